"""Operations on single numbers: functions, scales and shifts, modulation, residual connections."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..row_ops import RowOp
from .codes import Rows, Weights
from .held import Applied
from .pointwise import inverse_root_eps, is_square
from .recording import Operation, tensors_in
from .refusal import Refused
from .states import (
    Add,
    Affine,
    Film,
    Given,
    Linear,
    Modulation,
    Op,
    Operand,
    Pointwise,
    State,
    base_of,
    between,
    lineage,
)
from .walk import Walk, plain_name, shown, why


def number_by_number(walk: Walk, operation: Operation) -> Tensor:
    """What an operation on single numbers gives, as codes."""
    tensors = tensors_in([operation.args, operation.kwargs])
    moving = [tensor for tensor in tensors if walk.moves(tensor)]
    name, shape = operation.name, operation.output.shape
    if walk.late and all(
        isinstance(entry, Given) and entry.moves
        for tensor in moving
        for entry in walk.codes.entries(walk.moving_codes(tensor))
    ):
        return walk.codes.of_tensor(Given(operation.output, True))
    fixed = [t for t in tensors if not walk.moves(t) and not _is_number(walk, t)]
    if len({id(tensor) for tensor in moving}) == 1 and not fixed:
        rows = walk.rows(moving[0], shown(operation))
        if rows.is_spread:
            raise Refused(f"{shown(operation)} reads one number as a row")
        function = _function_of(operation, moving[:1])
        return walk.codes.spread(rows, [Pointwise(s.width, (s,), function, name) for s in rows.states])
    if fixed and len(moving) == 1:
        return _beside_fixed(walk, operation, moving[0], fixed, shape)
    if not fixed and len(moving) == 2:
        return _beside_rows(walk, operation, moving, shape)
    if not fixed:
        return _of_several(walk, operation, moving)
    raise Refused(f"it has {shown(operation)}, of {len(moving)} rows and {len(fixed)} other tensors")


def _is_number(walk: Walk, tensor: Tensor) -> bool:
    known = walk.known(tensor)
    return tensor.numel() == 1 and not known.follows and isinstance(known.expression, Tensor)


def _beside_fixed(walk: Walk, operation: Operation, moving: Tensor, fixed: list[Tensor], shape: torch.Size) -> Tensor:
    """Scaled and shifted by tensors that the actions do not reach."""
    name = operation.name
    scale, shift, sign = _scale_and_shift(operation, moving, fixed)
    walk.rows(moving, shown(operation))
    rows = walk.rows_of(walk.moving_codes(moving).expand(shape), shown(operation))
    codes = None
    if sign < 0:  # what - row
        negative = list(map(_negative, rows.states))
        codes, rows.states = walk.codes.spread(rows, negative), negative
    for tensor, is_scale in ((scale, True), (shift, False)):
        if tensor is None:
            continue
        follows = walk.known(tensor).follows
        if follows and follows <= {"t"}:
            of = {"div": "reciprocal", "sub": "neg"}.get(name, "") if is_scale or sign > 0 else ""
            rows.states = [_film(walk, state, Modulation(tensor, of), is_scale) for state in rows.states]
        elif follows:
            verb = "multiplied by" if is_scale else "added to"
            raise Refused(
                f"its hidden rows are {verb} what follows {' and '.join(sorted(follows))} ({name}); a packed "
                "network has its observations among its first columns, and modulation by t alone"
            )
        else:
            rows = _by_vector(walk, rows, tensor, is_scale, shape, name, operation)
        codes = walk.codes.spread(rows, rows.states)
    assert codes is not None
    return codes


def _film(walk: Walk, state: State, modulation: Modulation, is_scale: bool) -> State:
    tensor = modulation.tensor
    if tensor.shape[:1] != (walk.batch,) or tensor.numel() not in (walk.batch, walk.batch * state.width):
        raise Refused(f"its hidden rows are modulated by a tensor {list(tensor.shape)}; expected [B, {state.width}]")
    if isinstance(state, Film) and not is_scale and state.shift is None:
        return Film(state.width, state.parents, state.scale, modulation)
    return Film(state.width, (state,), *((modulation, None) if is_scale else (None, modulation)))


def _by_vector(
    walk: Walk, rows: Rows, tensor: Tensor, is_scale: bool, shape: torch.Size, name: str, operation: Operation
) -> Rows:
    codes = walk.weights(tensor)
    if name == "div":
        codes = _changed(walk, tensor, "reciprocal.default", torch.reciprocal)
    elif name == "sub" and operation.args[1] is tensor:
        codes = _changed(walk, tensor, "neg.default", torch.neg)
    codes = codes.expand(shape)
    width = rows.states[0].width
    flat = codes.reshape(-1, width)
    made: dict[tuple, int] = {}
    states: list[State] = []
    which = []
    for lead, (index, row) in enumerate(zip(rows.which.tolist(), flat.tolist())):
        key = (index, *row)
        if key not in made:
            operand = walk.codes.operand(flat[lead])
            if operand is None:
                raise Refused(f"{shown(operation)} reads a vector that is no view of one tensor")
            made[key] = len(states)
            states.append(_scaled(rows.states[index], operand) if is_scale else _shifted(rows.states[index], operand))
        which.append(made[key])
    rows.states, rows.which = states, torch.tensor(which)
    return rows


def _changed(walk: Walk, tensor: Tensor, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Codes of a function of weights."""
    expression, value = walk.expression(tensor), function(tensor.detach())
    of = value if isinstance(expression, Tensor) else Applied(name, (expression,), {})
    return walk.codes.of_tensor(Weights(of, value))


