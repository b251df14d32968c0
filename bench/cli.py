"""`qpilots-fast bench`: correctness first, then the table, its verdicts, a result file and plots."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import plots, records, report, targets
from .arguments import count
from .busy import measure_under_load
from .cases import BATCH_SIZES, CASES, METHODS, PRECISIONS, Workload, make_workload
from .contestants import PeerChoice, forget_compiled, native_backend, our_contestants, peer_contestants
from .loops import (
    BACK_TO_BACK,
    control_loop_rows,
    first_call_after_import,
    measure_control_loop,
    measure_scaling,
    scaling_rows,
)
from .machine import Peaks, header, measure_peaks, multiply_add_rates
from .measure import Cell, measure_cell, rows_do_not_depend_on_batch_mates
from .peers import Contestant
from .targets import Verdict
from .timing import combine_loads

# at this size every peer takes seconds a call: only the ones that won at the size below run
_WINNERS_ONLY_FROM = 1024
# --quick begins no cell after this, so that it ends within a minute on a slow machine too
_QUICK_STOPS_AFTER_S = 30.0


@dataclass
class Session:
    """What one command measures and has measured so far."""

    console: Console
    precisions: tuple[str, ...]
    peers: PeerChoice
    budget_s: float
    rounds: int | None = None
    min_rounds: int = 5
    control_loop: bool = False
    quick: bool = False
    peaks: Peaks | None = None
    cells: list[Cell] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def contestants(self, workload: Workload) -> list[Contestant]:
        """Ours and the peers of a workload; only the winners of the next smaller batch at the largest sizes."""
        peers = peer_contestants(workload, self.peers, self._peer_precisions())
        if self.quick:
            peers = [peer for peer in peers if peer.name == "torch eager"]
        if workload.batch_size >= _WINNERS_ONLY_FROM:
            peers = [peer for peer in peers if peer.key in self._winners(workload)] or peers
        return [*our_contestants(workload, self.precisions, "cpu", frozen=not self.quick), *peers]

    def _peer_precisions(self) -> tuple[str, ...]:
        # bfloat16 answers to the best peer of any precision
        return PRECISIONS if "bfloat16" in self.precisions else self.precisions

    def _winners(self, workload: Workload) -> set[str]:
        smaller = [
            cell
            for cell in self.cells
            if (cell.workload.case, cell.workload.method) == (workload.case, workload.method)
            and 256 <= cell.workload.batch_size < workload.batch_size
        ]
        if not smaller:
            return set()
        nearest = max(smaller, key=lambda cell: cell.workload.batch_size)
        best = (nearest.best_peer(precision) for precision in (None, *self._peer_precisions()))
        return {result.contestant.key for result in best if result is not None}

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{text}[/dim]", highlight=False)

    def measure(self, workload: Workload) -> Cell:
        """One cell, printed as soon as it is known."""
        forget_compiled()
        in_a_loop = self.control_loop and workload.batch_size == 1
        cell = measure_cell(
            workload, self.contestants(workload), precisions=self.precisions, rounds=self.rounds,
            budget_s=self.budget_s, min_rounds=self.min_rounds, memory=not self.quick, say=self.say,
            control_loop=measure_control_loop if in_a_loop else None,
            fma_rates=lambda: {} if self.quick else multiply_add_rates(self.precisions),
        )  # fmt: skip
        self.cells.append(cell)
        self.console.print(report.cell_table(cell, self.peaks))
        return cell

    def expected_s(self, plan: Sequence[tuple[str, str, int]]) -> float:
        """A guess of the whole run: compilation, first calls and the rounds."""
        total = 10.0
        for case, method, batch in plan:
            workload = make_workload(CASES[case], method, batch)
            contestants = self.contestants(workload)
            if batch >= _WINNERS_ONLY_FROM:
                contestants = contestants[:6]
            calls_s = len(contestants) * (0.05 + batch * 0.004) * (1 if method == "U" else 4)
            total += sum(c.compile_s for c in contestants) * (1.4 if method == "M" else 1)
            total += max(self.budget_s, self.min_rounds * calls_s) + 4 * calls_s
            if self.control_loop and batch == 1:
                total += 9 * len(contestants)
        return total


def build_parser() -> argparse.ArgumentParser:
    """The options of `qpilots-fast bench`."""
    parser = argparse.ArgumentParser(
        prog="qpilots-fast bench", description="Compare qpilots_fast with the best loops written without it."
    )

    def names(allowed: Sequence[str]) -> Any:
        def parse(text: str) -> tuple[str, ...]:
            parts = tuple(part for part in text.split(",") if part)
            wrong = [part for part in parts if part not in allowed]
            if wrong or not parts:
                raise argparse.ArgumentTypeError(f"{text!r}; expected some of {', '.join(allowed)}, comma-separated")
            return parts

        return parse

    def sizes(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.split(","))
        except ValueError:
            values = ()
        if not values or min(values) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}; expected batch sizes such as 1,16,256")
        return values

    def folder(text: str) -> Path:
        return Path(text)

    parser.add_argument(
        "--quick", action="store_true", help="within a minute: a few cells, eager torch as the only peer"
    )
    parser.add_argument(
        "--table", choices=("targets",), help="the release's requirements, row by row; exit status 1 where one fails"
    )
    parser.add_argument("--case", type=names(tuple(CASES)), default=("paper",), help=f"of {', '.join(CASES)}")
    parser.add_argument("--batch", type=sizes, help="batch sizes, comma-separated (default 1,16,64,256)")
    parser.add_argument("--method", type=names(tuple(METHODS)), help=f"of {', '.join(METHODS)} (default: the case's)")
    parser.add_argument(
        "--precision", type=names(PRECISIONS), default=PRECISIONS, help="of ours; bfloat16 meets peers of both"
    )
    parser.add_argument(
        "--peers",
        choices=("best", "all", "none"),
        default="all",
        help="best leaves out JAX and the compiled whole loop, whose first calls are long",
    )
    parser.add_argument("--rounds", type=count, help="interleaved rounds a cell (default: as many as fit --budget)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of rounds a cell (default 20)")
    parser.add_argument("--control-loop", action="store_true", help="B=1 back to back, and after a torch operation")
    parser.add_argument(
        "--load",
        type=int,
        default=0,
        metavar="N",
        help="with --control-loop: beside N busy processes, and nothing else",
    )
    parser.add_argument("--scaling", action="store_true", help="time against B, E, N, K and H with fitted exponents")
    parser.add_argument("--gpu", action="store_true", help="the GPU's table: every kernel's correctness, then times")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which --gpu begins nothing new (default 8)")
    parser.add_argument("--dry-run", action="store_true", help="--gpu on the CPU's kernels, briefly: what it would do")
    parser.add_argument("--compare", type=folder, metavar="OLD.jsonl", help="show what became slower since that result")
    parser.add_argument(
        "--out", type=folder, default=records.RESULTS, help="folder of results and plots (default bench/results)"
    )
    parser.add_argument("--no-plots", action="store_true", help="no pictures beside the result")
    return parser


def make_plan(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(case, method, batch size) in the order of measurement."""
    if options.table == "targets":
        wanted = dict.fromkeys((t.case, t.method, t.batch_size) for t in targets.TARGETS)
        return [key for key in wanted if options.batch is None or key[2] in options.batch]
    if options.quick:
        return [("paper", "U", 1), ("paper", "U", 16), ("paper", "M", 1)]
    return [
        (case, method, batch)
        for case in options.case
        for method in options.method or CASES[case].methods
        for batch in options.batch or BATCH_SIZES[:4]
    ]


