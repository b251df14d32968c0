"""The proof problem: a 2-D base policy with three modes, two critics, and the exact steering gradient.

Steering follows V(x, t) = log E[exp(tau Q(x1)) | x_t = x]. Differentiating the posterior's density gives
grad V = t / (1-t)^2 (E_tilted[x1] - E_posterior[x1]), two integrals over x1 that a grid settles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .closed_form import GaussianMixture

TAU = 2.0
RADIUS = 0.6

BASE = GaussianMixture(
    weights=torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64),
    means=RADIUS * torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], dtype=torch.float64),
    stds=torch.full((3,), 0.2, dtype=torch.float64),
)


def pointing(a: Tensor) -> Tensor:
    """A bump on the first mode: its slope points there from everywhere, so one estimate serves well. [B, 2] -> [B]."""
    return torch.exp(-(a - BASE.means[0].to(a)).square().sum(-1) / (2 * 0.4**2))


def supported(a: Tensor) -> Tensor:
    """Low where there are no data, between the modes, as pessimistic critics are; the first mode is best."""
    off_ring = ((a.square().sum(-1) + 1e-12).sqrt() - RADIUS) / 0.3
    return 0.5 * torch.tanh(2 * a[..., 0]) - off_ring.square()


CRITICS: dict[str, Callable[[Tensor], Tensor]] = {"pointing": pointing, "supported": supported}


@dataclass(frozen=True)
class States:
    """Noisy actions on the way to data: x [B, 2] at t [B, 1], and the smaller modes' posterior weight."""

    x: Tensor
    t: Tensor

    @property
    def second_weight(self) -> Tensor:
        """Posterior weight of the second likeliest mode, [B]; at most 1/2."""
        return BASE.posterior(self.x, self.t).weights.sort(-1).values[:, -2]

    @property
    def bimodal(self) -> Tensor:
        """[B] bool, at least a fifth of the posterior in the second mode."""
        return self.second_weight >= 0.2

    @property
    def unimodal(self) -> Tensor:
        """[B] bool, less than a fiftieth of it there."""
        return self.second_weight < 0.02


def states_at(t: Tensor, generator: torch.Generator) -> States:
    """x = t x1 + (1-t) e for each row of t [B, 1]."""
    x1 = BASE.sample(len(t), generator)
    return States(t * x1 + (1 - t) * torch.randn(x1.shape, generator=generator, dtype=x1.dtype), t)


def exact_gradient(critic: Callable[[Tensor], Tensor], states: States, points: int = 241) -> Tensor:
    """grad V [B, 2] by the trapezoid rule on [-2, 2]^2 (spectrally accurate: the integrand decays inside)."""
    axis = torch.linspace(-2, 2, points, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    prior, tilt = BASE.log_density(grid), TAU * critic(grid)
    rows = []
    for x, t in zip(states.x, states.t):
        log_posterior = prior - (x - t * grid).square().sum(-1) / (2 * (1 - t) ** 2)
        shift = torch.softmax(log_posterior + tilt, 0) @ grid - torch.softmax(log_posterior, 0) @ grid
        rows.append(t / (1 - t) ** 2 * shift)
    return torch.stack(rows)
