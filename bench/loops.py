"""Beyond one cell: the control loop at B = 1, how time grows with each size, and the first call after import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .cases import CASES, Case, make_workload
from .contestants import EAGER, native_backend, our_contestants, peer_contestants
from .machine import ROOT
from .measure import Cell, Say, measure_cell
from .peers import Run
from .timing import control_loop, fit_exponent

_LOOP_S = 4.0  # of each contestant and mode
BACK_TO_BACK = "back to back"

# name -> sizes, around B=16, E=10, N=4, K=10, H=512; N is of QPILOTS-M, the others of QPILOTS-U
SCALING: dict[str, tuple[int, ...]] = {
    "B": (1, 4, 16, 64, 256),
    "E": (2, 5, 10, 20),
    "N": (1, 2, 4, 8),
    "K": (5, 10, 20),
    "H": (128, 256, 512, 1024),
}


def torch_operation() -> Callable[[], object]:
    """A parallel torch operation such as a robot's loop makes on its images: wakes torch's thread pool."""
    image = torch.rand(3, 480, 640)
    return lambda: torch.tanh(image)


def measure_control_loop(run: Run) -> dict[str, dict[str, float]]:
    """A contestant back to back, and again with a torch operation right before every call."""
    modes: dict[str, Callable[[], object] | None] = {BACK_TO_BACK: None, "after a torch op": torch_operation()}
    measured = {}
    for mode, between in modes.items():
        guess = control_loop(run, 5, between)["p50_s"]
        measured[mode] = control_loop(run, int(min(max(_LOOP_S / guess, 30), 1000)), between)
    return measured


def control_loop_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For the terminal: milliseconds and p99 over p50."""
    return [
        {
            "contestant": result.contestant.key, "method": cell.workload.method, "mode": mode, "calls": stats["calls"],
            **{f"{name} ms": round(stats[f"{name}_s"] * 1e3, 3) for name in ("p50", "p90", "p99", "max", "jitter")},
            "p99/p50": round(stats["p99_s"] / stats["p50_s"], 2),
        }
        for cell in cells for result in cell.results for mode, stats in result.control_loop.items()
    ]  # fmt: skip


def _scaled(case: Case, dimension: str, size: int) -> tuple[Case, str, int, int | None]:
    """(case, method, batch size, num_samples) with one dimension set."""
    if dimension == "B":
        return case, "U", size, None
    if dimension == "N":
        return case, "M", 16, size
    changes: dict[str, dict[str, Any]] = {
        "E": {"num_critics": size},
        "K": {"num_steps": size},
        "H": {"hidden_dims": (size,) * len(case.hidden_dims)},
    }
    return replace(case, **changes[dimension]), "U", 16, None


def measure_scaling(precisions: tuple[str, ...], budget_s: float, say: Say) -> tuple[list[dict[str, Any]], list[Cell]]:
    """Time against B, E, N, K and H for ours and eager torch, with the exponent p of time ~ size^p."""
    rows, cells = [], []
    for dimension, sizes in SCALING.items():
        times: dict[str, list[float]] = {}
        for size in sizes:
            case, method, batch, draws = _scaled(CASES["paper"], dimension, size)
            workload = make_workload(case, method, batch, num_samples=draws)
            eager = [c for c in peer_contestants(workload, "best", ("float32",)) if c.name == EAGER]
            ours = our_contestants(workload, precisions, "cpu", frozen=False)
            cell = measure_cell(
                workload, [*ours, *eager], precisions=precisions, budget_s=budget_s, min_rounds=3, memory=False, say=say
            )
            cells.append(cell)
            for result in cell.results:
                if result.usable and result.timing is not None:
                    times.setdefault(result.contestant.key, []).append(result.timing.p50)
        for key, seconds in times.items():
            if len(seconds) == len(sizes):
                exponent = round(fit_exponent(sizes, seconds), 3)
                rows.append(
                    {
                        "dimension": dimension,
                        "contestant": key,
                        "sizes": list(sizes),
                        "p50_s": seconds,
                        "exponent": exponent,
                    }
                )
    return rows, cells


def scaling_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For the terminal."""
    return [
        {
            "dimension": row["dimension"],
            "contestant": row["contestant"],
            "sizes": ", ".join(map(str, row["sizes"])),
            "p50 ms": ", ".join(f"{s * 1e3:.3g}" for s in row["p50_s"]),
            "time ~ size^": row["exponent"],
        }
        for row in rows
    ]


_FIRST_CALL = """
import time, torch
start = time.perf_counter()
from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering
imported = time.perf_counter()
flow, critic = FlowMLP({s}, {a}), CriticEnsemble({s}, {a})
box = dict(action_low=-1.0, action_high=1.0)
sampler = SteeredSampler(flow, critic, Steering.qpilots_u(), backend={backend!r}, precision={precision!r}, **box)
obs = torch.zeros(1, {s})
before = time.perf_counter()
sampler(obs)
print(imported - start, time.perf_counter() - before)
"""


def first_call_after_import(precision: str) -> tuple[float, float] | None:
    """(seconds to import beyond torch, seconds of the first call at B = 1), the median of three fresh processes."""
    case = CASES["paper"]
    code = _FIRST_CALL.format(s=case.obs_dim, a=case.action_dim, backend=native_backend(), precision=precision)
    measured = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
        if done.returncode != 0:
            return None
        imported, call = done.stdout.split()
        measured.append((float(call), float(imported)))
    call_s, import_s = sorted(measured)[1]
    return import_s, call_s
