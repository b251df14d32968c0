"""Exact counts of one call of the persistent CUDA kernel, from its program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...spec import SamplerSpec
from .layout import WEIGHT_BYTES, full_presence
from .plan import Program, plan_sample
from .structs import STAGES, Phase


@dataclass(frozen=True)
class PhaseCounts:
    """One phase on a grid of `blocks`.

    Args:
        visits: how often a call runs it.
        weight_bytes: read by the warps, once for every tile of rows.
        staged_bytes: of planes read by all blocks for themselves; each block that works stages every row.
        macs: multiply-accumulates, rows padded to the tile.
    """

    visits: int
    weight_bytes: int
    staged_bytes: int
    macs: int
    barrier: bool


def counted_program(spec: SamplerSpec, batch_size: int) -> Program:
    """The program of a call, as if no optional parameter were missing."""
    present = tuple(full_presence(network) for network in spec.networks.values())
    return plan_sample(spec, present, batch_size, WEIGHT_BYTES.get(spec.precision, 4))


def tile_rows(max_rows: int) -> int:
    """Rows that a product takes at once, where shared memory allows; as `launch_sample` chooses."""
    return 16 if max_rows > 4 else 4 if max_rows > 1 else 1


def phase_counts(program: Program, blocks: int) -> Iterator[PhaseCounts]:
    args, rows = program.args, tile_rows(program.max_rows)
    for index, phase in enumerate(program.phases):
        if index < args.num_once:
            visits = 1
        else:
            visits = args.num_steps if index - args.num_once < args.num_flow_phases else program.num_steered
        neurons = phase.members * phase.out_dim
        tiles = -(-phase.rows // rows)
        segments = min(neurons, blocks) + phase.members - 1  # a block that spans two members stages both
        yield PhaseCounts(
            visits,
            neurons * phase.in_stride * program.weight_bytes * tiles,
            segments * phase.rows * phase.in_dim * 4 * _planes_read(phase),
            neurons * phase.in_stride * tiles * rows,
            bool(phase.ends_with_barrier),
        )


def _planes_read(phase: Phase) -> int:
    """Planes that staging reads: the value; backward also the slope and the delta."""
    stage = STAGES[phase.stage]
    if stage == "critic_top":
        return 1 + (phase.source_slope >= 0)
    return 2 + (phase.source_slope >= 0) if stage == "delta" else 1


def count_barriers(program: Program) -> int:
    """Grid barriers of one call."""
    return sum(phase.visits for phase in phase_counts(program, 1) if phase.barrier)


def count_traffic(program: Program, blocks: int = 1) -> int:
    """Bytes of weights and staged planes that one call reads."""
    return sum(p.visits * (p.weight_bytes + p.staged_bytes) for p in phase_counts(program, blocks))