def judge(session: Session) -> list[Verdict]:
    """Every requirement of the table, ratios first."""
    verdicts = targets.judge_ratios(session.cells, session.precisions, session.peaks)
    verdicts += targets.judge_limits(session.cells, session.peaks, session.precisions)
    backend = native_backend()
    for precision in session.precisions:
        session.say(f"first call after import, {precision}")
        first = first_call_after_import(precision)
        note = "" if first is None else f"import itself {first[0] * 1e3:.0f} ms beyond torch's"
        seconds = None if first is None else first[1]
        verdicts.append(
            Verdict(f"first call after import, {precision}", targets.FIRST_CALL_S, seconds, False, note, "s")
        )
        alone = targets.find(session.cells, "U", 1)
        ours = alone.ours(precision) if alone else None
        loop = ours.control_loop.get(BACK_TO_BACK) if ours else None
        if loop is not None:
            name = f"p99 / p50 at B=1, {precision}"
            ratio = loop["p99_s"] / loop["p50_s"]
            verdicts.append(Verdict(name, targets.P99_OVER_P50_AT_1, ratio, False, f"{loop['calls']} calls", "x"))
        for method in ("U", "M"):
            workload = make_workload(CASES["paper"], method, 17)
            same = rows_do_not_depend_on_batch_mates(workload, precision, backend)
            verdicts.append(
                Verdict(
                    f"rows bitwise independent, {method} {precision}", 1, float(same), True, "alone, among 17, reversed"
                )
            )
    return verdicts


