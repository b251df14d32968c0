"""Result files: JSON lines that are only ever added, and the comparison of two of them.

The first line says what the run was (command, date, commit, machine, versions, peaks, load, verdicts, and of each cell
what its contestants share); every further line is one contestant in one cell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qpilots_fast.files import write_text

from .machine import ROOT
from .report import milliseconds

RESULTS = ROOT / "bench" / "results"

# a call slower than before by more than this is called a regression; the noise of a shared machine is below it
REGRESSION = 1.10

# what says which cell a line belongs to
_CELL = ("case", "method", "batch_size")
# more digits than this are noise
_DIGITS = 4


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def processor(machine: dict[str, Any]) -> str:
    """A folder's name for the processor that was measured: "amd-epyc-9r14" of "AMD EPYC 9R14 96-Core Processor"."""
    name = (machine["gpu"] or {}).get("name") or machine["cpu"]
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor|\d+-core)\b|@.*", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


def save(record: dict[str, Any], folder: Path, again: Path | None = None) -> Path:
    """Writes folder/<processor>/<date>_<commit>.jsonl; an existing file is never touched.

    Args:
        again: what an earlier call returned: its file is replaced, whole.
    """
    folder = folder / processor(record["machine"])
    run = record | {"cells": [{k: v for k, v in cell.items() if k != "results"} for cell in record["cells"]]}
    rows = [{k: cell[k] for k in _CELL} | result for cell in record["cells"] for result in cell["results"]]
    lines = "".join(json.dumps(_rounded(line)) + "\n" for line in (run, *rows))
    if again is not None:
        write_text(again, lines)
        return again
    stamp = record["date"][:19].replace(":", "").replace("-", "")
    commit = (record["git"]["commit"] or "unknown")[:10]
    for suffix in ("", *(f"_{n}" for n in range(1, 1000))):
        path = folder / f"{stamp}_{commit}{suffix}.jsonl"
        if not path.exists():
            write_text(path, lines)
            return path
    raise FileExistsError(f"{folder} holds a thousand results of this second; remove some.")


def load(path: Path) -> dict[str, Any]:
    """What `save` was given, with rounded numbers.

    Raises:
        ValueError: where the file is not a result.
    """
    try:
        record, *rows = (json.loads(line) for line in path.read_text().splitlines())
        cells = {tuple(cell[k] for k in _CELL): cell | {"results": []} for cell in record["cells"]}
        for row in rows:
            cells[tuple(row.pop(k) for k in _CELL)]["results"].append(row)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a benchmark result; expected what `qpilots-fast bench` wrote.") from error
    return record | {"cells": list(cells.values())}


def _medians(record: dict[str, Any]) -> Iterable[tuple[tuple[Any, ...], float, float | None]]:
    """(cell and contestant, p50, ratio to the cell's best peer) of every correct result of ours."""
    for cell in record["cells"]:
        peers = [r["p50_s"] for r in cell["results"] if not r["ours"] and "p50_s" in r]
        for r in cell["results"]:
            if r["ours"] and "p50_s" in r:
                key = (*(cell[k] for k in _CELL), r["name"], r["precision"])
                yield key, r["p50_s"], (min(peers) / r["p50_s"] if peers else None)


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Our times now over our times then, for what both files hold; the slowest-down first.

    Where both have peers, the ratio to the best peer decides, because it cancels a slower machine.
    """
    before = {key: (p50, ratio) for key, p50, ratio in _medians(old)}
    rows = []
    for key, p50, ratio in _medians(new):
        if key not in before:
            continue
        old_p50, old_ratio = before[key]
        slower = old_ratio / ratio if ratio and old_ratio else p50 / old_p50
        rows.append(
            {
                "what": " ".join((*map(str, key[:2]), f"B={key[2]}", *key[3:])),
                "old ms": milliseconds(old_p50),
                "new ms": milliseconds(p50),
                "time now / then": round(p50 / old_p50, 3),
                "slow-down": round(slower, 3),
                "verdict": "REGRESSION" if slower > REGRESSION else "faster" if slower < 1 / REGRESSION else "same",
            }
        )
    return sorted(rows, key=lambda row: -row["slow-down"])
