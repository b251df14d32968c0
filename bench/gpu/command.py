"""`qpilots-fast bench --gpu`: a card's first minutes. Prices of the primitives, then what is right, then times.

It ends by itself, and saves as it goes: what fails is noted, and what comes after it is done all the same.
Nothing here was run by its authors on a GPU: its first run on one is the measurement.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from qpilots_fast import backends

from .. import plots, records, report
from ..cases import CASES, Workload, make_workload
from ..contestants import forget_compiled, our_contestants, peer_contestants
from ..machine import Peaks, header, measure_peaks
from ..measure import Cell, measure_cell
from ..peers import Contestant
from .check import SHIPPED, KernelCheck, ShippedCall, check_networks, check_samplers, check_shipped
from .prices import measure_prices
from .times import TIMED, TimedCall, measure_call

GPU_BACKENDS = ("triton", "cuda")
_BATCH_SIZES = (1, 16, 256, 4096, 64, 1024, 16384)  # in the order of measurement
_PRICES_S = 90.0  # nvcc and the run, at the longest
_DRY_BATCH = 64  # a dry run's largest
_FIRST_CALL_S = 30.0  # of a sampler at its own shape: a handful of kernels are compiled
_COMPILES_FROM_S = 2.0  # peers whose first call takes longer wait until everything else was measured


_SPREADS = ("graph_us", "graph_flushed_us", "eager_us")
Call = TypeVar("Call", ShippedCall, TimedCall)


@dataclass
class Deadline:
    """When nothing new begins.

    Args:
        limit_s: from now on. clock: tells seconds.
    """

    limit_s: float
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self._start = self.clock()

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether something that takes so long still ends in time."""
        return self.limit_s - (self.clock() - self._start) > seconds


@dataclass
class Session:
    """What one run does and has found; what it had no time for is named in left_out."""

    console: Console
    options: argparse.Namespace
    deadline: Deadline
    device: str = "cuda"
    checks: list[KernelCheck] = field(default_factory=list)
    prices: list[dict[str, Any]] = field(default_factory=list)
    times: list[dict[str, Any]] = field(default_factory=list)
    cells: dict[tuple[str, str, int], Cell] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    peaks: Peaks | None = None
    path: Path | None = None  # of the file, once something was saved

    def usable(self) -> list[str]:
        """The backends that can run; says why another cannot."""
        reasons = {name: backends.unavailable_reason(name) for name in self.backends}
        for name, reason in reasons.items():
            if reason is not None:
                self.console.print(f"{name}: not here ({reason})")
        return [name for name, reason in reasons.items() if reason is None]

    @property
    def wrong(self) -> bool:
        """Whether any kernel, or any contestant of ours, is."""
        contestants = any(r.contestant.ours and not r.usable for cell in self.cells.values() for r in cell.results)
        return contestants or bool(self.failures) or any(check.words for check in self.checks)

    def note(self, checks: Iterable[KernelCheck]) -> None:
        for check in checks:
            self.checks.append(check)
            verdict = f"[red]WRONG[/red] {check.words}" if check.words else "right"
            error = f"worst error {check.compared.max_error:.1e}"
            self.console.print(f"{check.backend} {check.precision} {check.what}: {verdict}, {error}")

    @property
    def backends(self) -> tuple[str, ...]:
        """Those of a GPU; a dry run has the CPU's kernels in their place."""
        return GPU_BACKENDS if self.device == "cuda" else ("cpu",)

    def measure_prices(self) -> None:
        """What exchanges, launches and reads cost, apart from any kernel of ours."""
        if self.device != "cuda" or not self.deadline.allows(_PRICES_S):
            self.left_out.append("prices of the primitives")
            return
        self.prices, missing = measure_prices()
        for row in self.prices:
            self.console.print(f"{row['price']}: {row['value']} {row['unit']}")
        if missing:
            self.left_out.append(f"prices of the primitives ({missing})")

    def planned(self, calls: Iterable[Call], usable: list[str]) -> list[Call]:
        """Those that can run here; of a dry run the smaller ones, on the CPU's kernels."""
        if self.device != "cuda":
            calls = dict.fromkeys(replace(call, backend="cpu") for call in calls if call.batch_size <= _DRY_BATCH)
        return [c for c in calls if c.backend in usable and c.precision in backends.get(c.backend).precisions]

    def check_shipped(self, usable: list[str]) -> None:
        """Every kernel at the shape that it is for."""
        for call in self.planned(SHIPPED, usable):
            if not self.deadline.allows(_FIRST_CALL_S):
                self.left_out.append(f"check of {call}")
                continue
            if self.device != "cuda":
                call = replace(call, repeats=1)
            self.note(self.guarded(str(call), lambda call=call: [check_shipped(call, self.device)]))

    def measure_times(self, usable: list[str]) -> None:
        """Ours alone; a wrong kernel is timed too, and its row says so."""
        wrong = {(check.backend, check.precision) for check in self.checks if check.words}
        for call in self.planned(TIMED, usable):
            if not self.deadline.allows(_FIRST_CALL_S):
                self.left_out.append(f"times of {call}")
                continue
            for row in self.guarded(str(call), lambda call=call: [measure_call(call, self.device)]):
                self.times.append(row | {"right": (call.backend, call.precision) not in wrong})
                self.console.print(_time_text(self.times[-1]))
            self.save()

    def guarded(self, what: str, run: Callable[[], list[Any]]) -> list[Any]:
        """What it returns; nothing where it fails, which is noted: what comes after it is still wanted."""
        try:
            return run()
        except Exception as error:  # of any kernel, driver or compiler
            words = f"{type(error).__name__}: {str(error)[:300]}"
            self.failures.append(f"{what}: {words}")
            self.console.print(f"[red]FAILED[/red] {what}: {words}")
            return []

    def save(self) -> None:
        """What is known now, in the run's one file."""
        out = self.options.out
        if self.device != "cuda" and out == records.RESULTS:  # no result to keep
            out = Path(tempfile.gettempdir()) / "qpilots_dry_run"
        self.path = records.save(self.record(), out, self.path)

    def check_grid(self, usable: list[str]) -> None:
        """Every setting, activation and norm at small, odd shapes, for as long as there is time."""
        for name in usable:
            for precision in backends.get(name).precisions:
                checks = [*check_samplers_and_networks(self, name, precision)]
                worst = max((check.compared.max_error for check in checks), default=float("nan"))
                wrong = [check for check in checks if check.words]
                summary = f"{len(checks)} small checks, {len(wrong)} wrong, worst error {worst:.1e}"
                self.console.print(f"{name} {precision}: {summary}")
                self.note(wrong)
                self.checks += [check for check in checks if not check.words]

    def measure(self) -> None:
        """Every cell with the peers that start at once; then again with those that compile, while there is time."""
        plan = [
            (name, method, batch)
            for name in self.options.case
            for batch in self.options.batch or _BATCH_SIZES
            for method in self.options.method or CASES[name].methods
        ]
        for compiled in (False, True):
            for key in plan:
                workload = make_workload(CASES[key[0]], key[1], key[2], device=self.device)
                contestants = self.contestants(workload, compiled)
                if contestants:
                    self.measure_cell(key, workload, contestants, compiled)
                    self.save()

    def contestants(self, workload: Workload, compiled: bool) -> list[Contestant]:
        """Ours and the peers of one pass; none where the pass has no peers of its own."""
        options = self.options
        ours = our_contestants(workload, options.precision, self.device)
        peers = peer_contestants(workload, options.peers, device=self.device)
        if not compiled:
            return [*ours, *(peer for peer in peers if peer.compile_s < _COMPILES_FROM_S)]
        slow = any(peer.compile_s >= _COMPILES_FROM_S for peer in peers)
        return [*ours, *peers] if slow else []

    def measure_cell(
        self, key: tuple[str, str, int], workload: Workload, contestants: list[Contestant], compiled: bool
    ) -> None:
        budget = min(self.options.budget, 5.0)
        first_calls = _FIRST_CALL_S + sum(peer.compile_s for peer in contestants if compiled)
        if not self.deadline.allows(first_calls + budget):
            what = "compiled peers of " if compiled else ""
            self.left_out.append(f"{what}{key[0]} {key[1]} B={key[2]}")
            return
        forget_compiled()
        limits = dict(rounds=self.options.rounds, budget_s=budget)
        cell = measure_cell(workload, contestants, precisions=self.options.precision, **limits)
        self.cells[key] = cell
        self.console.print(report.cell_table(cell, self.peaks))

    def record(self) -> dict[str, Any]:
        return header("gpu", ["--gpu"], self.peaks) | {
            "dry_run": self.device != "cuda",
            "failures": self.failures,
            "prices": self.prices,
            "times": self.times,
            "complete": not self.left_out,
            "left_out": self.left_out,
            "cells": [cell.to_json(self.peaks) for cell in self.cells.values()],
            "checks": [asdict(check) for check in self.checks],
        }


