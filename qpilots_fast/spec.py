"""What a network and a sampler are, as plain hashable data: the only description that backends read."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .bounds import Bound, Bounds, as_operands
from .network_spec import (
    INPUT_ORDER,
    KINDS,
    MOVING_BLOCK,
    POSTERIOR_DRAW,
    TIME_EMBEDDINGS,
    NetworkSpec,
    NormPlacement,
    Pullback,
    network_from_dict,
    network_spec_from_json,
)
from .steering import Steering
from .times import GlassCoefficients, Step, column_of, glass_coefficients

__all__ = [  # those of network_spec among them: backends read this module alone
    "INPUT_ORDER", "KINDS", "MOVING_BLOCK", "POSTERIOR_DRAW", "PRECISIONS", "TIME_EMBEDDINGS", "ActionMap",
    "BoundNetwork", "BoundNetworks", "LayerParameters", "NetworkSpec", "NormParameters", "NormPlacement", "OwnColumns",
    "Pullback", "RawSample", "SamplerSpec", "Step", "StepReport", "network_spec_from_json",
]  # fmt: skip

PRECISIONS: tuple[str, ...] = ("float32", "bfloat16", "float16", "tf32", "float64")


class OwnColumns(ABC):
    """What the network's own module makes of its inputs before its first layer, from its parameters as they are now.

    Results have the inputs' dtype and device, and no autograd history.
    """

    @abstractmethod
    def obs(self, obs: Tensor) -> Tensor:
        """[B, S] -> [B, obs_columns]."""

    @abstractmethod
    def times(self, t: Tensor) -> Tensor:
        """[n, 1] -> [n, time_embedding_dim]."""

    def film(self, t: Tensor) -> Tensor:
        """[n, 1] -> [n, film_dim]."""
        raise NotImplementedError

    @abstractmethod
    def actions(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift [len(action_columns)] of each column, in like's dtype, on its device."""

    @abstractmethod
    def followed(self) -> list[Tensor]:
        """The tensors that `times`, `film` and `actions` follow."""


class NormParameters(NamedTuple):
    """E tensors [out] each, or None."""

    weight: tuple[Tensor, ...] | None = None
    bias: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class LayerParameters:
    """One Linear of every member, with the norms of its chain: views of live parameters, never copies.

    weight: E tensors [out, in], any strides. bias, norm_weight, norm_bias: E tensors [out], or None; these of the
    first norm. more_norms: those of a chain's further ones.
    """

    weight: tuple[Tensor, ...]
    bias: tuple[Tensor, ...] | None
    norm_weight: tuple[Tensor, ...] | None = None
    norm_bias: tuple[Tensor, ...] | None = None
    more_norms: tuple[NormParameters, ...] = ()

    @property
    def norms(self) -> tuple[NormParameters, ...]:
        """The parameters of each norm of the chain; one at least, which a layer without norms does not read."""
        return (NormParameters(self.norm_weight, self.norm_bias), *self.more_norms)


