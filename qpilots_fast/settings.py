"""The checks on what a sampler is made from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .callables import CriticList, unwrapped
from .critic_outputs import check_layout
from .integers import as_int
from .networks import PackableNetwork
from .spec import PRECISIONS
from .steering import Steering

if TYPE_CHECKING:
    from .sampler import SteeredSampler


def read_setting(name: str, value: Any) -> Any:
    """A setting of a sampler as it is kept."""
    if name == "num_steps":
        return as_int(value)
    if name == "chunk_shape" and isinstance(value, (tuple, list)):
        return tuple(map(as_int, value))
    if name == "critic" and isinstance(value, (list, tuple, nn.ModuleList)):
        return CriticList(value)
    if name in ("flow", "critic", "posterior") and isinstance(unwrapped(value), PackableNetwork):
        return unwrapped(value)  # the wrapper itself would run as a callable, many times slower
    return value


def check_bound(name: str, value: object) -> float:
    """An action bound as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; expected a finite number (actions are scaled to one common box).")
    return float(value)


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
    elif not callable(network):
        raise TypeError(f"{name} is {type(network).__name__}; expected a network or a callable.")


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


def check_settings(sampler: SteeredSampler) -> None:
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
    low, high = check_bound("action_low", sampler.action_low), check_bound("action_high", sampler.action_high)
    if not low < high:
        raise ValueError(f"action_low is {low:g} and action_high {high:g}; expected action_low < action_high.")
    check_layout(sampler.critic_layout)
    check_chunk_shape(sampler.chunk_shape, sampler.networks.values())
    for name, network, needed in (
        ("flow", sampler.flow, True),
        ("critic", sampler.critic, steering.steers or steering.num_candidates > 1),
        ("posterior", sampler.posterior, steering.steers and steering.estimate == "mfm"),
    ):
        check_network(name, network, needed)


def computes_float64(sampler: SteeredSampler) -> bool | None:
    """Whether float64 inputs are computed in float64; None where no network says it."""
    dtypes = [parameter.dtype for parameter in sampler.parameters() if parameter.is_floating_point()]
    if sampler.precision == "float64" or torch.float64 in dtypes:
        return True
    return False if dtypes else None
