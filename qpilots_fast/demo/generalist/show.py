"""What `qpilots-fast demo --policy generalist` shows: one frozen policy, six tasks told in words, some methods."""

from __future__ import annotations

import argparse

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..ogbench_cube import wilson_interval
from .instructions import TASKS
from .methods import Method, methods, steered
from .tasks import Episode, Tasks, seen
from .weights import load_critics, load_policy

QUICK = ("unsteered", "best of", "QPILOTS-U full, alpha 0.1")


def _table(found: list[tuple[Method, list[Episode]]]) -> Table:
    table = Table(
        title=f"One frozen policy, {len(found[0][1])} episodes a method (the same starts, words and noise)", box=SIMPLE
    )
    for name in ("method", "success", *(task.split("-")[0] for task in TASKS)):
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for method, episodes in found:
        done = [episode.success for episode in episodes]
        low, high = wilson_interval(sum(done), len(done))
        by_task = [[episode.success for episode in episodes if episode.task == task] for task in TASKS]
        table.add_row(
            method.name.replace("QPILOTS-", ""), f"{sum(done) / len(done):.0%} ({100 * low:.0f} to {100 * high:.0f})",
            *(f"{sum(task)}/{len(task)}" for task in by_task),
        )  # fmt: skip
    return table


def run(args: argparse.Namespace) -> int:
    """The demo, once its packages are known to be there."""
    console, copies = Console(), args.episodes or (2 if args.quick else 5)
    torch.set_num_threads(1)  # rows are few and networks small: threads cost more than they bring
    policy, critics = load_policy(), load_critics()
    count = sum(value.numel() for value in policy.parameters())
    console.print(
        f"[bold]Six Meta-World tasks told in words[/bold]: a policy in pi0's shape, but small ({count / 1e6:.1f} M "
        "numbers, from states, no images), cloned from clumsy demonstrations and frozen; ten critics learned from its "
        f"own rollouts when it succeeds. {copies} episodes a task."
    )
    with console.status(f"Starting {copies * len(TASKS)} simulators"):
        tasks = Tasks(copies)
        observed = seen(tasks.rollout(policy.predict_action_chunk, 1, args.seed + 1))
    found: list[tuple[Method, list[Episode]]] = []
    for method in methods(policy, critics, observed):
        if args.quick and not any(word in method.name for word in QUICK):
            continue
        with console.status(method.name), steered(policy, critics, method.steering, args.seed) as act, torch.no_grad():
            episodes = tasks.rollout(act, 1, args.seed)
        found.append((method, episodes))
    console.print(_table(found))
    console.print("In brackets 95 % intervals. More episodes, and how it was made: examples/generalist/README.md")
    return 0
