"""The generalist: a flow policy in pi0's shape (arXiv 2410.24164), small, from states and words.

A prefix transformer reads one token of the instruction and one for each part of the observation; its keys and values
are computed once a chunk. An action expert of its own weights reads them at every flow step and moves a padded chunk
from noise (tau = 1) to actions (tau = 0) with u = noise - action. Methods carry LeRobot's names, so that
`qpilots_fast.integrations.lerobot.steer` takes this policy as it takes pi0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .instructions import EMBEDDING_DIM

STATE_DIM = 39  # Meta-World's: hand and objects now, the same one step ago, the goal
ACTION_DIM = 4  # the hand's way in x, y and z, and the fingers' effort; in [-1, 1]
CHUNK = 8
PADDED_DIM = 32
PARTS = (8, 13, 10, 9)  # columns of `features` in each observation token: hand, first object, second object, goal

Cache = tuple[tuple[Tensor, Tensor], ...]  # a layer's keys and values of the prefix, each [B, heads, P, width / heads]


def features(state: Tensor) -> Tensor:
    """[..., 40] of Meta-World's states [..., 39]: places, ways between them and speeds, each of order 1.

    Distances that decide a grasp are centimetres in a workspace of a metre: ways are scaled more than places.
    """
    hand, fingers = state[..., 0:3], state[..., 3:4]
    first, first_quat = state[..., 4:7], state[..., 7:11]
    second, second_quat = state[..., 11:14], state[..., 14:18]
    goal = state[..., 36:39]
    moved = state[..., 0:18] - state[..., 18:36]
    place = lambda xyz: 3 * (xyz - xyz.new_tensor([0.0, 0.6, 0.15]))  # noqa: E731
    columns = [
        place(hand), 2 * fingers - 1, 50 * moved[..., 0:3], 10 * moved[..., 3:4],
        place(first), first_quat, 10 * (first - hand), 50 * moved[..., 4:7],
        place(second), second_quat, 10 * (second - hand),
        place(goal), 10 * (goal - first), 10 * (goal - hand),
    ]  # fmt: skip
    return torch.cat(columns, -1).clamp(-8, 8)


class Block(nn.Module):
    """Pre-norm attention and MLP; tokens attend to one another and to the keys and values that they are given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, prefix: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, T, width] -> the same, and the tokens' own keys and values [B, heads, T, width / heads]."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        keys, values = (k, v) if prefix is None else (torch.cat([prefix[0], k], 2), torch.cat([prefix[1], v], 2))
        x = x + self.out(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), (k, v)


def time_embedding(tau: Tensor, width: int) -> Tensor:
    """[B, width] of sines and cosines of tau [B], periods from 0.004 to 4, as pi0's."""
    periods = 4e-3 * (4 / 4e-3) ** torch.linspace(0, 1, width // 2, device=tau.device)
    angles = 2 * math.pi * tau[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], -1)


class ActionExpertFlow(nn.Module):
    """Prefix and action expert.

    Args:
        width, layers, heads: of both.
    """

    def __init__(self, width: int = 96, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.width = width
        self.language_in = nn.Linear(EMBEDDING_DIM, width)
        self.parts_in = nn.ModuleList(nn.Linear(part, width) for part in PARTS)
        self.part_kind = nn.Parameter(0.02 * torch.randn(len(PARTS), width))
        self.prefix_blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.actions_in = nn.Linear(PADDED_DIM, width)
        self.place_in_chunk = nn.Parameter(0.02 * torch.randn(CHUNK, width))
        self.time_in = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.expert_blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out, self.actions_out = nn.LayerNorm(width), nn.Linear(width, PADDED_DIM)

    def embed_prefix(self, state: Tensor, language: Tensor) -> Cache:
        """Keys and values of the prefix, of states [B, 39] and embeddings [B, 384] of length 1."""
        parts = features(state).split(PARTS, -1)
        x = torch.stack([layer(part) for layer, part in zip(self.parts_in, parts)], 1) + self.part_kind
        instruction = self.language_in(language * EMBEDDING_DIM**0.5)
        x = torch.cat([instruction.unsqueeze(1), x], 1)
        cache = []
        for block in self.prefix_blocks:
            x, keys_and_values = block(x)
            cache.append(keys_and_values)
        return tuple(cache)

    def denoise_step(self, cache: Cache, x_t: Tensor, timestep: Tensor) -> Tensor:
        """noise - action [B, C, 32] at x_t = tau noise + (1 - tau) action, timestep = tau [B]."""
        x = self.actions_in(x_t) + self.place_in_chunk
        time = time_embedding(timestep, self.width).unsqueeze(1).expand_as(x)
        x = x + self.time_in(torch.cat([x, time], -1))
        for block, prefix in zip(self.expert_blocks, cache):
            x, _ = block(x, prefix)
        return self.actions_out(self.norm_out(x))

    def sample_actions(self, batch: dict[str, Tensor], noise: Tensor | None, num_steps: int) -> Tensor:
        """Padded chunks [B, C, 32] by Euler steps from noise [B, C, 32]; None: drawn."""
        cache = self.embed_prefix(batch["observation.state"], batch["observation.language"])
        if noise is None:
            noise = torch.randn(len(batch["observation.state"]), CHUNK, PADDED_DIM)
        x_t, dt = noise, -1.0 / num_steps
        for k in range(num_steps):
            x_t = x_t + dt * self.denoise_step(cache, x_t, x_t.new_full((len(x_t),), 1.0 + k * dt))
        return x_t


@dataclass
class GeneralistConfig:
    """What `lerobot.steer` reads of a policy, under LeRobot's names, and the networks' sizes."""

    width: int = 96
    layers: int = 3
    heads: int = 4
    chunk_size: int = CHUNK
    max_action_dim: int = PADDED_DIM
    num_inference_steps: int = 10
    action_feature: Any = field(default_factory=lambda: SimpleNamespace(shape=(ACTION_DIM,)))


class GeneralistPolicy(nn.Module):
    """The policy with LeRobot's methods; each `select_action` plays one chunk to its end before it asks for another."""

    def __init__(self, config: GeneralistConfig) -> None:
        super().__init__()
        self.config = config
        self.model = ActionExpertFlow(config.width, config.layers, config.heads)
        self.reset()

    def reset(self) -> None:
        """Forgets the actions that are queued."""
        self._queue: list[Tensor] = []

    def predict_action_chunk(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """Actions [B, C, 4] of a batch of observation.state [B, 39] and observation.language [B, 384].

        Args:
            noise: to start from, [B, C, 32], or [B, n, C, 32] where n candidates are ranked; None: drawn.
        """
        with torch.no_grad():
            chunk = self.model.sample_actions(batch, noise, self.config.num_inference_steps)
        return chunk[..., :ACTION_DIM]

    def select_action(self, batch: dict[str, Tensor]) -> Tensor:
        """The next action [B, 4]."""
        if not self._queue:
            self._queue = list(self.predict_action_chunk(batch).unbind(1))
        return self._queue.pop(0)
