"""OGBench tasks: the environment, its dataset with the task's rewards, and a buffer of chunked transitions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config, split_task


@dataclass
class Batch:
    """Chunked transitions; rewards are discounted sums inside the chunk, discounts 0 once the task is solved."""

    obs: Tensor  # [B, S]
    actions: Tensor  # [B, A]
    rewards: Tensor  # [B]
    discounts: Tensor  # [B]
    next_obs: Tensor  # [B, S]


def make_env(task: str) -> Any:
    """The singletask environment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ogbench

        return ogbench.make_env_and_datasets(task, env_only=True)


def dataset_path(config: Config) -> Path:
    """Where the task's dataset lies.

    Raises:
        FileNotFoundError: with the ways to get it.
    """
    name = split_task(config.task)[1]
    tried = [Path(config.data)] if config.data else [Path("data"), Path.home() / ".ogbench" / "data"]
    for place in tried:
        path = place if config.data else place / f"{name}.npz"
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{name}.npz is in none of {', '.join(map(str, tried))}. Make it with `python -m "
        f"examples.offline_to_online.generate {name}` (cube, scene, puzzle, pointmaze), fetch it with "
        "ogbench.download_datasets, or say --data PATH."
    )


def load_rows(config: Config, env: Any) -> dict[str, np.ndarray]:
    """observations, actions, rewards, masks (0 where solved) and terminals (last row of an episode), row by row."""
    from ogbench.relabel_utils import relabel_dataset

    file = np.load(dataset_path(config))
    rows = {key: file[key] for key in file.files}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        relabel_dataset(config.task, env, rows)
    if config.sparse:
        rows["rewards"] = -rows["masks"]
    keys = ("observations", "actions", "rewards", "masks", "terminals")
    return {key: np.asarray(rows[key], dtype=np.float32) for key in keys}


def normalisation(observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, the latter not below 0.01."""
    return observations.mean(0), np.maximum(observations.std(0), 1e-2)


class ReplayBuffer:
    """Rows of episodes, of which chunks that stay inside one episode are sampled.

    Args:
        rows: as `load_rows`.
        chunk: C, actions a transition.
        discount: per environment step.
        capacity: rows that `add` may append.
        seed: of the sampling.
    """

    def __init__(self, rows: dict[str, np.ndarray], chunk: int, discount: float, capacity: int, seed: int) -> None:
        self.chunk, self.discount = chunk, discount
        self.size = self.offline_size = len(rows["actions"])
        self.rows = {
            key: np.concatenate([value, np.zeros((capacity, *value.shape[1:]), np.float32)])
            for key, value in rows.items()
        }
        self.rng = np.random.default_rng(seed)
        ends = np.flatnonzero(rows["terminals"])
        last = np.full(self.size, self.size - 1)
        if len(ends):
            last = ends[np.minimum(np.searchsorted(ends, np.arange(self.size)), len(ends) - 1)]
        starts = np.flatnonzero(np.arange(self.size) + chunk <= last)
        self._starts = np.concatenate([starts, np.zeros(capacity, starts.dtype)])
        self._count = self._offline_count = len(starts)
        self._powers = (discount ** np.arange(chunk)).astype(np.float32)

    @property
    def starts(self) -> np.ndarray:
        """Rows that begin a chunk."""
        return self._starts[: self._count]

    def _add_starts(self, starts: np.ndarray) -> None:
        self._starts[self._count : self._count + len(starts)] = starts
        self._count += len(starts)

    def add_episode(self, episode: dict[str, np.ndarray]) -> None:
        """Appends an episode's rows; its last row holds only the last observation."""
        count = min(len(episode["actions"]), len(self.rows["actions"]) - self.size)
        for key, value in episode.items():
            self.rows[key][self.size : self.size + count] = value[:count]
        self._add_starts(np.arange(self.size, self.size + count - self.chunk))
        self.size += count

    def restore(self, online: dict[str, np.ndarray], starts: list[int]) -> None:
        """Puts back what `online_rows` gave, and which of those rows begin a chunk."""
        self.size = self.offline_size + len(online["actions"])
        for key, value in online.items():
            self.rows[key][self.offline_size : self.size] = value
        self._count = self._offline_count
        self._add_starts(np.asarray(starts, self._starts.dtype))

    def online_rows(self) -> dict[str, np.ndarray]:
        """What was appended, for a checkpoint."""
        return {key: value[self.offline_size : self.size] for key, value in self.rows.items()}

    def sample(self, batch_size: int) -> Batch:
        """A batch of chunks, offline and online rows alike."""
        index = self._starts[self.rng.integers(self._count, size=batch_size)]
        steps = index[:, None] + np.arange(self.chunk)
        masks = self.rows["masks"][steps]
        alive = np.cumprod(np.concatenate([np.ones_like(masks[:, :1]), masks], axis=1), axis=1)  # solved before step i
        rewards = (self.rows["rewards"][steps] * alive[:, :-1] * self._powers).sum(1)
        return Batch(
            obs=torch.from_numpy(self.rows["observations"][index]),
            actions=torch.from_numpy(self.rows["actions"][steps].reshape(batch_size, -1)),
            rewards=torch.from_numpy(rewards.astype(np.float32)),
            discounts=torch.from_numpy((self.discount**self.chunk * alive[:, -1]).astype(np.float32)),
            next_obs=torch.from_numpy(self.rows["observations"][index + self.chunk]),
        )
