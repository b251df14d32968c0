"""The table of backends: what there is, what can run here, and which one "auto" takes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache

import torch

from ..errors import BackendUnavailable
from ..spec import NetworkSpec, SamplerSpec
from .base import Backend, Call, Footprint, QuickCall, RowKernels, Slots
from .captured import capturing
from .quick import ByBatchSize

__all__ = [
    "BACKENDS",
    "Backend",
    "ByBatchSize",
    "Call",
    "Choice",
    "Footprint",
    "QuickCall",
    "Request",
    "RowKernels",
    "Slots",
    "capturing",
    "choose",
    "for_rows",
    "get",
    "unavailable_reason",
]

# name -> (module, class), in the order that "auto" prefers on their own device; the last runs anything
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


@cache
def for_rows(device: torch.device) -> RowKernels | None:
    """The kernels of the row-wise pieces of a step on this device; None where torch code has to do."""
    loaded = (_load(name) for name in BACKENDS)
    found = (backend.row_kernels(device) for backend in loaded if isinstance(backend, Backend))
    return next((rows for rows in found if rows is not None), None)


@dataclass(frozen=True)
class Request:
    """What is to run: a whole sampler, or (spec None) single networks.

    Args:
        name: "auto" or a backend's name. dtype: of obs and actions.
        batch_size: where given, "auto" leaves batches over a backend's max_batch_size to the next one.
        networks: the single ones, where they are known.
    """

    name: str
    precision: str
    device: torch.device
    dtype: torch.dtype = torch.float32
    spec: SamplerSpec | None = None
    batch_size: int | None = None
    networks: tuple[NetworkSpec, ...] = ()

    def refusal(self, backend: Backend) -> str | None:
        reasons = map(backend.structure_refusal, self.networks if self.spec is None else self.spec.networks.values())
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is not None:
            return reason
        if self.spec is None:
            return backend.network_refusal(self.precision, self.device)
        return backend.refusal(self.spec, self.device)

    def automatic_refusal(self, backend: Backend) -> str | None:
        """Why "auto" passes a backend over."""
        limit = backend.max_batch_size
        if self.spec is None and not backend.auto_for_networks:
            return "single networks gain nothing from it"
        if limit is not None and self.batch_size is not None and self.batch_size > limit:
            return f"it is for batches up to {limit}, this one has {self.batch_size}"
        return self.refusal(backend)


@dataclass(frozen=True)
class Choice:
    """The backend that runs a request, and why each better one does not."""

    backend: Backend
    passed: dict[str, str]

    @property
    def fallback(self) -> str | None:
        """Why nothing faster than the reference runs, where "auto" fell back to it."""
        if not self.passed or self.backend.name != BACKENDS[-1]:
            return None
        return "; ".join(f"{name}: {reason}" for name, reason in self.passed.items())


def choose(request: Request) -> Choice:
    """The backend for a sampler or for single networks.

    Raises:
        TypeError: float64 inputs on a backend, asked for by name, that computes in float32.
        BackendUnavailable: where a backend asked for by name cannot run this, or none can.
    """
    name, exact, what = request.name, BACKENDS[-1], "this sampler" if request.spec else "these networks"
    if request.dtype == torch.float64 and request.precision != "float64":
        if name not in ("auto", exact):
            raise TypeError(
                f"inputs are float64, but backend {name!r} computes in float32; expected float32 inputs (.float()), or "
                f"backend={exact!r}."
            )
        return Choice(get(exact), {})
    if name != "auto":
        backend = get(name)
        reason = request.refusal(backend)
        if reason is not None:
            raise BackendUnavailable(f"backend {name!r} cannot run {what}: {reason}.")
        return Choice(backend, {})
    passed: dict[str, str] = {}
    for candidate in BACKENDS:
        reason = unavailable_reason(candidate)
        if reason is None:
            backend = get(candidate)
            reason = request.automatic_refusal(backend)
            if reason is None:
                return Choice(backend, passed)
        passed[candidate] = reason
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in passed.items())
    raise BackendUnavailable(f"no backend can run {what} on {request.device}: {reasons}.")
