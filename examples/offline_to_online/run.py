"""Offline training on a task's dataset, then online training in its environment with one update a step.

    python -m examples.offline_to_online.run --preset small --method qpilots_u \\
        --task cube-single-play-singletask-task1-v0

Writes config.json, train.csv, eval.csv and checkpoint.safetensors under <out>/<task>/<method>/seed<seed>, and goes on
from the checkpoint where there is one (the environment starts a fresh episode).
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qpilots_fast.demo.ogbench_cube import wilson_interval
from qpilots_fast.files import write_text

from . import checkpoint
from .agents import Agent, make_agent
from .config import Config, parse_config
from .tasks import ReplayBuffer, load_rows, make_env, normalisation


class CsvLog:
    """Appends rows to a CSV file; columns are those of the first row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = path.read_text().splitlines()[0].split(",") if path.exists() else None

    def add(self, row: dict[str, Any]) -> None:
        new = self.columns is None
        self.columns = self.columns or list(row)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def drop_after(self, step: int) -> None:
        """Forgets rows that a run wrote after its last checkpoint."""
        if self.path.exists():
            head, *rows = self.path.read_text().split("\n")[:-1]  # a line without its end was cut off by a kill
            kept = [row for row in rows if int(row.split(",")[0]) <= step]
            write_text(self.path, "\n".join([head, *kept]) + "\n")


