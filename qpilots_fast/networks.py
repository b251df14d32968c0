"""The networks that the backends can run whole: ordinary nn.Modules with a plain PyTorch forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import ACTIVATIONS
from .integers import as_int
from .spec import TIME_EMBEDDINGS, BoundNetwork, LayerParameters, NetworkSpec, NormParameters, NormPlacement
from .times import time_features


def _check_sizes(spec: NetworkSpec, flat: Sequence[Tensor]) -> None:
    """Raises where kernels, which go by the spec, would read outside a parameter."""
    if len(flat) != len(spec.parameter_shapes):
        raise ValueError(
            f"{spec.kind}: got {len(flat)} parameters, expected {len(spec.parameter_shapes)}. Was a layer replaced? "
            "Make a new network (or call from_module again) for another structure."
        )
    for index, (parameter, shape) in enumerate(zip(flat, spec.parameter_shapes)):
        if parameter.shape != shape:
            raise ValueError(
                f"{spec.kind}: parameter {index} of flat_parameters() has shape {list(parameter.shape)}, expected "
                f"{list(shape)}. Was a layer replaced by one of another size? Make a new network (or call "
                "from_module again) for another structure."
            )
        if parameter.device.type == "meta" or not parameter.numel():
            continue
        last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride()))
        needed = (parameter.storage_offset() + last + 1) * parameter.element_size()
        if parameter.untyped_storage().nbytes() < needed:
            raise ValueError(
                f"{spec.kind}: parameter {index} of flat_parameters() has lost its memory (its storage has "
                f"{parameter.untyped_storage().nbytes()} bytes, expected {needed}), as where FSDP has sharded it; "
                "gather the parameters before sampling."
            )


def bind(spec: NetworkSpec, flat: Sequence[Tensor]) -> BoundNetwork:
    """Groups a flat parameter list (see PackableNetwork.flat_parameters) by layer and member.

    Raises:
        ValueError: where a parameter's shape is not the spec's.
    """
    _check_sizes(spec, flat)
    entries = iter(flat)

    def members() -> tuple[Tensor, ...]:
        if spec.stacked:
            return next(entries).unbind(0)
        return tuple(next(entries) for _ in range(spec.num_members))

    layers = []
    for index, has_bias in enumerate(spec.biases):
        weight = members()
        bias = members() if has_bias else None
        ops = spec.row_chains[index] if index < len(spec.hidden_dims) else ()
        norms = [
            NormParameters(members() if op.weight else None, members() if op.bias else None) for op in ops if op.is_norm
        ]
        first = norms[0] if norms else NormParameters()
        layers.append(LayerParameters(weight, bias, *first, more_norms=tuple(norms[1:])))
    return BoundNetwork(spec, tuple(layers))


# (dict, key, value): the dict holds the value, or for None has no such key; (dict, None, size): it holds that many
Slots = list[tuple[dict, str | None, object]]


def module_slots(module: nn.Module, parameters: bool = True) -> Slots:
    """What a module is while nothing in it is replaced or added: every submodule (and parameter) in its dict."""
    slots: Slots = []
    for part in module.modules():
        for owner in (part._modules, part._parameters) if parameters else (part._modules,):
            if not isinstance(owner, dict):  # of a scripted module, in which nothing can be replaced
                continue
            slots += [(owner, name, value) for name, value in owner.items()]
            slots.append((owner, None, len(owner)))
    return slots


def slots_hold(slots: Slots) -> bool:
    """Whether each dict holds what it did."""
    return all(len(d) == value if key is None else d.get(key) is value for d, key, value in slots)


class PackableNetwork(nn.Module):
    """A network whose structure is known, so that a backend can run it without PyTorch."""

    spec: NetworkSpec

    def flat_parameters(self) -> list[Tensor]:
        """Live parameters layer by layer: weight [out, in], then bias, norm weight, norm bias where they exist."""
        raise NotImplementedError

    def slots(self) -> Slots | None:
        """Such that flat_parameters gives the same tensors while they hold; None
        where that cannot be said: a parameter is computed at every call (weight_norm, parametrizations)."""
        slots = module_slots(self)
        held = {id(value) for _, _, value in slots}
        return slots if all(id(parameter) in held for parameter in self.flat_parameters()) else None

    def bound(self) -> BoundNetwork:
        """The spec with views of the live parameters; cached until a parameter's memory moves."""
        flat = self.flat_parameters()
        if not all(isinstance(parameter, Tensor) for parameter in flat):
            raise ValueError(
                f"{type(self).__name__}: parameter {[isinstance(p, Tensor) for p in flat].index(False)} of "
                "flat_parameters() is missing; expected one for each that its spec lists. Make a new network (or call "
                "from_module again) for another structure."
            )
        # cached views keep the old memory alive, so an equal address is the same memory
        key = [(p.data_ptr(), p.dtype, p.shape, p.stride()) for p in flat]
        cached = self.__dict__.get("_bound_cache")
        if cached is None or cached[0] != key:
            cached = (key, bind(self.spec, [p.detach() for p in flat]))
            self.__dict__["_bound_cache"] = cached
        return cached[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_bound_cache"}

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"obs_dim={s.obs_dim}, action_dim={s.action_dim}, hidden_dims={s.hidden_dims}, "
            f"activation={s.activation!r}, layer_norm={s.layer_norm}, num_members={s.num_members}"
        )


