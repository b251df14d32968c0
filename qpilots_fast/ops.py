"""torch.ops.qpilots.*: the pieces of the method as PyTorch operators with fakes and first-order autograd.

The functions of this module take networks (FlowMLP, CriticEnsemble, from_module(...)) and numbers; the operators
beneath take the networks' parameters as a flat list and their spec as JSON, so that `torch.compile` sees tensors
alone. Networks run on the backend asked for; gradients with respect to obs and actions come from its own
vector-Jacobian product, gradients of parameters, t, and of whole samples from autograd through the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .bounds import as_lists
from .loop_conventions import NOISE_AT_ZERO, check_step, check_time, from_convention, time_rows
from .networks import PackableNetwork
from .op_networks import (
    packed_network,
    pessimistic_otherwise,
    step_otherwise,
    values_otherwise,
    velocity_otherwise,
)
from .op_transforms import call
from .spec import NetworkSpec, SamplerSpec
from .steering import AGGREGATIONS, Steering, check_choice, check_number, plain

__all__ = [
    "clean_actions",
    "critic_values",
    "pessimistic_q",
    "posterior_weights",
    "sample",
    "steer_step",
    "steer_update",
    "steer_velocity",
    "velocity",
]


def _check_rows(op: str, obs: Tensor, actions: Tensor, spec: NetworkSpec) -> None:
    if obs.ndim != 2 or obs.shape[1] != spec.obs_dim:
        raise ValueError(f"{op}: obs has shape {list(obs.shape)}; expected [B, {spec.obs_dim}].")
    if actions.ndim != 2 or actions.shape[1] != spec.action_dim or actions.shape[0] != obs.shape[0]:
        raise ValueError(
            f"{op}: actions have shape {list(actions.shape)}; expected [{obs.shape[0]}, {spec.action_dim}]."
        )


def velocity(
    obs: Tensor,
    noisy_actions: Tensor,
    t: Tensor | float,
    flow: PackableNetwork,
    *,
    precision: str = "float32",
    backend: str = "auto",
) -> Tensor:
    """v(obs, x, t), [B, A].

    Args:
        obs: [B, S].
        noisy_actions: x, [B, A].
        t: in [0, 1]: a number, [B] or [B, 1].
        flow: FlowMLP, or `from_module(...)`.
        precision: of its weights and products, as SteeredSampler's.
        backend: as SteeredSampler's.

    Raises:
        ValueError: for shapes that do not fit, and t outside [0, 1].
        TypeError: for a flow that is not packed; the message says what to call.
        BackendUnavailable: where a backend asked for by name cannot run.
    """
    flow = packed_network("velocity", "flow", flow, obs, noisy_actions, velocity_otherwise)
    _check_rows("velocity", obs, noisy_actions, flow.spec)
    times = time_rows("velocity", t, noisy_actions)
    return call("velocity", obs, noisy_actions, times, flow.flat_parameters(), flow.spec.json, precision, backend)


def critic_values(
    obs: Tensor, actions: Tensor, critic: PackableNetwork, *, precision: str = "float32", backend: str = "auto"
) -> Tensor:
    """The members' values [E, B].

    Args:
        obs: [B, S].
        actions: [B, A].
        critic: CriticEnsemble, or `from_module(...)`.
        precision: of its weights and products, as SteeredSampler's.
        backend: as SteeredSampler's.

    Raises:
        ValueError: for shapes that do not fit.
        TypeError: for a critic that is not packed; the message says what to call.
        BackendUnavailable: where a backend asked for by name cannot run.
    """
    critic = packed_network("critic_values", "critic", critic, obs, actions, partial(values_otherwise, critic))
    _check_rows("critic_values", obs, actions, critic.spec)
    return call("critic_values", obs, actions, critic.flat_parameters(), critic.spec.json, precision, backend)


def pessimistic_q(
    obs: Tensor,
    actions: Tensor,
    critic: PackableNetwork,
    rho: float = 0.5,
    *,
    aggregation: str = "pessimistic",
    precision: str = "float32",
    backend: str = "auto",
) -> Tensor:
    """Qbar = mean_j Q_j - rho std_j Q_j (population std), or the "mean" or "min" over members: [B].

    Its gradient where all members agree (std = 0) is that of the mean. Other arguments and errors as `critic_values`.

    Args:
        rho: pessimism, >= 0, in standard deviations.
        aggregation: "pessimistic", "mean" or "min".

    Raises:
        ValueError: for another aggregation, a negative rho, and what `critic_values` refuses.
    """
    check_choice("pessimistic_q: aggregation", aggregation, AGGREGATIONS)
    rho = plain(rho)
    check_number("pessimistic_q: rho", rho, 0.0)
    otherwise = partial(pessimistic_otherwise, critic, aggregation, rho)
    critic = packed_network("pessimistic_q", "critic", critic, obs, actions, otherwise)
    _check_rows("pessimistic_q", obs, actions, critic.spec)
    parameters, spec = critic.flat_parameters(), critic.spec.json
    return call("pessimistic_q", obs, actions, parameters, spec, rho, aggregation, precision, backend)


def clean_actions(noisy_actions: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """Posterior mean of the clean action, x + (1 - t) v: [B, A] or [B, C, D].

    Args:
        noisy_actions: x, [B, A] or chunks [B, C, D]; half precision is computed in float32, returned as given.
        velocity: v, as noisy_actions.
        t: in [0, 1], 0 at the noise: a number, [B], [B, 1], or per token [B, C].

    Raises:
        ValueError: for other shapes, and t outside [0, 1] (looked at where it is a number or on the CPU).
    """
    _same_shape("clean_actions", noisy_actions=noisy_actions, velocity=velocity)
    check_time("clean_actions", t)
    x, v = _float_rows(noisy_actions, velocity)
    result = call("clean_actions", x, v, time_rows("clean_actions", t, noisy_actions).to(x.dtype))
    return _as_given(result, noisy_actions)


def steer_update(
    noisy_actions: Tensor,
    velocity: Tensor,
    q_grad: Tensor,
    dt: float,
    alpha: float = 0.2,
    eps: float = 1e-8,
    steered_dims: Sequence[int] | None = None,
) -> Tensor:
    """x + dt (v + alpha ||v|| / (||g|| + eps) g), row by row: [B, A] or [B, C, D], dt > 0.

    A row whose g is not finite takes the plain step.

    Args:
        noisy_actions: x, [B, A] or chunks [B, C, D]; half precision is computed in float32, returned as given.
        velocity: v, as noisy_actions.
        q_grad: g, as noisy_actions.
        dt: positive.
        alpha: strength, >= 0: the ratio of the added term to the velocity.
        eps: positive.
        steered_dims: of the flattened row: norms and g count only over these (a chunk is one row: its norms run over
            all tokens). None: all.

    Raises:
        ValueError: for shapes that differ, and numbers out of range.
        TypeError: for tensors that are not floating.
    """
    check_step("steer_update", NOISE_AT_ZERO, dt)
    x, v, g, *rest = _update_arguments("steer_update", noisy_actions, velocity, q_grad, alpha, eps, steered_dims)
    return _as_given(call("steer_update", x, v, g, dt, *rest), noisy_actions)


def _update_arguments(
    op: str,
    noisy_actions: Tensor,
    velocity: Tensor,
    q_grad: Tensor,
    alpha: float,
    eps: float,
    steered_dims: Sequence[int] | None,
) -> tuple[Any, ...]:
    """What the operator steer_update takes, without dt."""  # fmt: skip
    _same_shape(op, noisy_actions=noisy_actions, velocity=velocity, q_grad=q_grad)
    x, v, g = _float_rows(noisy_actions, velocity, q_grad)
    dims = None if steered_dims is None else [int(d) for d in steered_dims]
    alpha, eps = plain(alpha), plain(eps)
    check_number(f"{op}: alpha", alpha, 0.0)
    check_number(f"{op}: eps", eps, 0.0, strict=True)
    if dims is not None and not all(0 <= d < x.shape[1] for d in dims):
        raise ValueError(f"{op}: steered_dims is {dims}; expected indices in [0, {x.shape[1]}).")
    return x, v, g, alpha, eps, dims


def posterior_weights(q_values: Tensor, tau: float = 1.0, q_scale: float = 1.0) -> Tensor:
    """softmax_n(tau Qbar_n / q_scale) over the first axis, [N, B].

    Args:
        q_values: Qbar, [N, B].
        tau: positive.
        q_scale: positive, in units of Q.

    Raises:
        ValueError: for a tau or q_scale that is not > 0.
    """
    tau, q_scale = plain(tau), plain(q_scale)
    check_number("posterior_weights: tau", tau, 0.0, strict=True)
    check_number("posterior_weights: q_scale", q_scale, 0.0, strict=True)
    return call("posterior_weights", q_values, tau, q_scale)


_DEFAULT_STEP = Steering.qpilots_u(jacobian="identity")


def steer_step(
    noisy_actions: Tensor,
    velocity: Tensor,
    t: Tensor | float,
    dt: float,
    *,
    obs: Tensor | None = None,
    critic: PackableNetwork | None = None,
    q_grad: Tensor | None = None,
    steering: Steering | None = None,
    action_low: Any = -1.0,
    action_high: Any = 1.0,
    convention: str = NOISE_AT_ZERO,
    precision: str = "float32",
    backend: str = "auto",
) -> Tensor:
    """One steered Euler step for anybody's loop: project, critic gradient, norm match, update.

    With obs and a packed critic, the gradient is taken at the clean-action estimate x + (1 - t) v (clipped as
    steering says) and used as it is (jacobian="identity"); no autograd is involved. With q_grad, computed by the
    caller, only the update remains.

    Args:
        noisy_actions: x, [B, A], or chunks [B, C, D]: one row each, whose norms run over all tokens and whose
            steered_dims index the flattened C D. Half precision is computed in float32, returned as given.
        velocity: v, as noisy_actions.
        t: in [0, 1]: a number, [B], [B, 1], or per token [B, C].
        dt: step length.
        obs: [B, S], what the critic reads; with critic, in place of q_grad.
        critic: CriticEnsemble, or `from_module(...)`.
        q_grad: g, as noisy_actions: your own gradient, in place of obs and critic.
        steering: defaults to Steering.qpilots_u(jacobian="identity").
        action_low: lower bounds of the estimate, where the steering clips it; as SteeredSampler's.
        action_high: the upper bounds of the same.
        convention: "noise_at_zero" (time runs from 0 to 1, dt > 0, velocity = action - noise) or "noise_at_one"
            (openpi, LeRobot, diffusers: from 1 to 0, dt < 0, velocity = noise - action).
        precision: of the critic's weights and products, as SteeredSampler's.
        backend: as SteeredSampler's.

    Returns:
        noisy actions at t + dt, in the shape and dtype of noisy_actions.

    Raises:
        ValueError: unless exactly one of (obs and critic) and q_grad is given; for steering that needs the flow's
            Jacobian or posterior draws; for dt or t that convention does not allow.
        TypeError: for a critic that is not packed; the message says what to pass.
        BackendUnavailable: where a backend asked for by name cannot run.
    """
    check_step("steer_step", convention, dt)
    arguments = _step_arguments(
        "steer_step", noisy_actions, velocity, t, obs, critic, q_grad, steering, action_low, action_high, convention,
        precision, backend,
    )  # fmt: skip
    length = dt if convention == NOISE_AT_ZERO else -dt
    if arguments is None:
        return _as_given(_plain_step(noisy_actions, velocity, dt), noisy_actions)
    if q_grad is not None:
        x, v, g, *rest = arguments
        stepped = call("steer_update", x, v, g, length, *rest)
    else:
        obs, x, v, times, parameters, *rest = arguments
        stepped = call("steer_step", obs, x, v, times, parameters, length, *rest)
    return _as_given(stepped, noisy_actions)


def steer_velocity(
    noisy_actions: Tensor,
    velocity: Tensor,
    t: Tensor | float,
    *,
    obs: Tensor | None = None,
    critic: PackableNetwork | None = None,
    q_grad: Tensor | None = None,
    steering: Steering | None = None,
    action_low: Any = -1.0,
    action_high: Any = 1.0,
    convention: str = NOISE_AT_ZERO,
    precision: str = "float32",
    backend: str = "auto",
) -> Tensor:
    """The steered velocity v + alpha ||v|| / (||g|| + eps) g alone, for any integrator (Heun, multistep, a scheduler).

    Arguments, shapes and errors are those of `steer_step`, without dt. What is returned is a velocity of the same
    convention as the one given, in its shape and dtype: a Euler step of it is `steer_step`.
    """
    arguments = _step_arguments(
        "steer_velocity", noisy_actions, velocity, t, obs, critic, q_grad, steering, action_low, action_high,
        convention, precision, backend,
    )  # fmt: skip
    if arguments is None:
        return velocity
    if q_grad is not None:
        x, v, g, *rest = arguments
        steered = call("steer_update", torch.zeros_like(x), v, g, 1.0, *rest)  # 0 + 1 v' is v', exactly
    else:
        steered = call("steer_velocity", *arguments)
    return _as_given(steered if convention == NOISE_AT_ZERO else -steered, velocity)


def _step_arguments(
    op: str,
    noisy_actions: Tensor,
    velocity: Tensor,
    t: Tensor | float,
    obs: Tensor | None,
    critic: PackableNetwork | None,
    q_grad: Tensor | None,
    steering: Steering | None,
    action_low: Any,
    action_high: Any,
    convention: str,
    precision: str,
    backend: str,
) -> tuple[Any, ...] | None:
    """What the operators of one step take, without dt: of steer_update with q_grad, else of steer_velocity.

    None where the steering asks no critic.
    """
    steering = _DEFAULT_STEP if steering is None else steering
    _same_shape(op, noisy_actions=noisy_actions, velocity=velocity)
    _refuse_settings_of_a_call(op, steering, q_grad)
    if (q_grad is None) == (critic is None):
        raise ValueError(f"{op}: expected either obs and critic, or q_grad, and not both.")
    v, time = from_convention(op, convention, velocity, t)
    if not steering.steers:
        return None
    times = time_rows(op, time, noisy_actions)
    if q_grad is not None:
        if steering.scale != "norm_match":
            raise ValueError(f"{op}: q_grad with scale={steering.scale!r}; expected 'norm_match', or obs and critic.")
        return _update_arguments(op, noisy_actions, v, q_grad, steering.alpha, steering.eps, steering.steered_dims)
    if steering.uses_posterior or (steering.estimate == "tweedie" and steering.jacobian == "full"):
        raise ValueError(
            f"{op}: estimate={steering.estimate!r} with jacobian={steering.jacobian!r} needs the flow network, "
            "and only its velocity was given; expected jacobian='identity', or q_grad computed by you."
        )
    if obs is None:
        raise ValueError(f"{op}: obs is None; the critic needs obs [B, S].")
    otherwise = partial(step_otherwise, op, critic, steering, action_low, action_high, convention)
    critic = packed_network(op, "critic", critic, obs, noisy_actions, otherwise)
    parameters, spec = critic.flat_parameters(), critic.spec.json
    obs, x, v = _float_rows(obs, noisy_actions, v)
    _check_rows(op, obs, x, critic.spec)
    times = times.to(x.dtype)
    low, high = as_lists(action_low, action_high, x.shape[1], noisy_actions.shape[1:])
    return obs, x, v, times, parameters, spec, steering.json, low, high, precision, backend


def _plain_step(noisy_actions: Tensor, velocity: Tensor, dt: float) -> Tensor:
    x, v = _float_rows(noisy_actions, velocity)
    return x + dt * v


def _refuse_settings_of_a_call(op: str, steering: Steering, q_grad: Tensor | None) -> None:
    """Raises for what a single step cannot follow."""
    for name, absent, cure in (
        ("step_weights", None, "multiply Steering.alpha by the step's weight"),
        ("window", None, "call it at the steps inside the window alone"),
        ("num_candidates", 1, "step every candidate and rank them by ops.pessimistic_q"),
        ("final_steps", 0, "move the finished action by the gradient of ops.pessimistic_q"),
    ):
        if getattr(steering, name) != absent:
            raise ValueError(
                f"{op}: Steering.{name} is {getattr(steering, name)!r}, which is of a whole call; expected {absent} "
                f"for a single step: {cure}."
            )
    if q_grad is not None and steering.max_disagreement is not None:
        raise ValueError(
            f"{op}: q_grad with Steering.max_disagreement, which needs the critics' values; expected obs and critic, "
            "or None."
        )


def sample(
    obs: Tensor,
    noise: Tensor,
    posterior_noise: Tensor | None,
    parameters: Sequence[Tensor],
    spec: SamplerSpec,
    backend: str = "auto",
    alpha: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The whole steered loop as one operator: actions [B, A], then gradient_norms, nonfinite, q_std, gated [K, B].

    What SteeredSampler calls inside torch.compile; parameters are flow's, critic's and posterior's
    flat_parameters(), joined; alpha [B] the strength of each row, None the steering's. Its gradients are those of the
    unrolled reference loop.
    """
    own = () if alpha is None else (alpha,)
    return call("sample", obs, noise, posterior_noise, list(parameters), spec.json, backend, *own)


def _same_shape(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"{op}: {name} is {got}; expected a floating Tensor (torch.as_tensor(..., dtype=...)).")
    (first_name, first), *others = tensors.items()
    if first.ndim not in (2, 3):
        raise ValueError(f"{op}: {first_name} has shape {list(first.shape)}; expected [B, A] or [B, C, D].")
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected {list(first.shape)}.")


def _float_rows(*tensors: Tensor) -> list[Tensor]:
    """Chunks as rows; half precision as float32, as norms and steps in it would lose the push."""
    rows = (t.flatten(1) if t.ndim == 3 else t for t in tensors)
    return [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in rows]


def _as_given(rows: Tensor, given: Tensor) -> Tensor:
    rows = rows.reshape(given.shape) if given.ndim == 3 else rows
    return rows.to(given.dtype)
