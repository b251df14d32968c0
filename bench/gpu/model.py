"""Exact counts of a call on a GPU, ours and eager PyTorch's, and roofline predictions from them. Nothing is measured.

`python -m bench.gpu.model` prints the tables of docs/gpu.md and docs/gpu_cuda.md. Ours are counted from the launch plan
or program. The eager loop's are counted from its operations: it runs here, on the CPU, and every operation that makes
or fills a tensor would be one kernel (at least) on a GPU, reading its inputs and writing its outputs once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qpilots_fast.backends.cuda.counts import count_call_exchanges, counted_program, phase_counts
from qpilots_fast.backends.triton.counts import (
    call_counts,
    hbm_bytes,
    launch_counts,
    pack_launches,
    programs,
    workspace_bytes,
)
from qpilots_fast.backends.triton.evaluation import Launch
from qpilots_fast.backends.triton.launch_table import LaunchTable
from qpilots_fast.backends.triton.plan import SamplerPlan
from qpilots_fast.spec import SamplerSpec

from ..cases import CASES, Workload, make_workload
from ..peers import build_eager
from .roofline import DEVICES, Device, cuda_seconds, triton_seconds

# of an exchange, of a block's own work between two. Assumed: others measured 0.65 us for a counter's hop on an H100
# (revollllt/flash-vla), and a word needs no fence; the work is an estimate from instruction counts
_CUDA_LATENCIES = ((0.35e-6, 0.35e-6), (0.65e-6, 0.45e-6))
# of a call in bfloat16 on an H100, in milliseconds by batch size: what this model is to come to
_GOALS = {
    "U": {64: 0.7, 256: 0.9, 1024: 1.6, 4096: 4.5},
    "M": {64: 1.2, 256: 2.2, 1024: 5.0, 4096: 16.0},
}
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


@dataclass
class EagerCounts:
    """Of one call of the eager loop.

    Args:
        kernels: operations that are not views. products: those that are matrix products.
        nbytes: inputs read once and outputs written once by each kernel.
        flops: of the products.
    """

    kernels: int = 0
    products: int = 0
    nbytes: int = 0
    flops: int = 0

    def seconds(self, device: Device, precision: str) -> float:
        """Back to back in a CUDA graph: the slower of bytes and flops of the whole call, plus the launches."""
        fastest = max(self.nbytes / device.l2_bytes_per_s, self.flops / device.flops[precision])
        return self.kernels * device.launch_s + fastest

    def fused_seconds(self, device: Device, precision: str) -> float:
        """As if a compiler left one kernel beside every product, and products moved nothing: a bound from below."""
        return 2 * self.products * device.launch_s + self.flops / device.flops[precision]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = EagerCounts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or not isinstance(out, (Tensor, tuple, list)):
            return out
        name = func._schema.name.split("::")[1]
        if name.startswith(("empty", "detach", "_unsafe_view")):
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.counts.kernels += 1
        self.counts.nbytes += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        if name in _PRODUCTS:
            self.counts.products += 1
            first = inputs[-2]  # baddbmm and addmm put their bias first
            self.counts.flops += 2 * outputs[0].numel() * first.shape[-1]
        return out


def eager_counts(workload: Workload, precision: str) -> EagerCounts:
    """Runs one call of the eager peer and counts."""
    run = build_eager(workload, precision)
    with _Counter() as counter:
        run()
    return counter.counts


def sampler_spec(workload: Workload, precision: str) -> SamplerSpec:
    return replace(workload.sampler("auto", "float32")._run.spec, precision=precision)


def sampler_plan(workload: Workload, precision: str, device: Device) -> SamplerPlan:
    spec = sampler_spec(workload, precision)
    return SamplerPlan(spec, torch.device("cpu"), LaunchTable(), sm=max(80, device.sm))


def _table(header: str, rows: list[tuple[str, ...]]) -> str:
    columns = header.split("|")
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows))


def counts_table(names: tuple[str, ...], batches: tuple[int, ...], precision: str = "bfloat16") -> str:
    """Launches, flops and bytes of one call, ours (H100's grid) and eager."""
    rows = []
    for name in names:
        for batch in batches:
            workload = make_workload(CASES["paper"], name, batch)
            plan = sampler_plan(workload, precision, DEVICES[0])
            ours = call_counts(plan, batch)
            launches = sum(c.visits for c in ours) + pack_launches(plan).total()
            row = [name, str(batch), str(launches), f"{sum(c.visits * c.flops for c in ours) / 1e9:.0f}"]
            row += [f"{sum(c.visits * c.l2_bytes for c in ours) / 1e9:.2f}", f"{hbm_bytes(plan, batch) / 1e6:.0f}"]
            row += [f"{workspace_bytes(plan, batch) / 2**20:.0f}"]
            if batch <= 256:  # larger ones scale with the batch, and would take minutes here
                eager = eager_counts(workload, precision)
                row += [
                    str(eager.kernels),
                    str(eager.products),
                    f"{eager.flops / 1e9:.0f}",
                    f"{eager.nbytes / 1e9:.2f}",
                ]
            else:
                row += ["as above", "as above", "-", "-"]
            rows.append(tuple(row))
    ours_header = "method|B|launches|GFLOP|L2 GB|HBM MB|workspace MiB"
    return _table(f"{ours_header}|eager kernels|of them products|eager GFLOP|eager GB", rows)


def prediction_table(names: tuple[str, ...], batches: tuple[int, ...]) -> str:
    """Predicted, not measured: lower bounds in milliseconds."""
    rows = []
    for name in names:
        for batch in batches:
            workload = make_workload(CASES["paper"], name, batch)
            eager = eager_counts(workload, "bfloat16") if batch <= 256 else None
            for device in DEVICES:
                ours = [
                    triton_seconds(sampler_plan(workload, p, device), batch, device)
                    for p in ("bfloat16", "tf32", "float32")
                ]
                bounds = ("-", "-")
                if eager is not None:
                    seconds = (eager.seconds(device, "bfloat16"), eager.fused_seconds(device, "bfloat16"))
                    bounds = tuple(f"{1e3 * s:.2f}" for s in seconds)  # type: ignore[assignment]
                rows.append((name, str(batch), device.name, *(f"{1e3 * s:.2f}" for s in ours), *bounds))
    ours_header = "method|B|device|ours bf16|ours tf32|ours fp32"
    return _table(f"{ours_header}|eager bf16 in a graph|compiled bf16, bound", rows)


def issue_table(names: tuple[str, ...], batches: tuple[int, ...], device: Device = DEVICES[0]) -> str:
    """Predicted, not measured: what instructions add to the bounds; bfloat16. Compiles the kernels."""
    from .issue import warp_instructions

    def issued(launch: Launch) -> int:
        return warp_instructions(launch, device.sm)

    rows = []
    for name in names:
        plan = sampler_plan(make_workload(CASES["paper"], name, 1), "bfloat16", device)
        for batch in batches:
            total = 0
            for times, launches in programs(plan, batch):
                counts = [(launch_counts(launch, plan.operand.itemsize), issued(launch)) for launch in launches]
                total += times * sum(one.programs * one.warps * instructions for one, instructions in counts)
            bounds = [1e3 * triton_seconds(plan, batch, device, count) for count in (None, issued)]
            goal = _GOALS.get(name, {}).get(batch)
            reached = "-" if goal is None else f"{goal:.2f}{', missed' if bounds[-1] > goal else ''}"
            rows.append((name, str(batch), f"{total / 1e9:.2f}", *(f"{ms:.2f}" for ms in bounds), reached))
    return _table("method|B|warp instructions, G|flops and bytes, ms|and instructions, ms|goal, ms", rows)


def cuda_table(names: tuple[str, ...], batches: tuple[int, ...]) -> str:
    """The persistent CUDA kernel, predicted: microseconds with the lower and the higher assumed latencies."""
    rows = []
    for name in names:
        for precision in ("bfloat16", "float32"):
            for batch in batches:
                spec = sampler_spec(make_workload(CASES["paper"], name, batch), precision)
                programs = [counted_program(spec, batch, device.multiprocessors) for device in DEVICES]
                phases = list(phase_counts(programs[0]))
                counts = (
                    count_call_exchanges(programs[0]),
                    sum(phase.visits * phase.weight_bytes for phase in phases) / 1e6,
                    sum(phase.visits * 8 * phase.received_words for phase in phases) / 1e6,
                )
                spans = [
                    [1e6 * cuda_seconds(program, device, *latencies) for latencies in _CUDA_LATENCIES]
                    for program, device in zip(programs, DEVICES)
                ]
                row = (f"{name}, {precision}", str(batch), *(f"{count:.0f}" for count in counts))
                rows.append((*row, *(f"{low:.0f} to {high:.0f}" for low, high in spans)))
    words = f"words on {DEVICES[0].multiprocessors} SMs, MB"
    times = "|".join(f"{device.name}, us" for device in DEVICES)
    return _table(f"method, operands|B|exchanges|weights, MB|{words}|{times}", rows)


def main() -> None:
    names = ("U", "M")
    print(counts_table(names, (1, 16, 64, 256, 1024, 4096)))
    print()
    print(prediction_table(names, (16, 64, 256, 1024, 4096)))
    print()
    print(issue_table(names, (1, 16, 64, 256, 1024, 4096)))
    print()
    print(cuda_table(("U", "U-identity", "M"), (1, 16)))


if __name__ == "__main__":
    main()
