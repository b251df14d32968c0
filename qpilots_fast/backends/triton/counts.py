"""Exact counts of one call on a GPU, and a roofline prediction from them (a prediction: nothing here was measured)."""

from __future__ import annotations

from dataclasses import dataclass

from ..base import Footprint
from ..counts import count_flops, count_weights
from .packing import NetworkLayout
from .plan import SamplerPlan, scratch_sizes

_OPERAND_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Device:
    """Datasheet numbers, dense, without sparsity. flops by precision; bytes/s; seconds.

    Args:
        launch_s: from one kernel's end to the next one's start inside a CUDA graph; an assumption.
        l2_bytes_per_s: reads of all multiprocessors together; published microbenchmarks, not a datasheet number.
    """

    name: str
    sm: int
    multiprocessors: int
    clock_hz: float
    flops: dict[str, float]
    hbm_bytes_per_s: float
    l2_bytes_per_s: float
    l2_bytes: int
    launch_s: float = 1.5e-6


DEVICES = (
    Device(
        "H100 SXM", 90, 132, 1.755e9,
        {"bfloat16": 989e12, "float16": 989e12, "tf32": 495e12, "float32": 67e12}, 3.35e12, 5.5e12, 50 << 20,
    ),
    Device(
        "RTX 4090", 89, 128, 2.52e9,
        {"bfloat16": 165e12, "float16": 165e12, "tf32": 82.6e12, "float32": 82.6e12}, 1.008e12, 5.0e12, 72 << 20,
    ),
    Device(
        "Jetson AGX Orin 64GB", 87, 16, 1.3e9,
        {"bfloat16": 42.5e12, "float16": 42.5e12, "tf32": 21.2e12, "float32": 5.3e12}, 204.8e9, 0.6e12, 4 << 20, 3e-6,
    ),
)  # fmt: skip


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
    element = _OPERAND_BYTES[plan.spec.precision]
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
    element = _OPERAND_BYTES[plan.spec.precision]
    forward = _pass_counts(plan.flow_layout, element, False)
    backward = _pass_counts(plan.flow_layout, element, True)
    chunks = -(-grid.rows_per_tile * plan.num_draws // plan.step_tile.block_b)
    work: list[tuple[int, tuple[int, int]]] = [(flows, forward)]
    if steering.draws_posterior:
        inner = steering.glass_steps if steering.estimate == "glass" else 1
        network = plan.map_layout or plan.flow_layout
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
    steps, first = plan.spec.num_steps, plan.first_steered
    if first >= steps:
        return [step_counts(plan, batch_size, False, False, steps)]
    found = [step_counts(plan, batch_size, False, True, first + 1)]
    for k in range(first, steps):
        last = k == steps - 1
        found += [critic_counts(plan, batch_size), step_counts(plan, batch_size, True, not last, 0 if last else 1)]
    return found


def workspace_bytes(plan: SamplerPlan, batch_size: int) -> int:
    """Of SamplerPlan.workspace, without allocating it."""
    steering, a, grid = plan.spec.steering, plan.spec.flow.action_dim, plan.grid(batch_size)
    element = _OPERAND_BYTES[plan.spec.precision]
    draws = batch_size * plan.num_draws
    floats, total = 2 * batch_size * a, plan.spec.num_steps * batch_size * 5
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
    weights = sum(n.num_weights for n in plan.layouts) * _OPERAND_BYTES[spec.precision]
    eps = spec.num_steps * batch_size * plan.num_draws * spec.flow.action_dim if spec.steering.uses_posterior else 0
    return weights + 4 * (batch_size * (spec.flow.obs_dim + 2 * spec.flow.action_dim) + eps)


def predicted_seconds(plan: SamplerPlan, batch_size: int, device: Device) -> float:
    """Roofline of the launches one after another: the slowest of flops, L2 and HBM, plus launch gaps.

    A launch with fewer tiles than multiprocessors gets its share of the flops, and at most 64 bytes a clock from L2
    for each of its programs. Weights that do not fit L2 cross HBM again at every launch. Latencies and imperfect
    overlap are left out: a lower bound.
    """
    precision = plan.spec.precision
    weights = {
        "critic": plan.critic_layout.num_weights if plan.critic_layout else 0,
        "step": sum(n.num_weights for n in plan.step_layouts()),
    }
    packed = sum(weights.values()) * _OPERAND_BYTES[precision]
    total = 0.0
    for launch in call_counts(plan, batch_size):
        share = min(launch.tiles / launch.waves, device.multiprocessors) / device.multiprocessors
        l2 = min(device.l2_bytes_per_s, 64 * device.clock_hz * min(launch.programs, device.multiprocessors))
        hbm = weights[launch.name] * _OPERAND_BYTES[precision] if packed > device.l2_bytes else 0
        total += device.launch_s + max(
            launch.flops / (device.flops[precision] * share), launch.l2_bytes / l2, hbm / device.hbm_bytes_per_s
        )
    return max(total, hbm_bytes(plan, batch_size) / device.hbm_bytes_per_s)


def footprint(plan: SamplerPlan, batch_size: int) -> Footprint:
    """Counts of a call with live weights (one launch packs them)."""
    spec = plan.spec
    calls = call_counts(plan, batch_size)
    known = next((d for d in DEVICES if plan.capability == d.sm and plan.sms == d.multiprocessors), None)
    notes = ["one launch packs live weights; a frozen sampler saves it"]
    if known is not None:
        notes.append(f"the floor is a roofline of {known.name}: predicted, not measured")
    return Footprint(
        launches=len(calls) + 1,
        flops=count_flops(spec, batch_size),
        weight_bytes=count_weights(spec) * _OPERAND_BYTES[spec.precision],
        traffic_bytes=sum(c.l2_bytes for c in calls),
        workspace_bytes=workspace_bytes(plan, batch_size),
        floor_s=None if known is None else predicted_seconds(plan, batch_size, known),
        notes=tuple(notes),
    )
