"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .machine import Peaks
from .measure import Cell, Result
from .targets import Verdict


def milliseconds(seconds: float | None) -> str:
    """Three significant digits, in ms."""
    if seconds is None:
        return "-"
    ms = seconds * 1e3
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"


def _speedup(cell: Cell, result: Result) -> str:
    """How many times faster than the best peer of any precision; nothing where the actions are wrong."""
    peer = cell.best_peer()
    if not result.usable or peer is None:
        return ""
    assert result.timing is not None and peer.timing is not None
    return f"{peer.timing.p50 / result.timing.p50:.2f}x"


def cell_table(cell: Cell, peaks: Peaks | None) -> Table:
    """One row a contestant, fastest first; those whose actions are wrong have no time."""
    w = cell.workload
    floor = ", ".join(
        f"{p} {milliseconds(cell.floor_s(p, peaks))} ms" for p in cell.weight_bytes if cell.floor_s(p, peaks)
    )
    title = f"{w.case.name}, {w.method}, B={w.batch_size}: {cell.flops / 1e9:.2f} GFLOP" + (
        f"; floor {floor}" if floor else ""
    )
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("contestant", "precision"):
        table.add_column(name)
    for name in (
        "p50 ms",
        "p90",
        "p99",
        "x best peer",
        "first call",
        "GFLOP/s",
        "% peak",
        "GB/s",
        "% cache bw",
        "extra MB",
        "error",
    ):
        table.add_column(name, justify="right")
    for result in sorted(cell.results, key=lambda r: r.timing.p50 if r.usable and r.timing else float("inf")):
        table.add_row(*_cells(cell, result, peaks), style="bold" if result.contestant.ours else "")
    return table


def _cells(cell: Cell, result: Result, peaks: Peaks | None) -> list[str]:
    c = result.contestant
    if result.check is None:
        return [c.name, c.precision, "did not run: " + result.failure]
    error = f"{result.check.max_error:.0e}" if c.precision == "float32" else f"{result.check.mean_error:.0e} mean"
    timing = result.timing
    first = "-" if timing is None else _seconds(timing.build_s + timing.first_call_s)
    if not result.usable or timing is None:
        return [
            c.name,
            c.precision,
            "WRONG",
            "",
            "",
            "",
            first,
            "",
            "",
            "",
            "",
            "",
            f"[red]{result.check.words}[/red]",
        ]
    p50 = timing.p50
    traffic = cell.traffic_bytes.get(c.precision, 0)
    extra = "-" if timing.peak_extra_bytes is None else f"{timing.peak_extra_bytes / 1e6:.0f}"
    summary = timing.summary()
    return [
        c.name, c.precision, milliseconds(p50), milliseconds(summary["p90_s"]), milliseconds(summary["p99_s"]),
        _speedup(cell, result), first, f"{cell.flops / p50 / 1e9:.0f}",
        _percent(peaks.percent_of_flops(cell.flops, p50, c.precision) if peaks else None), f"{traffic / p50 / 1e9:.0f}",
        _percent(peaks.percent_of_bytes(traffic, p50) if peaks else None), extra, error,
    ]  # fmt: skip


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Required, measured, passed."""
    table = Table(title="Requirements", title_justify="left", header_style="bold")
    table.add_column("requirement")
    table.add_column("required", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("")
    table.add_column("note", overflow="fold")
    for v in verdicts:
        sign = ">=" if v.at_least else "<="
        status = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: "[yellow]not measured[/yellow]"}[
            v.passed
        ]
        measured = "-" if v.measured is None else f"{v.measured:.3g}{v.unit}"
        table.add_row(v.name, f"{sign} {v.required:g}{v.unit}", measured, status, v.note)
    return table


def row_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A plain table of equal dictionaries, for the control loop, scaling and comparisons."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(rows[0] if rows else ()):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def peaks_text(peaks: Peaks) -> str:
    """One line."""
    parts = [f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in peaks.flops.items()]
    parts += [f"{name} by vectors {value / 1e9:.0f} GFLOP/s" for name, value in peaks.fma_flops.items()]
    for name, value in (("memory", peaks.dram_bytes), ("cache", peaks.cache_bytes)):
        if value:
            parts.append(f"{name} {value / 1e9:.0f} GB/s")
    return f"peaks of this run: {', '.join(parts)} ({peaks.source})"


def print_load(console: Console, load: dict[str, Any] | None) -> None:
    """Says whether other processes disturbed the run."""
    if load is None:
        console.print("other processes' load: unknown on this system")
    elif load["quiet"]:
        console.print(f"quiet machine: other processes took {load['mean_other_cpus']:.2f} CPUs on average")
    else:
        console.print(
            f"[yellow]not a quiet machine: other processes took {load['mean_other_cpus']:.2f} CPUs on average, "
            f"{load['worst']['other_cpus'] + load['worst']['stolen_cpus']:.2f} at worst; do not publish these "
            "times[/yellow]"
        )
