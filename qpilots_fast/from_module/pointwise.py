"""Which row operation a function of single numbers is, found by its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..row_ops import RowOp

Function = Callable[[Tensor], Tensor]

_EXACT = 1e-9  # relative
_FAR = 3.0e38  # a bound that no float32 passes


class ScaledAndShifted(NamedTuple):
    """x -> scale x + shift."""

    scale: float
    shift: float


# where a bound, a cut or a threshold could begin that the grid does not reach
_END = 1e9
_BEYOND = torch.tensor([-_END, -1e6, -1e3, -300.0, -80.0, 80.0, 300.0, 1e3, 1e6, _END], dtype=torch.float64)


def _grid() -> Tensor:
    near = torch.linspace(-12, 12, 385, dtype=torch.float64)
    return torch.cat([near, torch.tensor([-40.0, -25.0, -1e-4, 1e-4, 25.0, 40.0], dtype=torch.float64)])


def _same(got: Tensor, expected: Tensor) -> bool:
    return bool(((got - expected).abs() <= _EXACT * (1 + expected.abs())).all())


def _is(function: Function, value: Function, got: Tensor) -> bool:
    """Whether a function, whose numbers on the grid these are, is this one: there, and beyond where float32 holds."""
    far, ours = function(_BEYOND), value(_BEYOND)
    held = far.abs() < _FAR
    return _same(got, value(_grid())) and _same(far[held], ours[held])


def identify(function: Function) -> RowOp | ScaledAndShifted | None:
    """The operation whose numbers these are; None where it is none of the table."""
    at = _grid()
    try:
        got = function(at)
        ends = function(torch.tensor([-_END, -1.0, 0.0, 1.0, _END], dtype=torch.float64)).tolist()
    except Exception:
        return None
    if got.shape != at.shape or not got.isfinite().all():
        return None
    shift = ends[2]
    line = ScaledAndShifted(ends[3] - shift, shift)
    if _is(function, lambda x: line.scale * x + line.shift, got):
        return line
    for name, activation in ACTIVATIONS.items():
        if _is(function, activation.value, got):
            return RowOp(name)
    if _is(function, lambda x: torch.where(x > 0, x, -ends[1] * x), got):
        return RowOp("leaky_relu", (-ends[1],))
    low = ends[0] if ends[0] > -_END else -_FAR
    high = ends[4] if ends[4] < _END else _FAR
    if low <= high and _is(function, lambda x: x.clamp(low, high), got):
        return RowOp("clamp", (low, high))
    return None


def is_square(function: Function) -> bool:
    """Whether it is x -> x^2."""
    at = _grid()
    return _same(function(at), at.square())


def inverse_root_eps(function: Function, inverse: bool) -> float | None:
    """eps where it is m -> 1 / sqrt(m + eps), or for not inverse sqrt(m + eps); else None."""
    at = torch.linspace(0.01, 9, 99, dtype=torch.float64)
    got = function(at) if inverse else 1 / function(at)
    root = function(torch.zeros(1, dtype=torch.float64)).item()
    eps = root**-2 if inverse and root else root**2
    return eps if 0 < eps < 0.01 and _same(got, (at + eps).rsqrt()) else None
