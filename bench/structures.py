"""Flows and critics that are no MLPs, as users write them, packed by from_module."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qpilots_fast import FlowMLP, from_module
from qpilots_fast.networks import PackableNetwork

# (obs_dim, action_dim, num_critics) -> flow, critics
Structure = Callable[[int, int, int], tuple[PackableNetwork, PackableNetwork]]


class Block(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class ResidualFlow(nn.Module):
    """Blocks of LayerNorm, Linear to 4 times the width, ReLU, Linear; sinusoid -> Linear -> Mish -> Linear of t."""

    def __init__(self, obs_dim: int, action_dim: int, width: int = 256, blocks: int = 3, time_dim: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000), time_dim // 2)))
        self.time = nn.Sequential(nn.Linear(time_dim, 2 * time_dim), nn.Mish(), nn.Linear(2 * time_dim, time_dim))
        self.net = nn.Sequential(
            nn.Linear(obs_dim + action_dim + time_dim, width),
            *(
                Block(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
                for _ in range(blocks)
            ),
            nn.ReLU(),
            nn.Linear(width, action_dim),
        )

    def forward(self, obs: Tensor, noisy_actions: Tensor, t: Tensor) -> Tensor:
        angles = t * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        return self.net(torch.cat([obs, noisy_actions, time], -1))


def bronet(inputs: int, width: int = 512, blocks: int = 2) -> nn.Sequential:
    """Linear, LayerNorm, ReLU, then blocks of two Linears with LayerNorm; one value."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU(),
        *(
            Block(
                nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width)
            )
            for _ in range(blocks)
        ),
        nn.Linear(width, 1),
    )  # fmt: skip


class Categorical(nn.Module):
    """The expectation over 101 atoms from -10 to 10 that an MLP with LayerNorm gives probabilities."""

    def __init__(self, inputs: int, widths: tuple[int, ...] = (512, 256, 128), atoms: int = 101) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU()]
            inputs = width
        self.net = nn.Sequential(*layers, nn.Linear(inputs, atoms))
        self.register_buffer("support", torch.linspace(-10, 10, atoms))

    def forward(self, columns: Tensor) -> Tensor:
        return (self.net(columns).softmax(-1) * self.support).sum(-1, keepdim=True)


def residual(obs_dim: int, action_dim: int, num_critics: int) -> tuple[PackableNetwork, PackableNetwork]:
    """A residual flow and BroNet critics."""
    dims = {"obs_dim": obs_dim, "action_dim": action_dim}
    flow = from_module(ResidualFlow(obs_dim, action_dim), "flow", **dims)
    critics = [bronet(obs_dim + action_dim) for _ in range(num_critics)]
    return flow, from_module(critics, "critic", **dims)


def c51(obs_dim: int, action_dim: int, num_critics: int) -> tuple[PackableNetwork, PackableNetwork]:
    """The paper's flow and categorical critics."""
    critics = [Categorical(obs_dim + action_dim) for _ in range(num_critics)]
    return FlowMLP(obs_dim, action_dim), from_module(critics, "critic", obs_dim=obs_dim, action_dim=action_dim)