def _beside_rows(walk: Walk, operation: Operation, moving: list[Tensor], shape: torch.Size) -> Tensor:
    """Two rows number by number: added, multiplied as part of one function, or divided by their root mean square."""
    name = operation.name
    for tensor in moving:
        walk.rows(tensor, shown(operation))
    both = [walk.rows_of(walk.moving_codes(t).expand(shape), shown(operation)) for t in moving]
    if not torch.equal(both[0].batch, both[1].batch):
        raise Refused(f"{shown(operation)} mixes rows of the batch")
    made: dict[tuple[int, int], int] = {}
    states: list[State] = []
    which = []
    for pair in zip(both[0].which.tolist(), both[1].which.tolist()):
        if pair not in made:
            made[pair] = len(states)
            first, second = (rows.states[index] for rows, index in zip(both, pair))
            spread = (both[0].is_spread, both[1].is_spread)
            states.append(_of_two(walk, operation, moving, first, second, spread))
        which.append(made[pair])
    of = both[1] if both[0].is_spread else both[0]
    of.states, of.which, of.is_spread = states, torch.tensor(which), False
    if name in ("add", "sub") and operation.kwargs.get("alpha", 1) != 1:
        raise Refused(f"{shown(operation)} has alpha={operation.kwargs['alpha']}")
    return walk.codes.spread(of, states)


def _of_several(walk: Walk, operation: Operation, moving: list[Tensor]) -> Tensor:
    """One function of several rows that are all functions of the same row: torch.where of it."""
    rows = [walk.rows(tensor, shown(operation)) for tensor in moving]
    first = rows[0]
    states: list[State] = []
    for group in zip(*(each.states for each in rows)):
        if len({id(base_of(state)) for state in group}) > 1 or any(each.is_spread for each in rows):
            raise Refused(f"its {shown(operation)} puts {len(rows)} rows together")
        states.append(Pointwise(group[0].width, group, _function_of(operation, moving), operation.name))
    same = all(torch.equal(r.which, first.which) and torch.equal(r.batch, first.batch) for r in rows)
    if not same or len(states) < len(first.states):
        raise Refused(f"its {shown(operation)} puts {len(rows)} rows together")
    return walk.codes.spread(first, states)


