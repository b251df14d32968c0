"""Success table, learning curves and training speed of all runs under a folder.

python -m examples.offline_to_online.report out/offline_to_online --out examples/offline_to_online/results
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import matplotlib

from qpilots_fast.demo.ogbench_cube import wilson_interval
from qpilots_fast.files import replacing, write_figure, write_text

from .config import METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Key = tuple[str, str]  # task, method


def read(folder: Path) -> tuple[dict[Key, dict[int, list[dict[str, Any]]]], dict[Key, list[float]]]:
    """Evaluations per (task, method) and step, one per seed; and updates per second per (task, method)."""
    evaluations: dict[Key, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    speeds: dict[Key, list[float]] = defaultdict(list)
    for path in sorted(folder.glob("*/*/*/eval.csv")):
        config = json.loads((path.parent / "config.json").read_text())
        key = (config["task"], config["method"])
        for row in csv.DictReader(path.open()):
            evaluations[key][int(row["step"])].append(row)
        train = path.parent / "train.csv"  # none where nothing was trained
        rates = sorted(float(row["updates_per_s"]) for row in csv.DictReader(train.open())) if train.exists() else []
        if rates:
            speeds[key].append(rates[len(rates) // 2])
    return evaluations, speeds


def pooled(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Success rate and 95 % Wilson interval over all seeds' episodes."""
    successes, episodes = (sum(int(row[name]) for row in rows) for name in ("successes", "episodes"))
    return (successes / episodes, *wilson_interval(successes, episodes))


def last_of_phase(steps: dict[int, list[dict[str, Any]]], phase: str) -> int | None:
    """The step of the last evaluation of a phase."""
    return max((step for step, rows in steps.items() if rows[0]["phase"] == phase), default=None)


def short(task: str) -> str:
    """A task's name without what all of them share."""
    return task.replace("-singletask", "").replace("-play", "").replace("-navigate", "").replace("-v0", "")


def _markdown(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def wide_table(evaluations: dict[Key, dict[int, list[dict[str, Any]]]], phase: str) -> list[list[str]]:
    """A row a task, a column a method: percent of successes [95 % interval]; last, all tasks' episodes together.

    A method that lacks a task has no entry in the last row.
    """

    def entry(rows: list[dict[str, Any]]) -> str:
        rate, low, high = (100 * value for value in pooled(rows))
        return f"{rate:.0f} [{low:.0f}, {high:.0f}]"

    tasks = sorted({task for task, _ in evaluations})
    methods = [method for method in METHODS if any(name == method for _, name in evaluations)]
    together: dict[str, list[dict[str, Any]]] = defaultdict(list)
    table, counts = [["task", *methods]], Counter[str]()
    for task in tasks:
        row = [short(task)]
        for method in methods:
            steps = evaluations.get((task, method), {})
            last = last_of_phase(steps, phase)
            row.append("" if last is None else entry(steps[last]))
            if last is not None:
                together[method] += steps[last]
                counts[method] += 1
        table.append(row)
    if len(tasks) > 1:
        table.append(["all", *(entry(together[m]) if counts[m] == len(tasks) else "" for m in methods)])
    return table


def write_table(folder: Path, out: Path) -> None:
    """table.csv, a line a task, method and phase; table.md, a wide table a phase."""
    evaluations, speeds = read(folder)
    table: list[list[object]] = []
    for (task, method), steps in sorted(evaluations.items()):
        for phase in ("offline", "online"):
            last = last_of_phase(steps, phase)
            if last is None:
                continue
            rate, low, high = pooled(steps[last])
            seeds, rates = len(steps[last]), speeds[task, method]
            episodes = sum(int(row["episodes"]) for row in steps[last])
            speed = f"{sum(rates) / len(rates):.1f}" if rates else ""
            table.append([task, method, phase, last, seeds, episodes, *(f"{v:.3f}" for v in (rate, low, high)), speed])
    head = ["task", "method", "phase", "step", "seeds", "episodes", "success", "low", "high", "updates_per_s"]
    with replacing(out / "table.csv") as new, new.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *table])
    lines: list[str] = []
    for phase in ("offline", "online"):
        counts = sorted({(row[4], row[5]) for row in table if row[2] == phase})
        seeds = ", ".join(f"{episodes} episodes of {count} seeds" for count, episodes in counts)
        lines += [f"After {phase} training, % of successes [95 % Wilson interval]; an entry is {seeds}:", ""]
        lines += [*_markdown(wide_table(evaluations, phase)), ""]
    write_text(out / "table.md", "\n".join(lines))
    print("\n".join(lines))


def plot(folder: Path, out: Path) -> None:
    """One panel a task: pooled success against gradient steps, with its interval; the online phase is shaded."""
    evaluations, _ = read(folder)
    tasks = sorted({task for task, _ in evaluations})
    columns = min(3, len(tasks))
    count = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        count, columns, figsize=(4.2 * columns, 3.1 * count + 0.5), squeeze=False, sharex=True, sharey=True
    )
    lines = {}
    for axis, task in zip(axes.flat, tasks):
        ends, starts = [], []
        for index, method in enumerate(METHODS):
            steps = evaluations.get((task, method), {})
            if not steps:
                continue
            at = sorted(steps)
            rate, low, high = zip(*(pooled(steps[step]) for step in at))
            shift = 0.006 * (index - 3) * at[-1]  # bars side by side
            error = [[r - a for r, a in zip(rate, low)], [b - r for r, b in zip(rate, high)]]
            lines[method] = axis.errorbar(
                [step + shift for step in at], rate, error, marker=".", color=f"C{index}", linewidth=1.4,
                elinewidth=0.6, linestyle="--" if method == "bc" else "-",
            )  # fmt: skip
            starts.append(last_of_phase(steps, "offline"))
            ends.append(at[-1])
        known = [start for start in starts if start is not None]
        if known and max(ends) > max(known):
            axis.axvspan(max(known), max(ends), color="0.92", zorder=0)
        axis.set_title(short(task), fontsize=10)
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    figure.supxlabel("gradient steps (shaded: online)", fontsize=10)
    figure.supylabel("success", fontsize=10)
    names = [method for method in METHODS if method in lines]
    figure.legend([lines[name] for name in names], names, loc="upper center", ncols=len(names), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.95 if count > 1 else 0.9))
    write_figure(out / "curves.png", figure, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_table(args.folder, args.out)
    plot(args.folder, args.out)


if __name__ == "__main__":
    main()
