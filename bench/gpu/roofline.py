"""Data sheets of three GPUs, and what our counts come to on them: predictions, nothing here was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qpilots_fast.backends.cuda.counts import count_call_exchanges, phase_counts
from qpilots_fast.backends.cuda.plan import Program
from qpilots_fast.backends.triton.counts import KernelCounts, hbm_bytes, launch_counts, programs
from qpilots_fast.backends.triton.evaluation import Launch
from qpilots_fast.backends.triton.plan import SamplerPlan

_PER_CLOCK = 2  # instructions that a multiprocessor issues a clock, of at most 4: an assumption


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
    launch_s: float = 1.4e-6


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


def triton_seconds(
    plan: SamplerPlan, batch_size: int, device: Device, issued: Callable[[Launch], int] | None = None
) -> float:
    """The launches one after another, with the gap between two of them.

    A launch takes its programs in waves of one a multiprocessor, each wave the slowest of flops, L2 bytes and (issued:
    instructions of a warp) instructions at _PER_CLOCK; the last one, of fewer programs, gets their share of the flops
    and at most 64 bytes a clock from L2 for each. Weights that do not fit L2 cross HBM again at every step of the
    schedule. Latencies and imperfect overlap are left out: a lower bound.
    """
    weights = sum(n.num_weights for n in plan.packed_layouts)
    total = hbm_bytes(plan, batch_size) / device.hbm_bytes_per_s
    if weights * plan.operand.itemsize > device.l2_bytes:
        total *= plan.spec.num_steps
    for times, launches in programs(plan, batch_size):
        for launch in launches:
            counts = launch_counts(launch, plan.operand.itemsize)
            instructions = 0 if issued is None else counts.warps * issued(launch)
            total += times * (device.launch_s + _launch_seconds(counts, instructions, device, plan.spec.precision))
    return total


def _launch_seconds(counts: KernelCounts, instructions: int, device: Device, precision: str) -> float:
    """Of one launch, whose programs issue so many instructions each."""
    flops, moved = counts.flops / counts.programs, counts.l2_bytes / counts.programs
    alone = max(flops * device.multiprocessors / device.flops[precision], instructions / (_PER_CLOCK * device.clock_hz))

    def wave(number: int) -> float:
        rate = min(device.l2_bytes_per_s, 64 * device.clock_hz * number)
        return max(alone, number * moved / rate) if number else 0.0

    whole, rest = divmod(counts.programs, device.multiprocessors)
    return whole * wave(device.multiprocessors) + wave(rest)


def cuda_seconds(program: Program, device: Device, exchange_s: float, local_s: float) -> float:
    """Dependent exchanges one after another, with what blocks read and multiply between them.

    Weights travel while a block waits for the exchange before: only what takes longer than that counts. Weights that
    exceed L2 come from HBM instead. A call also starts once.

    Args:
        exchange_s: from a word's store to its arrival in another block. An assumption.
        local_s: of a block's own work between two exchanges, bytes and products apart. An assumption.
    """
    rate = device.hbm_bytes_per_s if program.weights_bytes > device.l2_bytes else device.l2_bytes_per_s
    total = device.launch_s + count_call_exchanges(program) * (exchange_s + local_s)
    for phase in phase_counts(program):
        words = 8 * phase.received_words / device.l2_bytes_per_s
        products = 2 * phase.macs / device.flops["float32" if program.weight_bytes == 4 else "bfloat16"]
        late = phase.weight_bytes / rate - exchange_s - local_s
        total += phase.visits * (words + products + max(0.0, late))
    return max(total, program.weights_bytes / device.hbm_bytes_per_s)
