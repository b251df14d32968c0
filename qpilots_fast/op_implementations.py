"""What the operators compute: on a backend, and as differentiable references for what no backend differentiates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from .backends import Backend, Call, Request, RowKernels
from .bounds import as_operands
from .evaluators import NetworkCall, backend_call, compute_dtype, packed_critic, reference_call, reference_evaluators
from .inputs import check_actions
from .networks import bind
from .spec import BoundNetwork, BoundNetworks, NetworkSpec, SamplerSpec, network_spec_from_json
from .steering import Steering

# ---------------------------------------------------------------- differentiable references, by operator name
# Each takes the operator's tensors, the flat parameters and the remaining arguments, in the schema's order.


def _network_forward(
    tensors: Sequence[Tensor], parameters: Sequence[Tensor], spec_json: str, precision: str
) -> tuple[NetworkSpec, Tensor]:
    spec = network_spec_from_json(spec_json)
    blocks = spec.ordered(_named_inputs(spec, tensors))
    dtype = compute_dtype(precision, *tensors[:2])
    return spec, reference.ReferenceNetwork(bind(spec, parameters), dtype, precision)(blocks)[0]


def _velocity_reference(
    tensors: Sequence[Tensor], parameters: Sequence[Tensor], spec_json: str, precision: str, backend: str
) -> Tensor:
    return _network_forward(tensors, parameters, spec_json, precision)[1][0]


def _critic_values_reference(
    tensors: Sequence[Tensor], parameters: Sequence[Tensor], spec_json: str, precision: str, backend: str
) -> Tensor:
    spec, output = _network_forward(tensors, parameters, spec_json, precision)
    return spec.head(output)[0]


def _pessimistic_q_reference(
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    spec_json: str,
    rho: float,
    aggregation: str,
    precision: str,
    backend: str,
) -> Tensor:
    q_values = _critic_values_reference(tensors, parameters, spec_json, precision, backend)
    return reference.aggregate(q_values, aggregation, rho)


def _clean_actions_reference(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    return reference.clean_actions(*tensors)


def _steer_update_reference(
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    dt: float,
    alpha: float = 0.2,  # the dispatcher leaves out trailing arguments that equal the schema's defaults
    eps: float = 1e-8,
    steered_dims: list[int] | None = None,
) -> Tensor:
    noisy_actions, v, q_grad = tensors
    return noisy_actions + dt * reference.steer_velocity(v, q_grad, _norm_match(alpha, eps, steered_dims))[0]


def _norm_match(alpha: float, eps: float, steered_dims: list[int] | None) -> Steering:
    return Steering(alpha=alpha, eps=eps, steered_dims=None if steered_dims is None else tuple(steered_dims))


def _posterior_weights_reference(
    tensors: Sequence[Tensor], parameters: Sequence[Tensor], tau: float = 1.0, q_scale: float = 1.0
) -> Tensor:
    return reference.posterior_weights(tensors[0], tau, q_scale)


_Place = Callable[[NetworkSpec, str, str], tuple[BoundNetwork, NetworkCall]]


def _reference_place(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> _Place:
    def place(spec: NetworkSpec, precision: str, backend: str) -> tuple[BoundNetwork, NetworkCall]:
        network = bind(spec, parameters)
        return network, reference_call(network, compute_dtype(precision, tensors[1]), precision)

    return place


def _backend_place(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> _Place:
    def place(spec: NetworkSpec, precision: str, backend: str) -> tuple[BoundNetwork, NetworkCall]:
        network = bind(spec, [p.detach() for p in parameters])
        return network, backend_call(_network_backend(backend, precision, tensors[1], spec), network, precision)

    return place


def _steer_step_reference(tensors: Sequence[Tensor], parameters: Sequence[Tensor], *args: Any) -> Tensor:
    return _steer_step(tensors, _reference_place(tensors, parameters), *args)


def _steer_step(tensors: Sequence[Tensor], place: _Place, dt: float, *args: Any) -> Tensor:
    return tensors[1] + dt * _steer_velocity(tensors, place, *args)


def _steer_velocity_reference(tensors: Sequence[Tensor], parameters: Sequence[Tensor], *args: Any) -> Tensor:
    return _steer_velocity(tensors, _reference_place(tensors, parameters), *args)


def _steer_velocity(tensors: Sequence[Tensor], place: _Place, *args: Any) -> Tensor:
    g, std, steering = _steering_gradient(tensors, place, *args)
    return reference.steer_velocity(tensors[2], g, steering, std)[0]


def _steering_gradient(
    tensors: Sequence[Tensor],
    place: _Place,
    spec_json: str,
    steering_json: str,
    low: Sequence[float],
    high: Sequence[float],
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor | None, Steering]:
    """g [B, A], the critics' std [B], and the steering."""
    obs, noisy_actions, v, t = tensors
    steering, spec = Steering.from_json(steering_json), network_spec_from_json(spec_json)
    critic = packed_critic(*place(spec, precision, backend), obs)
    net = reference.Evaluators(flow=lambda *_: (v, lambda d: d), critic=critic)
    bounds = as_operands(low, high, noisy_actions)
    g, std = reference.steering_gradient(net, steering, noisy_actions, v, lambda d: d, t, None, bounds)
    return g, std, steering


