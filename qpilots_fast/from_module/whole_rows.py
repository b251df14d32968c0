"""Operations on whole rows: products, norms, softmax, sorting, sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..row_ops import RowOp
from ..spec import NetworkSpec
from .codes import Weights
from .held import Applied
from .recording import Operation
from .refusal import Refused
from .states import Affine, Linear, Op, Operand, Sorted, State
from .walk import Walk, shown


def _product(walk: Walk, operation: Operation) -> Tensor:
    """mm, bmm, mv and the same with a bias."""
    name, args = operation.name, list(operation.args)
    bias = args.pop(0) if name in ("addmm", "baddbmm", "addmv") else None
    if any(operation.kwargs.get(factor, 1) != 1 for factor in ("alpha", "beta")):
        raise Refused(f"{shown(operation)} has factors {operation.kwargs}")
    left, right = args[:2]
    if walk.moves(left) and walk.moves(right):
        raise Refused(f"{shown(operation)} multiplies rows by rows (attention?)")
    if bias is not None and walk.moves(bias):
        raise Refused(f"{shown(operation)} adds a row to a product; expected a bias")
    if walk.moves(left):
        walk.rows(left, shown(operation))
        rows, weights = walk.moving_codes(left), walk.weights(right)
        if name.endswith("mv"):
            weights = weights.unsqueeze(-1)
    else:
        if name.endswith("mv"):
            raise Refused(f"{shown(operation)} reads one row")
        transposed = right.transpose(-1, -2)
        walk.take(transposed, walk.moving_codes(right).transpose(-1, -2))
        walk.rows(transposed, shown(operation))
        rows, weights = walk.moving_codes(transposed), walk.weights(left).transpose(-1, -2)
    flipped = not walk.moves(left)
    stack = rows if rows.ndim == 3 else rows.unsqueeze(0)
    matrices = weights if weights.ndim == 3 else weights.unsqueeze(0)
    width = matrices.shape[-1]
    biases = None
    if bias is not None:
        biases = walk.weights(bias).expand(operation.output.shape)
        biases = biases.transpose(-1, -2) if flipped else biases
        biases = biases.reshape(len(stack), -1, width)
    parts = [
        _linear(walk, operation, part, matrix.transpose(0, 1), None if biases is None else biases[index])
        for index, (part, matrix) in enumerate(zip(stack, matrices))
    ]
    made = torch.stack(parts)
    made = made.transpose(-1, -2) if flipped else made
    return made.reshape(operation.output.shape)


def _linear(walk: Walk, operation: Operation, codes: Tensor, weight: Tensor, biases: Tensor | None) -> Tensor:
    """Codes [N, out] of a product of rows [N, in] with a weight [out, in]."""
    what = shown(operation)
    rows = walk.rows_of(codes, what)
    matrix = walk.codes.operand(weight)
    if matrix is None:
        raise Refused(f"the weight of {what} is no view of one tensor")
    vector: Operand | None = None
    if biases is not None:
        if not torch.equal(biases, biases[:1].expand_as(biases)):
            raise Refused(f"the bias of {what} differs from row to row")
        vector = walk.codes.operand(biases[0])
        if vector is None:
            raise Refused(f"the bias of {what} is no view of one tensor")
    states: list[State] = [Linear(len(weight), (state,), matrix, vector) for state in rows.states]
    return walk.codes.spread(rows, states)


def _layer_norm(walk: Walk, operation: Operation) -> Any:
    tensor, shape, weight, bias, eps = operation.args[:5]
    if list(shape) != [tensor.shape[-1]]:
        raise Refused(f"a LayerNorm is over {list(shape)}; expected the {tensor.shape[-1]} hidden units")
    return [_norm(walk, operation, "layer_norm", weight, bias, eps), None, None]


def _rms_norm(walk: Walk, operation: Operation) -> Any:
    tensor, shape, weight, eps = operation.args[:4]
    if list(shape) != [tensor.shape[-1]]:
        raise Refused(f"an RMSNorm is over {list(shape)}; expected the {tensor.shape[-1]} hidden units")
    eps = default_eps(tensor.dtype) if eps is None else eps
    return [_norm(walk, operation, "rms_norm", weight, None, eps), None]


def default_eps(dtype: torch.dtype) -> float:
    """What an RMSNorm of eps=None adds to rows of a dtype."""
    return torch.finfo(dtype).eps


def in_dtype(spec: NetworkSpec, dtype: torch.dtype) -> NetworkSpec:
    """A spec that was read on a float64 copy, with the default eps of the module's own dtype."""
    of_copy, own = default_eps(torch.float64), default_eps(dtype)
    chains = tuple(
        tuple(op._replace(numbers=(own,)) if op.name == "rms_norm" and op.numbers == (of_copy,) else op for op in chain)
        for chain in spec.chains
    )
    return replace(spec, chains=chains)


