"""`python -m bench.control`: the cost of a strength for each row, a gate, step weights and windows; what warm_up saves.

Each against the same call without it, in turns. All but the half window compute the same actions, which is checked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from qpilots_fast import Steering

from . import records, report
from .arguments import count
from .cases import CASES, Workload, make_workload
from .machine import header
from .peers import Run
from .timing import Load, Timing, combine_loads, interleave, prepare, ratio_spread

METHODS = ("U", "M")
BATCH_SIZES = (1, 16, 256)
PLAIN = "without"
HALF = "window over half of the steps"


def variants(steering: Steering, num_steps: int) -> dict[str, Steering]:
    """The same actions by other settings, and a window over half of the steps."""
    weights = (0.0, *(1.0,) * (num_steps - 1))
    return {
        PLAIN: steering,
        "step weights": replace(steering, step_weights=weights),
        "gate that lets all pass": replace(steering, max_disagreement=1e9),
        HALF: replace(steering, window=(0.5, 1.0)),
    }


def runs_of(workload: Workload, precision: str) -> dict[str, Callable[[], Run]]:
    """What builds each contestant."""

    def build(steering: Steering, alpha: Tensor | None = None) -> Callable[[], Run]:
        def made() -> Run:
            sampler = replace(workload, steering=steering).sampler("auto", precision)
            inputs = (workload.obs, workload.noise, workload.posterior_noise)
            return (lambda: sampler(*inputs)) if alpha is None else lambda: sampler(*inputs, alpha=alpha)

        return made

    named = {name: build(steering) for name, steering in variants(workload.steering, workload.num_steps).items()}
    rows = torch.full((workload.batch_size,), workload.steering.alpha)
    return named | {"a strength for each row": build(workload.steering, rows)}


def first_call_after_warm_up(workload: Workload, precision: str) -> float:
    """Seconds of the first call of a sampler that was warmed up."""
    sampler = workload.sampler("auto", precision).warm_up((workload.batch_size,))
    inputs = (workload.obs, workload.noise, workload.posterior_noise)
    _, timing, _ = prepare(lambda: lambda: sampler(*inputs))
    return timing.first_call_s


def measure(
    workload: Workload, precision: str, rounds: int | None, budget_s: float
) -> tuple[dict[str, Any], Load | None]:
    """One cell of the record; raises where actions differ that should not."""
    runs: dict[str, Run] = {}
    timings: dict[str, Timing] = {}
    actions: dict[str, Tensor] = {}
    for name, build in runs_of(workload, precision).items():
        runs[name], timings[name], actions[name] = prepare(build)
        if name != HALF and not torch.allclose(actions[name], actions[PLAIN], rtol=0, atol=1e-6):
            raise AssertionError(f"{name} changed the actions")
    load = interleave(runs, timings, rounds=rounds, budget_s=budget_s)
    plain = timings[PLAIN]
    results = []
    for name, timing in timings.items():
        median, low, high = ratio_spread(timing, plain)
        found = {"setting": name, "precision": precision, "p50_s": timing.p50, "rounds": len(timing.round_medians)}
        results.append(found | {"ratio": median, "quartiles": [low, high]})
    warm = sorted(first_call_after_warm_up(workload, precision) for _ in range(5))[2]
    found = {"setting": "first call after warm_up", "precision": precision, "p50_s": warm, "rounds": 5}
    results.append(found | {"ratio": warm / plain.p50, "quartiles": None})
    key = {"case": workload.case.name, "method": workload.method, "batch_size": workload.batch_size}
    return key | {"results": results}, load


def table(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """For the terminal."""
    return [
        {
            "method": cell["method"],
            "B": cell["batch_size"],
            "precision": result["precision"],
            "setting": result["setting"],
            "ms": report.milliseconds(result["p50_s"]),
            "over the call without": f"{result['ratio']:.3f}",
            "quartiles": "" if result["quartiles"] is None else "{:.3f} to {:.3f}".format(*result["quartiles"]),
        }
        for result in cell["results"]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(prog="python -m bench.control", description="The cost of steering under control.")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of rounds a cell (default 8)")
    parser.add_argument("--rounds", type=count, help="interleaved rounds a cell (default: as many as fit --budget)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of results (default bench/results)")
    options = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    console = Console(width=max(Console().width, 120))
    record, cells, loads = header("control", [], None), [], []
    record["command"] = "python -m bench.control"
    for method in METHODS:
        for batch_size in options.batch_sizes:
            workload = make_workload(CASES["paper"], method, batch_size)
            for precision in ("float32", "bfloat16"):
                cell, load = measure(workload, precision, options.rounds, options.budget)
                cells.append(cell)
                loads.append(load)
                console.print(report.row_table("", table(cell)))
    record |= {"complete": True, "cells": cells, "verdicts": [], "load": combine_loads(loads)}
    report.print_load(console, record["load"])
    console.print(f"saved {records.save(record, options.out)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
