"""The policy that the demo steers: a behaviour-cloned flow and goal-conditioned critics for OGBench cube-single.

Trained by examples/ogbench_cube/train.py on scripted play data. The critics see the state and the way from the cube
to its goal; the flow is given the same columns but its weights on the goal are zero: the base policy does not know
the task, and only steering makes it useful. The same holds for the meta flow map of examples/ogbench_cube/
train_posterior.py, which draws the flow's clean actions for QPILOTS-M.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import fill, read_tensors, write_tensors, write_text
from ..networks import CriticEnsemble, FlowMLP, MetaFlowMap

ASSETS = Path(__file__).parents[1] / "assets" / "ogbench_cube"
CHUNK = 5  # environment steps a chunk, executed open loop
ACTION_DIM = 5 * CHUNK
STATE_DIM = 28
GOAL_DIM = 3
OBS_DIM = STATE_DIM + GOAL_DIM
CUBE_OBS = slice(19, 22)  # the cube's place in the state, as (xyz - XYZ_CENTER) * XYZ_SCALE
XYZ_CENTER = (0.425, 0.0, 0.0)  # metres; these three are constants of ogbench's CubeEnv
XYZ_SCALE = 10.0
SUCCESS_DISTANCE = 0.04  # metres
TASKS = (1, 2, 3, 4, 5)
EPISODE_STEPS = 200

ChunkSampler = Callable[..., Tensor]  # (obs [B, S], noise [B, A]) -> actions [B, A]


def goal_features(state: np.ndarray, goal_xyz: np.ndarray) -> np.ndarray:
    """[..., 3]: the way from the cube to the goal (metres), in the state's units."""
    return (goal_xyz - np.asarray(XYZ_CENTER)) * XYZ_SCALE - state[..., CUBE_OBS]


@dataclass
class CubePolicy:
    """Flow, critics and the state's normalisation; a meta flow map of the flow where QPILOTS-M is wanted."""

    flow: FlowMLP
    critic: CriticEnsemble
    mean: np.ndarray  # [28]
    std: np.ndarray  # [28]
    posterior: MetaFlowMap | None = None

    @property
    def networks(self) -> dict[str, FlowMLP | CriticEnsemble | MetaFlowMap]:
        """By the prefix of their tensors in the file."""
        networks: dict[str, FlowMLP | CriticEnsemble | MetaFlowMap] = {"flow": self.flow, "critic": self.critic}
        return networks if self.posterior is None else networks | {"posterior": self.posterior}

    def obs(self, state: np.ndarray, goal_xyz: np.ndarray) -> Tensor:
        """[B, S] of raw states [B, 28] and goals [B, 3] in metres."""
        columns = [(state - self.mean) / self.std, goal_features(state, goal_xyz)]
        return torch.from_numpy(np.concatenate(columns, axis=-1).astype(np.float32))

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Writes policy.safetensors (bfloat16) and policy.json (shapes, normalisation, how it was trained)."""
        tensors = {f"{name}.{k}": v for name, net in self.networks.items() for k, v in net.state_dict().items()}
        write_tensors(folder / "policy.safetensors", {k: v.to(torch.bfloat16) for k, v in tensors.items()})
        config: dict[str, Any] = {
            "flow_hidden_dims": self.flow.spec.hidden_dims,
            "critic_hidden_dims": self.critic.spec.hidden_dims,
            "num_critics": self.critic.spec.num_members,
            "state_mean": [round(float(v), 6) for v in self.mean],
            "state_std": [round(float(v), 6) for v in self.std],
            "about": about,
        }
        if self.posterior is not None:
            names = ("hidden_dims", "time_embedding", "time_embedding_dim")
            config["posterior"] = {name: getattr(self.posterior.spec, name) for name in names}
        write_text(folder / "policy.json", json.dumps(config, indent=1) + "\n")

    @staticmethod
    def load(folder: Path = ASSETS) -> CubePolicy:
        """Reads what `save` wrote, in float32; a file without a posterior gives a policy without one.

        Raises:
            ValueError: where a file is cut off, altered, or not of the sizes that policy.json tells.
        """
        config = _read_config(folder / "policy.json")
        policy = new_policy(
            tuple(config["flow_hidden_dims"]), tuple(config["critic_hidden_dims"]), config["num_critics"],
            np.asarray(config["state_mean"]), np.asarray(config["state_std"]),
        )  # fmt: skip
        if "posterior" in config:
            policy.posterior = MetaFlowMap(OBS_DIM, ACTION_DIM, **config["posterior"])
        path = folder / "policy.safetensors"
        fill({f"{name}.": network for name, network in policy.networks.items()}, read_tensors(path)[0], path)
        for network in policy.networks.values():
            network.requires_grad_(False)
        return policy


def _read_config(path: Path) -> dict[str, Any]:
    needed = ("flow_hidden_dims", "critic_hidden_dims", "num_critics", "state_mean", "state_std")
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected the JSON object that was written.") from None
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; expected what CubePolicy.save wrote.")
    return config


def new_policy(
    flow_hidden_dims: tuple[int, ...], critic_hidden_dims: tuple[int, ...], num_critics: int,
    mean: np.ndarray, std: np.ndarray,
) -> CubePolicy:  # fmt: skip
    """An untrained policy of this project's shapes."""
    flow = FlowMLP(OBS_DIM, ACTION_DIM, flow_hidden_dims)
    critic = CriticEnsemble(OBS_DIM, ACTION_DIM, num_critics, critic_hidden_dims)
    return CubePolicy(flow, critic, mean, std)