def without_paths(arguments: Sequence[str]) -> list[str]:
    """What decides the measurement: a result file names no folder of the machine it was made on."""
    paths = ("--out", "--compare")
    return [
        argument
        for i, argument in enumerate(arguments)
        if argument.partition("=")[0] not in paths and (i == 0 or arguments[i - 1] not in paths)
    ]


def _print_peaks(session: Session) -> None:
    session.say("measuring this machine's peaks")
    session.peaks = measure_peaks()
    session.console.print(report.peaks_text(session.peaks))


def _finish(session: Session, record: dict[str, Any], options: argparse.Namespace) -> None:
    """Load, files, plots and the comparison."""
    console = session.console
    record["load"] = combine_loads([cell.load for cell in session.cells])
    report.print_load(console, record["load"])
    path = records.save(record, options.out)
    console.print(f"saved {path}", soft_wrap=True)
    if not options.no_plots:
        for plot in plots.plot_all(record, path):
            console.print(f"saved {plot}", soft_wrap=True)
    if options.compare:
        rows = records.compare(records.load(options.compare), record)
        if rows:
            console.print(report.row_table(f"against {options.compare.name}", rows))
        else:
            console.print(f"{options.compare} and this run have no cell in common")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 where ours is wrong or a requirement of --table fails."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.compare and not options.compare.is_file():
        parser.error(f"--compare {options.compare}: no such file")
    if options.gpu:
        from .gpu import command

        return command.main(options)
    console = Console(width=max(Console().width, 160))
    session = Session(
        console, options.precision, options.peers, options.budget, options.rounds,
        control_loop=options.control_loop or options.table == "targets", quick=options.quick,
    )  # fmt: skip
    if options.quick:
        session.budget_s, session.min_rounds = 3.0, 3
        console.print("quick: eager torch is the only peer, so these speed-ups are not the ones to publish")
    if options.load:
        if not options.control_loop:
            parser.error("--load needs --control-loop")
        rows = measure_under_load(options.load, options.precision)
        console.print(report.row_table(f"control loop, B=1, beside {options.load} busy processes", rows))
        record = header("load", without_paths(arguments), None) | {"cells": [], "verdicts": [], "under_load": rows}
        console.print(f"saved {records.save(record, options.out)}", soft_wrap=True)
        return 0
    plan = make_plan(options)
    console.print(
        f"{len(plan)} cells, backend {native_backend()}, {torch.get_num_threads()} threads; about "
        f"{max(session.expected_s(plan) / 60 + (2.5 if options.scaling else 0), 1):.0f} minutes on a quiet machine "
        "(torch.compile's cache of an earlier run makes it shorter)"
    )
    _print_peaks(session)
    kind = "targets" if options.table else "quick" if options.quick else "bench"
    record = header(kind, without_paths(arguments), session.peaks)
    complete, start = True, time.perf_counter()
    try:
        for case, method, batch in plan:
            if options.quick and time.perf_counter() - start > _QUICK_STOPS_AFTER_S:
                console.print(f"out of time: {method} B={batch} is left out")
                continue
            session.measure(make_workload(CASES[case], method, batch))
        if in_a_loop := control_loop_rows(session.cells):
            console.print(report.row_table("control loop, B=1", in_a_loop))
        if options.scaling:
            session.extra["scaling"], _ = measure_scaling(session.precisions, min(options.budget, 3.0), session.say)
            console.print(report.row_table("scaling", scaling_rows(session.extra["scaling"])))
    except KeyboardInterrupt:
        complete = False
        console.print("interrupted: what was measured is kept")
    if not options.quick:
        session.peaks = session.peaks.best_of(measure_peaks()) if session.peaks else None
    record["peaks"] = asdict(session.peaks) if session.peaks else None
    verdicts = judge(session) if options.table and complete else []
    if verdicts:
        console.print(report.verdict_table(verdicts))
    record |= {
        "complete": complete,
        "cells": [cell.to_json(session.peaks) for cell in session.cells],
        "verdicts": [verdict.to_json() for verdict in verdicts],
        **session.extra,
    }
    _finish(session, record, options)
    wrong = any(r.contestant.ours and not r.usable for cell in session.cells for r in cell.results)
    return int(wrong or not complete or any(verdict.passed is not True for verdict in verdicts))
