"""The table of backends: what there is, what can run here, and which one "auto" takes."""

from __future__ import annotations

import importlib
from functools import cache

import torch

from ..errors import BackendUnavailable
from ..spec import SamplerSpec
from .base import Backend, BoundNetwork, BoundNetworks, Footprint, QuickCall, RawSample, Slots

__all__ = [
    "BACKENDS",
    "Backend",
    "BoundNetwork",
    "BoundNetworks",
    "Footprint",
    "QuickCall",
    "RawSample",
    "Slots",
    "choose",
    "for_networks",
    "get",
    "unavailable_reason",
]

# name -> (module, class), in the order that "auto" prefers on their own device
_TABLE = {
    "cuda": ("cuda", "CudaBackend"),
    "triton": ("triton", "TritonBackend"),
    "cpu": ("cpu", "CpuBackend"),
    "reference": ("reference", "ReferenceBackend"),
}
BACKENDS: tuple[str, ...] = tuple(_TABLE)


@cache
def _load(name: str) -> Backend | str:
    """The backend, or why it cannot be imported."""
    module, cls = _TABLE[name]
    try:
        return getattr(importlib.import_module(f".{module}", __package__), cls)()
    except ImportError as error:
        return f"its module does not import: {error}"


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None where it can.

    Raises:
        ValueError: for a name that is not in BACKENDS.
    """
    if name not in _TABLE:
        raise ValueError(f"backend is {name!r}; expected 'auto' or one of {', '.join(map(repr, BACKENDS))}.")
    backend = _load(name)
    return backend if isinstance(backend, str) else backend.unavailable_reason()


def get(name: str) -> Backend:
    """The named backend.

    Raises:
        BackendUnavailable: where it cannot run on this machine, with the reason.
    """
    reason = unavailable_reason(name)
    if reason is not None:
        raise BackendUnavailable(
            f"backend {name!r} cannot run here: {reason}. `qpilots-fast info` lists every backend; "
            "backend='auto' takes the best one that can run."
        )
    backend = _load(name)
    assert isinstance(backend, Backend)
    return backend


def for_networks(name: str, precision: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that runs single networks: for operators, and beside networks that are the user's own callables.

    Raises:
        TypeError: float64 inputs on a backend, asked for by name, that computes in float32.
        BackendUnavailable: where a named backend cannot run, or lacks the precision.
    """
    if dtype == torch.float64 and name not in ("auto", "reference"):
        raise TypeError(
            f"inputs are float64, but backend {name!r} computes in float32; expected float32 inputs (.float()), or "
            "backend='reference'."
        )
    if name == "auto":
        native = "cpu" if device.type == "cpu" else "triton"
        usable = unavailable_reason(native) is None and precision in get(native).precisions
        name = native if usable and dtype != torch.float64 else "reference"
    backend = get(name)
    if precision not in backend.precisions:
        raise BackendUnavailable(
            f"backend {name!r} has no precision {precision!r}; it has {', '.join(backend.precisions)}."
        )
    return backend


def choose(
    name: str, spec: SamplerSpec, device: torch.device, batch_size: int | None = None
) -> tuple[Backend, dict[str, str]]:
    """The backend that runs a sampler on a device, and why each better one does not.

    Args:
        name: "auto" or a name; a named backend that cannot run raises.
        batch_size: where given, "auto" leaves batches over a backend's max_batch_size to the next one.
    """
    if name != "auto":
        backend = get(name)
        reason = backend.refusal(spec, device)
        if reason is not None:
            raise BackendUnavailable(f"backend {name!r} cannot run this sampler: {reason}.")
        return backend, {}
    passed: dict[str, str] = {}
    for candidate in BACKENDS:
        reason = unavailable_reason(candidate)
        if reason is None:
            backend = get(candidate)
            reason = backend.refusal(spec, device)
            limit = backend.max_batch_size
            if reason is None and limit is not None and batch_size is not None and batch_size > limit:
                reason = f"it is for batches up to {limit}, this one has {batch_size}"
            if reason is None:
                return backend, passed
        passed[candidate] = reason
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in passed.items())
    raise BackendUnavailable(f"no backend can run this sampler on {device}: {reasons}.")
