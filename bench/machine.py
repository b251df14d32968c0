"""What the numbers were measured on: machine, versions, commit, and the peaks reached in the same run."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
_ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "neon", "asimd", "sve", "bf16")
_PEAK_REPEATS = 6


@dataclass(frozen=True)
class Peaks:
    """What this machine reached in this run; None where it was not measured.

    Args:
        flops: per second, by precision. dram, cache: bytes read per second from memory, and from the largest cache.
        source: what measured them.
        fma_flops: per second of multiply-adds on vectors, where something faster than those reaches `flops`.
    """

    flops: dict[str, float]
    dram_bytes: float | None
    cache_bytes: float | None
    source: str
    fma_flops: dict[str, float] = field(default_factory=dict)

    def best_of(self, other: Peaks) -> Peaks:
        """The higher of two measurements, value by value: a disturbed one is too low."""
        flops, fma_flops = (
            {name: max(value, theirs.get(name, 0.0)) for name, value in ours.items()}
            for ours, theirs in ((self.flops, other.flops), (self.fma_flops, other.fma_flops))
        )
        pairs = ((self.dram_bytes, other.dram_bytes), (self.cache_bytes, other.cache_bytes))
        dram, cache = (max((value for value in pair if value), default=None) for pair in pairs)
        return Peaks(flops, dram, cache, self.source, fma_flops)

    def percent_of_flops(self, flops: float, seconds: float, precision: str) -> float | None:
        peak = self.flops.get(precision)
        return None if not peak else 100 * flops / seconds / peak

    def percent_of_fma(self, flops: float, seconds: float, precision: str) -> float | None:
        """Of vector multiply-adds' peak: above 100 where tile registers do the products."""
        peak = self.fma_flops.get(precision, self.flops.get(precision))
        return None if not peak else 100 * flops / seconds / peak

    def percent_of_bytes(self, num_bytes: float, seconds: float) -> float | None:
        return None if not self.cache_bytes else 100 * num_bytes / seconds / self.cache_bytes

    def floor_s(self, flops: float, traffic_bytes: float, weight_bytes: float, precision: str) -> float | None:
        """The longer of all flops at the peak, and the weights' visits at the bandwidth of where they fit."""
        peak = self.flops.get(precision)
        fits = weight_bytes <= 0.9 * (largest_cache_bytes() or 0)
        bandwidth = self.cache_bytes if fits else self.dram_bytes
        if not peak or not bandwidth:
            return None
        return max(flops / peak, traffic_bytes / bandwidth)


def _best_rate(work: Callable[[], object], amount: float, seconds: float = 0.5) -> float:
    """amount / the fastest call of work, over a while."""
    device_sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    work()
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        work()
        device_sync()
        best = min(best, time.perf_counter() - start)
    return amount / best


def _torch_peaks(device: str) -> Peaks:
    """torch's own matmul and sum: below the hardware's peak, so percentages come out too high."""
    size = 8192 if device == "cuda" else 1536
    flops = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        flops[name] = _best_rate(lambda a=a, b=b: a @ b, 2 * size**3)  # type: ignore[misc]
    large = torch.zeros(64 * 2**20, device=device)  # 256 MiB
    small = torch.zeros(2**20, device=device)  # 4 MiB: beyond two cores' L2, within most L3
    return Peaks(
        flops,
        _best_rate(large.sum, large.numel() * 4),
        _best_rate(small.sum, small.numel() * 4),
        "torch matmul and sum (no native micro-benchmark here): the hardware's peaks are higher",
    )


def _native_peaks() -> Peaks | None:
    """The native module's micro-benchmarks, the best of several; None where it was not built."""
    from qpilots_fast import backends
    from qpilots_fast.backends import native

    if backends.unavailable_reason("cpu") is not None:
        return None
    threads = torch.get_num_threads()
    # a disturbed measurement is too low, and would make every percentage too high
    limits = [native.machine_limits.__wrapped__(threads) for _ in range(_PEAK_REPEATS)]
    best = native.MachineLimits(*(max(values) for values in zip(*limits)))
    return Peaks(
        {"float32": best.flops_float32, "bfloat16": best.flops_bfloat16},
        best.memory_bytes,
        best.cache_bytes,
        f"native micro-benchmarks on {threads} threads",
        # without tile registers it is the same loop once more
        {"bfloat16": best.fma_bfloat16} if best.flops_bfloat16 > 2 * best.fma_bfloat16 else {},
    )


def measure_peaks(device: str = "cpu") -> Peaks:
    """Multiply-add and bandwidth peaks with the threads that torch uses now; a few seconds."""
    native = _native_peaks() if device == "cpu" else None
    return native or _torch_peaks(device)


def multiply_add_rates(precisions: Sequence[str], seconds: float = 0.01) -> dict[str, float]:
    """Flops per second that multiply-adds on vectors reach at this moment; empty where there is no native module.

    A processor's clock moves with what it and its neighbours do: a share of the peak is one of the clock of that time.
    """
    from qpilots_fast import backends
    from qpilots_fast.backends import native

    if backends.unavailable_reason("cpu") is not None:
        return {}
    peak = native.load_module().cpu_peak_flops
    return {precision: peak(precision, torch.get_num_threads(), seconds, vectors=True) for precision in precisions}


# ---------------------------------------------------------------- description


def _cpuinfo() -> dict[str, str]:
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            if kind != "Instruction":
                found[f"L{(index / 'level').read_text().strip()}"] = (index / "size").read_text().strip()
        except OSError:
            continue
    return found


def largest_cache_bytes() -> int | None:
    """Size of CPU 0's last-level cache, as the kernel reports it."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [int(text[:-1]) * units[text[-1]] for text in _caches().values() if text[-1:] in units]
    return max(sizes, default=None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write_watch() -> str | None:
    """How unchanged live weights are recognised."""
    from qpilots_fast import backends
    from qpilots_fast.backends import native

    if backends.unavailable_reason("cpu") is not None:
        return None
    return native.write_watch_refusal() or "available"


def describe() -> dict[str, Any]:
    """CPU, caches, GPU, threads and versions; nothing that names the machine or its user."""
    cpu = _cpuinfo()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return {
        "cpu": cpu.get("model name") or platform.processor(),
        "cpu_features": [flag for flag in _ISA_FLAGS if flag in flags],
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "torch_threads": torch.get_num_threads(),
        "write_watch": _write_watch(),
        "omp_environment": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))},
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("qpilots-fast", "torch", "triton", "jax", "jaxlib", "numpy")},
    }


def commit() -> dict[str, Any]:
    """The commit of this clone, and whether tracked files differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def header(kind: str, argv: list[str], peaks: Peaks | None) -> dict[str, Any]:
    """The part of every result file that says when, where and with what it was measured."""
    return {
        "schema": 2,
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["qpilots-fast", "bench", *argv]),
        "git": commit(),
        "machine": describe(),
        "peaks": None if peaks is None else asdict(peaks),
    }