@dataclass
class Rollouts:
    """What happened in a set of episodes."""

    success: np.ndarray  # [rounds, tasks], bool
    steps: np.ndarray  # [rounds, tasks], environment steps until success or the end
    obs: list[Tensor] = field(default_factory=list)  # [S] each: what the policy saw at every decision
    column: list[int] = field(default_factory=list)  # of each of these, which environment it was

    @property
    def rate(self) -> float:
        return float(self.success.mean())

    def of(self, columns: range) -> Rollouts:
        """What happened in some of the environments."""
        picked = [(obs, i - columns.start) for obs, i in zip(self.obs, self.column) if i in columns]
        inside = slice(columns.start, columns.stop)
        return Rollouts(
            self.success[:, inside], self.steps[:, inside], [obs for obs, _ in picked], [i for _, i in picked]
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without gymnasium's remarks on float32 bounds and glfw's on the missing display."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class CubeTasks:
    """The five `cube-single-play-singletask-task{1..5}-v0` environments, stepped side by side in this process.

    Args:
        tasks: of 1 to 5. copies: environments of each, which start alike; those of a copy lie side by side. About
            150 MB an environment.
    """

    def __init__(self, tasks: tuple[int, ...] = TASKS, copies: int = 1) -> None:
        self.tasks = tasks
        with _quiet():
            import gymnasium
            import ogbench.manipspace  # noqa: F401  (registers the environments)

            self.envs: list[Any] = [
                gymnasium.make(f"cube-single-singletask-task{task}-v0", visualize_info=False) for task in tasks * copies
            ]

    def columns(self, which: int) -> range:
        """Which environments are those of a copy."""
        return range(which * len(self.tasks), (which + 1) * len(self.tasks))

    def first_copy(self) -> CubeTasks:
        """One environment of each task, shared with this."""
        one = copy.copy(self)
        one.envs = self.envs[: len(self.tasks)]
        return one

    def _reset(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        with _quiet():
            states = [env.reset(seed=seed + i % len(self.tasks))[0] for i, env in enumerate(self.envs)]
        goals = [env.unwrapped.cur_task_info["goal_xyzs"][0] for env in self.envs]
        return np.stack(states), np.stack(goals)

    def rollout(
        self, policy: CubePolicy, sampler: ChunkSampler, rounds: int, seed: int,
        on_round: Callable[[], None] = lambda: None, max_steps: int = EPISODE_STEPS, alpha: Tensor | None = None,
        noise_dim: int | None = None,
    ) -> Rollouts:  # fmt: skip
        """Runs `rounds` episodes of every task with chunks of actions, executed open loop.

        Starts and noise depend on the seed alone, so two samplers meet the same episodes.

        Args:
            policy: turns states and goals into observations.
            sampler: (obs [B, S], noise [B, noise_dim]) -> actions [B, A].
            rounds: episodes a task.
            seed: of the environments' starts and of the noise.
            on_round: called after each round.
            max_steps: environment steps at which an episode is given up.
            alpha: a strength for each environment, which the sampler then takes as alpha=.
            noise_dim: of a sampler that makes more actions than are executed; None: the policy's A.
        """
        shape = (rounds, len(self.envs))
        result = Rollouts(np.zeros(shape, dtype=bool), np.full(shape, max_steps))
        noise_dim = noise_dim or policy.flow.spec.action_dim
        for r in range(rounds):
            generator = torch.Generator().manual_seed(seed + 7919 * r)
            noise = torch.randn(math.ceil(max_steps / CHUNK), len(self.tasks), noise_dim, generator=generator)
            states, goals = self._reset(seed + 1000 * (r + 1))
            running = list(range(len(self.envs)))
            for k in range(len(noise)):
                obs = policy.obs(states[running], goals[running])
                result.obs.extend(obs)
                result.column.extend(running)
                named = {} if alpha is None else {"alpha": alpha[running]}
                actions = sampler(obs, noise[k, [i % len(self.tasks) for i in running]], **named)
                chunks = actions.reshape(len(running), CHUNK, -1).numpy()
                for row, i in enumerate(tuple(running)):
                    for step in range(CHUNK):
                        states[i], _, terminated, truncated, info = self.envs[i].step(chunks[row, step])
                        if terminated or truncated:
                            result.success[r, i] = bool(info["success"])
                            result.steps[r, i] = CHUNK * k + step + 1
                            running.remove(i)
                            break
                if not running:
                    break
            on_round()
        return result


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a success rate."""
    if trials < 1:
        raise ValueError(f"wilson_interval: trials is {trials}; expected at least 1.")
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
