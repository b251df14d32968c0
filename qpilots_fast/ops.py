"""torch.ops.qpilots.*: the pieces of the method as PyTorch operators with fakes and first-order autograd.

The functions of this module take networks (FlowMLP, CriticEnsemble, from_module(...)) and numbers; the operators
beneath take the networks' parameters as a flat list and their spec as JSON, so that `torch.compile` sees tensors
alone. Networks run on the backend asked for; gradients with respect to obs and actions come from its own
vector-Jacobian product, gradients of parameters, t, and of whole samples from autograd through the reference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .networks import PackableNetwork
from .op_implementations import FORWARDS, NETWORK_OPS, REFERENCES, backend_vjp, no_autocast, recompute_vjp
from .spec import NetworkSpec, SamplerSpec, network_spec_from_json
from .steering import AGGREGATIONS, Steering, check_choice, check_number

__all__ = [
    "clean_actions",
    "critic_values",
    "pessimistic_q",
    "posterior_weights",
    "sample",
    "steer_step",
    "steer_update",
    "velocity",
]

_lib = torch.library.Library("qpilots", "DEF")

_NETWORK_ARGS = "str spec, str precision, str backend"
_SCHEMAS = {
    "velocity": f"(Tensor obs, Tensor noisy_actions, Tensor t, Tensor[] parameters, {_NETWORK_ARGS}) -> Tensor",
    "critic_values": f"(Tensor obs, Tensor actions, Tensor[] parameters, {_NETWORK_ARGS}) -> Tensor",
    "pessimistic_q": "(Tensor obs, Tensor actions, Tensor[] parameters, str spec, float rho, str aggregation, "
    "str precision, str backend) -> Tensor",
    "clean_actions": "(Tensor noisy_actions, Tensor velocity, Tensor t) -> Tensor",
    "steer_update": "(Tensor noisy_actions, Tensor velocity, Tensor q_grad, float dt, float alpha=0.2, "
    "float eps=1e-8, int[]? steered_dims=None) -> Tensor",
    "posterior_weights": "(Tensor q_values, float tau=1.0, float q_scale=1.0) -> Tensor",
    "steer_step": "(Tensor obs, Tensor noisy_actions, Tensor velocity, Tensor t, Tensor[] parameters, float dt, "
    "str critic, str steering, float low, float high, str precision, str backend) -> Tensor",
    "sample": "(Tensor obs, Tensor noise, Tensor? posterior_noise, Tensor[] parameters, str spec, str backend) "
    "-> (Tensor, Tensor, Tensor)",
}


def _vjp_fake(
    name: str,
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    args_json: str,
    grad: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip(tensors, needs) if need]


def _gradients(
    name: str, tensors: list[Tensor], parameters: list[Tensor], args: list[Any], grad: Tensor, needs: list[bool]
) -> list[Tensor]:
    """Gradients of the tensors and parameters that need one, in order."""
    if name in NETWORK_OPS and not any(needs[2:]):
        return torch.ops.qpilots._vjp(name, tensors, parameters, json.dumps(args), grad.contiguous(), needs)
    with no_autocast(tensors[0]):
        found = recompute_vjp(REFERENCES[name], tensors, parameters, args, grad, needs)
    if torch.is_grad_enabled():  # create_graph=True: make a second derivative raise rather than vanish
        return list(_FirstOrderOnly.apply(len(found), *found, grad, *tensors, *parameters))
    return found


class _FirstOrderOnly(torch.autograd.Function):
    """Passes gradients through; refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone() for value in values[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _refuse_second_order(ctx, *grads)


def _split(name: str, arguments: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """An operator's arguments as (tensors, parameters, the rest)."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    parameters = next(
        (list(a) for a in arguments if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)), []
    )
    skip = 3 if name == "sample" else len(tensors)
    rest = list(arguments[skip + 1 :]) if parameters else list(arguments[skip:])
    return tensors, parameters, rest


def _fake_result(name: str, tensors: Sequence[Tensor], rest: Sequence[Any]) -> Any:
    if name in ("critic_values", "pessimistic_q"):
        dtype = torch.float64 if tensors[1].dtype == torch.float64 else torch.float32
        if name == "pessimistic_q":
            return tensors[1].new_empty(tensors[1].shape[0], dtype=dtype)
        return tensors[1].new_empty(network_spec_from_json(rest[0]).num_members, tensors[1].shape[0], dtype=dtype)
    if name == "velocity":
        dtype = torch.float64 if tensors[1].dtype == torch.float64 else torch.float32
        return tensors[1].new_empty(tensors[1].shape, dtype=dtype)
    if name == "sample":
        dtype = torch.float64 if torch.float64 in (tensors[0].dtype, tensors[1].dtype) else torch.float32
        steps = SamplerSpec.from_json(rest[0]).num_steps
        noise = tensors[1]
        per_step = (steps, noise.shape[0])
        return (
            noise.new_empty(noise.shape, dtype=dtype),
            noise.new_empty(per_step, dtype=dtype),
            noise.new_empty(per_step, dtype=torch.bool),
        )
    like = tensors[1] if name == "steer_step" else tensors[0]
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _register(name: str) -> None:
    def forward(*arguments: Any) -> Any:
        tensors, parameters, rest = _split(name, arguments)
        with torch.no_grad(), no_autocast(tensors[0]):
            return FORWARDS[name](tensors, parameters, *rest)

    def fake(*arguments: Any) -> Any:
        tensors, _, rest = _split(name, arguments)
        return _fake_result(name, tensors, rest)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, parameters, rest = _split(name, inputs)
        ctx.save_for_backward(*tensors, *parameters)
        ctx.counts = (len(tensors), len(parameters))
        ctx.rest = rest
        ctx.positions = [index for index, a in enumerate(inputs) if isinstance(a, Tensor)]
        ctx.list_position = next(
            (i for i, a in enumerate(inputs) if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)), None
        )
        ctx.num_inputs = len(inputs)
        if isinstance(output, tuple):  # gradient_norms and nonfinite are reports, not functions to differentiate
            ctx.mark_non_differentiable(*output[1:])

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        tensors, parameters = list(saved[: ctx.counts[0]]), list(saved[ctx.counts[0] :])
        needs = [bool(ctx.needs_input_grad[p]) for p in ctx.positions]
        parameter_needs: list[bool] = []
        if ctx.list_position is not None:
            flags = ctx.needs_input_grad[ctx.list_position]
            parameter_needs = list(flags) if isinstance(flags, (list, tuple)) else [bool(flags)] * len(parameters)
        results = iter(_gradients(name, tensors, parameters, ctx.rest, grads[0], [*needs, *parameter_needs]))
        answer: list[Any] = [None] * ctx.num_inputs
        for position, need in zip(ctx.positions, needs):
            answer[position] = next(results) if need else None
        if ctx.list_position is not None:
            answer[ctx.list_position] = [next(results) if need else None for need in parameter_needs]
        return tuple(answer)

    _lib.define(name + _SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
    _lib.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qpilots::{name}", fake, lib=_lib)
    torch.library.register_autograd(f"qpilots::{name}", backward, setup_context=setup_context, lib=_lib)


def _refuse_second_order(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "qpilots operators have first-order gradients only, but a gradient of a gradient was asked for "
        "(create_graph=True). Use the networks' own forward (flow(...), critic(...)) where you need second order."
    )


_lib.define(
    "_vjp(str op, Tensor[] tensors, Tensor[] parameters, str args, Tensor grad, bool[] needs) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_lib.impl("_vjp", backend_vjp, "CompositeExplicitAutograd")
torch.library.register_fake("qpilots::_vjp", _vjp_fake, lib=_lib)
torch.library.register_autograd("qpilots::_vjp", _refuse_second_order, lib=_lib)
for _name in _SCHEMAS:
    _register(_name)

# ---------------------------------------------------------------- the functions users call


def _parameters(network: PackableNetwork, kind: str, op: str) -> tuple[list[Tensor], str]:
    if not isinstance(network, PackableNetwork) or network.spec.kind != kind:
        got = network.spec.kind if isinstance(network, PackableNetwork) else type(network).__name__
        raise TypeError(f"{op}: the network is {got}; expected a {kind} network or from_module(module, kind={kind!r}).")
    return network.flat_parameters(), network.spec.json


def _check_rows(op: str, obs: Tensor, actions: Tensor, spec: NetworkSpec) -> None:
    if obs.ndim != 2 or obs.shape[1] != spec.obs_dim:
        raise ValueError(f"{op}: obs has shape {list(obs.shape)}; expected [B, {spec.obs_dim}].")
    if actions.ndim != 2 or actions.shape[1] != spec.action_dim or actions.shape[0] != obs.shape[0]:
        raise ValueError(
            f"{op}: actions have shape {list(actions.shape)}; expected [{obs.shape[0]}, {spec.action_dim}]."
        )


def _time(t: Tensor | float, like: Tensor) -> Tensor:
    """t as [B, 1] or [1, 1]."""
    if not isinstance(t, Tensor):
        return torch.full((1, 1), float(t), dtype=torch.float64, device=like.device)
    return t.reshape(-1, 1)


def velocity(
    obs: Tensor,
    noisy_actions: Tensor,
    t: Tensor | float,
    flow: PackableNetwork,
    *,
    precision: str = "float32",
    backend: str = "auto",
) -> Tensor:
    """v(obs, x, t): obs [B, S], noisy_actions [B, A], t [B, 1] or a number in [0, 1] -> [B, A]."""
    parameters, spec = _parameters(flow, "flow", "velocity")
    _check_rows("velocity", obs, noisy_actions, flow.spec)
    return torch.ops.qpilots.velocity(obs, noisy_actions, _time(t, obs), parameters, spec, precision, backend)


def critic_values(
    obs: Tensor, actions: Tensor, critic: PackableNetwork, *, precision: str = "float32", backend: str = "auto"
) -> Tensor:
    """q_values [E, B] at obs [B, S], actions [B, A]."""
    parameters, spec = _parameters(critic, "critic", "critic_values")
    _check_rows("critic_values", obs, actions, critic.spec)
    return torch.ops.qpilots.critic_values(obs, actions, parameters, spec, precision, backend)


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

    Its gradient where all members agree (std = 0) is that of the mean.
    """
    parameters, spec = _parameters(critic, "critic", "pessimistic_q")
    _check_rows("pessimistic_q", obs, actions, critic.spec)
    check_choice("pessimistic_q: aggregation", aggregation, AGGREGATIONS)
    check_number("pessimistic_q: rho", rho, 0.0)
    return torch.ops.qpilots.pessimistic_q(obs, actions, parameters, spec, rho, aggregation, precision, backend)


def clean_actions(noisy_actions: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """Posterior mean of the clean action, x + (1 - t) v: [B, A]; t [B, 1] or a number in [0, 1]."""
    _same_shape("clean_actions", noisy_actions=noisy_actions, velocity=velocity)
    return torch.ops.qpilots.clean_actions(noisy_actions, velocity, _time(t, noisy_actions).to(noisy_actions.dtype))


def steer_update(
    noisy_actions: Tensor,
    velocity: Tensor,
    q_grad: Tensor,
    dt: float,
    alpha: float = 0.2,
    eps: float = 1e-8,
    steered_dims: Sequence[int] | None = None,
) -> Tensor:
    """x + dt (v + alpha ||v|| / (||g|| + eps) g), row by row: [B, A].

    Norms and g count only over steered_dims where given; a row whose g is not finite takes the plain step.
    """
    _same_shape("steer_update", noisy_actions=noisy_actions, velocity=velocity, q_grad=q_grad)
    dims = None if steered_dims is None else list(steered_dims)
    check_number("steer_update: alpha", alpha, 0.0)
    check_number("steer_update: eps", eps, 0.0, strict=True)
    if dims is not None and not all(0 <= d < noisy_actions.shape[1] for d in dims):
        raise ValueError(f"steer_update: steered_dims is {dims}; expected indices in [0, {noisy_actions.shape[1]}).")
    return torch.ops.qpilots.steer_update(noisy_actions, velocity, q_grad, dt, alpha, eps, dims)


def posterior_weights(q_values: Tensor, tau: float = 1.0, q_scale: float = 1.0) -> Tensor:
    """softmax_n(tau Qbar_n / q_scale) over the first axis: q_values [N, B] -> [N, B]."""
    check_number("posterior_weights: tau", tau, 0.0, strict=True)
    check_number("posterior_weights: q_scale", q_scale, 0.0, strict=True)
    return torch.ops.qpilots.posterior_weights(q_values, tau, q_scale)


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
    action_low: float = -1.0,
    action_high: float = 1.0,
    precision: str = "float32",
    backend: str = "auto",
) -> Tensor:
    """One steered Euler step for anybody's loop: project, critic gradient, norm match, update.

    With obs and a packed critic, the gradient is taken at the clean-action estimate x + (1 - t) v (clipped as
    steering says) and used as it is (jacobian="identity"); no autograd is involved. With q_grad [B, A], computed
    by the caller, only the update remains.

    Args:
        noisy_actions, velocity: [B, A]. t: [B, 1] or a number in [0, 1]. dt: step length, 1/K.
        steering: defaults to Steering.qpilots_u(jacobian="identity").

    Returns:
        noisy actions [B, A] at t + dt.

    Raises:
        ValueError: unless exactly one of (obs and critic) and q_grad is given; for steering that needs the flow's
            Jacobian or posterior draws.
    """
    steering = _DEFAULT_STEP if steering is None else steering
    _same_shape("steer_step", noisy_actions=noisy_actions, velocity=velocity)
    if (q_grad is None) == (critic is None):
        raise ValueError("steer_step: expected either obs and critic, or q_grad, and not both.")
    if q_grad is not None:
        _same_shape("steer_step", noisy_actions=noisy_actions, q_grad=q_grad)
        if steering.scale != "norm_match":
            raise ValueError(
                f"steer_step: q_grad with scale={steering.scale!r}; expected 'norm_match', or obs and critic."
            )
        return steer_update(noisy_actions, velocity, q_grad, dt, steering.alpha, steering.eps, steering.steered_dims)
    if steering.uses_posterior or (steering.estimate == "tweedie" and steering.jacobian == "full"):
        raise ValueError(
            f"steer_step: estimate={steering.estimate!r} with jacobian={steering.jacobian!r} needs the flow network, "
            "and only its velocity was given; expected jacobian='identity', or q_grad computed by you."
        )
    if obs is None:
        raise ValueError("steer_step: obs is None; the critic needs obs [B, S].")
    parameters, spec = _parameters(critic, "critic", "steer_step")  # type: ignore[arg-type]
    _check_rows("steer_step", obs, noisy_actions, critic.spec)  # type: ignore[union-attr]
    times = _time(t, noisy_actions).to(noisy_actions.dtype)
    return torch.ops.qpilots.steer_step(
        obs, noisy_actions, velocity, times, parameters, dt, spec, steering.json, action_low, action_high,
        precision, backend,
    )  # fmt: skip


def sample(
    obs: Tensor,
    noise: Tensor,
    posterior_noise: Tensor | None,
    parameters: Sequence[Tensor],
    spec: SamplerSpec,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole steered loop as one operator: (actions [B, A], gradient_norms [K, B], nonfinite [K, B]).

    What SteeredSampler calls inside torch.compile; parameters are flow's, critic's and posterior's
    flat_parameters(), joined. Its gradients are those of the unrolled reference loop.
    """
    return torch.ops.qpilots.sample(obs, noise, posterior_noise, list(parameters), spec.json, backend)


def _same_shape(op: str, **tensors: Tensor) -> None:
    (first_name, first), *others = tensors.items()
    if first.ndim != 2:
        raise ValueError(f"{op}: {first_name} has shape {list(first.shape)}; expected [B, A].")
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected {list(first.shape)}.")