@dataclass(frozen=True)
class BoundNetwork:
    """A network's spec with views of its live parameters (one LayerParameters per Linear).

    own: where spec.own_columns says so, what computes them.
    """

    spec: NetworkSpec
    layers: tuple[LayerParameters, ...]
    own: OwnColumns | None = field(default=None, compare=False)

    @property
    def device(self) -> torch.device:
        return self.layers[0].weight[0].device

    def parameters(self) -> list[Tensor]:
        """Every tensor of `layers`, layer by layer."""
        groups = (
            group
            for layer in self.layers
            for group in (layer.weight, layer.bias, *(group for norm in layer.norms for group in norm))
        )
        return [tensor for group in groups for tensor in group or ()]

    @cached_property
    def trunk(self) -> BoundNetwork:
        """The network as a function of its first layer's columns: what a backend runs that is given these."""
        spec, actions = self.spec, self.spec.action_columns
        if self.own is None:
            return self
        obs_dim, action_dim = spec.block_dim("obs"), spec.action_dim if actions is None else len(actions)
        columns = replace(spec, obs_dim=obs_dim, action_dim=action_dim, obs_columns=None, action_columns=None)
        return BoundNetwork(columns, self.layers)

    def obs_input(self, obs: Tensor) -> Tensor:
        """The block of obs [B, S] among the first layer's columns."""
        return obs if self.own is None or self.spec.obs_columns is None else self.own.obs(obs)

    def time_inputs(self, t: float | Tensor, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """Every time block at flow time t, a number or [B, 1], by name: [B, d] each, float64."""
        at = torch.as_tensor(t, dtype=torch.float64, device=device).reshape(-1, 1)
        film = {}
        if self.spec.film_dim:
            assert self.own is not None
            film = {"film": self.own.film(at).expand(batch_size, -1)}
        if self.spec.time_embedding != "module":
            return film | self.spec.time_inputs(t, batch_size, device)
        assert self.own is not None
        rows = self.own.times(at).expand(batch_size, -1)
        return film | {"t": rows} | {name: rows[:, :0] for name in POSTERIOR_DRAW if name in self.spec.input_order}

    def time_rows(self, times: Sequence[float]) -> dict[str, Tensor]:
        """The time blocks at each of these flow times: [len(times), d] each, float64, CPU."""
        at = column_of(times)
        return {
            name: rows.cpu() for name, rows in self.time_inputs(at.to(self.device), len(times), self.device).items()
        }

    def action_map(self, like: Tensor) -> ActionMap | None:
        """How a critic's columns of the actions follow from actions like these [B, A]; None: they are the actions."""
        if self.own is None or self.spec.action_columns is None:
            return None
        scale, shift = self.own.actions(like)
        return ActionMap(torch.tensor(self.spec.action_columns, device=like.device), scale, shift)


class ActionMap(NamedTuple):
    """columns = actions[:, dims] * scale + shift; dims, scale and shift [d]."""

    dims: Tensor
    scale: Tensor
    shift: Tensor

    def __call__(self, actions: Tensor) -> Tensor:
        return actions[:, self.dims] * self.scale + self.shift

    def pull_back(self, d_columns: Tensor, action_dim: int) -> Tensor:
        """[B, d] to [B, A]."""
        zeros = d_columns.new_zeros(len(d_columns), action_dim)
        return zeros.index_add(1, self.dims, d_columns * self.scale)


@dataclass(frozen=True)
class BoundNetworks:
    """The networks that take part in a sampler's calls, as SamplerSpec.networks says."""

    flow: BoundNetwork
    critic: BoundNetwork | None = None
    posterior: BoundNetwork | None = None


class StepReport(NamedTuple):
    """What happened to each row at each step, [K, B]; 0 or False at unsteered steps."""

    gradient_norms: Tensor  # of g over the steered dims; 0 where it is not finite
    nonfinite: Tensor  # bool: no finite gradient, so the row followed the base flow
    q_std: Tensor  # the critics' population std at the estimate (draws: their weighted mean); 0 where nonfinite
    gated: Tensor  # bool: q_std exceeded max_disagreement, so the row followed the base flow


@dataclass(frozen=True)
class RawSample:
    """What a backend's inner loop returns; the report where it was asked for."""

    actions: Tensor  # [B, A]
    report: StepReport | None = None


@dataclass(frozen=True)
class SamplerSpec:
    """Everything about a sampling call that is not a tensor. Hashable; converts to and from JSON.

    Networks that the steering never asks are dropped: `critic` and `posterior` are None where they take no part.

    Raises:
        ValueError: where the networks, or steered_dims, do not fit each other; where one that takes part is missing.
    """

    flow: NetworkSpec
    critic: NetworkSpec | None
    posterior: NetworkSpec | None
    steering: Steering = field(default_factory=Steering)
    num_steps: int = 10
    precision: str = "float32"
    action_low: Bound = -1.0  # one number, or one for each of the A dimensions (then both)
    action_high: Bound = 1.0
    time_grid: tuple[float, ...] | None = None  # K + 1 increasing times from 0 to 1; None: k / K

    json: ClassVar[str]  # this spec as text, ready before torch.compile traces through

    def __post_init__(self) -> None:
        flow, steering = self.flow, self.steering
        if self.time_grid is not None and len(self.time_grid) != self.num_steps + 1:
            raise ValueError(
                f"num_steps is {self.num_steps}, but time_grid has {len(self.time_grid)} times; expected num_steps + 1."
            )
        for name, other in (("critic", self.critic), ("posterior", self.posterior)):
            if other is not None and (other.obs_dim, other.action_dim) != (flow.obs_dim, flow.action_dim):
                raise ValueError(
                    f"{name} has obs_dim={other.obs_dim}, action_dim={other.action_dim}, but flow has "
                    f"obs_dim={flow.obs_dim}, action_dim={flow.action_dim}; expected the same."
                )
        dims = steering.steered_dims
        if dims is not None and dims[-1] >= flow.action_dim:
            raise ValueError(
                f"Steering.steered_dims has {dims[-1]}; expected indices below action_dim={flow.action_dim}."
            )
        for name in ("critic", "posterior"):
            if not steering.asks(name) or not self.steered_steps:
                object.__setattr__(self, name, None)
            elif getattr(self, name) is None:
                raise ValueError(f"{name} is None, but this steering needs one; give a network or a callable.")
        object.__setattr__(self, "json", json.dumps(asdict(self), sort_keys=True))

    @property
    def networks(self) -> dict[str, NetworkSpec]:
        """The networks that take part in a call, by name: flow, critic, posterior, in this order."""
        named = {"flow": self.flow, "critic": self.critic, "posterior": self.posterior}
        return {name: network for name, network in named.items() if network is not None}

    @property
    def own_columns(self) -> str | None:
        """Which columns of which networks their own modules compute, in words; None where there are none."""
        return "; ".join(filter(None, (network.own_columns for network in self.networks.values()))) or None

    def taking_part(self, networks: BoundNetworks) -> list[BoundNetwork]:
        """Those of the networks that a call reads, in the order of `networks`."""
        return [getattr(networks, name) for name in self.networks]

    def bounds(self, like: Tensor) -> Bounds:
        """Low and high of the actions, as torch.clamp takes them beside like [..., A]."""
        return as_operands(self.action_low, self.action_high, like)

    @property
    def box(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Low and high of each dimension of the actions, [A] each."""
        low, high = (
            bound if isinstance(bound, tuple) else (bound,) * self.flow.action_dim
            for bound in (self.action_low, self.action_high)
        )
        return low, high

    @cached_property
    def schedule(self) -> tuple[Step, ...]:
        """Every step: time, length, weight of the steering."""
        return self.steering.schedule(self.num_steps, self.time_grid)

    @cached_property
    def times(self) -> tuple[float, ...]:
        """t_k of every step."""
        return tuple(step.t for step in self.schedule)

    @cached_property
    def steered_steps(self) -> tuple[int, ...]:
        """The steps at which the critic is asked."""
        return tuple(k for k, step in enumerate(self.schedule) if step.weight > 0)

    @property
    def pulls_flow(self) -> bool:
        """Whether a steered step pulls the gradient back through the flow at its own (x, t)."""
        return self.steering.pulls_flow and bool(self.steered_steps)

    @property
    def num_draws(self) -> int:
        """Estimates of the clean action a steered step and row: N posterior draws, or one point."""
        return self.steering.num_samples if self.steering.draws_posterior else 1

    def posterior_noise_shape(self, batch_size: int) -> tuple[int, int, int, int] | None:
        """[K, B, N, A], or None where no posterior draw is taken."""
        if not self.steering.draws_posterior:
            return None
        return self.num_steps, batch_size, self.num_draws, self.flow.action_dim

    @cached_property
    def glass_table(self) -> tuple[tuple[GlassCoefficients[float], ...], ...]:
        """K rows of m: the coefficients of every inner step; empty unless the estimate is "glass"."""
        if not self.steered_steps or self.steering.estimate != "glass":
            return ()
        m = self.steering.glass_steps
        return tuple(tuple(glass_coefficients(t, i / m) for i in range(m)) for t in self.times)

    @cached_property
    def flow_times(self) -> tuple[float, ...]:
        """Every time at which the flow is asked: the K steps', then the inner steps' of GLASS draws."""
        return self.times + tuple(c.t_star for row in self.glass_table for c in row)

    @staticmethod
    def from_json(text: str) -> SamplerSpec:
        return _sampler_spec_from_json(text)


@lru_cache(maxsize=256)
def _sampler_spec_from_json(text: str) -> SamplerSpec:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
    steering = Steering.from_json(json.dumps(values.pop("steering")))
    networks = {name: network_from_dict(values.pop(name)) for name in ("flow", "critic", "posterior")}
    return SamplerSpec(**networks, steering=steering, **values)  # type: ignore[arg-type]
