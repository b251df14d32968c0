"""Which number of which row an element of a tensor is: integers that go through the same changes of layout."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .held import Expression, Held
from .sources import Source, Strided
from .states import Given, Operand, State


@dataclass(eq=False)
class Weights:
    """A tensor that follows no input: of the module, constant, or made of these."""

    expression: Expression
    tensor: Tensor


@dataclass
class Rows:
    """A tensor's last axis as rows.

    Args:
        lead: the shape of the other axes. states: the rows' own, each once. which, batch: [lead] flat, the state of
            each row by its place in `states`, and the row of the batch. is_spread: one number along the last axis.
        is_unsqueezed: whether the tensor itself has no last axis, the rows being one number wide.
    """

    lead: tuple[int, ...]
    states: list[State]
    which: Tensor
    batch: Tensor
    is_spread: bool = False
    is_unsqueezed: bool = False


Entry = State | Given | Weights


class Codes:
    """Gives out integers: those of a State are first + row of the batch * width + column; of others first + element."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._firsts: list[int] = []
        self._entries: list[Entry] = []
        self._next = 0
        self._first_of: dict[int, int] = {}

    def _first(self, entry: Entry, size: int) -> int:
        if id(entry) not in self._first_of:
            self._firsts.append(self._next)
            self._entries.append(entry)
            self._first_of[id(entry)] = self._next
            self._next += size
        return self._first_of[id(entry)]

    def of_state(self, state: State) -> Tensor:
        """[batch, width]."""
        size = self.batch * state.width
        return self._first(state, size) + torch.arange(size).view(self.batch, state.width)

    def of_tensor(self, entry: Given | Weights) -> Tensor:
        """Of the entry's tensor, in its shape."""
        size = entry.tensor.numel()
        return self._first(entry, size) + torch.arange(size).view(entry.tensor.shape)

    def entry(self, code: int) -> tuple[Entry, int]:
        """What a code is of, and which element."""
        at = bisect_right(self._firsts, code) - 1
        return self._entries[at], code - self._firsts[at]

    def entries(self, codes: Tensor) -> list[Entry]:
        """What the elements are of, each once, in order of appearance."""
        at = torch.bucketize(codes.flatten(), torch.tensor(self._firsts), right=True) - 1
        return [self._entries[i] for i in dict.fromkeys(at.tolist())]

    def rows(self, codes: Tensor) -> Rows | None:
        """The tensor as rows along its last axis; None where it is none. Slices of rows are among them by first column.

        Of a State alone.
        """
        if codes.ndim:
            found = self._rows(codes)
            if found is not None:
                return found
        if all(isinstance(e, State) and e.width == 1 for e in self.entries(codes)):
            found = self._rows(codes.unsqueeze(-1))
            if found is not None:
                found.is_unsqueezed = True
            return found
        return None

    def _rows(self, codes: Tensor) -> Rows | None:
        width = codes.shape[-1]
        flat = codes.reshape(-1, width)
        states: dict[tuple[int, int], int] = {}
        which, batch = [], []
        is_spread = width > 1 and bool((flat == flat[:, :1]).all())
        if not is_spread and not torch.equal(flat, flat[:, :1] + torch.arange(width)):
            return None
        self.slices: list[tuple[State, int]] = []
        for code in flat[:, 0].tolist():
            entry, element = self.entry(code)
            if not isinstance(entry, State):
                return None
            row, column = divmod(element, entry.width)
            if is_spread and entry.width != 1:
                return None
            if not is_spread and column + width > entry.width:
                return None
            key = (id(entry), column)
            if key not in states:
                states[key] = len(states)
                self.slices.append((entry, column))
            which.append(states[key])
            batch.append(row)
        return Rows(
            tuple(codes.shape[:-1]), [entry for entry, _ in self.slices], torch.tensor(which), torch.tensor(batch),
            is_spread,
        )  # fmt: skip

    def spread(self, rows: Rows, states: Sequence[State]) -> Tensor:
        """Codes of other states at the same places: [*lead, width], or [*lead]."""
        of = torch.stack([self.of_state(state) for state in states])
        codes = of[rows.which, rows.batch].view(*rows.lead, states[0].width)
        return codes.squeeze(-1) if rows.is_unsqueezed and states[0].width == 1 else codes

    def operand(self, codes: Tensor) -> Operand | None:
        """The matrix or vector of these elements of Weights; None where it is no view of one tensor."""
        first = codes.flatten()[0].item()
        entry, offset = self.entry(int(first))
        if not isinstance(entry, Weights):
            return None
        strides = []
        for axis, size in enumerate(codes.shape):
            strides.append(int(codes.select(axis, 1).flatten()[0] - first) if size > 1 else 0)
        steps = sum(
            torch.arange(size).view(-1, *[1] * (codes.ndim - 1 - axis)) * stride
            for axis, (size, stride) in enumerate(zip(codes.shape, strides))
        )
        if not torch.equal(codes, first + torch.as_tensor(steps).expand(codes.shape)) or min(strides, default=0) < 0:
            return None
        for axis in reversed(range(codes.ndim)):  # as a contiguous tensor's
            if codes.shape[axis] == 1:
                strides[axis] = strides[axis + 1] * codes.shape[axis + 1] if axis + 1 < codes.ndim else 1
        view = Strided(tuple(codes.shape), tuple(strides), offset)
        value = view.of(entry.tensor.contiguous())
        whole = view.sizes == entry.tensor.shape and view.strides == entry.tensor.contiguous().stride() and not offset
        if isinstance(entry.expression, Source):
            source: Source | Held = entry.expression if whole else entry.expression.viewed(view)
        else:
            source = Held(entry.expression, view)
        diagonal = Held(entry.expression, view, "diagonal") if codes.ndim == 1 else None
        return Operand(source, value, diagonal, codes)