def _norm(
    walk: Walk, operation: Operation, name: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    rows = walk.rows(operation.args[0], shown(operation))
    if rows.is_unsqueezed or rows.is_spread:
        raise Refused(f"its {shown(operation)} is over one number")
    operands = []
    for tensor in (weight, bias):
        operand = None if tensor is None else walk.codes.operand(walk.weights(tensor))
        if tensor is not None and operand is None:
            raise Refused(f"the parameters of {shown(operation)} are no views of one tensor")
        operands.append(operand)
    op = RowOp(name, (float(eps),))
    return walk.codes.spread(rows, [Op(state.width, (state,), op, *operands) for state in rows.states])


def _batch_norm(walk: Walk, operation: Operation) -> Any:
    """In eval mode: rows scaled and shifted by what the layer holds."""
    given = _arguments(operation)
    tensor, mean, var, eps = (given[name] for name in ("input", "running_mean", "running_var", "eps"))
    if given.get("training") or mean is None or tensor.ndim != 2:
        raise Refused(f"its {shown(operation)} normalises over the batch (a BatchNorm in training mode?)")
    rows = walk.rows(tensor, shown(operation))
    scale, value = (
        Applied("rsqrt.default", (Applied("add.Scalar", (walk.expression(var), eps), {}),), {}),
        (var + eps).rsqrt(),
    )
    if given["weight"] is not None:
        scale, value = Applied("mul.Tensor", (scale, walk.expression(given["weight"])), {}), value * given["weight"]
    moved, at = Applied("mul.Tensor", (walk.expression(mean), scale), {}), mean * value
    shift, by = Applied("neg.default", (moved,), {}), -at
    if given["bias"] is not None:
        shift, by = Applied("sub.Tensor", (walk.expression(given["bias"]), moved), {}), given["bias"] - at
    factors, terms = (
        walk.codes.operand(walk.codes.of_tensor(Weights(expression, numbers)))
        for expression, numbers in ((scale, value), (shift, by))
    )
    states: list[State] = [Affine(state.width, (state,), factors, terms) for state in rows.states]
    return [walk.codes.spread(rows, states), *[None] * (len(operation.output) - 1)]


def _softmax(walk: Walk, operation: Operation) -> Tensor:
    tensor, axis = operation.args[:2]
    rows = walk.rows(tensor, shown(operation))
    if axis % tensor.ndim != tensor.ndim - 1 or rows.is_unsqueezed or rows.is_spread:
        raise Refused(f"its softmax is over axis {axis} of {list(tensor.shape)}; expected a row's numbers")
    return walk.codes.spread(rows, [Op(s.width, (s,), RowOp("softmax")) for s in rows.states])


def _sort(walk: Walk, operation: Operation) -> Any:
    given = _arguments(operation)
    tensor = operation.args[0]
    axis, is_descending = given.get("dim", -1), given.get("descending", False)
    return _ascending(walk, operation, tensor, axis, is_descending, tensor.shape[-1])


def _topk(walk: Walk, operation: Operation) -> Any:
    given = _arguments(operation)
    return _ascending(walk, operation, operation.args[0], given.get("dim", -1), given.get("largest", True), given["k"])


def _ascending(walk: Walk, operation: Operation, tensor: Tensor, axis: int, from_above: bool, count: int) -> Any:
    rows = walk.rows(tensor, shown(operation))
    if axis % tensor.ndim != tensor.ndim - 1 or rows.is_unsqueezed or rows.is_spread:
        raise Refused(f"its {operation.name} is over axis {axis} of {list(tensor.shape)}; expected a row's numbers")
    if from_above:
        raise Refused(f"its {operation.name} is from the largest; expected ascending order")
    return [walk.codes.spread(rows, [Sorted(count, (state,)) for state in rows.states]), None]


def _reduce(walk: Walk, operation: Operation) -> Tensor:
    given = _arguments(operation)
    tensor, axes = operation.args[0], given.get("dim")
    what = shown(operation)
    walk.rows(tensor, what)
    axes = [axes] if isinstance(axes, int) else list(axes or range(tensor.ndim))
    if len(axes) != 1:
        raise Refused(f"its {what} is over {len(axes)} axes; expected a row's numbers")
    axis, keeps = axes[0] % tensor.ndim, given.get("keepdim", False)
    rows = walk.rows_of(walk.moving_codes(tensor).movedim(axis, -1), what)
    if rows.is_unsqueezed or rows.is_spread:
        raise Refused(f"its {what} is over one number")
    width = rows.states[0].width
    vector = torch.full((1, width), 1 / width if operation.name == "mean" else 1.0, dtype=torch.float64)
    matrix = walk.codes.operand(walk.codes.of_tensor(Weights(vector, vector)))
    states: list[State] = []
    for state in rows.states:
        if isinstance(state, Sorted):
            lowest = Op(state.parents[0].width, state.parents, RowOp("lowest", (float(width),)))
            all_of = torch.full((1, lowest.width), vector[0, 0].item(), dtype=torch.float64)
            whole = walk.codes.operand(walk.codes.of_tensor(Weights(all_of, all_of)))
            states.append(Linear(1, (lowest,), whole, None))
        else:
            states.append(Linear(1, (state,), matrix, None))
    codes = walk.codes.spread(rows, states).view(rows.lead)
    return codes.unsqueeze(axis) if keeps else codes


def _arguments(operation: Operation) -> dict[str, Any]:
    """What the operation was given, by name."""
    names = [argument.name for argument in operation.function._schema.arguments]
    return {**dict(zip(names, operation.args)), **operation.kwargs}


HANDLERS = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv"), _product),
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"), _batch_norm),
    "_softmax": _softmax,
    "sort": _sort,
    "topk": _topk,
    "mean": _reduce,
    "sum": _reduce,
}
