"""`python -m bench.tables`: writes the tables of README and docs from the recorded results that their markers name.

A table stands between `<!-- table: NAME FILES -->` and `<!-- end of table -->`, FILES as a pattern from the root. The
tests compare every one with what this writes.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qpilots_fast.demo.ogbench_cube import wilson_interval
from qpilots_fast.files import write_text

from .control import PLAIN
from .machine import ROOT
from .markdown import goals, headline, latencies
from .records import load

TABLE = re.compile(r"(?<=^<!-- table: )(\w+) (\S+) -->\n(.*?)(?=^<!-- end of table -->$)", re.MULTILINE | re.DOTALL)


def _table(head: Sequence[str], numbers: int, rows: Iterable[Sequence[str]]) -> str:
    """Markdown whose last columns, `numbers` of them, are right-aligned."""
    rule = "|" + "---|" * (len(head) - numbers) + "---:|" * numbers
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def _last(make: Callable[[dict[str, Any]], str]) -> Callable[[list[Path]], str]:
    return lambda paths: make(load(paths[-1]))


def _first_screen(record: dict[str, Any]) -> str:
    """U at batch 1 and 256, of the rows of `headline`."""
    lines = headline(record, floor=False).splitlines()
    return "\n".join(lines[:2] + [line for line in lines if re.match(r"\| U \| (1|256) \|", line)])


def control(record: dict[str, Any]) -> str:
    """Time over that of the same call without the setting, float32 / bfloat16."""
    cells = record["cells"]
    ratios = {
        ((cell["method"], cell["batch_size"]), result["precision"], result["setting"]): f"{result['ratio']:.2f}"
        for cell in cells
        for result in cell["results"]
    }
    columns = list(dict.fromkeys((cell["method"], cell["batch_size"]) for cell in cells))
    settings = [setting for setting in dict.fromkeys(r["setting"] for r in cells[0]["results"]) if setting != PLAIN]
    rows = [
        [setting, *(" / ".join(ratios[column, p, setting] for p in ("float32", "bfloat16")) for column in columns)]
        for setting in settings
    ]
    return _table(["float32 / bfloat16", *(f"{method}, B = {size}" for method, size in columns)], 0, rows)


def busy(record: dict[str, Any]) -> str:
    """p50 and p99 in ms, one pair a round, on one and on two threads."""

    def figures(contestant: str, threads: int) -> str:
        return "; ".join(
            f"{row['p50 ms']:.3g}, {row['p99 ms']:.3g}"
            for row in record["under_load"]
            if (row["contestant"], row["threads"]) == (contestant, threads)
        )

    names = dict.fromkeys(row["contestant"] for row in record["under_load"])
    return _table(
        ["p50, p99", "one thread", "two threads"], 0, [[name, figures(name, 1), figures(name, 2)] for name in names]
    )


def _rows(paths: list[Path]) -> list[dict[str, str]]:
    with paths[-1].open() as file:
        return list(csv.DictReader(file))


SHOWN = {
    "unsteered": "unsteered",
    "best of 16": "best of 16 samples",
    "QPILOTS-U  alpha 0.2": "**QPILOTS-U, alpha 0.2**",
    "QPILOTS-U  alpha 0.5": "QPILOTS-U, alpha 0.5",
    "QPILOTS-M  alpha 0.2, N=4": "QPILOTS-M, alpha 0.2, N = 4 draws of a trained meta flow map",
    "QPILOTS-M  0.2, N=4, GLASS m=4": "QPILOTS-M, alpha 0.2, N = 4 GLASS draws (nothing trained)",
}


def success(paths: list[Path]) -> str:
    """Success of the methods of `SHOWN` in examples/ogbench_cube/evaluation.csv."""
    rows = {row["method"]: row for row in _rows(paths)}
    percent = {key: [f"{100 * float(rows[key][c]):.0f} %" for c in ("success", "low", "high")] for key in SHOWN}
    lines = [[SHOWN[key], rate, f"{low} to {high}"] for key, (rate, low, high) in percent.items()]
    return _table(["method", "success", "95 % interval"], 2, lines)


METHODS = {
    "bc": "behaviour cloning, unsteered",
    "best_of_n": "best of 8 samples",
    "qpilots_u": "QPILOTS-U",
    "qpilots_m": "QPILOTS-M, N = 2",
    "qgf": "QGF",
    "fql": "FQL-style one-step student",
    "fbrac": "FBRAC-style backpropagation",
}


def training(paths: list[Path]) -> str:
    """Success over all tasks after both phases of examples/offline_to_online, from its table.csv."""
    rows = _rows(paths)

    def pooled(method: str, phase: str) -> str:
        mine = [row for row in rows if (row["method"], row["phase"]) == (method, phase)]
        episodes = sum(int(row["episodes"]) for row in mine)
        successes = round(sum(float(row["success"]) * int(row["episodes"]) for row in mine))
        low, high = wilson_interval(successes, episodes)
        return f"{100 * successes / episodes:.0f} % ({100 * low:.0f} to {100 * high:.0f})"

    lines = [[METHODS[m], pooled(m, "offline"), pooled(m, "online")] for m in METHODS]
    return _table(["method", "after offline training", "after online training"], 2, lines)


PRESETS = {"full": "4x512, K = 10 (the paper's)", "bench": "2x128 critics, 3x256 flow, K = 5"}


def training_speed(paths: list[Path]) -> str:
    """Updates per second, and over the eager sampler's, from examples/offline_to_online's speed.csv."""
    rows = _rows(paths)
    lines = []
    for preset, phase in dict.fromkeys((row["preset"], row["phase"]) for row in rows):
        eager, *native = (row for row in rows if (row["preset"], row["phase"]) == (preset, phase))
        ratios = [f"{row['updates_per_s']} ({row['speedup']}x)" for row in native]
        lines.append([PRESETS[preset], phase, eager["updates_per_s"], *ratios])
    return _table(["networks", "phase", "eager", "native float32", "native bfloat16"], 3, lines)


def generalist(paths: list[Path]) -> str:
    """Success over the six tasks, told in trained phrasings, from examples/generalist's episodes.csv."""
    rows = [row for row in _rows(paths) if row["phrasings"] == "trained"]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        done = [int(row["success"]) for row in rows if row["method"] == method]
        low, high = wilson_interval(sum(done), len(done))
        rate = f"{100 * sum(done) / len(done):.0f} %"
        lines.append([method, str(len(done)), rate, f"{100 * low:.0f} % to {100 * high:.0f} %"])
    return _table(["method", "episodes", "success", "95 % interval"], 3, lines)


MAKERS: dict[str, Callable[[list[Path]], str]] = {
    "first_screen": _last(_first_screen),
    "against_peers": _last(headline),
    "latencies": _last(latencies),
    "goals": lambda paths: goals([load(path) for path in paths]),
    "control": _last(control),
    "busy": _last(busy),
    "success": success,
    "generalist": generalist,
    "training": training,
    "training_speed": training_speed,
}


def written(text: str) -> str:
    """The document with every table made anew.

    Raises:
        ValueError: where a marker names a table that nothing makes, or no file.
    """

    def made(found: re.Match[str]) -> str:
        name, pattern, _ = found.groups()
        paths = sorted(ROOT.glob(pattern))
        if name not in MAKERS or not paths:
            raise ValueError(f"table: {name} {pattern}: expected one of {', '.join(MAKERS)} and a file's name.")
        return f"{name} {pattern} -->\n{MAKERS[name](paths)}\n"

    return TABLE.sub(made, text)


def main() -> int:
    """Rewrites the documents whose tables are others now."""
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = document.read_text()
        if written(text) != text:
            write_text(document, written(text))
            print(f"{document.relative_to(ROOT)}: tables written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
