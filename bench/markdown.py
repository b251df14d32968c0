"""Markdown of result files, for the README and the docs: `python -m bench.markdown bench/results/PROCESSOR/*.jsonl`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .records import load
from .report import milliseconds
from .targets import TARGETS


def _fastest(cell: dict[str, Any], ours: bool, precision: str | None, frozen: bool = False) -> dict[str, Any] | None:
    """The fastest correct result, of ours with live or with frozen weights."""
    found = [
        r
        for r in cell["results"]
        if "p50_s" in r and r["ours"] == ours and r["frozen"] == frozen and precision in (None, r["precision"])
    ]
    return min(found, key=lambda r: r["p50_s"], default=None)


def headline(record: dict[str, Any], floor: bool = True) -> str:
    """One row a cell and precision: our median, the best peer that it answers to, the ratio, the floor."""
    lines = [
        "| method | B | precision | qpilots_fast | best peer | faster by |" + " floor |" * floor,
        "|---|---:|---|---:|---|---:|" + "---:|" * floor,
    ]
    for cell in record["cells"]:
        for precision, least in cell["floor_s"].items():
            ours = _fastest(cell, True, precision)
            peer = _fastest(cell, False, "float32" if precision == "float32" else None)
            if ours is None:
                continue
            best, ratio = "-", "-"
            if peer is not None:
                best = f"{milliseconds(peer['p50_s'])} ms ({peer['name']}, {peer['precision']})"
                ratio = f"{peer['p50_s'] / ours['p50_s']:.1f}x"
            values = [f"{milliseconds(ours['p50_s'])} ms", best, ratio] + [f"{milliseconds(least)} ms"] * floor
            lines.append(f"| {cell['method']} | {cell['batch_size']} | {precision} | {' | '.join(values)} |")
    return "\n".join(lines)


def latencies(record: dict[str, Any]) -> str:
    """Our medians (and minima) with live and frozen weights, over the batch sizes."""
    batches = sorted({cell["batch_size"] for cell in record["cells"]})
    lines = ["| | " + " | ".join(f"B={b}" for b in batches) + " |", "|---" * (len(batches) + 1) + "|"]
    for method in dict.fromkeys(cell["method"] for cell in record["cells"]):
        for precision in ("float32", "bfloat16"):
            for frozen in (False, True):
                row = [f"{method} {precision}, {'frozen' if frozen else 'live weights'}"]
                for batch in batches:
                    cells = [c for c in record["cells"] if (c["method"], c["batch_size"]) == (method, batch)]
                    ours = _fastest(cells[0], True, precision, frozen) if cells else None
                    row.append("" if ours is None else f"{milliseconds(ours['p50_s'])} ({milliseconds(ours['min_s'])})")
                lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def goals(records: Sequence[dict[str, Any]]) -> str:
    """Every ratio that is required, and what each run measured: live weights, in brackets frozen ones."""
    runs = " | ".join(f"run {i + 1}" for i in range(len(records)))
    lines = [f"| | B | goal | {runs} | at the limits |", "|---|---:" + "|---:" * (len(records) + 2) + "|"]
    for target in TARGETS:
        case, name = "" if target.case == "paper" else f"{target.case} ", target.name
        if not any(v["name"] == name and v["measured"] for record in records for v in record.get("verdicts", [])):
            continue
        row = [f"{case}{target.method} {target.precision}", str(target.batch_size), f"{target.required:.1f}"]
        ceiling = ""
        for record in records:
            verdict = next((v for v in record.get("verdicts", []) if v["name"] == name), None)
            if verdict is None or verdict["measured"] is None:
                row.append("-")
                continue
            bold = "" if verdict["passed"] else "**"
            frozen = f" ({verdict['frozen']:.2f})" if verdict.get("frozen") else ""
            row.append(f"{bold}{verdict['measured']:.2f}{bold}{frozen}")
            ceiling = f"{verdict['ceiling']:.1f}" if verdict.get("ceiling") else ""
        lines.append("| " + " | ".join([*row, ceiling]) + " |")
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
    rates = [] if peaks is None else [*peaks["flops"].items()]
    if peaks is not None:
        rates += [(f"{name} by vectors", rate) for name, rate in peaks.get("fma_flops", {}).items()]
    measured = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates)
    load_text = ""
    if record.get("load"):
        load_text = f"; other processes took {record['load']['mean_other_cpus']:.2f} CPUs on average"
    commit = "not from a clone"
    if record["git"]["commit"]:
        commit = f"commit {record['git']['commit'][:10]}" + (" with local changes" if record["git"]["dirty"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return f"{record['date'][:10]}, {where}, peaks {measured}, {versions}, {commit}{load_text}."


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of the last file, and the goals as every file met them."""
    parser = argparse.ArgumentParser(prog="python -m bench.markdown", description="Markdown tables of result files.")
    parser.add_argument("result", type=Path, nargs="+", help="files that `qpilots-fast bench` wrote, oldest first")
    records = [load(path) for path in parser.parse_args(argv).result]
    record = records[-1]
    parts = [headline(record), latencies(record)]
    if record.get("verdicts"):
        parts += [goals(records), requirements(record)]
    parts.append(provenance(record))
    print("\n\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
