"""The checks on what a sampler is made from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .bounds import check_bounds, read_bound
from .callables import CriticList, has_forward, is_list, name_of, unwrapped
from .critic_outputs import check_layout
from .from_module.calling import other_order
from .integers import as_int
from .joined_critics import JoinedCritics, are_alike
from .networks import PackableNetwork
from .spec import PRECISIONS
from .steering import Steering
from .user_warning import warn

if TYPE_CHECKING:
    from .sampler_state import SamplerState

DEFAULT_STEPS = 10
_ROUNDING = 1e-6  # what float32 leaves of 0 and 1


def read_setting(name: str, value: Any) -> Any:
    """A setting of a sampler as it is kept."""
    if name == "num_steps":
        return as_int(value)
    if name == "chunk_shape" and isinstance(value, (tuple, list)):
        return tuple(map(as_int, value))
    if name == "critic" and (is_list(value) or _are_modules(value)):
        members = [unwrapped(member) for member in value]
        if are_alike(members):
            return JoinedCritics(members)
        critics = CriticList(value)
        if is_list(value):
            critics._modules = value._modules  # what is put in the list later is moved and saved with it
        return critics
    if name == "time_grid":
        return _read_time_grid(value)
    if name in ("action_low", "action_high"):
        return read_bound(name, value)
    if name in ("flow", "critic", "posterior") and isinstance(unwrapped(value), PackableNetwork):
        return unwrapped(value)  # the wrapper itself would run as a callable, many times slower
    return value


def check_argument_order(name: str, network: Any) -> None:
    """Of a flow or critic that is given: a module's arguments are passed by place, and their names may say another.

    Raises:
        ValueError: where they contradict the order of the call; where they are only odd, a warning says so.
    """
    is_several = is_list(network) or _are_modules(network)
    network = nn.ModuleList(map(unwrapped, network)) if is_several else unwrapped(network)
    if name not in ("flow", "critic") or not isinstance(network, nn.Module) or isinstance(network, PackableNetwork):
        return
    order = other_order(network, name)
    if order is None:
        return
    called = f"and is called with ({order.given}), by place"
    cure = f"qpilots_fast.as_{name}(module, {order.call})"
    if order.is_certain:
        raise ValueError(
            f"{name} {name_of(network)}: its forward takes ({order.takes}), {called}; expected that order. Give {cure}."
        )
    warn(
        f"{name} {name_of(network)}: its forward takes ({order.takes}), {called}. Where the names mean another order, "
        f"give {cure}; in such a call you can also say that it is right."
    )


def _are_modules(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(member, nn.Module) for member in value)


def _read_time_grid(value: Any) -> tuple[float, ...] | None:
    """K + 1 increasing times from 0 to 1; None: even steps."""
    if value is None:
        return None
    try:
        times = tuple(float(t) for t in (value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value))
    except (TypeError, ValueError):
        raise TypeError(f"time_grid is {value!r}; expected K + 1 increasing numbers from 0 to 1, or None.") from None
    if len(times) < 2 or any(not b > a for a, b in pairwise(times)) or abs(times[0]) + abs(times[-1] - 1) > _ROUNDING:
        raise ValueError(
            f"time_grid is {value!r}; expected K + 1 increasing numbers from 0 (noise) to 1 (action). A scheduler's "
            "grid from 1 to 0 goes in as 1 - t."
        )
    return (0.0, *times[1:-1], 1.0)


def check_num_steps(given: object, steps: int) -> None:
    """Raises where num_steps was given beside a time_grid of another number of steps."""
    if steps != given and given != DEFAULT_STEPS and isinstance(given, int):
        raise ValueError(
            f"num_steps is {given}, but time_grid has {steps + 1} times, {steps} steps; expected one of the two."
        )


def check_network(name: str, network: object, needed: bool) -> None:
    """Raises unless the network fits its place."""
    kinds = {"flow": "flow", "critic": "critic", "posterior": "meta_flow_map"}
    if network is None:
        if needed:
            raise ValueError(f"{name} is None, but this steering needs one; give a network or a callable.")
        return
    if isinstance(network, PackableNetwork):
        if network.spec.kind != kinds[name]:
            raise TypeError(
                f"{name} is a {network.spec.kind} network ({type(network).__name__}); expected a {kinds[name]}."
            )
    elif isinstance(network, CriticList):
        if not len(network):
            raise ValueError("critic is an empty list; expected at least one critic.")
    elif not callable(network) or (isinstance(network, nn.Module) and not has_forward(network)):
        raise TypeError(f"{name} is {name_of(network)}; expected a network or a callable{_cure(name, network)}.")


# the arguments of each network's call, and of one made of several what it could return
_CALLS = {
    "flow": ("obs, noisy_actions, t", "sum(m(obs, noisy_actions, t) for m in {}) / len(modules)"),
    "critic": ("obs, actions", "[m(obs, actions) for m in {}]"),
    "posterior": ("obs, xbar, noisy_actions, t", "sum(m(obs, xbar, noisy_actions, t) for m in {}) / len(modules)"),
}


def _cure(name: str, network: Any) -> str:
    """What to do with several modules, or functions."""
    if not isinstance(network, (list, tuple, dict, nn.ModuleList, nn.ModuleDict)):
        return ""
    arguments, together = _CALLS[name]
    is_dict = isinstance(network, (dict, nn.ModuleDict))
    code = together.format("modules.values()" if is_dict else "modules")
    return (
        f". Say what several make together: qpilots_fast.as_{name}({name}, call=lambda modules, {arguments}: {code}), "
        "for one"
    )


def check_chunk_shape(chunk: object, networks: Iterable[object]) -> None:
    """Raises unless chunk is None or (C, D), with C D the action width of the networks that tell it."""
    if chunk is None:
        return
    if not isinstance(chunk, tuple) or len(chunk) != 2 or not all(type(n) is int and n >= 1 for n in chunk):
        raise ValueError(f"chunk_shape is {chunk!r}; expected (C, D), two integers >= 1, or None.")
    for network in networks:
        if isinstance(network, PackableNetwork) and network.spec.action_dim != math.prod(chunk):
            raise ValueError(
                f"chunk_shape is {chunk!r}, {math.prod(chunk)} numbers, but {type(network).__name__} has "
                f"action_dim={network.spec.action_dim}; expected C D = {network.spec.action_dim}."
            )


def check_settings(sampler: SamplerState) -> None:
    """Raises ValueError or TypeError for the first setting of a sampler that is none."""
    if not isinstance(sampler.steering, Steering):
        raise TypeError(
            f"steering is {type(sampler.steering).__name__}; expected a Steering, e.g. Steering.qpilots_u()."
        )
    steering = sampler.steering
    if isinstance(sampler.num_steps, bool) or not isinstance(sampler.num_steps, int) or sampler.num_steps < 1:
        raise ValueError(f"num_steps is {sampler.num_steps!r}; expected an integer >= 1.")
    if sampler.precision not in PRECISIONS:
        raise ValueError(f"precision is {sampler.precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}.")
    check_bounds(sampler.action_low, sampler.action_high)
    if sampler.time_grid is not None and len(sampler.time_grid) != sampler.num_steps + 1:
        raise ValueError(
            f"num_steps is {sampler.num_steps}, but time_grid has {len(sampler.time_grid)} times, "
            f"{len(sampler.time_grid) - 1} steps; expected num_steps to be left out, or time_grid=None."
        )
    if steering.critic_time and isinstance(sampler.critic, PackableNetwork):
        raise ValueError(
            f"Steering.critic_time asks Q(obs, a, t), but {type(sampler.critic).__name__} is packed as Q(obs, a); "
            "expected a callable critic(obs, actions, t [B, 1]) -> q_values, or critic_time=False."
        )
    check_layout(sampler.critic_layout)
    check_chunk_shape(sampler.chunk_shape, sampler.networks.values())
    for name, network, needed in (
        ("flow", sampler.flow, True),
        ("critic", sampler.critic, steering.needs_critic),
        ("posterior", sampler.posterior, steering.steers and steering.estimate == "mfm"),
    ):
        check_network(name, network, needed)


def computes_float64(sampler: SamplerState) -> bool | None:
    """Whether float64 inputs are computed in float64; None where no network says it."""
    dtypes = [parameter.dtype for parameter in sampler.parameters() if parameter.is_floating_point()]
    if sampler.precision == "float64" or torch.float64 in dtypes:
        return True
    return False if dtypes else None