def _positive_int(owner: str, name: str, value: Any, low: int = 1) -> int:
    value = as_int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{owner}: {name} is {value!r}; expected an integer >= {low}.")
    return value


def _make_spec(
    kind: str,
    obs_dim: int,
    action_dim: int,
    hidden_dims: Sequence[int],
    activation: str,
    layer_norm: NormPlacement | Sequence[NormPlacement],
    layer_norm_eps: float,
    time_embedding: str,
    time_embedding_dim: int | None,
    num_members: int,
    owner: str,
) -> NetworkSpec:
    hidden = tuple(_positive_int(owner, "hidden_dims entry", h) for h in hidden_dims)
    if not hidden:
        raise ValueError(f"{owner}: hidden_dims is empty; expected at least one hidden layer.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{owner}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
    placements = (layer_norm,) * len(hidden) if layer_norm is None or isinstance(layer_norm, str) else tuple(layer_norm)
    if len(placements) != len(hidden) or any(p not in (None, "pre", "post") for p in placements):
        raise ValueError(
            f"{owner}: layer_norm is {layer_norm!r}; expected None, 'pre', 'post', or one of these for each of the "
            f"{len(hidden)} hidden layers."
        )
    if not (isinstance(layer_norm_eps, float) and 0 < layer_norm_eps < math.inf):
        raise ValueError(f"{owner}: layer_norm_eps is {layer_norm_eps!r}; expected a float > 0.")
    if time_embedding not in TIME_EMBEDDINGS:
        raise ValueError(
            f"{owner}: time_embedding is {time_embedding!r}; expected one of {', '.join(TIME_EMBEDDINGS)}."
        )
    dim = TIME_EMBEDDINGS[time_embedding] if time_embedding_dim is None else as_int(time_embedding_dim)
    if time_embedding == "raw" and dim != 1:
        raise ValueError(f"{owner}: time_embedding_dim is {dim!r} for time_embedding='raw'; expected 1 or None.")
    if time_embedding != "raw" and (not isinstance(dim, int) or dim < 2 or dim % 2):
        raise ValueError(f"{owner}: time_embedding_dim is {dim!r}; expected an even integer >= 2.")
    return NetworkSpec(
        kind=kind,  # type: ignore[arg-type]
        obs_dim=_positive_int(owner, "obs_dim", obs_dim, 0),
        action_dim=_positive_int(owner, "action_dim", action_dim),
        hidden_dims=hidden,
        activation=activation,
        layer_norm=placements,
        layer_norm_eps=layer_norm_eps,
        time_embedding=time_embedding,  # type: ignore[arg-type]
        time_embedding_dim=dim,
        num_members=num_members,
    )


class _TimedMLP(PackableNetwork):
    """An MLP over concatenated blocks, some of which are embedded times."""

    _kind: str

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (512, 512, 512, 512),
        activation: str = "gelu_tanh",
        layer_norm: NormPlacement | Sequence[NormPlacement] = None,
        time_embedding: str = "raw",
        time_embedding_dim: int | None = None,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.spec = spec = _make_spec(
            self._kind, obs_dim, action_dim, hidden_dims, activation, layer_norm, layer_norm_eps, time_embedding,
            time_embedding_dim, 1, type(self).__name__,
        )  # fmt: skip
        widths = (spec.input_dim, *spec.hidden_dims)
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, eps=spec.layer_norm_eps) if placement else nn.Identity()
            for width, placement in zip(spec.hidden_dims, spec.layer_norm)
        )
        self.output = nn.Linear(spec.hidden_dims[-1], spec.output_dim)

    def flat_parameters(self) -> list[Tensor]:
        flat: list[Tensor] = []
        for linear, norm, placement in zip(self.hidden, self.norms, self.spec.layer_norm):
            flat += [linear.weight, linear.bias]  # type: ignore[list-item]
            if placement:
                flat += [norm.weight, norm.bias]  # type: ignore[list-item]
        return [*flat, self.output.weight, self.output.bias]

    def _time(self, t: Tensor | float, like: Tensor) -> Tensor:
        t = torch.as_tensor(t, device=like.device)
        if t.ndim == 0:
            t = t.reshape(1, 1)
        features = time_features(t, self.spec.time_embedding, self.spec.time_embedding_dim)
        return features.to(like.dtype).expand(*like.shape[:-1], -1)

    def _mlp(self, blocks: Sequence[Tensor]) -> Tensor:
        act = ACTIVATIONS[self.spec.activation].function
        h = torch.cat(list(blocks), dim=-1)
        for linear, norm, placement in zip(self.hidden, self.norms, self.spec.layer_norm):
            h = act(norm(linear(h))) if placement != "post" else norm(act(linear(h)))
        return self.output(h)


