"""Critics that encode or normalise what they observe, and change the units of the actions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .time_networks import A, H, S


class Critic(nn.Module):
    """Two Q networks behind what `observe` and `act` make of their inputs."""

    obs_width, action_width = S, A

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(S))
        self.register_buffer("std", torch.rand(S) + 0.5)
        self.encoder = nn.Sequential(nn.Linear(S, 9), nn.LayerNorm(9), nn.Tanh())
        self.register_buffer("scale", torch.rand(A) + 0.5)
        self.shift = nn.Parameter(torch.randn(A))
        width = self.obs_width + self.action_width
        self.q1, self.q2 = (
            nn.Sequential(nn.Linear(width, H), nn.ReLU(), nn.Linear(H, H), nn.LayerNorm(H), nn.ReLU(), nn.Linear(H, 1))
            for _ in range(2)
        )

    def observe(self, obs: Tensor) -> Tensor:
        return obs

    def act(self, actions: Tensor) -> Tensor:
        return actions

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.cat([self.observe(obs), self.act(actions)], -1)
        return self.q1(columns), self.q2(columns)


class Normalising(Critic):
    """rl_games' running mean and std of the observations, clipped at 5."""

    def observe(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) / self.std).clamp(-5, 5)


class Scaling(Critic):
    """The usual RunningMeanStd, of a variance."""

    def observe(self, obs: Tensor) -> Tensor:
        return (obs - self.mean) / (self.std + 1e-5).sqrt()


class Whitening(Critic):
    """The same as a batch norm of fixed statistics."""

    def observe(self, obs: Tensor) -> Tensor:
        return F.batch_norm(obs, self.mean, self.std, training=False)


class Encoding(Critic):
    """DrQ-v2's trunk: Linear, LayerNorm, Tanh on the observation alone."""

    obs_width = 9

    def observe(self, obs: Tensor) -> Tensor:
        return self.encoder(obs)


class InUnits(Critic):
    """Actions in the environment's units: a * scale + shift, both read at each call."""

    def act(self, actions: Tensor) -> Tensor:
        return actions * self.scale + self.shift


class SomeDims(Critic):
    """The real dimensions of a padded action, in another order."""

    action_width = 3

    def act(self, actions: Tensor) -> Tensor:
        return actions[:, [3, 0, 2]]


class Everything(Encoding):
    action_width = 3

    def act(self, actions: Tensor) -> Tensor:
        return (actions * self.scale + self.shift)[:, [2, 3, 1]]


CRITICS = {cls.__name__: cls for cls in (Normalising, Scaling, Whitening, Encoding, InUnits, SomeDims, Everything)}
