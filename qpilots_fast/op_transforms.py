"""torch.func through the operators: grad, vmap, jacrev and what they nest to.

The operators' registered autograd serves eager mode and torch.compile, but no function transform goes through it.
Inside one, the same forward and the same gradients run as a `torch.autograd.Function` with a batching rule instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .op_implementations import sample_inputs
from .op_registration import gradients, refuse_second_order, split

# the axis of B in each tensor argument and in each output; an operator's rows do not depend on each other
_OUTPUT_ROWS = {"critic_values": (1,), "posterior_weights": (1,), "sample": (0, 1, 1, 1, 1)}


def call(name: str, *arguments: Any) -> Any:
    """torch.ops.qpilots.<name>, by a way that function transforms understand where one is active."""
    operator = getattr(torch.ops.qpilots, name)
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return operator(*arguments)
    tensors, parameters, rest = split(name, arguments)
    outputs = _Operator.apply(name, len(tensors), json.dumps(rest), *tensors, *parameters)
    return outputs if name == "sample" else outputs[0]


def _run(name: str, tensors: Sequence[Tensor], parameters: Sequence[Tensor], rest: Sequence[Any]) -> tuple[Tensor, ...]:
    operator = getattr(torch.ops.qpilots, name)
    if name == "sample":
        obs, noise, eps, alpha = sample_inputs(tensors)
        return operator(obs, noise, eps, list(parameters), *rest, alpha)
    outputs = operator(*tensors, *([list(parameters)] if parameters else []), *rest)
    return outputs if isinstance(outputs, tuple) else (outputs,)


class _Operator(torch.autograd.Function):
    """forward(name, number of tensors, the rest as JSON, *tensors, *parameters) -> outputs."""

    @staticmethod
    def forward(name: str, count: int, rest: str, *values: Tensor) -> tuple[Tensor, ...]:
        return _run(name, values[:count], values[count:], json.loads(rest))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, ctx.count, ctx.rest, *values = inputs
        ctx.save_for_backward(*values)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[3:])
        found = iter(_Gradients.apply(ctx.name, ctx.count, ctx.rest, json.dumps(needs), grads[0], *ctx.saved_tensors))
        return None, None, None, *(next(found) if need else None for need in needs)

    @staticmethod
    def jvp(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "qpilots operators have no forward mode (torch.func.jvp, jacfwd, linearize, hessian). Use torch.func.vjp "
            "or jacrev, or the networks' own forward (flow(...), critic(...))."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], name: str, count: int, rest: str, *values: Tensor) -> Any:
        values, batched = _batch_first(values, in_dims[3:])  # type: ignore[assignment]
        if _rows_mix(name, rest) or any(batched[count:]):

            def one(*row: Tensor) -> tuple[Tensor, ...]:
                return tuple(_Operator.apply(name, count, rest, *row))

            outputs = _one_by_one(one, info.batch_size, values, batched)
            return outputs, (0,) * len(outputs)
        tensors = _fold(name, info.batch_size, values[:count], batched[:count])
        outputs = _Operator.apply(name, count, rest, *tensors, *values[count:])
        axes = _OUTPUT_ROWS.get(name, (0,) * len(outputs))
        return tuple(o.unflatten(axis, (info.batch_size, -1)) for o, axis in zip(outputs, axes)), axes


class _Gradients(torch.autograd.Function):
    """forward(name, count, rest, needs as JSON, grad, *tensors, *parameters) -> gradients of those that need one."""

    @staticmethod
    def forward(name: str, count: int, rest: str, needs: str, grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        tensors, parameters = list(values[:count]), list(values[count:])
        return tuple(gradients(name, tensors, parameters, json.loads(rest), grad, json.loads(needs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(refuse_second_order)
    jvp = staticmethod(refuse_second_order)

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], name: str, count: int, rest: str, needs: str, grad: Tensor, *values: Tensor
    ) -> Any:
        (grad, *values), (grad_batched, *batched) = _batch_first((grad, *values), in_dims[4:])  # type: ignore[assignment]
        wanted = json.loads(needs)
        tensors, parameters = values[:count], values[count:]
        times_summed = name in ("velocity", "clean_actions", "steer_step", "steer_velocity") and wanted[count - 1]
        if _rows_mix(name, rest) or any(batched[count:]) or any(wanted[count:]) or times_summed:

            def one(row_grad: Tensor, *row: Tensor) -> tuple[Tensor, ...]:
                return tuple(_Gradients.apply(name, count, rest, needs, row_grad, *row))

            found = _one_by_one(one, info.batch_size, (grad, *values), (grad_batched, *batched))
            return found, (0,) * len(found)
        folded = _fold(name, info.batch_size, tensors, batched[:count])
        axis = _OUTPUT_ROWS.get(name, (0,))[0]
        grad = grad if grad_batched else grad.expand(info.batch_size, *grad.shape)
        grad = grad.movedim(0, axis).flatten(axis, axis + 1)
        found = _Gradients.apply(name, count, rest, needs, grad, *folded, *parameters)
        axes = tuple(_input_rows(name, tensor) for tensor, need in zip(folded, wanted) if need)
        return tuple(g.unflatten(axis, (info.batch_size, -1)) for g, axis in zip(found, axes)), axes


def _input_rows(name: str, tensor: Tensor, is_batched: bool = False) -> int:
    """The axis of B in a tensor argument, its vmapped one apart; of sample's four, posterior_noise is [K, B, N, A]."""
    return 1 if name == "posterior_weights" or (name == "sample" and tensor.ndim - is_batched == 4) else 0


def _rows_mix(name: str, rest: str) -> bool:
    """Whether rows depend on each other: q_scale="batch_std" reads the batch."""
    return name in ("sample", "steer_step", "steer_velocity") and "batch_std" in rest


def _batch_first(values: Sequence[Tensor], in_dims: Sequence[int | None]) -> tuple[list[Tensor], list[bool]]:
    moved = [v if dim is None else v.movedim(dim, 0) for v, dim in zip(values, in_dims)]
    return moved, [dim is not None for dim in in_dims]


def _fold(name: str, size: int, tensors: Sequence[Tensor], batched: Sequence[bool]) -> list[Tensor]:
    """[V, .., B, ..] as [.., V B, ..]: the vmapped axis goes into the rows."""
    folded = []
    # t may be one for all rows: [1, 1]
    rows = max(t.shape[_input_rows(name, t, b) + b] for t, b in zip(tensors, batched))
    for tensor, is_batched in zip(tensors, batched):
        axis = _input_rows(name, tensor, is_batched)
        tensor = tensor if is_batched else tensor.expand(size, *tensor.shape)
        shape = list(tensor.shape)
        shape[axis + 1] = rows
        folded.append(tensor.expand(shape).movedim(0, axis).flatten(axis, axis + 1))
    return folded


def _one_by_one(
    function: Callable[..., tuple[Tensor, ...]], size: int, values: Sequence[Tensor], batched: Sequence[bool]
) -> tuple[Tensor, ...]:
    """One call a sample, where samples have networks of their own or ask for the parameters' gradients."""
    each = [function(*(v[i] if b else v for v, b in zip(values, batched))) for i in range(size)]
    return tuple(torch.stack(outputs) for outputs in zip(*each))