class FlowMLP(_TimedMLP):
    """velocity = v(obs, noisy_actions, t), E[x1 - e | x_t = noisy_actions] once trained by flow matching.

    Args:
        obs_dim: S.
        action_dim: A, a chunk flattened.
        hidden_dims: one width per hidden layer.
        activation: a name in activations.ACTIVATIONS.
        layer_norm: None, "pre" (Linear, LayerNorm, activation) or "post" (Linear, activation, LayerNorm), one value
            or one per hidden layer.
        time_embedding: "raw", "sinusoidal" (QGF) or "fourier" (QAM).
        time_embedding_dim: its width, even unless raw; None: 1, 16, 64.
        layer_norm_eps: positive.

    Raises:
        ValueError: for any argument outside these.
    """

    _kind = "flow"

    def forward(self, obs: Tensor, noisy_actions: Tensor, t: Tensor | float) -> Tensor:
        """Returns the velocity [B, A] at obs [B, S], noisy_actions [B, A], t [B, 1] (or a number)."""
        return self._mlp([obs, noisy_actions, self._time(t, noisy_actions)])


class MetaFlowMap(_TimedMLP):
    """X_{s,u}(xbar; t, x) = xbar + (u - s) vhat(obs, xbar, x, t, s, u): a posterior draw at s=0, u=1, xbar = eps.

    The auxiliary network of QPILOTS-M (Meta Flow Maps, arXiv 2601.14430); train it with
    `objectives.meta_flow_map_loss`. Arguments as FlowMLP; t, s and u are embedded alike.
    """

    _kind = "meta_flow_map"

    def average_velocity(
        self, obs: Tensor, xbar: Tensor, noisy_actions: Tensor, t: Tensor | float, s: Tensor | float, u: Tensor | float
    ) -> Tensor:
        """vhat [B, A], the velocity that carries xbar from inner time s to u in one step."""
        times = [self._time(value, xbar) for value in (t, s, u)]
        return self._mlp([obs, xbar, noisy_actions, *times])

    def forward(
        self,
        obs: Tensor,
        xbar: Tensor,
        noisy_actions: Tensor,
        t: Tensor | float,
        s: Tensor | float = 0.0,
        u: Tensor | float = 1.0,
    ) -> Tensor:
        """Returns the mapped point [B, A]; xbar, noisy_actions [B, A]; t, s, u [B, 1] or numbers in [0, 1]."""
        vhat = self.average_velocity(obs, xbar, noisy_actions, t, s, u)
        gap = torch.as_tensor(u, dtype=xbar.dtype, device=xbar.device) - torch.as_tensor(
            s, dtype=xbar.dtype, device=xbar.device
        )
        return xbar + gap * vhat


