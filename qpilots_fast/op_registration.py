"""The operators torch.ops.qpilots.*: schemas, fakes, first-order autograd.

They take the networks' parameters as a flat list and their spec as JSON, so that `torch.compile` sees tensors alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .op_implementations import FORWARDS, NETWORK_OPS, REFERENCES, backend_vjp, no_autocast, recompute_vjp
from .spec import SamplerSpec, network_spec_from_json

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
    "str critic, str steering, float[] low, float[] high, str precision, str backend) -> Tensor",
    "steer_velocity": "(Tensor obs, Tensor noisy_actions, Tensor velocity, Tensor t, Tensor[] parameters, str critic, "
    "str steering, float[] low, float[] high, str precision, str backend) -> Tensor",
    "sample": "(Tensor obs, Tensor noise, Tensor? posterior_noise, Tensor[] parameters, str spec, str backend, "
    "Tensor? alpha=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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


def gradients(
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
        return refuse_second_order(ctx, *grads)


def split(name: str, arguments: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """An operator's arguments as (tensors, parameters, the rest)."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    parameters = next(
        (list(a) for a in arguments if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)), []
    )
    skip = 3 if name == "sample" else len(tensors)
    rest = list(arguments[skip + 1 :]) if parameters else list(arguments[skip:])
    if name == "sample":
        rest = rest[:2]  # what follows is alpha
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
        norms, q_std = (noise.new_empty(steps, noise.shape[0], dtype=dtype) for _ in range(2))
        nonfinite, gated = (noise.new_empty(steps, noise.shape[0], dtype=torch.bool) for _ in range(2))
        return noise.new_empty(noise.shape, dtype=dtype), norms, nonfinite, q_std, gated
    like = tensors[1] if name in ("steer_step", "steer_velocity") else tensors[0]
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _register(name: str) -> None:
    def forward(*arguments: Any) -> Any:
        tensors, parameters, rest = split(name, arguments)
        with torch.no_grad(), no_autocast(tensors[0]):
            return FORWARDS[name](tensors, parameters, *rest)

    def fake(*arguments: Any) -> Any:
        tensors, _, rest = split(name, arguments)
        return _fake_result(name, tensors, rest)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, parameters, rest = split(name, inputs)
        ctx.save_for_backward(*tensors, *parameters)
        ctx.counts = (len(tensors), len(parameters))
        ctx.rest = rest
        ctx.positions = [index for index, a in enumerate(inputs) if isinstance(a, Tensor)]
        ctx.list_position = next(
            (i for i, a in enumerate(inputs) if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)), None
        )
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
        results = iter(gradients(name, tensors, parameters, ctx.rest, grads[0], [*needs, *parameter_needs]))
        answer: list[Any] = [None] * len(ctx.needs_input_grad)  # of those given: defaults may have been left out
        for position, need in zip(ctx.positions, needs):
            answer[position] = next(results) if need else None
        if ctx.list_position is not None:
            answer[ctx.list_position] = [next(results) if need else None for need in parameter_needs]
        return tuple(answer)

    _lib.define(name + _SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
    _lib.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qpilots::{name}", fake, lib=_lib)
    torch.library.register_autograd(f"qpilots::{name}", backward, setup_context=setup_context, lib=_lib)


def refuse_second_order(ctx: Any, *grads: Any) -> Any:
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
torch.library.register_autograd("qpilots::_vjp", refuse_second_order, lib=_lib)
for _name in _SCHEMAS:
    _register(_name)
