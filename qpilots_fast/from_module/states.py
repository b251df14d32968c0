"""The rows that pass through a network, each as what was done to the row before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..row_ops import RowOp
from .held import Held
from .sources import Source


@dataclass(eq=False)
class Operand:
    """A matrix or vector that an operation reads.

    Args:
        source: where it lives. value: its numbers on the copy. diagonal: the source of the matrix with these on its
            diagonal; of vectors. codes: of its elements.
    """

    source: Source | Held
    value: Tensor
    diagonal: Held | None = None
    codes: Tensor | None = None


@dataclass(eq=False)
class Given:
    """A tensor before the network's first Linear.

    Args:
        tensor: [B, ...]. moves: whether it follows the moving actions.
    """

    tensor: Tensor
    moves: bool


@dataclass(eq=False)
class Modulation:
    """A function of a tensor [B, width] or [B, 1] of the call that follows the flow time alone.

    Args:
        function: of its numbers, of MODULATED.
    """

    tensor: Tensor
    function: str = ""


MODULATED: dict[str, Callable[[Tensor], Tensor]] = {
    "": torch.Tensor.detach, "neg": torch.neg, "reciprocal": torch.reciprocal,
}  # fmt: skip


@dataclass(eq=False)
class State:
    """A row of numbers, for each row of the batch.

    Args:
        width: of the row. parents: the rows that it is made of; none for the columns.
    """

    width: int
    parents: tuple[State, ...] = ()


class Columns(State):
    """What the network reads."""


@dataclass(eq=False)
class Linear(State):
    """weight [width, parent's width] row + bias."""

    weight: Operand | None = None
    bias: Operand | None = None


@dataclass(eq=False)
class Op(State):
    """One operation of the table, on whole rows; a norm may have operands."""

    op: RowOp = field(default_factory=lambda: RowOp(""))
    weight: Operand | None = None
    bias: Operand | None = None


@dataclass(eq=False)
class Pointwise(State):
    """A function of each number of its parents' rows."""

    function: Callable[..., Tensor] | None = None
    name: str = ""


@dataclass(eq=False)
class Affine(State):
    """scale row + shift, each a vector [width]; None: 1, and 0."""

    scale: Operand | None = None
    shift: Operand | None = None


@dataclass(eq=False)
class Film(State):
    """As Affine, of what follows the flow time."""

    scale: Modulation | None = None
    shift: Modulation | None = None


class Add(State):
    """The first parent's row and that of the second, from which the first was made."""


class Sorted(State):
    """The parent's numbers in ascending order; of `width` the smallest ones."""


def lineage(state: State) -> Iterator[State]:
    """The row, and those that it was made of one after the other."""
    while True:
        yield state
        if not state.parents:
            return
        state = state.parents[0]


def base_of(state: State) -> State:
    """The row that it is a function of number by number."""
    while isinstance(state, Pointwise):
        state = state.parents[0]
    return state


def between(base: State, state: State) -> Callable[[Tensor], Tensor]:
    """The function of single numbers that makes a row of an earlier one.

    Raises:
        ValueError: where it is none.
    """
    if state is base:
        return lambda x: x
    if not isinstance(state, Pointwise):
        raise ValueError(state)
    functions = [between(base, parent) for parent in state.parents]
    own: Any = state.function
    return lambda x: own(*(function(x) for function in functions))
