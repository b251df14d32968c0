"""Flows whose time features a network of their own makes, from t alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

S, A, H = 7, 4, 24


def angles(t: Tensor, width: int, gap: int = 1, scale: float = 1.0) -> Tensor:
    half = width // 2
    return scale * t * torch.exp(torch.arange(half, dtype=t.dtype) * (-math.log(1e4) / (half - gap)))


class SinusoidalMLP(nn.Module):
    """DPPO's SinusoidalPosEmb, Linear, Mish, Linear; sin before cos."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.Mish(), nn.Linear(2 * width, width))

    def forward(self, t: Tensor) -> Tensor:
        at = angles(t, self.width)
        return self.net(torch.cat([at.sin(), at.cos()], -1))


class PlainSinusoidal(nn.Module):
    """Diffusion-QL's SinusoidalPosEmb: nothing is trained."""

    width = 8

    def forward(self, t: Tensor) -> Tensor:
        at = angles(t, self.width)
        return torch.cat([at.sin(), at.cos()], -1)


class LearnedFourier(nn.Module):
    """IDQL's FourierFeatures with a trained kernel."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.kernel = nn.Parameter(torch.randn(width // 2, 1))

    def forward(self, t: Tensor) -> Tensor:
        at = 2 * math.pi * t @ self.kernel.T
        return torch.cat([at.cos(), at.sin()], -1)


class GaussianFourier(nn.Module):
    """score_sde's GaussianFourierProjection: frequencies in a buffer, then a Linear and SiLU."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("frequencies", 4 * torch.randn(width // 2))
        self.linear = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        at = 2 * math.pi * t * self.frequencies
        return nn.functional.silu(self.linear(torch.cat([at.sin(), at.cos()], -1)))


class StepTable(nn.Module):
    """CleanDiffuser's table of step indices: nn.Embedding."""

    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, self.width)

    def forward(self, t: Tensor) -> Tensor:
        return self.table((10 * t).round().long().squeeze(-1).clamp(0, 9))


class PlainAttribute(nn.Module):
    """Frequencies in a tensor that is neither parameter nor buffer, and the length of a step beside the features."""

    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = torch.tensor([1.0, 3.0])
        self.step = nn.Parameter(torch.tensor([0.1]))

    def forward(self, t: Tensor) -> Tensor:
        at = t * self.frequencies.to(t)
        return torch.cat([at.sin(), at.cos(), self.step.expand_as(t)], -1)


TIMES: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (SinusoidalMLP, PlainSinusoidal, LearnedFourier, GaussianFourier, StepTable, PlainAttribute)
}


class Flow(nn.Module):
    """DPPO's FlowMLP: [action, time features, obs]."""

    def __init__(self, time: nn.Module, act: type[nn.Module] = nn.Mish) -> None:
        super().__init__()
        self.time = time
        self.net = nn.Sequential(nn.Linear(A + time.width + S, H), act(), nn.Linear(H, H), act(), nn.Linear(H, A))

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([actions, self.time(t), obs], -1))


class Map(nn.Module):
    """A meta flow map with one time network for t, s and u."""

    def __init__(self) -> None:
        super().__init__()
        self.time = SinusoidalMLP()
        width = S + 2 * A + 3 * self.time.width
        self.net = nn.Sequential(nn.Linear(width, H), nn.SiLU(), nn.Linear(H, H), nn.SiLU(), nn.Linear(H, A))

    def forward(self, obs: Tensor, xbar: Tensor, x: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        times = torch.cat([self.time(t), self.time(s), self.time(u)], -1)
        return xbar + (u - s) * self.net(torch.cat([obs, xbar, x, times], -1))
