"""The compiled module of the CPU backend: found, checked, and asked about this machine."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .params import interface_mismatch

# what crosses to C++ besides params.py, in the order of the enums there
INPUT_KINDS = ("obs", "x", "xbar", "t", "s", "u")  # x: the (noisy) actions
DTYPES = ("float32", "float64", "bfloat16", "float16")
PHASES = ("pack", "prepare", "denoise", "gradient", "update")  # of `CpuBackend.sample_phases`
ISA_VARIABLE = "QPILOTS_CPU_ISA"
WATCH_VARIABLE = "QPILOTS_WRITE_WATCH"  # 0: live weights are read at every call, never watched for writes


@lru_cache(maxsize=1)
def load_module() -> ModuleType:
    """The compiled module. torch is imported first (see docs/how_it_works.md): its OpenMP then serves both.

    Raises:
        ImportError: where it is missing, or was compiled from other sources.
    """
    from .. import _C  # type: ignore[attr-defined]

    own = {"DType": DTYPES, "InputKind": INPUT_KINDS, "PhaseIndex": PHASES}
    mismatch = interface_mismatch(getattr(_C, "interface_text", str)(), own)
    if mismatch is not None:
        raise ImportError(f"{mismatch}; build it again, e.g. with `pip install -e .`")
    return _C


@lru_cache(maxsize=1)
def build_info() -> dict[str, Any]:
    """What the install recorded about the native build: native, reason, cuda."""
    path = Path(__file__).parent.parent / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def import_failure() -> str | None:
    try:
        load_module()
    except ImportError as error:
        recorded = build_info().get("reason")
        return f"the compiled module cannot be used ({recorded or error})"
    return None


def write_watch_refusal() -> str | None:
    """Why the kernel cannot watch live weights for writes here, so that every call reads them; None where it can."""
    if os.environ.get(WATCH_VARIABLE, "1") == "0":
        return f"{WATCH_VARIABLE}=0"
    return load_module().cpu_write_watch_unavailable() or None


class MachineLimits(NamedTuple):
    """Measured once a process, on as many threads as torch uses."""

    flops_float32: float  # per second, by the instructions that the products are made of
    flops_bfloat16: float
    cache_bytes: float  # per second, read from a buffer that fits the last-level cache
    memory_bytes: float
    fma_bfloat16: float  # flops per second of multiply-adds on vectors, where tile registers do the products


@lru_cache(maxsize=8)
def machine_limits(threads: int) -> MachineLimits:
    """Arithmetic peak and read bandwidth of this machine, by the backend's own instructions (about half a second)."""
    module = load_module()
    return MachineLimits(
        module.cpu_peak_flops("float32", threads, 0.1),
        module.cpu_peak_flops("bfloat16", threads, 0.1),
        module.cpu_read_bandwidth(12 << 20, threads, 0.1),
        module.cpu_read_bandwidth(256 << 20, threads, 0.2),
        module.cpu_peak_flops("bfloat16", threads, 0.1, vectors=True),
    )


@lru_cache(maxsize=64)
def read_weights_seconds(
    flow_bytes: int, twice: tuple[int, ...], steps: int, flow_visits: int, threads: int
) -> tuple[float, float]:
    """Best and median time of nothing but loads of a call's weights, in its order; measured once a process (0.15 s).

    Args:
        flow_bytes: read by all threads together, flow_visits times over the steps.
        twice: bytes of each network that a step reads forwards and then backwards.
    """
    return load_module().cpu_read_weights(flow_bytes, twice, steps, flow_visits, threads, 0.15)