class Run:
    """One task, one method, one seed."""

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, config.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.json", config.to_json() + "\n")
        self.env, self.eval_env = make_env(config.task), make_env(config.task)
        rows = load_rows(config, self.env)
        self.mean, self.std = np.zeros(1, np.float32), np.ones(1, np.float32)
        if config.normalise_obs:
            self.mean, self.std = normalisation(rows["observations"])
        rows["observations"] = self.normalised(rows["observations"])
        chunk = config.action_chunk
        capacity = min(
            config.online_capacity, 2 * config.online_steps + 2
        )  # an episode costs a row more than its steps
        self.buffer = ReplayBuffer(rows, chunk, config.discount, capacity, config.seed)
        self.agent: Agent = make_agent(config, rows["observations"].shape[1], chunk * rows["actions"].shape[1])
        self.counters: dict[str, Any] = {"step": 0, "seconds": 0.0, "episodes": 0}
        self.train_log, self.eval_log = CsvLog(self.folder / "train.csv"), CsvLog(self.folder / "eval.csv")
        self.board: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder))
        self.sums: dict[str, Any] = {}
        self.since = time.perf_counter()

    def normalised(self, obs: np.ndarray) -> np.ndarray:
        return ((obs - self.mean) / self.std).astype(np.float32)

    def observe(self, obs: np.ndarray) -> Tensor:
        """[1, S], as the networks see it."""
        return torch.from_numpy(self.normalised(obs)).unsqueeze(0)

    # ------------------------------------------------------------ training

    def update(self) -> None:
        """One gradient step, with its logging, evaluation and checkpoint."""
        logs = self.agent.update(self.buffer.sample(self.config.batch_size))
        self.counters["step"] += 1
        step, every = self.counters["step"], self.config.log_every
        for name, value in logs.items():
            self.sums[name] = self.sums.get(name, 0.0) + value  # a tensor: no wait for its number
        if step % every == 0:
            seconds = time.perf_counter() - self.since
            self.counters["seconds"] += seconds
            row = {"step": step, "seconds": self.counters["seconds"], "updates_per_s": every / seconds}
            row |= {name: float(total) / every for name, total in self.sums.items()}
            self.train_log.add({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
            for name, value in row.items() if self.board else ():
                self.board.add_scalar(f"train/{name}", value, step)
            self.sums, self.since = {}, time.perf_counter()
        if step % self.config.eval_every == 0 or step in (self.config.offline_steps, self.config.total_steps):
            self.evaluate()

    def maybe_save(self) -> None:
        """Between updates or episodes, where the state is whole."""
        due = self.counters["step"] // self.config.checkpoint_every
        if due > self.counters.get("saved", 0):
            self.counters["saved"] = due
            self.save()

    def save(self) -> None:
        checkpoint.save(self.folder / "checkpoint.safetensors", self.agent, self.buffer, self.counters)

    def offline(self) -> None:
        """Gradient steps on the dataset alone."""
        steps = range(self.counters["step"], self.config.offline_steps)
        for _ in tqdm(steps, desc="offline", initial=steps.start, total=steps.stop, mininterval=1):
            self.update()
            self.maybe_save()

    def online(self) -> None:
        """Episodes in the environment, one update for each of its steps."""
        end = self.config.total_steps
        with tqdm(
            desc="online",
            total=self.config.online_steps,
            initial=self.counters["step"] - self.config.offline_steps,
            mininterval=1,
        ) as bar:
            while self.counters["step"] < end:
                steps = self.collect_episode(end - self.counters["step"], bar)
                self.counters["episodes"] += 1
                self.maybe_save()
                assert steps > 0

    def collect_episode(self, budget: int, bar: tqdm) -> int:
        """One episode of at most `budget` steps into the buffer; updates as it goes."""
        seed = self.config.seed * 1_000_003 + self.counters["episodes"]
        obs, _ = self.env.reset(seed=seed)
        np.random.seed(seed % 2**32)  # the maze draws its noise from numpy's global generator
        rows: list[tuple[np.ndarray, np.ndarray, float, float]] = []
        done = terminated = False
        while not done and len(rows) < budget:
            chunk = self.agent.act(self.observe(obs)).reshape(self.config.action_chunk, -1).numpy()
            for action in chunk:
                if terminated:  # the chunk's rest, in an absorbing state worth 0: the task is solved
                    rows.append((obs, action, 0.0, 0.0))
                    continue
                before = obs
                obs, reward, terminated, truncated, _ = self.env.step(action)
                reward = (-1.0 if not terminated else 0.0) if self.config.sparse else float(reward)
                rows.append((before, action, reward, 0.0 if terminated else 1.0))
                done = terminated or truncated
                self.update()
                bar.update()
                if truncated and not terminated:
                    break
        rows.append((obs, np.zeros_like(rows[0][1]), 0.0, 0.0))  # the last observation, never a start
        observations, actions, rewards, masks = (np.asarray(column, np.float32) for column in zip(*rows))
        terminals = np.zeros_like(rewards)
        terminals[-1] = 1.0
        self.buffer.add_episode(
            {
                "observations": self.normalised(observations), "actions": actions, "rewards": rewards, "masks": masks,
                "terminals": terminals,
            }
        )  # fmt: skip
        return len(rows)

    # ------------------------------------------------------------ evaluation

    def evaluate(self) -> None:
        """Success over eval_episodes fresh episodes, with its 95 % Wilson interval."""
        start, successes = time.perf_counter(), 0
        lengths: list[int] = []
        state = self.agent.generator.get_state()
        self.agent.generator.manual_seed(self.config.seed + 77)  # the same noise at every evaluation
        for episode in range(self.config.eval_episodes):
            np.random.seed(episode)
            obs, _ = self.eval_env.reset(seed=self.config.eval_seed + 1_000 * self.config.seed + episode)
            done, success, length = False, False, 0
            while not done:
                chunk = self.agent.act(self.observe(obs)).reshape(self.config.action_chunk, -1).numpy()
                for action in chunk:
                    obs, _, terminated, truncated, info = self.eval_env.step(action)
                    length, success = length + 1, success or bool(info["success"])
                    done = terminated or truncated
                    if done:
                        break
            successes += success
            lengths.append(length)
        self.agent.generator.set_state(state)
        low, high = wilson_interval(successes, self.config.eval_episodes)
        row = {
            "step": self.counters["step"],
            "phase": "offline" if self.counters["step"] <= self.config.offline_steps else "online",
            "episodes": self.config.eval_episodes, "successes": successes,
            "success": round(successes / self.config.eval_episodes, 4), "low": round(low, 4), "high": round(high, 4),
            "length": round(float(np.mean(lengths)), 1), "train_seconds": round(self.counters["seconds"], 1),
        }  # fmt: skip
        self.eval_log.add(row)
        tqdm.write("  ".join(f"{key} {value}" for key, value in row.items()))
        if self.board:
            self.board.add_scalar("eval/success", row["success"], row["step"])
        self.since += time.perf_counter() - start  # training's clock stands still meanwhile

    def go(self) -> None:
        """Both phases, from the checkpoint where there is one."""
        path = self.folder / "checkpoint.safetensors"
        if path.exists():
            self.counters = checkpoint.load(path, self.agent, self.buffer)
            tqdm.write(f"going on from step {self.counters['step']}")
        elif self.config.start_from is not None:
            critics = {name: self.agent.networks[name] for name in ("critic", "target")}
            checkpoint.load_networks(Path(self.config.start_from), critics)
            self.counters["step"] = self.config.offline_steps
        for log in (self.train_log, self.eval_log):
            log.drop_after(self.counters["step"])
        self.since = time.perf_counter()
        if not self.agent.learns:
            self.judge()
        else:
            if self.counters["step"] < self.config.offline_steps:
                self.offline()
            self.online()
        self.save()

    def judge(self) -> None:
        """Evaluations at the end of both phases, for a policy that neither changes."""
        for step in (self.config.offline_steps, self.config.total_steps):
            if self.counters["step"] < step:
                self.counters["step"] = step
                self.evaluate()


def main(argv: list[str] | None = None) -> None:
    config = parse_config(argv, description=__doc__.splitlines()[0])
    torch.set_num_threads(config.threads)
    Run(config).go()


if __name__ == "__main__":
    main()