def check_samplers_and_networks(session: Session, backend: str, precision: str) -> Iterator[KernelCheck]:
    """The small checks of one backend, until the deadline."""
    for checks in (check_samplers, check_networks):
        for check in checks(backend, precision, session.device):
            yield check
            if not session.deadline.allows():
                session.left_out.append(f"small checks of {backend} {precision} from {check.what} on")
                return


def _time_text(row: dict[str, Any]) -> str:
    spreads = (f"{name.removesuffix('_us')} {value['p50']:.0f}" for name, value in row.items() if name in _SPREADS)
    host = (f"{name.removesuffix('_us')} {row[name]:.0f}" for name in ("host_live_us", "host_frozen_us") if name in row)
    call = f"{row['backend']} {row['precision']} {row['method']} B={row['batch_size']}"
    return f"{call}: {', '.join((*spreads, *host))} us{'' if row['right'] else ' [red](a check of it was wrong)[/red]'}"


def run(session: Session) -> int:
    """The whole session, and its file; the exit status is 1 where something is wrong or failed."""
    interrupted = False
    try:
        usable = session.usable()
        session.measure_prices()
        session.check_shipped(usable)
        session.save()
        session.measure_times(usable)
        if session.deadline.allows(_FIRST_CALL_S):
            session.peaks = measure_peaks(session.device)
            session.console.print(report.peaks_text(session.peaks))
            session.measure()
        session.check_grid(usable)
    except KeyboardInterrupt:
        interrupted = True
        session.left_out.append("what came after the interruption")
    if session.left_out:
        session.console.print(f"left out (--minutes {session.deadline.limit_s / 60:g})")
        session.console.print("\n".join(f"  {what}" for what in session.left_out), highlight=False)
    session.save()
    session.console.print(f"saved {session.path}", soft_wrap=True)
    if not session.options.no_plots and session.cells and session.path is not None:
        plots.plot_all(session.record(), session.path)
    return int(session.wrong or interrupted)


def main(options: argparse.Namespace) -> int:
    """Checks, then times; the exit status is 2 without a GPU, 1 where a kernel is wrong."""
    console = Console(width=max(Console().width, 160))
    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        console.print(
            "bench --gpu needs an NVIDIA GPU and a CUDA build of torch; torch.cuda.is_available() is False here. "
            "Without one --dry-run shows what it would do, and `python -m bench.gpu_static` compiles every kernel and "
            "reads its machine code."
        )
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends it: what was found is kept
    return run(Session(console, options, Deadline(60 * options.minutes), device))
