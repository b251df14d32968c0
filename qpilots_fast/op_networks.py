"""The packed network that an operator was given, and what to do where it was given another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .bounds import read_bound
from .callables import is_list, name_of, unwrapped
from .loop_conventions import NOISE_AT_ZERO
from .networks import PackableNetwork
from .steering import Steering


def packed_network(
    op: str, kind: str, network: Any, obs: Any, actions: Tensor, otherwise: Callable[[], str]
) -> PackableNetwork:
    """The packed network inside wrappers.

    Args:
        kind: "flow" or "critic"; also the argument's name.
        obs, actions: [B, S], [B, A]; their widths stand in the advice.
        otherwise: says what to do where from_module refuses.

    Raises:
        TypeError: for anything else, with what to pass.
    """
    found = unwrapped(network)
    if isinstance(found, PackableNetwork):
        if found.spec.kind != kind:
            raise TypeError(f"{op}: {kind} is {name_of(found)}, a packed {found.spec.kind}; expected a packed {kind}.")
        if found.spec.own_columns is not None:
            raise TypeError(
                f"{op}: {kind} is {name_of(found)}, and {found.spec.own_columns}, which operators do not read (a "
                f"SteeredSampler does); {otherwise()}"
            )
        return found
    raise TypeError(f"{op}: {kind} is {name_of(network)}; expected {_cure(kind, network, obs, actions)}{otherwise()}")


def _cure(kind: str, network: Any, obs: Any, actions: Tensor) -> str:
    ours = {"flow": "FlowMLP", "critic": "CriticEnsemble"}[kind]
    if not isinstance(network, (nn.Module, list, tuple)):
        return f"{ours} or what qpilots_fast.from_module(module, {kind!r}, ...) returns for an nn.Module. Otherwise, "
    obs_dim = obs.shape[-1] if isinstance(obs, Tensor) else "..."
    return (
        f"{ours} or what from_module returns: {kind} = qpilots_fast.from_module({kind}, {kind!r}, obs_dim={obs_dim}, "
        f"action_dim={actions[:1].numel()}). Where it refuses, "
    )


def velocity_otherwise() -> str:
    return "call it yourself: velocity = flow(obs, noisy_actions, t)"


def values_otherwise(critic: Any) -> str:
    return f"ask it yourself: {_ask(critic, 'actions')}"


def pessimistic_otherwise(critic: Any, aggregation: str, rho: float) -> str:
    return f"ask it yourself: {_ask(critic, 'actions')}; {_aggregate(aggregation, rho)}"


def _ask(critic: Any, actions: str) -> str:
    """Code that makes q_values [E, B] of any critic."""
    as_one = f"lambda obs, {actions}: [q(obs, {actions}) for q in critic]"
    asked = as_one if isinstance(critic, (list, tuple)) or is_list(critic) else "critic"
    return f"q_values = qpilots_fast.critic_outputs.ask_critic({asked}, obs, {actions})"


def _aggregate(aggregation: str, rho: float) -> str:
    return f"q_bar = qpilots_fast.reference.aggregate(q_values, {aggregation!r}, {rho!r})"


def step_otherwise(op: str, critic: Any, steering: Steering, low: Any, high: Any, convention: str) -> str:
    """The gradient of any critic, to be given in place of obs and critic."""
    if steering.scale != "norm_match":
        return (
            f"note that q_grad, computed by you, goes with scale='norm_match' alone, and this steering has scale="
            f"{steering.scale!r}; SteeredSampler takes any critic with any scale."
        )
    at_zero = convention == NOISE_AT_ZERO
    clean = f"qpilots_fast.ops.clean_actions(x, {'v, t' if at_zero else '-v, 1 - t'})"
    estimate = "x" if steering.estimate == "noisy" else clean
    clamp = "" if steering.clip == "none" else _clamp(low, high)
    return (
        f"take the gradient yourself and call {op}(..., q_grad=q_grad) without obs and critic: "
        f"a = {estimate}.detach(){clamp}.requires_grad_(); "
        f"{_ask(critic, 'a')}; {_aggregate(steering.aggregation, steering.rho)}; "
        "q_grad = torch.autograd.grad(q_bar.sum(), a)[0]"
        + (" (low, high: your bounds as tensors)" if "low, high" in clamp else "")
    )


def _clamp(low: Any, high: Any) -> str:
    low, high = read_bound("action_low", low), read_bound("action_high", high)
    if isinstance(low, tuple) or isinstance(high, tuple):
        return ".clamp(low, high)"  # tensors of the caller's
    ends = [repr(float(end)) if math.isfinite(end) else "None" for end in (low, high)]
    return "" if ends == ["None", "None"] else f".clamp({', '.join(ends)})"
