"""The play data as chunked transitions with hindsight goals and OGBench's singletask reward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qpilots_fast.demo.ogbench_cube import CHUNK, GOAL_DIM, SUCCESS_DISTANCE, goal_features

CUBE_QPOS = slice(14, 17)  # of qpos; the same columns as ogbench.relabel_utils
REST_HEIGHT = 0.025  # metres; the cube's centre is 0.02 above the floor when it lies there
REST_SPEED = 2e-4  # metres a step


@dataclass
class Batch:
    """Chunked transitions (B of them); rewards are discounted sums inside the chunk."""

    obs: Tensor  # [B, S]
    actions: Tensor  # [B, A]
    rewards: Tensor  # [B]
    discounts: Tensor  # [B], gamma^CHUNK, or 0 where the goal was reached within the chunk
    next_obs: Tensor  # [B, S]
    next_actions: Tensor  # [B, A], the dataset's own next chunk (SARSA)


class PlayData:
    """Samples chunked transitions from one play file.

    A goal is a resting place of the cube: with probability `p_future` one of the next places in the same episode,
    otherwise a place of any episode; moved by up to `goal_jitter` metres so that all of the table is covered. The
    reward is the singletask one for that goal: -1 a step, and 0 with termination once the cube is within 4 cm.

    Args:
        path: a file of generate_data.py.
        discount: per environment step.
        seed: of the sampling.
    """

    def __init__(
        self, path: Path, discount: float = 0.99, seed: int = 0, p_future: float = 0.7, goal_jitter: float = 0.03
    ) -> None:
        file = np.load(path)
        self.obs = file["observations"].astype(np.float32)  # [T, 28]
        self.actions = file["actions"].astype(np.float32)  # [T, 5]
        self.cube = file["qpos"][:, CUBE_QPOS].astype(np.float32)  # [T, 3]
        ends = np.flatnonzero(file["terminals"])
        self.episode = np.zeros(len(self.obs), dtype=np.int64)
        self.episode[ends[:-1] + 1] = 1
        self.episode = np.cumsum(self.episode)
        last = ends[self.episode]
        self.starts = np.flatnonzero(np.arange(len(self.obs)) + 2 * CHUNK - 1 <= last)
        self.discount, self.p_future, self.goal_jitter = discount, p_future, goal_jitter
        self.seed(seed)
        self._find_resting_places()
        self.mean, self.std = self.obs.mean(0), np.maximum(self.obs.std(0), 1e-2)

    def seed(self, seed: int) -> None:
        """Starts the sampling anew."""
        self.rng = np.random.default_rng(seed)

    def keep_episodes(self, first: int, last: int | None) -> None:
        """From now on draws transitions of episodes [first:last] alone, as Python slices."""
        episodes = range(int(self.episode[-1]) + 1)[first:last]
        chosen = self.episode[self.starts]
        self.starts = self.starts[(chosen >= episodes.start) & (chosen < episodes.stop)]

    def _find_resting_places(self) -> None:
        moved = np.linalg.norm(np.diff(self.cube, axis=0, prepend=self.cube[:1]), axis=1)
        rest = (self.cube[:, 2] < REST_HEIGHT) & (moved < REST_SPEED)
        begins = rest & ~np.concatenate([[False], rest[:-1] & (self.episode[1:] == self.episode[:-1])])
        self.place_index = np.flatnonzero(begins)
        self.places = self.cube[self.place_index]

    def _sample_goals(self, index: np.ndarray) -> np.ndarray:
        """[B, 3] metres; the places after the current one are taken with probability 1/2, 1/4, ..."""
        count = len(index)
        places = np.searchsorted(self.place_index, index, side="right") + self.rng.geometric(0.5, count) - 1
        anywhere = self.rng.integers(len(self.places), size=count)
        clipped = np.minimum(places, len(self.places) - 1)
        same_episode = (places < len(self.places)) & (self.episode[self.place_index[clipped]] == self.episode[index])
        future = same_episode & (self.rng.random(count) < self.p_future)
        goals = self.places[np.where(future, clipped, anywhere)].copy()
        goals[:, :2] += self.rng.uniform(-self.goal_jitter, self.goal_jitter, (count, 2))
        goals[:, 2] = 0.02
        return goals

    def policy_obs(self, index: np.ndarray, goals: np.ndarray) -> Tensor:
        """[B, S]: the normalised state and the way from cube to goal, as the networks see them."""
        state = (self.obs[index] - self.mean) / self.std
        columns = [state, goal_features(self.obs[index], goals).astype(np.float32)]
        return torch.from_numpy(np.concatenate(columns, axis=1))

    def chunk(self, index: np.ndarray) -> Tensor:
        """[B, A]: the CHUNK actions from each index on."""
        return torch.from_numpy(self.actions[index[:, None] + np.arange(CHUNK)].reshape(len(index), -1))

    def sample_behaviour(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """obs [B, S] with zeros for the goal, and the chunk that the play took there [B, A]."""
        index = self.starts[self.rng.integers(len(self.starts), size=batch_size)]
        state = (self.obs[index] - self.mean) / self.std
        padded = np.concatenate([state, np.zeros((batch_size, GOAL_DIM), np.float32)], axis=1)
        return torch.from_numpy(padded), self.chunk(index)

    def sample(self, batch_size: int) -> Batch:
        """A batch of transitions with fresh goals."""
        index = self.starts[self.rng.integers(len(self.starts), size=batch_size)]
        goals = self._sample_goals(index)
        cube = self.cube[index[:, None] + np.arange(CHUNK + 1)]  # [B, CHUNK + 1, 3]
        success = np.linalg.norm(cube - goals[:, None], axis=-1) <= SUCCESS_DISTANCE
        alive = 1.0 - np.maximum.accumulate(success, axis=1)  # [B, CHUNK + 1], no success up to here
        powers = self.discount ** np.arange(CHUNK)
        return Batch(
            obs=self.policy_obs(index, goals),
            actions=self.chunk(index),
            rewards=torch.from_numpy(-(alive[:, :CHUNK] * powers).sum(1).astype(np.float32)),
            discounts=torch.from_numpy((alive[:, CHUNK] * self.discount**CHUNK).astype(np.float32)),
            next_obs=self.policy_obs(index + CHUNK, goals),
            next_actions=self.chunk(index + CHUNK),
        )
