"""Markdown of a result file, for the README and the docs: `python -m bench.markdown bench/results/FILE.json`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import load, milliseconds


def _fastest(cell: dict[str, Any], ours: bool, precision: str | None) -> dict[str, Any] | None:
    """The fastest correct result with live weights."""
    found = [
        r for r in cell["results"]
        if "p50_s" in r and r["ours"] == ours and not r["frozen"] and precision in (None, r["precision"])
    ]  # fmt: skip
    return min(found, key=lambda r: r["p50_s"], default=None)


def headline(record: dict[str, Any]) -> str:
    """One row a cell and precision: our median, the best peer that it answers to, the ratio, the floor."""
    lines = [
        "| method | B | precision | qpilots_fast | best peer | faster by | floor |",
        "|---|---:|---|---:|---|---:|---:|",
    ]
    for cell in record["cells"]:
        for precision, floor in cell["floor_s"].items():
            ours = _fastest(cell, True, precision)
            peer = _fastest(cell, False, "float32" if precision == "float32" else None)
            if ours is None:
                continue
            best, ratio = "-", "-"
            if peer is not None:
                best = f"{milliseconds(peer['p50_s'])} ms ({peer['name']}, {peer['precision']})"
                ratio = f"{peer['p50_s'] / ours['p50_s']:.1f}x"
            values = (f"{milliseconds(ours['p50_s'])} ms", best, ratio, f"{milliseconds(floor)} ms")
            lines.append(f"| {cell['method']} | {cell['batch_size']} | {precision} | {' | '.join(values)} |")
    return "\n".join(lines)


def requirements(record: dict[str, Any]) -> str:
    """The verdicts of `--table targets`."""
    lines = ["| requirement | required | measured | |", "|---|---:|---:|---|"]
    for v in record.get("verdicts", []):
        sign = ">=" if v["at_least"] else "<="
        measured = "-" if v["measured"] is None else f"{v['measured']:.3g} {v['unit']}".rstrip()
        status = {True: "pass", False: "fail", None: "not measured"}[v["passed"]]
        lines.append(f"| {v['name']} | {sign} {v['required']:g} {v['unit']} | {measured} | {status} |")
    return "\n".join(lines)


def provenance(record: dict[str, Any]) -> str:
    """One sentence: date, commit, machine, peaks."""
    machine, peaks = record["machine"], record["peaks"]
    where = (machine["gpu"] or {}).get("name") or f"{machine['cpu']}, {machine['torch_threads']} threads"
    measured = "" if peaks is None else ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in peaks["flops"].items())
    load_text = ""
    if record.get("load"):
        load_text = f"; other processes took {record['load']['mean_other_cpus']:.2f} CPUs on average"
    commit = "not from a clone"
    if record["git"]["commit"]:
        commit = f"commit {record['git']['commit'][:10]}" + (" with local changes" if record["git"]["dirty"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return f"{record['date'][:10]}, {where}, peaks {measured}, {versions}, {commit}{load_text}."


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of one result file."""
    parser = argparse.ArgumentParser(prog="python -m bench.markdown", description="Markdown tables of a result file.")
    parser.add_argument("result", type=Path, help="a JSON file that `qpilots-fast bench` wrote")
    record = load(parser.parse_args(argv).result)
    parts = [headline(record), provenance(record)]
    if record.get("verdicts"):
        parts.insert(1, requirements(record))
    print("\n\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
