"""The one-dimensional UNet of Diffusion Policy (Chi et al., arXiv 2303.04137), small.

Convolutions run over the steps of an action chunk; the observation and the diffusion step enter every residual block
by FiLM (arXiv 1709.07871), as one scale and shift a channel.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn


class StepFeatures(nn.Module):
    """Sines and cosines of a diffusion step, [B] -> [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1)), False)

    def forward(self, steps: Tensor) -> Tensor:
        angles = steps[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def conv_block(inputs: int, outputs: int, kernel: int = 3, groups: int = 8) -> nn.Sequential:
    """Convolution over the chunk's steps, group norm, Mish."""
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.GroupNorm(groups, outputs), nn.Mish()
    )


class FiLMBlock(nn.Module):
    """Two convolutions with a residual; between them, the condition's scale and shift of every channel."""

    def __init__(self, inputs: int, outputs: int, condition_dim: int) -> None:
        super().__init__()
        self.first, self.second = conv_block(inputs, outputs), conv_block(outputs, outputs)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition_dim, 2 * outputs))
        self.residual = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, inputs, C], condition [B, condition_dim] -> [B, outputs, C]."""
        scale, shift = self.film(condition)[:, :, None].chunk(2, dim=1)
        return self.second(scale * self.first(x) + shift) + self.residual(x)


class ConditionalUnet1D(nn.Module):
    """noise(noisy_actions [B, C, D], steps [B], obs [B, S]) -> [B, C, D].

    Args:
        obs_dim: S. action_dim: D.
        widths: channels of the levels; between two levels the chunk is halved, so C must be a multiple of
            2^(levels - 1).
        step_dim: width of the diffusion step's embedding.
    """

    def __init__(self, obs_dim: int, action_dim: int, widths: tuple[int, ...] = (48, 96), step_dim: int = 64) -> None:
        super().__init__()
        self.embed_step = nn.Sequential(
            StepFeatures(step_dim), nn.Linear(step_dim, 4 * step_dim), nn.Mish(), nn.Linear(4 * step_dim, step_dim)
        )
        condition = step_dim + obs_dim
        pairs = list(pairwise((action_dim, *widths)))
        self.down = nn.ModuleList(
            nn.ModuleList([FiLMBlock(a, b, condition), FiLMBlock(b, b, condition)]) for a, b in pairs
        )
        self.shorten = nn.ModuleList(nn.Conv1d(width, width, 3, stride=2, padding=1) for width in widths[:-1])
        self.middle = nn.ModuleList(FiLMBlock(widths[-1], widths[-1], condition) for _ in range(2))
        self.up = nn.ModuleList(
            nn.ModuleList([FiLMBlock(2 * b, a, condition), FiLMBlock(a, a, condition)]) for a, b in pairs[:0:-1]
        )
        self.lengthen = nn.ModuleList(nn.ConvTranspose1d(a, a, 4, stride=2, padding=1) for a in widths[-2::-1])
        self.out = nn.Sequential(conv_block(widths[0], widths[0]), nn.Conv1d(widths[0], action_dim, 1))

    def forward(self, noisy_actions: Tensor, steps: Tensor, obs: Tensor) -> Tensor:
        condition = torch.cat([self.embed_step(steps.to(obs.dtype)), obs], dim=1)
        x = noisy_actions.transpose(1, 2)
        passed = []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x, condition)
            passed.append(x)
            if level < len(self.shorten):
                x = self.shorten[level](x)
        for block in self.middle:
            x = block(x, condition)
        for blocks, lengthen in zip(self.up, self.lengthen):
            x = torch.cat([x, passed.pop()], dim=1)
            for block in blocks:
                x = block(x, condition)
            x = lengthen(x)
        return self.out(x).transpose(1, 2)
