"""The interface between the sampler and a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..networks import Slots
from ..spec import BoundNetwork, BoundNetworks, NetworkSpec, RawSample, SamplerSpec
from ..steering import Steering


@dataclass(frozen=True)
class Call:
    """One call of a sampler's inner loop.

    Args:
        networks: those that take part. packed: what `pack` returned for them; None reads their live parameters.
        obs: [B, S], contiguous, float32 (float64 where the backend's precisions allow), B >= 1, finite.
        noise: [B, A], same dtype; not modified.
        posterior_noise: [K, B, N, A] where spec.posterior_noise_shape says so, else None.
        alpha: [B], the strength of each row in place of the steering's; same dtype, contiguous. None: the steering's.
        return_info: whether the result has a report.
    Candidates (best-of-n) are drawn and ranked by the sampler: here they are rows of the batch.
    """

    spec: SamplerSpec
    networks: BoundNetworks
    obs: Tensor
    noise: Tensor
    posterior_noise: Tensor | None = None
    alpha: Tensor | None = None
    packed: Any = None
    return_info: bool = False

    @property
    def batch_size(self) -> int:
        return self.noise.shape[0]


@dataclass(frozen=True)
class Footprint:
    """What one sampling call costs, counted from the spec and the batch size."""

    launches: int  # kernel launches (on a CPU: parallel regions) a call
    flops: int
    weight_bytes: int  # packed weights, each counted once
    traffic_bytes: int  # weight and activation bytes that must move at least once per visit
    workspace_bytes: int  # beyond packed weights, inputs and outputs
    floor_s: float | None  # physical lower bound on this machine; None where the machine is not known
    notes: tuple[str, ...] = ()


_T = TypeVar("_T")


class Graph(Protocol):
    """Records what a function queues on the GPU, to queue it again without the function."""

    def record(self, enqueue: Callable[[], _T]) -> _T:
        """Calls enqueue, more than once perhaps; returns what the recorded call returned."""

    def replay(self) -> None: ...


class RowKernels(Protocol):
    """The pieces of a step that see one row at a time, in float32, each as one kernel on the current stream."""

    def clean_actions(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """x + (1 - t) v: x, v [B, A], t [1, 1], [B, 1] or [B, A] -> [B, A]."""

    def steer_step(
        self, x: Tensor, v: Tensor, g: Tensor, dt: float, steering: Steering, q_std: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x + dt (v + scale(v, g) g) over the steered dims.

        Args:
            x: [B, A].
            v: [B, A].
            g: [B, A].
            dt: positive.
            steering: whose scale, alpha, steered_dims and gate the step follows.
            q_std: [B], the critics' std, for scale="gaf" and max_disagreement.

        Returns:
            The next x [B, A]; norms of g [B]; rows whose g was not finite, which took the plain step [B].

        Raises:
            ValueError: where q_std is needed and None.
        """


def check_q_std(steering: Steering, q_std: Tensor | None) -> None:
    """Raises ValueError where a step needs the critics' std and has none."""
    if q_std is None and (steering.scale == "gaf" or steering.max_disagreement is not None):
        raise ValueError("q_std is None; scale='gaf' and max_disagreement need the critics' std, [B].")


# (obs, noise, posterior noise, alpha; each of the last three or None) -> actions, or None where the general path must
# look at the inputs
QuickCall = Callable[[Any, Tensor | None, Tensor | None, Tensor | None], Tensor | None]


class Backend(ABC):
    """One way to run the maths. Stateless but for caches; safe to call from several threads."""

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    max_batch_size: ClassVar[int | None] = None  # "auto" takes the next backend for larger batches
    keeps: ClassVar[str] = "nothing by batch size"  # how much of it stays ready for a next call, in words
    auto_for_networks: ClassVar[bool] = True  # whether "auto" may take it to run single networks
    runs_chains: ClassVar[bool] = False  # whether it runs networks with NetworkSpec.chains
    quick_by_batch_size: ClassVar[bool] = False  # whether a `quick_call` is for one batch size alone

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None where it can."""

    @abstractmethod
    def refusal(self, spec: SamplerSpec, device: torch.device) -> str | None:
        """Why this backend cannot run this sampler on tensors of this device, or None where it can."""

    def network_refusal(self, precision: str, device: torch.device) -> str | None:
        """Why this backend cannot run single networks on tensors of this device, or None where it can."""
        if precision not in self.precisions:
            return f"precision {precision!r} is not one of {', '.join(self.precisions)}"
        return None

    def structure_refusal(self, network: NetworkSpec) -> str | None:
        """Why this backend cannot run a network of this structure, or None where it can."""
        if network.chains and not self.runs_chains:
            return f"the {network.kind} has residual blocks, a head or other row operations, which it does not run"
        return None

    @abstractmethod
    def pack(self, spec: SamplerSpec, networks: BoundNetworks) -> Any:
        """A private copy of the weights in this backend's layout, for reuse over many calls (frozen samplers)."""

    @abstractmethod
    def sample(self, call: Call) -> RawSample:
        """The whole K-step loop for the batch. Never tracked by autograd."""

    def quick_call(
        self, spec: SamplerSpec, networks: BoundNetworks, packed: Any, slots: Slots, batch_size: int
    ) -> QuickCall | None:
        """Something that makes the plainest calls of `sample`, checks included, with less overhead; None: nothing can.

        Args:
            slots: such that `networks` are current while they hold and no parameter's memory moves; empty for packed
                weights.
            batch_size: of the call that was just made.
        """
        return None

    def prepare(self, network: BoundNetwork, precision: str) -> Any:
        """Packs one network for several calls of `forward` and `vjp`; stands for the network in these."""
        return network

    @abstractmethod
    def forward(self, network: Any, blocks: Sequence[Tensor], precision: str) -> Tensor:
        """The network on its input blocks: [E, B, out].

        Args:
            network: a BoundNetwork or what `prepare` returned.
            blocks: each [B, d], contiguous, in the order of spec.input_order.
        """

    @abstractmethod
    def vjp(self, network: Any, blocks: Sequence[Tensor], cotangent: Tensor, precision: str) -> Tensor:
        """cotangent [E, B, out] pulled back to all input columns, summed over the members: [B, input_dim]."""

    def capture(
        self,
        spec: SamplerSpec,
        networks: BoundNetworks,
        batch_size: int,
        packed: Any = None,
        graph: Graph | None = None,
    ) -> Callable[..., Tensor]:
        """A CUDA graph of one call at a fixed batch size: f(obs, noise, posterior_noise=None) -> actions.

        Args:
            packed: what `pack` returned; None reads the networks' current weights at every replay.
            graph: what records; None: a CUDA graph of the networks' device.
        """
        raise BackendUnavailable(f"backend {self.name!r} has no CUDA graphs; expected 'triton' or 'cuda' on a GPU.")

    def row_kernels(self, device: torch.device) -> RowKernels | None:
        """The row-wise pieces on this device's tensors; None where this backend has none there."""
        return None

    def live_weights(self, spec: SamplerSpec, networks: BoundNetworks) -> str | None:
        """How a call finds out whether live weights changed, in words; None where it packs them every time."""
        return None

    @abstractmethod
    def footprint(self, spec: SamplerSpec, batch_size: int) -> Footprint:
        """Exact counts for one call of `sample`."""
