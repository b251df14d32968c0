"""Exact counts of one call on a GPU, from the launch plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..base import Footprint
from ..counts import count_flops, count_weights
from .packing import OPERAND_DTYPES, NetworkLayout
from .plan import SamplerPlan, scratch_sizes


@dataclass(frozen=True)
class KernelCounts:
    """Of one launch, padding included.

    Args:
        programs: that run side by side. tiles: work items. waves: tiles the busiest program takes.
    """

    name: str
    flops: int
    l2_bytes: int
    tiles: int
    programs: int

    @property
    def waves(self) -> int:
        return -(-self.tiles // max(self.programs, 1))


def _pass_counts(layout: NetworkLayout, element: int, backward: bool) -> tuple[int, int]:
    """(flops, bytes through L2) of a forward or a backward of one tile, padding included."""
    tile, hidden, depth = layout.tile, layout.hidden_pad, layout.depth
    rows = tile.block_b
    widths = [hidden] * depth
    ins = [layout.input_pad, *widths[:-1]]
    if backward:
        # (depth, columns) of each product: cotangent, hidden layers downwards, action columns
        last = 0 if layout.folded and layout.spec.kind == "critic" else layout.out_rows
        products = [(last, hidden), *[(hidden, hidden)] * (depth - 1), (hidden, layout.action_pad)]
    else:
        products = [*zip(ins, widths), (hidden, layout.out_pad)]
    flops = sum(2 * rows * k * n for k, n in products)
    # weights once a tile; the rows' operands once per column tile
    moved = sum(element * (k * n + rows * k * -(-n // tile.block_n)) for k, n in products)
    # per layer and element, in operands: forward z out, in (twice through a LayerNorm), h out;
    # backward d_hidden out, d_hidden and z in (twice through a LayerNorm), delta out
    norms = sum(placement is not None for placement in layout.spec.layer_norm)
    passes = (4 * depth + 2 * norms) if backward else (3 * depth + norms)
    return flops, moved + element * rows * hidden * passes


def critic_counts(plan: SamplerPlan, batch_size: int) -> KernelCounts:
    """One critic launch: forward and input gradient of every member at every estimate."""
    layout, grid = plan.critic_layout, plan.grid(batch_size)
    assert layout is not None
    element = OPERAND_DTYPES[plan.spec.precision].itemsize
    parts = [_pass_counts(layout, element, backward) for backward in (False, True)]
    flops, moved = (sum(part[i] for part in parts) for i in (0, 1))
    outputs = 4 * batch_size * plan.num_draws * (plan.spec.flow.action_dim + 1) * layout.spec.num_members
    return KernelCounts(
        "critic",
        flops * grid.critic_tiles,
        moved * grid.critic_tiles + outputs,
        grid.critic_tiles,
        grid.critic_programs,
    )


def step_counts(plan: SamplerPlan, batch_size: int, steer: bool, propose: bool, flows: int) -> KernelCounts:
    """One step launch."""
    steering, grid = plan.spec.steering, plan.grid(batch_size)
    element = OPERAND_DTYPES[plan.spec.precision].itemsize
    forward = _pass_counts(plan.flow_layout, element, False)
    backward = _pass_counts(plan.flow_layout, element, True)
    chunks = -(-grid.rows_per_tile * plan.num_draws // plan.step_tile.block_b)
    work: list[tuple[int, tuple[int, int]]] = [(flows, forward)]
    if steering.draws_posterior:
        inner = steering.glass_steps if steering.estimate == "glass" else 1
        network = plan.posterior_layout or plan.flow_layout
        ahead, back = (_pass_counts(network, element, direction) for direction in (False, True))
        again = steering.estimate == "glass" or grid.recompute
        work += [(chunks * inner * (propose + (steer and again)), ahead), (chunks * inner * steer, back)]
    elif steer and steering.pulls_flow:
        work += [(int(grid.recompute), forward), (1, backward)]
    flops, moved = (sum(times * part[i] for times, part in work) for i in (0, 1))
    draws = batch_size * plan.num_draws
    members = 0 if plan.critic_layout is None else plan.critic_layout.spec.num_members
    combined = 4 * draws * members * (plan.spec.flow.action_dim + 4) if steer else 0
    state = 4 * batch_size * plan.spec.flow.action_dim * 6
    return KernelCounts(
        "step", flops * grid.step_tiles, moved * grid.step_tiles + combined + state, grid.step_tiles, grid.step_programs
    )


def call_counts(plan: SamplerPlan, batch_size: int) -> list[KernelCounts]:
    """Every launch of one call with packed weights, in order."""
    found = []
    for step in plan.step_launches():
        found += [critic_counts(plan, batch_size)] if step.steer else []
        found.append(step_counts(plan, batch_size, step.steer, step.propose, step.num_flows))
    return found


def workspace_bytes(plan: SamplerPlan, batch_size: int) -> int:
    """Of SamplerPlan.workspace, without allocating it."""
    steering, a, grid = plan.spec.steering, plan.spec.flow.action_dim, plan.grid(batch_size)
    element = OPERAND_DTYPES[plan.spec.precision].itemsize
    draws = batch_size * plan.num_draws
    floats, total = 2 * batch_size * a, batch_size * (4 + 10 * plan.spec.num_steps)
    parts = [(plan.step_layouts(), plan.step_tile, grid.step_programs)]
    if plan.critic_layout is not None:
        members = plan.critic_layout.spec.num_members
        floats += draws * a + members * draws * (a + 1)
        if steering.uses_posterior:
            inner = steering.glass_steps if steering.estimate == "glass" else 0
            floats += draws * (2 + a + inner * a)
        parts.append(([plan.critic_layout], plan.critic_tile, grid.critic_programs))
    for layouts, tile, programs in parts:
        h, z, stat = scratch_sizes(layouts, tile)
        total += programs * ((h + z) * element + 4 * stat)
    return total + 4 * floats


def hbm_bytes(plan: SamplerPlan, batch_size: int) -> int:
    """Bytes that cross HBM at least once a call: packed weights, inputs, result; noises of every draw."""
    spec = plan.spec
    weights = sum(n.num_weights for n in plan.layouts) * OPERAND_DTYPES[spec.precision].itemsize
    eps = spec.num_steps * batch_size * plan.num_draws * spec.flow.action_dim if spec.steering.uses_posterior else 0
    return weights + 4 * (batch_size * (spec.flow.obs_dim + 2 * spec.flow.action_dim) + eps)


def footprint(plan: SamplerPlan, batch_size: int) -> Footprint:
    """Counts of a call with live weights (one launch packs them)."""
    spec = plan.spec
    calls = call_counts(plan, batch_size)
    return Footprint(
        launches=len(calls) + 1,
        flops=count_flops(spec, batch_size),
        weight_bytes=count_weights(spec) * OPERAND_DTYPES[spec.precision].itemsize,
        traffic_bytes=sum(c.l2_bytes for c in calls),
        workspace_bytes=workspace_bytes(plan, batch_size),
        floor_s=None,
        notes=("one launch packs live weights; a frozen sampler saves it",),
    )
