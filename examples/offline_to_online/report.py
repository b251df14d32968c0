"""Success table, learning curves and training speed of all runs under a folder.

python -m examples.offline_to_online.report out/offline_to_online --out examples/offline_to_online/results
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

from qpilots_fast.ogbench_cube import wilson_interval

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
        rates = sorted(float(row["updates_per_s"]) for row in csv.DictReader((path.parent / "train.csv").open()))
        if rates:
            speeds[key].append(rates[len(rates) // 2])
    return evaluations, speeds


def pooled(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Success rate and 95 % Wilson interval over all seeds' episodes."""
    successes, episodes = (sum(int(row[name]) for row in rows) for name in ("successes", "episodes"))
    return (successes / episodes, *wilson_interval(successes, episodes))


def write_table(folder: Path, out: Path) -> None:
    """table.csv and Markdown on the terminal: the end of each phase."""
    evaluations, speeds = read(folder)
    table: list[list[object]] = []
    for (task, method), steps in sorted(evaluations.items()):
        for phase in ("offline", "online"):
            last = max((step for step, rows in steps.items() if rows[0]["phase"] == phase), default=None)
            if last is None:
                continue
            rate, low, high = pooled(steps[last])
            seeds, rates = len(steps[last]), speeds[task, method]
            speed = f"{sum(rates) / len(rates):.1f}" if rates else ""
            table.append([task, method, phase, last, seeds, f"{rate:.3f}", f"{low:.3f}", f"{high:.3f}", speed])
    head = ["task", "method", "phase", "step", "seeds", "success", "low", "high", "updates_per_s"]
    with (out / "table.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *table])
    lines: list[list[object]] = [[*head], ["---"] * len(head), *table]
    for row in lines:
        print("| " + " | ".join(str(value) for value in row) + " |")


def plot(folder: Path, out: Path) -> None:
    """One panel a task: pooled success against gradient steps, shaded by its interval."""
    evaluations, _ = read(folder)
    tasks = sorted({task for task, _ in evaluations})
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.4), squeeze=False, sharey=True)
    for axis, task in zip(axes[0], tasks):
        for (name, method), steps in sorted(evaluations.items()):
            if name == task:
                at = sorted(steps)
                rate, low, high = zip(*(pooled(steps[step]) for step in at))
                (line,) = axis.plot(at, rate, marker=".", label=method)
                axis.fill_between(at, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axis.set(title=task.replace("-singletask", "").replace("-v0", ""), xlabel="gradient steps", ylim=(-0.02, 1.02))
        axis.title.set_fontsize(9)
    axes[0, 0].set_ylabel("success")
    axes[0, -1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)


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
