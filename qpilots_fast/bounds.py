"""The bounds of actions: as users and environments give them, and as a call reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Bound = float | tuple[float, ...]  # one number, or one for each of the A dimensions
Bounds = tuple[float, float] | tuple[Tensor, Tensor]  # low and high, as torch.clamp takes them


class DefaultBound(float):
    """A bound that nobody gave, so that a sampler can say where it clips much."""

    def __init__(self, value: float) -> None:
        self.plain = float(value)  # torch.compile of 2.6 traces no float() of a subclass

    def __reduce__(self) -> tuple[Any, ...]:
        return DefaultBound, (float(self),)


DEFAULT_LOW, DEFAULT_HIGH = DefaultBound(-1.0), DefaultBound(1.0)
_LARGEST = 3.4e38
_ABSENT = {"action_low": -math.inf, "action_high": math.inf}
_EXPECTED = "None, a number, or one per dimension ([A], [D] or [C, D]: a tensor, an array or a sequence)"


def read_bound(name: str, value: Any) -> float | tuple[Any, ...]:
    """A bound as it is kept: a float, or a tuple of floats, or of rows of floats.

    Args:
        name: "action_low" or "action_high"; None means minus or plus infinity.

    Raises:
        TypeError, ValueError: for what is no such number or array.
    """
    if value is None:
        return _ABSENT[name]
    if isinstance(value, DefaultBound):
        return value
    if type(value) in (int, float) and value == value:  # numpy's part cannot be traced
        number = float(value)  # beyond float32, which torch would refuse to clamp to: no clip
        return number if abs(number) < _LARGEST else math.copysign(math.inf, number)
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; expected {_EXPECTED}.")
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        read = array.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {_EXPECTED}.") from None
    if array.dtype.kind not in "fiu" or read.ndim > 2 or read.size == 0:
        raise TypeError(f"{name} is {array.dtype} of shape {list(read.shape)}; expected {_EXPECTED}.")
    if np.isnan(read).any():
        raise ValueError(f"{name} has NaN; expected numbers (None or infinities mean no clip).")
    if read.ndim == 0:
        return float(read)
    return tuple(tuple(row) if isinstance(row, list) else row for row in read.tolist())


def _per_dimension(name: str, bound: Any, action_dim: int, chunk: tuple[int, ...] | None) -> tuple[float, ...]:
    """One number for each of A dimensions; [D] serves every step of a chunk [C, D]."""
    if not isinstance(bound, tuple):
        return (float(bound),) * action_dim
    shape = (len(bound), len(bound[0])) if isinstance(bound[0], tuple) else (len(bound),)
    flat = tuple(number for row in bound for number in row) if len(shape) == 2 else bound
    fits = len(flat) == action_dim and (len(shape) == 1 or chunk is None or len(chunk) == 1 or shape == tuple(chunk))
    if not fits and len(shape) == 1 and (action_dim % len(flat) == 0 if chunk is None else len(flat) == chunk[-1]):
        flat, fits = flat * (action_dim // len(flat)), True
    if not fits:
        in_chunks = "" if chunk is None or len(chunk) < 2 else f", [{chunk[-1]}] or {list(chunk)}"
        of_many = len(shape) == 2 and shape[1] == action_dim
        side = name.removeprefix("action_")
        cure = f" Of a vector environment give env.single_action_space.{side}." if of_many else ""
        raise ValueError(
            f"{name} has shape {list(shape)}; expected a number, None, or [{action_dim}]{in_chunks}.{cure}"
        )
    return flat


def bounds_width(low: Any, high: Any) -> int | None:
    """How many numbers a bound has that has one a dimension; None where neither has."""
    for bound in (low, high):
        if isinstance(bound, tuple):
            return sum(len(row) if isinstance(row, tuple) else 1 for row in bound)
    return None


def check_bounds(low: Any, high: Any) -> None:
    """Raises ValueError where bounds of one shape (or a number) leave nothing between them."""
    if not isinstance(low, tuple) and not isinstance(high, tuple):
        if not low < high:
            raise ValueError(f"action_low is {low:g} and action_high {high:g}; expected action_low < action_high.")
        return
    pair = [np.asarray(bound, dtype=np.float64) for bound in (low, high)]
    try:
        crossed = pair[0] > pair[1]
    except ValueError:
        raise ValueError(
            f"action_low has shape {list(pair[0].shape)}, action_high {list(pair[1].shape)}; expected the same, or a "
            "number."
        ) from None
    at_infinity = (pair[0] == math.inf) | (pair[1] == -math.inf)
    if crossed.any() or at_infinity.any():
        where = [int(i) for i in np.argwhere(np.atleast_1d(crossed | at_infinity))[0]]
        a, b = (np.broadcast_to(bound, np.shape(crossed))[tuple(where)] for bound in pair)
        raise ValueError(f"action_low is {a:g} and action_high {b:g} at {where}; expected action_low <= action_high.")


def _plain(bound: float) -> float:
    return bound.plain if isinstance(bound, DefaultBound) else float(bound)


def box_of(low: Any, high: Any, action_dim: int, chunk: tuple[int, ...] | None = None) -> tuple[Bound, Bound]:
    """What `read_bound` returned, as two floats where all dimensions have the same, else as two tuples [A].

    Args:
        chunk: the shape of an action, (C, D) or (A,), where it is known; where it is not, a bound [D] whose length
            divides A is taken to be of chunks.

    Raises:
        ValueError: for shapes that do not fit.
    """
    if not isinstance(low, tuple) and not isinstance(high, tuple):
        return _plain(low), _plain(high)
    rows = [_per_dimension(n, b, action_dim, chunk) for n, b in (("action_low", low), ("action_high", high))]
    if all(number == row[0] for row in rows for number in row):
        return rows[0][0], rows[1][0]
    return rows[0], rows[1]


def as_operands(low: Bound | Sequence[float], high: Bound | Sequence[float], like: Tensor) -> Bounds:
    """The two of `box_of` (or lists of one number, or of A) as torch.clamp takes them beside like [..., A]."""
    if isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return low, high
    one, other = (torch.tensor(bound, dtype=like.dtype, device=like.device) for bound in (low, high))
    return one, other


def as_lists(low: Any, high: Any, action_dim: int, chunk: tuple[int, ...] | None = None) -> list[list[float]]:
    """Bounds as a user gives them as two lists, of one number or of A, for an operator; checked."""
    read = read_bound("action_low", low), read_bound("action_high", high)
    check_bounds(*read)
    return [list(bound) if isinstance(bound, tuple) else [bound] for bound in box_of(*read, action_dim, chunk)]
