"""A sampler's call as one CUDA graph at a fixed batch size, whichever backend queues it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..spec import BoundNetworks, SamplerSpec
from .base import Call, Graph

_T = TypeVar("_T")


class CudaGraph:
    """`Graph` on a CUDA device.

    Raises:
        BackendUnavailable: on another.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise BackendUnavailable(f"CUDA graphs need a CUDA device; the networks are on {device}.")
        self._device, self._graph = device, torch.cuda.CUDAGraph()

    def record(self, enqueue: Callable[[], _T]) -> _T:
        device, side = self._device, torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device):
            with torch.cuda.stream(side):
                enqueue()  # what may not happen while a stream is captured: kernels compile, tables are uploaded
            torch.cuda.current_stream(device).wait_stream(side)
            # of this thread alone: others may allocate meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                return enqueue()

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


def capturing(device: torch.device) -> bool:
    """Whether what is queued now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_while_capturing(device: torch.device, reason: str) -> None:
    """Raises BackendUnavailable inside a capture, where nothing can be uploaded; reason: why something has to be."""
    if capturing(device):
        raise BackendUnavailable(f"inside a CUDA graph capture, but {reason}; call the sampler once before capturing.")


class CapturedSampler:
    """actions = captured(obs, noise, posterior_noise=None): one replay, of the current weights.

    It owns its inputs and all that its graph reads, so that no cache can free them under it. Calls of several threads
    wait for each other; they must share a stream.

    Args:
        networks: every replay reads what the memory of their parameters holds then.
        packed: weights that `pack` returned, which the graph reads instead.
        enqueue: queues a call on the current stream; returns its actions [B, A], and whatever its kernels read and
            write that the call does not hold.
        before_replay: called with the filled call; raises where an earlier replay failed, or computes on the host what
            the graph reads.
    """

    def __init__(
        self,
        spec: SamplerSpec,
        networks: BoundNetworks,
        batch_size: int,
        enqueue: Callable[[Call], tuple[Tensor, Any]],
        graph: Graph,
        packed: Any = None,
        before_replay: Callable[[Call], object] | None = None,
    ) -> None:
        shapes = {
            "obs": (batch_size, spec.flow.obs_dim),
            "noise": (batch_size, spec.flow.action_dim),
            "posterior_noise": spec.posterior_noise_shape(batch_size),
        }
        with torch.inference_mode(False), torch.no_grad():
            made = {
                name: torch.zeros(shape, dtype=torch.float32, device=networks.flow.device)
                for name, shape in shapes.items()
                if shape is not None
            }
            call = Call(spec, networks, made["obs"], made["noise"], made.get("posterior_noise"), packed=packed)
            self._actions, enqueued = graph.record(lambda: enqueue(call))
        self._inputs, self._graph, self._before_replay, self._call = made, graph, before_replay, call
        self._lock = threading.Lock()  # between filling the inputs and reading the actions
        # networks: views, which keep what the graph reads where a user gives a parameter other memory
        self.holds = (made, networks, packed, enqueued)

    def __call__(self, obs: Tensor, noise: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """One call on the current stream; actions [B, A].

        Args:
            obs, noise, posterior_noise: [B, S], [B, A], [K, B, N, A], float32, on the graph's device. posterior_noise
                is read only by samplers that draw from the posterior, which need it.

        Raises:
            ValueError, TypeError: for another shape, dtype or device, or where one is missing.
        """
        given: dict[str, Any] = {"obs": obs, "noise": noise, "posterior_noise": posterior_noise}
        for name, own in self._inputs.items():
            _check(name, given[name], own)
        with self._lock, torch.no_grad():
            for name, own in self._inputs.items():
                own.copy_(given[name])
            if self._before_replay is not None:
                self._before_replay(self._call)
            self._graph.replay()
            return self._actions.clone()


def _check(name: str, given: Any, own: Tensor) -> None:
    expected = f"the captured graph expects {own.dtype} {list(own.shape)} on {own.device}"
    if given is None:
        raise ValueError(f"{name} is None; {expected}, and draws nothing itself: give torch.randn(...) of that shape.")
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is {type(given).__name__}; {expected}: torch.as_tensor(...) makes one.")
    if given.shape != own.shape:
        raise ValueError(f"{name} has shape {list(given.shape)}; {expected}. Capture each batch size that you call.")
    if given.dtype != own.dtype:
        raise TypeError(f"{name} is {given.dtype}; {expected}: cast it with {name}.float().")
    if given.device != own.device:
        raise ValueError(f"{name} is on {given.device}; {expected}: move it with {name}.to(...).")
