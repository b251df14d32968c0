"""Runs tasks x methods x seeds, skipping what is finished; workers started later share the same queue.

    python -m examples.offline_to_online.sweep --preset bench --workers 2 --cores 0,1

Runs are ordered by seed, then task, then method, so that a sweep that is cut short leaves complete seeds and tasks. A
worker locks a run's folder while it works there; the lock goes with its process. Where no pretrained file of the
dataset exists the first worker to need it makes it. Any other flag of run.py changes that setting in every run.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qpilots_fast.files import write_text

from .config import BENCH_TASKS, METHODS, Config, config_of, make_parser, split_task
from .pretrain import pretrain
from .run import Run

FINISHED = "finished.json"


@contextmanager
def lock(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process holds the file's lock; it ends with the process at the latest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
            return
        yield True


def queue(
    given: dict[str, Any], tasks: list[str], methods: list[str], seeds: list[int], skip: set[str]
) -> list[Config]:
    """All runs, by seed, task and method; `skip` holds method:task pairs that are left out."""
    return [
        config_of(given | {"task": task, "method": method, "seed": seed})
        for seed in seeds
        for task in tasks
        for method in methods
        if f"{method}:{task}" not in skip
    ]


def pretrained_file(config: Config, folder: Path, steps: int, posterior_steps: int) -> Path:
    """The dataset's pretrained networks, made where they are missing."""
    path = folder / f"{split_task(config.task)[1]}.safetensors"
    with lock(path.with_suffix(".lock"), wait=True):
        if not path.exists():
            same = {"seed": 0, "learning_rate": 1e-3, "autocast": True}
            settings = json.loads(config.to_json()) | same
            pretrain(Config(**settings), path, steps, posterior_steps, batch_size=256, rate=1e-3)
    return path


def work(configs: list[Config], core: int | None, folder: Path, steps: tuple[int, int], limit: float) -> None:
    """Runs what nobody has finished or is busy with, in order, until `limit` (time.time) is past."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    for config in configs:
        torch.set_num_threads(config.threads)
        with lock(config.folder / "lock", wait=False) as mine:
            if not mine or (config.folder / FINISHED).exists() or time.time() > limit:
                continue
            changes = {"pretrained": str(pretrained_file(config, folder, *steps))}
            start, used = time.time(), time.process_time()
            torch.compiler.reset()
            try:
                Run(Config(**(json.loads(config.to_json()) | changes))).go()
            except Exception:
                write_text(config.folder / "error.txt", traceback.format_exc())
                print(f"FAILED {config.folder}\n{traceback.format_exc()}", flush=True)
                continue
            about = {"seconds": round(time.time() - start, 1), "cpu_seconds": round(time.process_time() - used, 1)}
            write_text(config.folder / FINISHED, json.dumps(about) + "\n")
            print(f"finished {config.folder} {about}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0], skip=("task", "method", "seed", "pretrained"))
    parser.set_defaults(preset="bench")
    parser.add_argument("--tasks", nargs="+", default=list(BENCH_TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--skip", nargs="+", default=[], metavar="METHOD:TASK", help="pairs to leave out")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cores", help="one a worker, e.g. 0,1: pins each worker there")
    parser.add_argument("--minutes", type=float, default=1e9, help="starts no further run after this long")
    parser.add_argument("--pretrained-folder", type=Path, default=Path("out/pretrained"))
    parser.add_argument("--pretrain-steps", type=int, default=15_000)
    parser.add_argument("--posterior-steps", type=int, default=5_000)
    args = vars(parser.parse_args(argv))
    names = ("tasks", "methods", "seeds", "skip", "workers", "cores", "minutes", "pretrained_folder")
    tasks, methods, seeds, skip, workers, cores, minutes, folder = (args.pop(name) for name in names)
    steps = (args.pop("pretrain_steps"), args.pop("posterior_steps"))
    configs = queue(args, tasks, methods, seeds, set(skip))
    pins = [int(core) for core in cores.split(",")] if cores else [None] * workers
    limit = time.time() + 60 * minutes
    print(f"{len(configs)} runs, {sum((c.folder / FINISHED).exists() for c in configs)} finished", flush=True)
    if workers == 1:
        work(configs, pins[0], folder, steps, limit)
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(configs, pin, folder, steps, limit)) for pin in pins[:workers]]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