def _of_two(
    walk: Walk, operation: Operation, moving: list[Tensor], first: State, second: State, spread: tuple[bool, bool]
) -> State:
    name = operation.name
    if any(spread):
        row, statistic = (second, first) if spread[0] else (first, second)
        if (name == "mul" or (name == "div" and not spread[0])) and not all(spread):
            eps = _root_mean_square(row, statistic, name == "mul")
            if eps is not None:
                return Op(row.width, (row,), RowOp("rms_norm", (eps,)))
        raise Refused(f"its {shown(operation)} scales a row by what follows that row, and is no RMSNorm")
    if base_of(first) is base_of(second):
        return Pointwise(first.width, (first, second), _function_of(operation, moving), name)
    if name in ("add", "sub"):
        taken = second if name == "sub" else None  # off the other
        if any(state is second for state in lineage(first)):
            made, kept = first, second
        elif any(state is first for state in lineage(second)):
            made, kept = second, first
        else:
            raise Refused(
                f"its {shown(operation)} adds two rows of which neither is made of the other (a residual connection "
                "with a Linear on both sides?)"
            )
        if taken is None:
            return Add(made.width, (made, kept))
        if taken is made:
            return Add(made.width, (_negative(made), kept))
        return _negative(Add(made.width, (_negative(made), kept)))
    raise Refused(f"its {shown(operation)} puts two rows together{why(name)}")


def _negative(state: State) -> State:
    return Pointwise(state.width, (state,), torch.neg, "neg")


def _scaled(state: State, by: Operand) -> State:
    if isinstance(state, Op) and state.op.name in ("layer_norm", "rms_norm") and not state.weight and not state.bias:
        return Op(state.width, state.parents, state.op, by, None)
    return Affine(state.width, (state,), by, None)


def _shifted(state: State, by: Operand) -> State:
    if isinstance(state, Linear) and state.bias is None:
        return Linear(state.width, state.parents, state.weight, by)
    if isinstance(state, Op) and state.op.name in ("layer_norm", "rms_norm") and not state.bias:
        return Op(state.width, state.parents, state.op, state.weight, by)
    if isinstance(state, Affine) and state.shift is None:
        return Affine(state.width, state.parents, state.scale, by)
    return Affine(state.width, (state,), None, by)


def _root_mean_square(row: State, statistic: State, inverse: bool) -> float | None:
    """eps, where the statistic is (mean(row^2) + eps)^(-1/2), or its inverse."""
    mean = base_of(statistic)
    if not isinstance(mean, Linear) or mean.weight is None or mean.bias is not None:
        return None
    square = mean.parents[0]
    expected = torch.full_like(mean.weight.value, 1 / row.width)
    try:
        is_mean = mean.weight.value.shape == (1, row.width) and torch.allclose(mean.weight.value, expected)
        if is_mean and is_square(between(row, square)):
            return inverse_root_eps(between(mean, statistic), inverse)
    except ValueError:
        pass
    return None


def _scale_and_shift(
    operation: Operation, moving: Tensor, fixed: list[Tensor]
) -> tuple[Tensor | None, Tensor | None, int]:
    """(scale, shift, sign of the row) of sign scale row + shift."""
    name, args = operation.name, operation.args
    plain = not any(operation.kwargs.get(key, 1) != 1 for key in ("alpha", "value"))
    if name == "mul" or (name == "div" and args[0] is moving and not operation.kwargs):
        return fixed[0], None, 1
    if name == "add" and plain:
        return None, fixed[0], 1
    if name == "sub" and plain and args[0] is moving:
        return None, fixed[0], 1
    if name in ("sub", "rsub") and plain and (args[0] is moving) is (name == "rsub"):
        return None, fixed[0], -1
    if name == "addcmul" and plain and args[0] is not moving:
        return next(t for t in args[1:] if t is not moving), args[0], 1
    raise Refused(f"it has {shown(operation)}, which neither scales nor shifts rows{why(name)}")


def _function_of(operation: Operation, moving: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The operation as a function of these of its arguments."""
    places = {id(tensor): index for index, tensor in enumerate(moving)}
    name = plain_name(operation)
    packet, overload = name.split(".")
    function = getattr(getattr(torch.ops.aten, packet), overload)
    kwargs = {key: value for key, value in operation.kwargs.items() if key not in ("dtype", "device")}

    def of(*values: Tensor) -> Tensor:
        args = [values[places[id(a)]] if isinstance(a, Tensor) and id(a) in places else a for a in operation.args]
        return function(*args, **kwargs)

    return of
