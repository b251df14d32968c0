"""What depends on time alone: embeddings of flow times, and the coefficients of GLASS posterior flows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Time = TypeVar("Time", float, Tensor)


class Step(NamedTuple):
    """One Euler step of the flow.

    Args:
        t: flow time at its start. dt: its length.
        weight: multiplies the strength of the steering; at 0 the critic is not asked.
    """

    t: float
    dt: float
    weight: float


def time_features(t: Tensor, embedding: str, dim: int) -> Tensor:
    """Embeds flow times: raw [t]; sinusoidal cos, sin of 1e4 t 1e4^(-i/half); fourier cos, sin of t i.

    Computed in float64, since 1e4 t in float32 already moves an action by 1e-4 (see docs/method.md).

    Args:
        t: [..., 1], in [0, 1].
        embedding: "raw", "sinusoidal" (QGF) or "fourier" (QAM).
        dim: width of the result; 1 for raw, else even.

    Returns:
        [..., dim], float64.
    """
    t = t.to(torch.float64)
    if embedding == "raw":
        return t
    half = dim // 2
    index = torch.arange(half, dtype=torch.float64, device=t.device)
    angles = t * (1e4 * 1e4 ** (-index / half)) if embedding == "sinusoidal" else t * index
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@dataclass(frozen=True)
class GlassCoefficients(Generic[Time]):
    """w = c_x x + c_xbar xbar + c_v v(p_x x + p_xbar xbar, t_star)."""

    p_x: Time
    p_xbar: Time
    t_star: Time
    c_x: Time
    c_xbar: Time
    c_v: Time


def glass_coefficients(t: Time, s: Time) -> GlassCoefficients[Time]:
    """Coefficients of the GLASS posterior velocity at outer time t and inner time s, in its non-singular form.

    Two noisy looks at x1, x = t x1 + (1-t) e and xbar = s x1 + (1-s) e0, combine by precision into one look at
    time t* = h/(h+g) with h = sqrt(p^2+q^2), p = t(1-s), q = s(1-t), g = (1-t)(1-s).

    t and s are two numbers, or two tensors of one shape; both are held at or below 1 - 1e-4.
    """
    latest = 1 - 1e-4
    if isinstance(t, Tensor):
        t, s = t.clamp(max=latest), s.clamp(max=latest)
    else:
        t, s = min(t, latest), min(s, latest)
    p, q, g = t * (1 - s), s * (1 - t), (1 - t) * (1 - s)
    if isinstance(p, Tensor):
        h = torch.hypot(p, q)
        positive = torch.where(h > 0, h, torch.ones_like(h))
        a, b = p / positive, torch.where(h > 0, q / positive, torch.ones_like(h))
    else:
        h = math.hypot(p, q)
        a, b = (p / h, q / h) if h > 0 else (0.0, 1.0)
    total = h + g
    return GlassCoefficients(
        p_x=a * (1 - s) / total,
        p_xbar=b * (1 - t) / total,
        t_star=h / total,
        c_x=a / total,
        c_xbar=((1 - t) * (b - 1) - t * a) / total,
        c_v=(1 - t) / total,
    )


def column_of(times: Sequence[float]) -> Tensor:
    """Flow times as [len(times), 1], float64, CPU."""
    return torch.tensor(times, dtype=torch.float64, device="cpu").reshape(-1, 1)
