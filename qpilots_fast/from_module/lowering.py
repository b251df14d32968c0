"""Rows as layers: Linears with chains of row operations between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..row_ops import RowOp
from .held import Held
from .pointwise import ScaledAndShifted, identify
from .refusal import Refused
from .sources import Source, Strided
from .states import (
    Add,
    Affine,
    Columns,
    Film,
    Linear,
    Modulation,
    Op,
    Operand,
    Pointwise,
    Sorted,
    State,
    between,
    lineage,
)

Origin = Source | Held


@dataclass
class Layer:
    """A Linear and the chain after it.

    Args:
        norms: weight and bias of each norm of the chain. films: scale and shift of each "film".
    """

    width: int
    weight: Origin
    bias: Origin | None = None
    chain: list[RowOp] = field(default_factory=list)
    norms: list[tuple[Origin | None, Origin | None]] = field(default_factory=list)
    films: list[tuple[Modulation | None, Modulation | None]] = field(default_factory=list)


Step = tuple[State, Any]  # the row after the step, and the step


def constant(value: torch.Tensor) -> Held:
    """A parameter that is a constant."""
    return Held(value, Strided(tuple(value.shape), value.stride(), 0))


def layers_of(state: State) -> list[Layer]:
    """The layers that make a row of the columns; the last one has no chain.

    Raises:
        Refused: where no packed network makes it.
    """
    steps = _path(state)
    _check_kept(steps)
    layers: list[Layer] = []
    width = [*lineage(state)][-1].width
    for place, (_, step) in enumerate(steps):
        if isinstance(step, Linear):
            width = step.width
            weight = _folded(steps, place) or _origin(step.weight)
            layers.append(Layer(width, weight, _origin(step.bias)))  # type: ignore[arg-type]
            continue
        if isinstance(step, Affine):
            if place + 1 < len(steps) and _folded(steps, place + 1) is not None:
                continue
            scale = constant(torch.eye(width, dtype=torch.float64)) if step.scale is None else step.scale.diagonal
            assert scale is not None
            layers.append(Layer(width, scale, _origin(step.shift)))
            continue
        if not layers:
            layers.append(Layer(width, constant(torch.eye(width, dtype=torch.float64))))
        last = layers[-1]
        if isinstance(step, Op):
            op = step.op._replace(weight=step.weight is not None, bias=step.bias is not None)
            last.chain.append(op)
            if op.name in ("layer_norm", "rms_norm"):
                last.norms.append((_origin(step.weight), _origin(step.bias)))
        elif isinstance(step, Film):
            last.chain.append(RowOp("film"))
            last.films.append((step.scale, step.shift))
        else:
            last.chain.append(RowOp(step[0]))
    if layers and layers[-1].chain:
        layers.append(Layer(width, constant(torch.eye(width, dtype=torch.float64))))
    return layers


def _origin(operand: Operand | None) -> Origin | None:
    return None if operand is None else operand.source


def _folded(steps: Sequence[Step], place: int) -> Origin | None:
    """The weight of a Linear that sums a scaled row: the scale itself."""
    step = steps[place][1]
    before = steps[place - 1][1] if place else None
    if not isinstance(step, Linear) or not isinstance(before, Affine) or before.shift is not None:
        return None
    assert step.weight is not None
    scale, value = before.scale, step.weight.value
    if scale is None or not isinstance(step.weight.source, Held) or not step.weight.source.is_constant:
        return None
    if value.shape[0] != 1 or not bool((value == 1).all()):
        return None
    source = scale.source
    if isinstance(source, Held):
        view = source.view
        return replace(source, view=Strided((1, *view.sizes), (0, *view.strides), view.offset))
    return source.viewed("lead")


def _path(state: State) -> list[Step]:
    """The steps from the columns to a row."""
    if isinstance(state, Columns):
        return []
    if isinstance(state, Pointwise):
        return _pointwise_path(state)
    if isinstance(state, Sorted):
        raise Refused("it sorts a row and does not average what it takes of it")
    if isinstance(state, Add):
        return _add_path(state, *state.parents)
    return [*_path(state.parents[0]), (state, state)]


def _add_path(state: State, main: State, kept: State) -> list[Step]:
    path = _path(main)
    after = [place for place, (made, _) in enumerate(path) if made is kept]
    if isinstance(kept, Columns):
        at = 0
    elif after:
        at = after[-1] + 1
    else:
        raise Refused("it adds a row that it does not pass through as it is (a residual connection inside a function?)")
    if at == len(path) or path[at][1] != ("keep", kept):
        path.insert(at, (kept, ("keep", kept)))
    return [*path, (state, ("add", kept))]


def _pointwise_path(state: Pointwise) -> list[Step]:
    """The longest functions that the table has, from the front."""
    rows: list[State] = []
    for row in lineage(state):
        rows.append(row)
        if not isinstance(row, Pointwise):
            break
    for base in reversed(rows[1:]):
        try:
            found = identify(between(base, state))
        except ValueError:
            continue
        if isinstance(found, RowOp):
            return [*_path(base), (state, Op(state.width, (base,), found))]
        if found is not None:
            if found == ScaledAndShifted(1.0, 0.0):
                path = _path(base)
                return [*path[:-1], (state, path[-1][1])] if path else path
            return [*_path(base), (state, _affine(found, state.width, base))]
    if state.name == "add" and len(state.parents) == 2:
        first, second = state.parents
        for main, kept in ((first, second), (second, first)):
            if any(row is kept for row in lineage(main)):
                return _add_path(state, main, kept)
    raise Refused(f"its function {state.name} of single numbers is no activation of the table")


def _affine(by: ScaledAndShifted, width: int, base: State) -> Affine:
    scale, shift = (torch.full((width,), value, dtype=torch.float64) for value in by)
    diagonal = replace(constant(scale), form="diagonal")
    of_shift = Operand(constant(shift), shift) if by.shift else None
    return Affine(width, (base,), Operand(constant(scale), scale, diagonal), of_shift)


def _check_kept(steps: Sequence[Step]) -> None:
    kept = None
    for _, step in steps:
        if isinstance(step, tuple):
            if step[0] == "keep":
                kept = step[1]
            elif kept is not step[1]:
                raise Refused("its residual connections overlap or stand inside one another; expected one at a time")
