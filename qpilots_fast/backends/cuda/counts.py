"""Exact counts of one call of the persistent CUDA kernel, from its program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ...spec import SamplerSpec
from ..params import NORM_PLACEMENTS
from .layout import WEIGHT_BYTES, full_presence, round_up
from .plan import Program, plan_sample
from .structs import OPERANDS, PHASE_KINDS, RESULTS, TILE, TILE_SUMS, Phase


@dataclass(frozen=True)
class PhaseCounts:
    """One phase, over all blocks.

    Args:
        visits: how often a call runs it.
        weight_bytes: of weights, once for all rows.
        received_words: 8-byte words that blocks await, each for itself.
        macs: multiply-accumulates, neurons and columns padded to 16, rows to 8.
    """

    visits: int
    weight_bytes: int
    received_words: int
    macs: int


def counted_program(spec: SamplerSpec, batch_size: int, blocks: int = 132) -> Program:
    """The program of a call on so many multiprocessors, as if no optional parameter were missing."""
    present = tuple(full_presence(network) for network in spec.networks.values())
    return plan_sample(spec, present, batch_size, WEIGHT_BYTES.get(spec.precision, 4), blocks)


def phase_counts(program: Program) -> Iterator[PhaseCounts]:
    args = program.args
    for index, phase in enumerate(program.phases):
        step_index = index - args.num_once
        every_step = 0 <= step_index < args.num_flow_phases and not phase.steered_only
        visits = 1 if step_index < 0 else args.num_steps if every_step else program.num_steered
        takers = args.num_flow_blocks if every_step and not program.num_steered else args.num_blocks
        weights, macs = 0, 0
        if PHASE_KINDS[phase.kind] == "product":
            cells = phase.members * phase.tiles * TILE * phase.in_stride
            weights, macs = cells * program.weight_bytes, cells * round_up(phase.rows, 8)
        yield PhaseCounts(visits, weights, _received_words(program, phase, takers), macs)


def _received_words(program: Program, phase: Phase, takers: int) -> int:
    kind, args = PHASE_KINDS[phase.kind], program.args
    working = phase.members * min(phase.team_blocks, phase.tiles)  # blocks at a member, over the members
    if kind == "product":
        received = OPERANDS[phase.operand] == "received"
        words = phase.in_stride * program.weight_bytes // 4 + (phase.source_sums >= 0) * phase.in_stride // TILE * 2
        own = RESULTS[phase.result] == "own"
        return (takers if own else working) * phase.rows * words if received else 0
    if kind in ("norm", "norm_vjp"):
        whole = phase.at_top and NORM_PLACEMENTS[phase.norm] == "post"
        return working * phase.rows * phase.tiles * (TILE_SUMS if whole else 2 + phase.at_top)
    if kind == "collect":
        return takers * phase.rows * phase.out_dim
    rows = args.batch * args.steering.num_samples
    for_gradient = takers if RESULTS[phase.result] == "own" else min(phase.team_blocks, phase.tiles)
    return args.num_members * rows * (takers + for_gradient * args.action_dim)


def count_exchanges(program: Program, *, steered: bool) -> int:
    """Exchanges of one step that wait for each other, x to x: the longest chain of words that need each other."""
    sent: dict[int, int] = {-1: 0}  # plane -> the exchanges it takes to have it
    held = dict.fromkeys(OPERANDS, 0)  # what blocks make for themselves, by the operand that it becomes
    args, last = program.args, 0
    phases = program.phases[args.num_once :]
    for index, phase in enumerate(phases):
        if not steered and (index >= args.num_flow_phases or phase.steered_only):
            continue
        kind = PHASE_KINDS[phase.kind]
        if kind == "product":
            operand = OPERANDS[phase.operand]
            depth = sent[phase.source] if operand == "received" else held[operand]
            result, norm = RESULTS[phase.result], NORM_PLACEMENTS[phase.norm]
            if result == "own":
                last, planes = max(last, depth), []
                held["estimate"] = max(held["estimate"], depth)
            elif result not in ("hidden", "critic_top", "delta") or norm is None or phase.folded:
                planes = [phase.target, phase.vjp_sums]
            else:
                with_vjp = result == "delta" or (result == "critic_top" and norm == "post")
                planes = [phase.vjp_sums if with_vjp else phase.sums]
        elif kind == "norm":
            depth, planes = sent[phase.sums], [phase.vjp_sums if phase.at_top else phase.target]
        elif kind == "norm_vjp":
            depth, planes = sent[phase.vjp_sums], [phase.target] if phase.norm else []
            if phase.at_top:
                planes.append(args.q_values)
        else:
            needed = [phase.source] if kind == "collect" else [args.q_values, args.critic_vjp]
            depth = max(sent[plane] for plane in needed)
            last = max(last, depth)
            held["cotangent"] = held["estimate"] = max(held["estimate"], depth)
            planes = []
        for plane in planes:
            if plane >= 0:
                sent[plane] = depth + 1
    return last


def count_call_exchanges(program: Program) -> int:
    """Of a whole call: those of every step, and x once more for the blocks that sat steps out."""
    args, schedule = program.args, program.schedule
    assert schedule is not None
    steered = [bool(weight > 0) for weight in schedule[:, 2]]
    handed_on = sum(now and not before for before, now in pairwise(steered))
    handed_on *= args.num_blocks > args.num_flow_blocks
    return handed_on + sum(count_exchanges(program, steered=now) for now in steered)


def count_traffic(program: Program) -> int:
    """Bytes of weights and words that one call reads."""
    return sum(p.visits * (p.weight_bytes + 8 * p.received_words) for p in phase_counts(program))
