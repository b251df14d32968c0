"""Exact counts of one call on a GPU, from the launches themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..base import Footprint
from ..counts import count_flops, count_weights
from .chain_ops import MAX_OPS, UNSAVED
from .evaluation import Launch
from .layouts import round_up
from .packing import OPERAND_DTYPES, PackedBuffers
from .plan import SamplerPlan

_META = torch.device("meta")


@dataclass(frozen=True)
class KernelCounts:
    """Of one launch, padding included.

    Args:
        visits: equal launches a call. flops: of the products. l2_bytes: that programs load and store, in and out of L2.
        programs, warps: of each program. steps: of a product's loop over depth, BLOCK_K each.
    """

    name: str
    visits: int
    flops: int
    l2_bytes: int
    programs: int
    warps: int
    steps: int


def launch_counts(launch: Launch, element: int, visits: int = 1) -> KernelCounts:
    """Of one launch whose operands have so many bytes an element."""
    arguments, programs = {**launch.arguments, **launch.given}, 1
    for axis in launch.grid:
        programs *= axis
    flops, moved, steps = _COUNTS.get(launch.name, _rowwise)(arguments, element)
    return KernelCounts(
        launch.name, visits, programs * flops, programs * moved, programs, arguments["num_warps"], steps
    )


def _product(args: dict[str, Any], element: int, depth: int) -> tuple[int, int, int]:
    """(flops, bytes of both operands, steps) of a program."""
    rows, columns = args["BLOCK_B"], args["BLOCK_N"]
    return 2 * rows * columns * depth, element * depth * (rows + columns), -(-depth // args["BLOCK_K"])


def _tables(args: dict[str, Any], width: int, times: int) -> int:
    """Bytes of reading tables of column tiles for a program's rows."""
    return 8 * args["BLOCK_B"] * -(-width // args["STAT_N"]) * times


def _layer(args: dict[str, Any], element: int) -> tuple[int, int, int]:
    rows, columns, depth = args["BLOCK_B"], args["BLOCK_N"], args["depth"]
    if args["FIRST"]:
        depth = round_up(args["OBS_DIM"], args["BLOCK_K"]) + args["BLOCKS"] * args["A_PAD"]
    flops, moved, steps = _product(args, element, depth)
    if args["FIRST"]:
        moved += rows * (4 * (args["OBS_DIM"] + args["BLOCKS"] * args["ACTION_DIM"]) - element * depth)
    moved += rows * columns * {"pre": element, "chain": 4}.get(args["NORM"], 2 * element)  # z, y
    moved += 8 * rows * (args["NORM"] not in ("none", "chain")) + _tables(
        args, args["BELOW_WIDTH"], args["BELOW_NORM"] != "none"
    )
    return flops, moved, steps


def _output(args: dict[str, Any], element: int) -> tuple[int, int, int]:
    flops, moved, steps = _product(args, element, args["depth"])
    moved += 4 * args["BLOCK_B"] * args["OUT_DIM"] * (3 if args["ADD"] else 1)
    return flops, moved + _tables(args, args["WIDTH"], args["BELOW_NORM"] != "none"), steps


def _delta(args: dict[str, Any], element: int) -> tuple[int, int, int]:
    rows, columns, top, norm = (args[name] for name in ("BLOCK_B", "BLOCK_N", "TOP", "NORM"))
    depth = {"none": args["depth"], "rows": args["OUT_PAD"], "ones": 0}[top]
    flops, moved, steps = _product(args, element, depth)
    known = norm in ("post", "fold")
    if top == "rows":
        moved += rows * (4 * args["OUT_DIM"] * (2 + known) - element * depth)
    above = top == "none" and args["ABOVE_NORM"] == "pre"
    moved += rows * columns * (4 if norm == "chain" else 2 * element)  # z in, d out
    moved += element * rows * depth * above  # z of the layer above
    sums = norm == "pre" or args["BELOW_NORM"] in ("post", "fold")
    moved += 8 * rows * sums + _tables(args, args["WIDTH"], norm not in ("none", "chain"))
    return flops, moved + _tables(args, args["ABOVE_WIDTH"], 2 * above + (top == "none" and known and not above)), steps


def _input_gradient(args: dict[str, Any], element: int) -> tuple[int, int, int]:
    rows, columns, pre = args["BLOCK_B"], args["BLOCK_N"], args["NORM"] == "pre"
    flops, moved, steps = _product(args, element, args["depth"])
    moved += 4 * rows * (min(columns, args["COLUMNS"]) + args["OUT_DIM"] * args["RESCALE"])
    return flops, moved + pre * element * rows * args["depth"] + _tables(args, args["WIDTH"], 2 * pre), steps


def _rowwise(args: dict[str, Any], element: int) -> tuple[int, int, int]:
    """Rows of actions in float32: every tensor of rows once."""
    rows = args["BLOCK_B"]
    wide = sum(name in args for name in ("x_ptr", "v_ptr", "out_ptr", "from_ptr", "to_ptr", "star_ptr", "d_x_ptr"))
    wide += args.get("num_draws", 1) * args.get("STEER", False) + args.get("E", 0) + 1
    return 0, 4 * rows * (wide * args["ACTION_DIM"] + 3 * args.get("E", 0)), 0


def _chain(args: dict[str, Any], element: int) -> tuple[int, int, int]:
    """Rows in float32 and in the operands' format, kept ones, saves, and the vectors of norms."""
    names = [args[f"OP{i}"] for i in range(MAX_OPS)]
    norms = sum(name.endswith("_norm") for name in names)
    planes = 1 + args["LOADS"] + args["STORES"] + sum(name not in (*UNSAVED, "none") for name in names)
    moved = args["BLOCK_B"] * (4 * planes * args["WIDTH"] + element * args["COLUMNS"] + 4 * norms)
    vectors = norms * (1 if args["PULL"] else 2) + 2 * ("film" in names) * (not args["PULL"])
    return 0, moved + 4 * vectors * args["WIDTH"], 0


_COUNTS = {"layer": _layer, "output": _output, "delta": _delta, "input_gradient": _input_gradient, "chain": _chain}


def programs(plan: SamplerPlan, batch_size: int) -> Iterator[tuple[int, list[Launch]]]:
    """(times, launches) of each size of chunk of a call with packed weights; nothing is allocated."""
    space = plan.workspace(batch_size, device=_META)
    packed = PackedBuffers(plan.packed_layouts, plan.spec.precision, _META)
    whole, rest = divmod(batch_size, plan.chunk)
    for times, rows in ((whole, plan.chunk), (int(rest > 0), rest)):
        if times:
            yield times, list(plan.program(space, packed, rows))


def call_counts(plan: SamplerPlan, batch_size: int) -> list[KernelCounts]:
    """Every launch of one call with packed weights, equal ones together."""
    element = plan.operand.itemsize
    found: Counter[KernelCounts] = Counter()
    for times, launches in programs(plan, batch_size):
        for launch in launches:
            found[launch_counts(launch, element)] += times
    return [KernelCounts(**{**vars(counts), "visits": visits}) for counts, visits in found.items()]


def num_launches(plan: SamplerPlan, batch_size: int) -> Counter[str]:
    """Launches of a call with packed weights, by kernel."""
    names: Counter[str] = Counter()
    for times, launches in programs(plan, batch_size):
        for launch in launches:
            names[launch.name] += times
    return names


def pack_launches(plan: SamplerPlan) -> Counter[str]:
    """Launches that pack live weights of one dtype; "fold" apart for weights that take a gain and those that do not."""
    norms = {layout.norm(layer) for layout in plan.packed_layouts for layer in range(layout.depth)}
    folding = len({"post", "fold"} & norms)
    return Counter({"pack": 1, **({"fold": folding} if folding else {})})


def workspace_bytes(plan: SamplerPlan, batch_size: int) -> int:
    """Of SamplerPlan.workspace, without allocating it."""
    return plan.workspace(batch_size, device=_META).nbytes


def hbm_bytes(plan: SamplerPlan, batch_size: int) -> int:
    """Bytes that cross HBM at least once a call: packed weights, inputs, result; noises of every draw."""
    spec = plan.spec
    weights = sum(n.num_weights for n in plan.packed_layouts) * OPERAND_DTYPES[spec.precision].itemsize
    eps = spec.num_steps * batch_size * plan.num_draws * spec.flow.action_dim if spec.steering.draws_posterior else 0
    return weights + 4 * (batch_size * (spec.flow.obs_dim + 2 * spec.flow.action_dim) + eps)


def footprint(plan: SamplerPlan, batch_size: int) -> Footprint:
    """Counts of a call with live weights, all of one dtype."""
    spec, packing = plan.spec, pack_launches(plan)
    calls = call_counts(plan, batch_size)
    return Footprint(
        launches=sum(c.visits for c in calls) + packing.total(),
        flops=count_flops(spec, batch_size),
        weight_bytes=count_weights(spec) * OPERAND_DTYPES[spec.precision].itemsize,
        traffic_bytes=sum(c.visits * c.l2_bytes for c in calls),
        workspace_bytes=workspace_bytes(plan, batch_size),
        floor_s=None,
        notes=(f"{packing.total()} launches pack live weights; a frozen sampler saves them",),
    )
