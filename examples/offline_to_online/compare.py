"""Variants trained alike, run by run: success of each on every task, and what the later ones add to the first.

    python -m examples.offline_to_online.compare U=out/norm_match "U, absolute=out/absolute" --out out/finalists.csv

Each argument is a name and the folder of its runs; --out keeps a line a run and phase, where a run takes the place of
its variant's earlier one with that task and seed. Without arguments the tables are printed again. The line of all runs
takes those that every variant has: name with --variants those that shall be compared. Runs of one task and seed meet
the same starts under every variant, so differences are taken there.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from qpilots_fast.demo.ogbench_cube import wilson_interval
from qpilots_fast.files import replacing

from .report import short

COLUMNS = ("variant", "task", "seed", "phase", "step", "episodes", "successes", "length")
Row = dict[str, str]
# 97.5 % quantiles of Student's t at 1, 2, .. degrees of freedom; beyond them 1.96 + 2.6 / n, right to 0.01
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def collect(variant: str, folder: Path) -> list[Row]:
    """The last evaluation of each phase, of every run under `folder` that has come to its end."""
    rows = []
    for path in sorted(folder.glob("*/*/*/eval.csv")):
        config = json.loads((path.parent / "config.json").read_text())
        last = {row["phase"]: row for row in csv.DictReader(path.open())}  # the later row stands
        if str(config["offline_steps"] + config["online_steps"]) != list(last.values())[-1]["step"]:
            continue
        about = {"variant": variant, "task": config["task"], "seed": str(config["seed"])}
        rows += [about | {key: row[key] for key in COLUMNS[3:]} for row in last.values()]
    return rows


def run_of(row: Row) -> tuple[str, str, str]:
    """What tells its run from others."""
    return row["variant"], row["task"], row["seed"]


def rate(row: Row) -> float:
    """Share of successes."""
    return int(row["successes"]) / int(row["episodes"])


def pooled(rows: list[Row]) -> str:
    """Percent of successes [95 % Wilson interval] of all runs' episodes."""
    successes, episodes = (sum(int(row[key]) for row in rows) for key in ("successes", "episodes"))
    low, high = wilson_interval(successes, episodes)
    return f"{100 * successes / episodes:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def added(base: list[Row], other: list[Row]) -> tuple[int, float, float, float]:
    """What `other` adds to the success of `base`, over the tasks and seeds that both have.

    Returns:
        How many such pairs of runs there are, the mean difference, and its 95 % interval: Student's t over the pairs,
        so that what differs from seed to seed counts, and few of them say little; NaN where there are too few.
    """
    firsts = {(row["task"], row["seed"]): rate(row) for row in base}
    pairs = [(row["task"], row["seed"]) for row in other]
    differences = np.array([rate(row) - firsts[pair] for pair, row in zip(pairs, other) if pair in firsts])
    count = len(differences)
    mean = float(differences.mean()) if count else float("nan")
    half = float("nan")
    if count > 1:
        quantile = STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96 + 2.6 / (count - 1)
        half = quantile * float(differences.std(ddof=1)) / count**0.5
    return count, mean, mean - half, mean + half


def table(rows: list[Row], phase: str) -> list[str]:
    """Markdown of one phase: a line a task and a column a variant; below, all of them, and what is added to the first.

    The line of all tasks holds the pairs of task and seed that every variant has.
    """
    mine = [row for row in rows if row["phase"] == phase]
    variants = list(dict.fromkeys(row["variant"] for row in mine))
    of = {name: [row for row in mine if row["variant"] == name] for name in variants}
    lines = [f"| {phase} | " + " | ".join(variants) + " |", "| --- |" + " --- |" * len(variants)]
    for task in sorted({row["task"] for row in mine}):
        entries = [[row for row in of[name] if row["task"] == task] for name in variants]
        texts = [f"{pooled(entry)} ({len(entry)})" if entry else "" for entry in entries]
        lines.append(f"| {short(task)} | " + " | ".join(texts) + " |")
    shared = set.intersection(*({(row["task"], row["seed"]) for row in of[name]} for name in variants))
    of = {name: [row for row in of[name] if (row["task"], row["seed"]) in shared] for name in variants}
    if shared:
        lines.append(f"| all, {len(shared)} runs | " + " | ".join(pooled(of[name]) for name in variants) + " |")
        differences = ["{:+.0f} [{:+.0f}, {:+.0f}]".format(*(100 * n for n in added(of[variants[0]], of[name])[1:]))
                       for name in variants[1:]]  # fmt: skip
        lines.append("| adds | | " + " | ".join(differences) + " |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="NAME=FOLDER", help="none: the tables of what --out has")
    parser.add_argument("--out", type=Path, required=True, help="a .csv file; what it has of other runs stays")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="those to print, the first as the base; else all")
    args = parser.parse_args(argv)
    rows: list[Row] = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    names = list(dict.fromkeys([row["variant"] for row in rows] + [given.partition("=")[0] for given in args.folders]))
    printed = args.variants or names
    if unknown := set(printed) - set(names):
        parser.error(f"no runs of {sorted(unknown)}; expected some of {names}.")
    for given in args.folders:
        variant, _, folder = given.partition("=")
        found = collect(variant, Path(folder))
        if not found:
            parser.error(f"{given!r} has no finished run; expected NAME=FOLDER, with FOLDER/TASK/METHOD/SEED/eval.csv.")
        again = {run_of(row) for row in found}
        rows = [row for row in rows if run_of(row) not in again] + found
    rows.sort(key=lambda row: (names.index(row["variant"]), row["task"], int(row["seed"])))  # phases stay in order
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    rows = [row for name in printed for row in rows if row["variant"] == name]
    for phase in ("offline", "online"):
        if any(row["phase"] == phase for row in rows):
            print("\n".join(["", *table(rows, phase)]))


if __name__ == "__main__":
    main()
