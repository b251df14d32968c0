"""The six Meta-World environments, stepped side by side in one process, and episodes in them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .instructions import TASKS, TRAINED, embedding
from .policy import ACTION_DIM, CHUNK, PADDED_DIM

EPISODE_STEPS = 96  # 12 chunks; the scripted policies need 50 to 90

Batch = dict[str, Tensor]
Act = Callable[[Batch, Tensor], Tensor]  # (batch of B rows, noise [B, C, D]) -> actions [B, C, 4]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the scripted policies' remarks on clipped actions, gymnasium's and glfw's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_env(task: str) -> Any:
    """One environment whose goal is observed and whose every reset draws a new start from `env.seed`."""
    with quiet():
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"]()
    env._freeze_rand_vec, env.seeded_rand_vec = False, True  # Meta-World's own switches
    return env


def reset(env: Any, seed: int) -> np.ndarray:
    """The state [39] of a start that depends on the seed alone."""
    env.seed(seed)
    return env.reset()[0]


def batch_of(states: np.ndarray, sentences: list[str]) -> Batch:
    """What the policy and the critics read, of states [B, 39] and B instructions."""
    return {
        "observation.state": torch.from_numpy(states.astype(np.float32)),
        "observation.language": torch.stack([embedding(sentence) for sentence in sentences]),
    }


@dataclass
class Episode:
    """One episode: T chunks were played, and the state after the last is kept too."""

    task: str
    sentence: str
    states: list[np.ndarray] = field(default_factory=list)  # [39] each, T + 1
    chunks: list[np.ndarray] = field(default_factory=list)  # [C, 4] each, T
    success: bool = False
    steps: int = 0  # environment steps until success or the end


class Tasks:
    """`copies` environments of each task; those of one task lie side by side. About 20 MB an environment."""

    def __init__(self, copies: int, tasks: tuple[str, ...] = TASKS) -> None:
        self.copies, self.names = copies, [task for task in tasks for _ in range(copies)]
        self._envs = [make_env(task) for task in self.names]

    def rollout(
        self, act: Act, rounds: int, seed: int, *, phrasings: Mapping[str, tuple[str, ...]] = TRAINED,
        max_steps: int = EPISODE_STEPS, on_round: Callable[[], None] = lambda: None,
    ) -> list[Episode]:  # fmt: skip
        """Plays rounds x copies episodes of every task, chunks executed open loop.

        Starts, phrasings and noise depend on the seed alone: two policies meet the same episodes.

        Args:
            act: what chooses the chunks.
            rounds: episodes a copy.
            seed: of starts, phrasings and noise.
            phrasings: by task, of which each episode is told one.
            max_steps: environment steps at which an episode is given up.
            on_round: called after each round.
        """
        episodes: list[Episode] = []
        for r in range(rounds):
            rng = np.random.default_rng((seed, r))
            noise = torch.randn(
                math.ceil(max_steps / CHUNK), len(self._envs), CHUNK, PADDED_DIM,
                generator=torch.Generator().manual_seed(seed * 1009 + r),
            )  # fmt: skip
            seeds = rng.integers(2**31, size=len(self._envs))
            told = [str(rng.choice(phrasings[name])) for name in self.names]
            current = [Episode(name, sentence, steps=max_steps) for name, sentence in zip(self.names, told)]
            for episode, env, number in zip(current, self._envs, seeds):
                episode.states.append(reset(env, int(number)))
            running = list(range(len(self._envs)))
            for k in range(len(noise)):
                batch = batch_of(np.stack([current[i].states[-1] for i in running]), [told[i] for i in running])
                chunks = act(batch, noise[k, running]).numpy()
                for chunk, i in zip(chunks, running):
                    self._play(i, current[i], chunk, k)
                running = [i for i in running if not current[i].success]
                if not running:
                    break
            episodes += current
            on_round()
        return episodes

    def _play(self, i: int, episode: Episode, chunk: np.ndarray, k: int) -> None:
        """Executes a chunk [C, 4], the k-th, until success."""
        state = episode.states[-1]
        for step, action in enumerate(chunk):
            state, _, _, _, info = self._envs[i].step(np.clip(action, -1, 1).astype(np.float64))
            if info["success"] > 0:
                episode.success, episode.steps = True, CHUNK * k + step + 1
                break
        episode.states.append(state)
        episode.chunks.append(chunk[:, :ACTION_DIM])


def seen(episodes: list[Episode]) -> Batch:
    """What was seen at every decision of the episodes."""
    states = [state for episode in episodes for state in episode.states[:-1]]
    return batch_of(np.stack(states), [episode.sentence for episode in episodes for _ in episode.chunks])
