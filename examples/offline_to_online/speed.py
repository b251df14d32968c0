"""Updates per second of whole training steps, native sampler against eager PyTorch, all else equal.

    python -m examples.offline_to_online.speed --out examples/offline_to_online/results

Offline: one gradient step on a batch of the buffer. Online: one step in the environment, acting every chunk, and one
gradient step. The variants of a row take turns, a few steps at a time, so that a busy machine slows all of them alike;
what is written is the median of the turns. The data is random: speed does not depend on it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from qpilots_fast.files import replacing

from .config import METHODS, PRESETS, Config
from .run import Run

TASK = "cube-single-play-singletask-task1-v0"
VARIANTS = {  # name -> (backend, precision)
    "eager": ("reference", "float32"),
    "native float32": ("auto", "float32"),
    "native bfloat16": ("auto", "bfloat16"),
}


def random_rows(path: Path, rows: int = 2_000) -> None:
    """A dataset of the task's shapes."""
    rng = np.random.default_rng(0)
    terminals = np.zeros(rows, bool)
    terminals[199::200] = True
    np.savez(
        path, observations=rng.normal(size=(rows, 28)), actions=rng.uniform(-1, 1, (rows, 5)), terminals=terminals,
        qpos=rng.normal(size=(rows, 21)),
    )  # fmt: skip


class Trainer:
    """One variant, ready to take turns."""

    def __init__(self, preset: str, method: str, variant: str, folder: Path, threads: int) -> None:
        backend, precision = VARIANTS[variant]
        settings = PRESETS[preset] | {
            "task": TASK, "method": method, "chunk": 5, "data": str(folder / "random.npz"), "backend": backend,
            "precision": precision, "offline_steps": 10**9, "online_steps": 5_000, "eval_every": 10**9,
            "eval_episodes": 0, "log_every": 10**9, "threads": threads, "out": str(folder / preset / variant),
            "sparse": True,
        }  # fmt: skip
        self.run = Run(Config(**settings))
        # as over a pretrained flow: the method leaves it as it is
        self.run.agent.freeze("flow", "posterior")
        self.offline_times: list[float] = []
        self.online_times: list[float] = []

    def offline(self, steps: int) -> None:
        """One turn of gradient steps."""
        self.offline_times.append(self._timed(lambda: [self.run.update() for _ in range(steps)]) / steps)

    def online(self, steps: int) -> None:
        """One turn of environment steps, each with its gradient step; a chunk at least."""
        bar = _Counter()
        seconds = self._timed(lambda: self.run.collect_episode(steps, bar))
        self.online_times.append(seconds / bar.count)

    @staticmethod
    def _timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class _Counter:
    count = 0

    def update(self) -> None:
        self.count += 1


def measure(preset: str, method: str, seconds: float, folder: Path, threads: int) -> list[dict[str, object]]:
    """Rows of one preset and method; takes about `seconds`, more where a single turn is longer."""
    trainers = {name: Trainer(preset, method, name, folder, threads) for name in VARIANTS}
    for trainer in trainers.values():  # compile and warm up; an eager step tells how long a turn may be
        trainer.offline(1)
        trainer.offline(1)
    slowest = max(trainer.offline_times[-1] for trainer in trainers.values())
    total = sum(trainer.offline_times[-1] for trainer in trainers.values())
    steps = 5 if slowest * 5 * 4 < seconds else 1
    turns = max(1, min(9, int(seconds / total / (6 * steps))))
    for trainer in trainers.values():
        trainer.offline_times.clear()
    for _ in range(turns):
        for trainer in trainers.values():
            trainer.offline(steps)
        for trainer in trainers.values():
            trainer.online(5 * steps)
    rows: list[dict[str, object]] = []
    eager = trainers["eager"]
    for name, trainer in trainers.items():
        for phase in ("offline", "online"):
            times, base = getattr(trainer, f"{phase}_times"), getattr(eager, f"{phase}_times")
            rate = 1 / statistics.median(times)
            row = {"preset": preset, "method": method, "phase": phase, "sampler": name, "threads": threads}
            row |= {"updates_per_s": f"{rate:.3g}", "speedup": f"{rate * statistics.median(base):.2f}"}
            row |= {"fastest": f"{1 / min(times):.3g}", "slowest": f"{1 / max(times):.3g}", "turns": turns}
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--presets", nargs="+", default=["full", "bench"], choices=tuple(PRESETS))
    parser.add_argument("--methods", nargs="+", default=["qpilots_u"], choices=METHODS)
    parser.add_argument("--seconds", type=float, default=90.0, help="about, for one preset and method")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_rows(folder / "random.npz")
        for preset in args.presets:
            for method in args.methods:
                rows += measure(preset, method, args.seconds, folder, args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    with replacing(args.out / "speed.csv") as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
