"""The quick way of the plainest calls on a GPU: inputs that need nothing done to them, parameters where they were.

A GPU waits while the host prepares a call, so what the general path reads, checks and looks up is skipped where none of
it can have changed. `QuickCall`s answer None where it can, upon which the caller takes the general path.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..networks import Slots, slots_hold
from ..spec import SamplerSpec
from .base import QuickCall
from .caches import Cache
from .captured import CapturedSampler, capturing
from .native import import_failure, load_module

_log = logging.getLogger(__name__)

# (obs, noise, posterior noise, alpha), contiguous float32 -> actions
Enqueue = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class ParameterWatch(Protocol):
    """Whether modules and parameters are those of its construction, and the parameters' memory where it was."""

    def stayed(self) -> bool: ...


class PythonWatch:
    """`ParameterWatch` where there is no compiled module."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        tensors = [value for _, key, value in slots if key is not None and isinstance(value, Tensor)]
        self._places = [(t, t.data_ptr(), t.shape, t.stride()) for t in tensors]

    def stayed(self) -> bool:
        return slots_hold(self._slots) and all(
            t.data_ptr() == address and t.shape == shape and t.stride() == stride
            for t, address, shape, stride in self._places
        )


def watch_of(slots: Slots) -> ParameterWatch:
    """The fastest one that runs here."""
    return PythonWatch(slots) if import_failure() is not None else load_module().ParameterWatch(slots, Tensor)


class QuickDeviceCall:
    """`QuickCall` of one batch size.

    Args:
        slots: these hold, and their parameters stay where they are, or the call is not quick; [] for packed weights.
        enqueue: queues a call on the current stream.
    """

    def __init__(
        self, spec: SamplerSpec, device: torch.device, batch_size: int, slots: Slots, enqueue: Enqueue
    ) -> None:
        self._device, self._enqueue, self._watch = device, enqueue, watch_of(slots)
        self._obs_shape = (batch_size, spec.flow.obs_dim)
        self._noise_shape = (batch_size, spec.flow.action_dim)
        self._eps_shape = spec.posterior_noise_shape(batch_size)
        self._alpha_shape = (batch_size,) if spec.critic is not None else None

    def __call__(
        self, obs: Any, noise: Tensor | None, posterior_noise: Tensor | None, alpha: Tensor | None
    ) -> Tensor | None:
        eps_shape = self._eps_shape
        if not self._watch.stayed() or capturing(self._device) or not self._plain(obs, self._obs_shape):
            return None
        if noise is not None and not self._plain(noise, self._noise_shape):
            return None
        if alpha is not None and not self._plain(alpha, self._alpha_shape):
            return None
        if eps_shape is None:
            posterior_noise = None  # not read
        elif posterior_noise is not None and not self._plain(posterior_noise, eps_shape):
            return None
        if noise is None:
            noise = torch.randn(self._noise_shape, dtype=torch.float32, device=self._device)
        if eps_shape is not None and posterior_noise is None:
            posterior_noise = torch.randn(eps_shape, dtype=torch.float32, device=self._device)
        return self._enqueue(obs, noise, posterior_noise, alpha)

    def _plain(self, value: Any, shape: tuple[int, ...] | None) -> bool:
        return (
            type(value) is Tensor
            and value.dtype is torch.float32
            and value.shape == shape
            and value.device == self._device
            and value.is_contiguous()
        )


class GraphedEnqueue:
    """`Enqueue` that records itself at its second call and then replays: hundreds of launches cost the host one.

    Args:
        plain: queues launch by launch: the first call, one that gives alpha, one on another stream than the recorded
            (two replays at once would share memory), and all of them where nothing can be recorded or `kept` has
            dropped the graph.
        capture: makes the graph. stream: tells the current one. kept: of the graphs of a backend.
    """

    def __init__(
        self, plain: Enqueue, capture: Callable[[], CapturedSampler], stream: Callable[[], int], kept: Cache
    ) -> None:
        self._plain, self._capture, self._current, self._kept = plain, capture, stream, kept
        self._lock, self._calls, self._stream = threading.Lock(), 0, -1

    def __call__(self, obs: Tensor, noise: Tensor, posterior_noise: Tensor | None, alpha: Tensor | None) -> Tensor:
        with self._lock:
            self._calls += alpha is None
            if self._calls == 2 and alpha is None:
                self._record()
        graph = None if alpha is not None else self._kept.find("graph", self)
        if graph is None or self._current() != self._stream:
            return self._plain(obs, noise, posterior_noise, alpha)
        return graph(obs, noise, posterior_noise)

    def _record(self) -> None:
        try:
            self._kept.obtain("graph", self._capture, owner=self)
            self._stream = self._current()
        except Exception as error:  # of CUDA, of another thread: the plain way needs no graph
            _log.warning(
                "qpilots_fast launches kernel by kernel; no CUDA graph of the call could be recorded: %s", error
            )


class ByBatchSize:
    """`QuickCall` of the batch sizes that were called with: the backend and what it prepares depend on them."""

    kept = 64

    def __init__(self) -> None:
        self._calls: dict[int, tuple[tuple[Any, ...], QuickCall | None]] = {}

    def made_for(self, batch_size: int) -> tuple[Any, ...] | None:
        """What the call of this batch size was made for."""
        known = self._calls.get(batch_size)
        return None if known is None else known[0]

    def keep(self, batch_size: int, made_for: tuple[Any, ...], call: QuickCall | None) -> None:
        if len(self._calls) >= self.kept:
            self._calls.pop(next(iter(self._calls)), None)
        self._calls[batch_size] = (made_for, call)

    def __call__(
        self, obs: Any, noise: Tensor | None, posterior_noise: Tensor | None, alpha: Tensor | None
    ) -> Tensor | None:
        known = self._calls.get(obs.shape[0]) if type(obs) is Tensor and obs.dim() == 2 else None
        call = None if known is None else known[1]
        return None if call is None else call(obs, noise, posterior_noise, alpha)
