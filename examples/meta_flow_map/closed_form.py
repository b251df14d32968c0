"""A base policy whose velocity, posterior and log-tilt gradient are known: a mixture of isotropic Gaussians."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """x1 | x_t = x for B rows, again a mixture of Gaussians: weights, stds [B, M]; means [B, M, A]."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    @property
    def mean(self) -> Tensor:
        """[B, A]."""
        return (self.weights.unsqueeze(-1) * self.means).sum(-2)

    @property
    def variance(self) -> Tensor:
        """[B, A], per action dimension."""
        second = self.means.square() + self.stds.square().unsqueeze(-1)
        return (self.weights.unsqueeze(-1) * second).sum(-2) - self.mean.square()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """[B, count, A]."""
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        rows = torch.arange(len(mode)).unsqueeze(-1)
        noise = torch.randn(*mode.shape, self.means.shape[-1], generator=generator, dtype=self.means.dtype)
        return self.means[rows, mode] + self.stds[rows, mode].unsqueeze(-1) * noise


@dataclass(frozen=True)
class GaussianMixture:
    """x1 ~ sum_m weights_m N(means_m, stds_m^2 I); `velocity` has the signature of FlowMLP and ignores obs.

    Args:
        weights: [M], positive, sum 1.
        means: [M, A].
        stds: [M].
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def to(self, dtype: torch.dtype) -> GaussianMixture:
        """The same mixture in another precision."""
        return GaussianMixture(self.weights.to(dtype), self.means.to(dtype), self.stds.to(dtype))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, A] draws of x1."""
        prior = Posterior(self.weights.unsqueeze(0), self.means.unsqueeze(0), self.stds.unsqueeze(0))
        return prior.sample(count, generator)[0]

    def log_density(self, x1: Tensor) -> Tensor:
        """log p(x1) [...] at x1 [..., A]."""
        distance = (x1.unsqueeze(-2) - self.means).square().sum(-1) / self.stds.square()
        log_volume = x1.shape[-1] * (self.stds.log() + 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=x1.dtype)))
        return torch.logsumexp(self.weights.log() - log_volume - distance / 2, -1)

    def posterior(self, x: Tensor, t: Tensor | float) -> Posterior:
        """x1 | x_t = x, where x = t x1 + (1-t) e; x [B, A], t [B, 1] or a number in [0, 1)."""
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x), 1)
        variance = (1 - t).square() + (t * self.stds).square()  # of x_t within a mode, [B, M]
        residual = x.unsqueeze(-2) - t.unsqueeze(-1) * self.means
        log_weight = self.weights.log() - residual.square().sum(-1) / (2 * variance) - x.shape[-1] / 2 * variance.log()
        gain = t * self.stds.square() / variance
        means = self.means + gain.unsqueeze(-1) * residual
        return Posterior(torch.softmax(log_weight, -1), means, (1 - t) * self.stds / variance.sqrt())

    def velocity(self, obs: Tensor | None, noisy_actions: Tensor, t: Tensor | float) -> Tensor:
        """E[x1 - e | x_t = x] = sum_m weight_m (m-th mode's velocity), regular on 0 <= t <= 1.

        Within mode m: mean_m + (t std^2 - (1-t)) / ((1-t)^2 + t^2 std^2) (x - t mean_m).
        """
        del obs
        x = noisy_actions
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x), 1)
        variance = (1 - t).square() + (t * self.stds).square()
        residual = x.unsqueeze(-2) - t.unsqueeze(-1) * self.means
        log_weight = self.weights.log() - residual.square().sum(-1) / (2 * variance) - x.shape[-1] / 2 * variance.log()
        slope = (t * self.stds.square() - (1 - t)) / variance
        per_mode = self.means + slope.unsqueeze(-1) * residual
        return (torch.softmax(log_weight, -1).unsqueeze(-1) * per_mode).sum(-2)