def _sample_reference(
    tensors: Sequence[Tensor], parameters: Sequence[Tensor], spec_json: str, backend: str
) -> tuple[Tensor, ...]:
    obs, noise, eps, alpha = sample_inputs(tensors)
    spec = SamplerSpec.from_json(spec_json)
    dtype = compute_dtype(spec.precision, obs, noise)
    net = reference_evaluators(_bind_sampler(spec, parameters), obs.to(dtype), dtype, spec.precision)
    eps, alpha = (None if value is None else value.to(dtype) for value in (eps, alpha))
    raw = reference.sample(net, spec.steering, spec.schedule, noise.to(dtype), eps, spec.bounds(obs.to(dtype)), alpha)
    assert raw.report is not None
    return raw.actions, *raw.report


def sample_inputs(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """obs, noise, posterior_noise [K, B, N, A] and alpha [B], of which the last two may have been left out."""
    obs, noise, *rest = tensors
    eps, alpha = (next((value for value in rest if value.ndim == ndim), None) for ndim in (4, 1))
    return obs, noise, eps, alpha


def _bind_sampler(spec: SamplerSpec, parameters: Sequence[Tensor]) -> BoundNetworks:
    """Splits the flat list of flow, critic and posterior parameters."""
    bound, start = {}, 0
    for name, network in spec.networks.items():
        count = len(network.parameter_shapes)
        bound[name] = bind(network, parameters[start : start + count])
        start += count
    return BoundNetworks(**bound)


# ---------------------------------------------------------------- forward on a backend


def _network_backend(name: str, precision: str, like: Tensor, spec: NetworkSpec) -> Backend:
    return backends.choose(Request(name, precision, like.device, like.dtype, networks=(spec,))).backend


def _blocks(spec: NetworkSpec, named: dict[str, Tensor], like: Tensor) -> list[Tensor]:
    dtype = compute_dtype("float32", like)
    return [block.detach().to(dtype).contiguous() for block in spec.ordered(named)]


def _named_inputs(spec: NetworkSpec, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    if spec.kind == "critic":
        return {"obs": tensors[0], "actions": tensors[1]}
    times = spec.time_inputs(tensors[2], len(tensors[1]), tensors[1].device)
    return {"obs": tensors[0], "noisy_actions": tensors[1], **times}


def _run_network(
    tensors: Sequence[Tensor], parameters: Sequence[Tensor], spec_json: str, precision: str, backend: str
) -> Tensor:
    spec = network_spec_from_json(spec_json)
    chosen = _network_backend(backend, precision, tensors[1], spec)
    blocks = _blocks(spec, _named_inputs(spec, tensors), tensors[1])
    return chosen.forward(bind(spec, [p.detach() for p in parameters]), blocks, precision)


def _velocity_forward(tensors: Sequence[Tensor], parameters: Sequence[Tensor], *args: Any) -> Tensor:
    return _run_network(tensors, parameters, *args)[0].clone()


def _critic_values_forward(tensors: Sequence[Tensor], parameters: Sequence[Tensor], *args: Any) -> Tensor:
    return network_spec_from_json(args[0]).head(_run_network(tensors, parameters, *args))[0].clone()


def _pessimistic_q_forward(
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    spec_json: str,
    rho: float,
    aggregation: str,
    precision: str,
    backend: str,
) -> Tensor:
    q_values = _critic_values_forward(tensors, parameters, spec_json, precision, backend)
    return reference.aggregate(q_values, aggregation, rho)


def _row_kernels(*tensors: Tensor) -> RowKernels | None:
    """What does the row-wise pieces on these tensors as one kernel; None: torch code has to."""
    like = tensors[0]
    if any(tensor.dtype != torch.float32 or tensor.device != like.device for tensor in tensors):
        return None
    return backends.for_rows(like.device)


def _clean_actions_forward(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    rows = _row_kernels(*tensors)
    return reference.clean_actions(*tensors) if rows is None else rows.clean_actions(*tensors)


def _steer_update_forward(
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    dt: float,
    alpha: float = 0.2,
    eps: float = 1e-8,
    steered_dims: list[int] | None = None,
) -> Tensor:
    rows = _row_kernels(*tensors)
    if rows is None:
        return _steer_update_reference(tensors, parameters, dt, alpha, eps, steered_dims)
    x, v, g = tensors
    return rows.steer_step(x, v, g, dt, _norm_match(alpha, eps, steered_dims))[0]


def _steer_step_forward(tensors: Sequence[Tensor], parameters: Sequence[Tensor], dt: float, *args: Any) -> Tensor:
    place, rows = _backend_place(tensors, parameters), _row_kernels(*tensors[1:3])
    if rows is None:
        return _steer_step(tensors, place, dt, *args)
    g, std, steering = _steering_gradient(tensors, place, *args)
    return rows.steer_step(tensors[1], tensors[2], g, dt, steering, std)[0]


def _steer_velocity_forward(tensors: Sequence[Tensor], parameters: Sequence[Tensor], *args: Any) -> Tensor:
    return _steer_velocity(tensors, _backend_place(tensors, parameters), *args)


def _sample_forward(
    tensors: Sequence[Tensor], parameters: Sequence[Tensor], spec_json: str, backend: str
) -> tuple[Tensor, ...]:
    obs, noise, *rest = sample_inputs(tensors)
    spec = SamplerSpec.from_json(spec_json)
    dtype = compute_dtype("float32", obs, noise)
    eps, alpha = (None if value is None else value.to(dtype).contiguous() for value in rest)
    chosen = backends.choose(Request(backend, spec.precision, noise.device, dtype, spec, noise.shape[0])).backend
    raw = chosen.sample(
        Call(
            spec,
            _bind_sampler(spec, [p.detach() for p in parameters]),
            obs.to(dtype).contiguous(),
            noise.to(dtype).contiguous(),
            eps,
            alpha,
            return_info=True,
        )
    )
    check_actions(raw.actions)
    assert raw.report is not None
    return raw.actions, *(value.clone() for value in raw.report)  # an operator's outputs share no memory


# ---------------------------------------------------------------- vector-Jacobian products


def recompute_vjp(
    function: Callable[..., Any], tensors: Sequence[Tensor], parameters: Sequence[Tensor], args: list[Any],
    grad: Tensor, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Autograd through the reference, recomputed: for parameters, t and whole samples."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(need) for x, need in zip([*tensors, *parameters], needs)]
        output = function(leaves[: len(tensors)], leaves[len(tensors) :], *args)
        output = output[0] if isinstance(output, tuple) else output
        wanted = [leaf for leaf, need in zip(leaves, needs) if need]
        grads = torch.autograd.grad(output, wanted, grad.to(output.dtype), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.to(x.dtype) for x, g in zip(wanted, grads)]


def _backend_vjp(
    name: str, tensors: Sequence[Tensor], parameters: Sequence[Tensor], args: list[Any], grad: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The backend's own product, for gradients with respect to obs and actions alone."""
    spec = network_spec_from_json(args[0])
    precision, backend = args[-2:]
    chosen = _network_backend(backend, precision, tensors[1], spec)
    handle = chosen.prepare(bind(spec, [p.detach() for p in parameters]), precision)
    blocks = _blocks(spec, _named_inputs(spec, tensors), tensors[1])
    if name == "velocity":
        cotangent = grad.unsqueeze(0)
    else:
        # a head of one output is the identity: its pullback needs no forward pass
        output = chosen.forward(handle, blocks, precision) if name == "pessimistic_q" else grad.unsqueeze(-1)
        q_values, head_back = spec.head(output)
        weights = reference.member_weights(q_values, args[2], args[1]) if name == "pessimistic_q" else 1
        cotangent = head_back(weights * grad)
    d_input = chosen.vjp(handle, blocks, cotangent.to(blocks[0].dtype).contiguous(), precision)
    grads = []
    for tensor, block, need in zip(tensors, ("obs", spec.moving_block), needs):
        if need:
            grads.append(d_input[:, spec.block_slices[block]].to(tensor.dtype).clone())
    return grads


NETWORK_OPS = ("velocity", "critic_values", "pessimistic_q")


def backend_vjp(
    name: str,
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    args_json: str,
    grad: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Body of qpilots::_vjp."""
    with torch.no_grad(), no_autocast(tensors[0]):
        return _backend_vjp(name, tensors, parameters, json.loads(args_json), grad, needs)


def no_autocast(like: Tensor) -> torch.autocast:
    """Autocast off for the operators' own maths."""
    return torch.autocast(like.device.type, enabled=False)  # the precision is an argument of ours


REFERENCES: dict[str, Callable[..., Any]] = {
    "velocity": _velocity_reference,
    "critic_values": _critic_values_reference,
    "pessimistic_q": _pessimistic_q_reference,
    "clean_actions": _clean_actions_reference,
    "steer_update": _steer_update_reference,
    "posterior_weights": _posterior_weights_reference,
    "steer_step": _steer_step_reference,
    "steer_velocity": _steer_velocity_reference,
    "sample": _sample_reference,
}
FORWARDS: dict[str, Callable[..., Any]] = {
    **REFERENCES,
    "velocity": _velocity_forward,
    "critic_values": _critic_values_forward,
    "pessimistic_q": _pessimistic_q_forward,
    "clean_actions": _clean_actions_forward,
    "steer_update": _steer_update_forward,
    "steer_step": _steer_step_forward,
    "steer_velocity": _steer_velocity_forward,
    "sample": _sample_forward,
}