class CriticEnsemble(PackableNetwork):
    """q_values [E, B] of E equal MLPs with stacked parameters (weights[l] is [E, out, in]).

    Args:
        obs_dim: S.
        action_dim: A.
        num_critics: E, >= 1.
        hidden_dims: as FlowMLP's.
        activation: as FlowMLP's.
        layer_norm: as FlowMLP's.
        layer_norm_eps: as FlowMLP's.

    Raises:
        ValueError: for any argument outside these.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        num_critics: int = 10,
        hidden_dims: Sequence[int] = (512, 512, 512, 512),
        activation: str = "gelu_tanh",
        layer_norm: NormPlacement | Sequence[NormPlacement] = "post",
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        num_critics = _positive_int("CriticEnsemble", "num_critics", num_critics)
        spec = _make_spec(
            "critic", obs_dim, action_dim, hidden_dims, activation, layer_norm, layer_norm_eps, "raw", None,
            num_critics, "CriticEnsemble",
        )  # fmt: skip
        self.spec = replace(spec, stacked=True)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in self.spec.layer_dims:
            bound = 1 / math.sqrt(fan_in)  # nn.Linear's default initialisation, member by member
            self.weights.append(nn.Parameter(torch.empty(num_critics, fan_out, fan_in).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(num_critics, fan_out).uniform_(-bound, bound)))
        self.norm_weights = nn.ParameterList()
        self.norm_biases = nn.ParameterList()
        for width, placement in zip(self.spec.hidden_dims, self.spec.layer_norm):
            if placement:
                self.norm_weights.append(nn.Parameter(torch.ones(num_critics, width)))
                self.norm_biases.append(nn.Parameter(torch.zeros(num_critics, width)))

    def flat_parameters(self) -> list[Tensor]:
        flat: list[Tensor] = []
        # the lists' own dicts: iterating a ParameterList costs microseconds an entry, at every call
        weights, biases, norm_weights, norm_biases = (
            plist._parameters.values() for plist in (self.weights, self.biases, self.norm_weights, self.norm_biases)
        )
        norms = iter(zip(norm_weights, norm_biases))
        for weight, bias, placement in zip(weights, biases, (*self.spec.layer_norm, None)):
            flat += [weight, bias, *(next(norms) if placement else ())]  # type: ignore[list-item]
        return flat

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Returns q_values [E, B] at obs [B, S], actions [B, A]."""
        act = ACTIVATIONS[self.spec.activation].function
        h = torch.cat([obs, actions], dim=-1).expand(self.spec.num_members, -1, -1)
        norms = iter(zip(self.norm_weights, self.norm_biases))
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))
            if index == len(self.spec.hidden_dims):
                return h.squeeze(-1)
            placement = self.spec.layer_norm[index]
            if placement == "post":
                h = act(h)
            if placement is not None:
                scale, shift = next(norms)
                h = F.layer_norm(h, h.shape[-1:], eps=self.spec.layer_norm_eps)
                h = torch.addcmul(shift.unsqueeze(1), h, scale.unsqueeze(1))
            if placement != "post":
                h = act(h)
        raise AssertionError("unreachable: the last Linear returns")
