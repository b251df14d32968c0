"""The reference's operations on the rows of a hidden layer, each with its vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .row_ops import Chain, RowOp
from .spec import Pullback

# weight and bias of a norm
Vectors = tuple[Tensor | None, Tensor | None]
# the cotangents of a row and of what was kept (None: zero) after an operation -> before it
KeepingPullback = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Pullback]:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, population variance.

    d_x = inverse_std * (h - mean(h) - normalised * mean(h * normalised)), h = d_y * weight.
    """
    centred = x - x.mean(-1, keepdim=True)
    inverse_std = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalised = centred * inverse_std

    def pull_back(d_y: Tensor) -> Tensor:
        h = _scaled(d_y, weight)
        return inverse_std * (h - h.mean(-1, keepdim=True) - normalised * _mean_of(h * normalised))

    return _shifted(_scaled(normalised, weight), bias), pull_back


def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Pullback]:
    """x / sqrt(mean(x^2) + eps) * weight + bias over the last axis.

    d_x = inverse * (h - normalised * mean(h * normalised)), h = d_y * weight.
    """
    inverse = (_mean_of(x.square()) + eps).rsqrt()
    normalised = x * inverse

    def pull_back(d_y: Tensor) -> Tensor:
        h = _scaled(d_y, weight)
        return inverse * (h - normalised * _mean_of(h * normalised))

    return _shifted(_scaled(normalised, weight), bias), pull_back


def _mean_of(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _scaled(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def _shifted(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def softmax(x: Tensor) -> tuple[Tensor, Pullback]:
    """p of softmax over the last axis; d_x = p * (d_p - sum(p * d_p))."""
    p = torch.softmax(x, -1)
    return p, lambda d_p: p * (d_p - (p * d_p).sum(-1, keepdim=True))


def lowest(x: Tensor, count: int) -> tuple[Tensor, Pullback]:
    """x where it is among the `count` smallest of the last axis (of equal ones the first), else 0."""
    order = torch.sort(x, dim=-1, stable=True).indices[..., :count]
    is_low = torch.zeros_like(x).scatter(-1, order, 1.0)
    return x * is_low, lambda d_y: d_y * is_low


def _elementwise(op: RowOp, z: Tensor) -> tuple[Tensor, Pullback]:
    if op.name == "leaky_relu":
        slope = torch.where(z > 0, z.new_ones(()), z.new_tensor(op.numbers[0]))
        return z * slope, lambda d_y: d_y * slope
    if op.name == "clamp":
        low, high = op.numbers
        inside = ((z >= low) & (z <= high)).to(z.dtype)
        return z.clamp(low, high), lambda d_y: d_y * inside
    activation = ACTIVATIONS[op.name]
    return activation.value(z), lambda d_y: d_y * activation.derivative(z)


def run_chain(
    chain: Chain,
    z: Tensor,
    norms: Sequence[Vectors],
    film: Sequence[tuple[Tensor, Tensor]],
    kept: Tensor | None,
) -> tuple[Tensor, Tensor | None, list[KeepingPullback]]:
    """A chain on z [E, B, H].

    Args:
        norms: weight and bias of each norm of the chain. film: scale and shift of each "film".
        kept: the row that the layers before kept.

    Returns:
        The rows, what is kept now, and the pullbacks in the chain's order: each takes the cotangents of what its
        operation gives, and of what was kept after it (None: zero), and returns those before it.
    """
    normed, modulated = iter(norms), iter(film)
    pullbacks: list[KeepingPullback] = []
    for op in chain:
        if op.name == "keep":
            kept = z
            pullbacks.append(lambda d, d_kept: (d if d_kept is None else d + d_kept, None))
            continue
        if op.name == "add":
            assert kept is not None
            z = z + kept
            pullbacks.append(lambda d, d_kept: (d, d if d_kept is None else d + d_kept))
            continue
        z, pull_back = _apply(op, z, normed, modulated)
        pullbacks.append(_passing_by(pull_back))
    return z, kept, pullbacks


def _passing_by(pull_back: Pullback) -> KeepingPullback:
    """Of an operation that neither keeps nor adds."""
    return lambda d, d_kept: (pull_back(d), d_kept)


def _apply(
    op: RowOp, z: Tensor, normed: Iterator[Vectors], modulated: Iterator[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Pullback]:
    if op.name == "layer_norm":
        weight, bias = next(normed)
        return layer_norm(z, weight, bias, op.numbers[0])
    if op.name == "rms_norm":
        weight, bias = next(normed)
        return rms_norm(z, weight, bias, op.numbers[0])
    if op.name == "softmax":
        return softmax(z)
    if op.name == "lowest":
        return lowest(z, int(op.numbers[0]))
    if op.name == "film":
        scale, shift = next(modulated)
        return z * scale + shift, lambda d_y: d_y * scale
    return _elementwise(op, z)
