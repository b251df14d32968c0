"""The ratios and limits that a release must reach, and the verdict on a measured set of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qpilots_fast.testing import BFLOAT16_ERROR_OVER_TORCH, TOLERANCES

from .machine import Peaks
from .measure import Cell


@dataclass(frozen=True)
class Target:
    """At least `required` times as fast as the best peer (of float32, or of any precision), with live weights."""

    method: str
    precision: str
    batch_size: int
    required: float
    case: str = "paper"

    @property
    def name(self) -> str:
        """Of its verdict."""
        case = "" if self.case == "paper" else f"{self.case} "
        return f"{case}{self.method} {self.precision} B={self.batch_size}"

    @property
    def against(self) -> str | None:
        """The peers' precision; None for any."""
        return "float32" if self.precision == "float32" else None


def _targets(method: str, precision: str, ratios: dict[int, float], case: str = "paper") -> tuple[Target, ...]:
    return tuple(Target(method, precision, batch, ratio, case) for batch, ratio in ratios.items())


TARGETS: tuple[Target, ...] = (
    *_targets("U", "float32", {1: 3.0, 16: 2.2, 64: 1.6, 256: 1.4, 1024: 1.4}),
    *_targets("U", "bfloat16", {1: 6.0, 16: 3.5, 64: 2.0, 256: 1.7, 1024: 1.7}),
    *_targets("M", "float32", {1: 3.0, 16: 1.8, 64: 1.5}),
    *_targets("M", "bfloat16", {1: 5.0, 16: 2.0, 64: 1.7}),
    *_targets("U", "float32", {1: 3.0, 16: 2.0, 256: 1.4}, "residual"),
    *_targets("U", "float32", {1: 3.0, 16: 2.0, 256: 1.4}, "c51"),
)

PERCENT_OF_PEAK_AT_256 = 65.0
FIRST_CALL_S = 0.3
LIVE_OVER_FROZEN = 1.10  # at B >= 16
WORKSPACE_BYTES_AT_256 = 64_000_000
P99_OVER_P50_AT_1 = 1.5


@dataclass(frozen=True)
class Verdict:
    """One requirement, what was measured and whether it passes; measured is None where nothing could be.

    Args:
        frozen: of a ratio, the same with frozen weights.
        ceiling: of a ratio, what a call at this machine's limits would reach.
    """

    name: str
    required: float
    measured: float | None
    at_least: bool
    note: str = ""
    unit: str = ""
    frozen: float | None = None
    ceiling: float | None = None

    @property
    def passed(self) -> bool | None:
        """None where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured >= self.required if self.at_least else self.measured <= self.required

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def find(cells: Sequence[Cell], method: str, batch_size: int, case: str = "paper") -> Cell | None:
    """The cell of a method and batch size, or None."""
    for cell in cells:
        w = cell.workload
        if (w.case.name, w.method, w.batch_size) == (case, method, batch_size):
            return cell
    return None


def judge_ratios(
    cells: Sequence[Cell], precisions: Sequence[str] = ("float32", "bfloat16"), peaks: Peaks | None = None
) -> list[Verdict]:
    """A verdict for every target of these precisions whose cell was measured; with peaks also how far it could go."""
    verdicts = []
    for target in TARGETS:
        cell = find(cells, target.method, target.batch_size, target.case)
        if cell is None or target.precision not in precisions:
            continue
        name = target.name
        ratio = cell.ratio(target.precision, target.against)
        peer = cell.best_peer(target.against)
        if ratio is None or peer is None:
            reason = "no peer ran" if peer is None else "ours did not run, or its actions are wrong"
            verdicts.append(Verdict(name, target.required, None, True, reason, "x"))
            continue
        note = f"{peer.contestant.key}; quartiles over rounds {ratio[1]:.2f} to {ratio[2]:.2f}"
        frozen = cell.ratio(target.precision, target.against, frozen=True)
        floor = cell.floor_s(target.precision, peaks)
        ceiling = None
        if frozen is not None:
            note += f"; frozen {frozen[0]:.2f}x"
        if floor is not None:
            assert peer.timing is not None
            ceiling = peer.timing.p50 / floor
            note += f"; at the limits {ceiling:.2f}x: {floor * 1e3:.2f} ms"
        verdicts.append(
            Verdict(name, target.required, ratio[0], True, note, "x", frozen[0] if frozen else None, ceiling)
        )
    return verdicts


def judge_limits(cells: Sequence[Cell], peaks: Peaks | None, precisions: Sequence[str]) -> list[Verdict]:
    """Percent of peak, live over frozen, workspace and accuracy."""
    verdicts = []
    for precision in precisions:
        cell = find(cells, "U", 256)
        ours = cell.ours(precision) if cell else None
        if cell is not None and ours is not None and ours.timing is not None and peaks is not None:
            percent = of_best = peaks.percent_of_fma(cell.flops, ours.timing.p50, precision)
            note = f"peak measured by {peaks.source}"
            rate = cell.fma_flops.get(precision)
            if rate is not None:
                percent = 100 * cell.flops / ours.timing.p50 / rate
                note = f"of {rate / 1e9:.0f} GFLOP/s, the median of short loops between the rounds"
                note += "" if of_best is None else f"; {of_best:.0f} % of the best loop of the run"
            if precision in peaks.fma_flops:
                of_tiles = peaks.percent_of_flops(cell.flops, ours.timing.p50, precision)
                note += f"; {of_tiles:.0f} % of the tile registers' peak"
            verdicts.append(Verdict(f"FMA peak, U {precision} B=256", PERCENT_OF_PEAK_AT_256, percent, True, note, "%"))
            workspace = cell.workspace_bytes.get(precision)
            megabytes = None if workspace is None else workspace / 1e6
            verdicts.append(
                Verdict(f"workspace, U {precision} B=256", WORKSPACE_BYTES_AT_256 / 1e6, megabytes, False, "", "MB")
            )
        for cell in cells:
            live, frozen = cell.ours(precision), cell.ours(precision, frozen=True)
            if cell.workload.batch_size < 16 or live is None or frozen is None:
                continue
            assert live.timing is not None and frozen.timing is not None
            name = f"live / frozen, {cell.workload.method} {precision} B={cell.workload.batch_size}"
            verdicts.append(Verdict(name, LIVE_OVER_FROZEN, live.timing.p50 / frozen.timing.p50, False, "", "x"))
        verdicts += _judge_accuracy(cells, precision)
    return verdicts


def _judge_accuracy(cells: Sequence[Cell], precision: str) -> list[Verdict]:
    """The worst error over the cells; in bfloat16 also against torch's own bfloat16 loop."""
    ours, torchs = [], []
    for cell in cells:
        for result in cell.results:
            if result.check is None or result.contestant.precision != precision:
                continue
            if result.contestant.ours:
                ours.append((cell, result.check))
            elif result.contestant.name == "torch eager":
                torchs.append((cell, result.check))
    if not ours:
        return []
    kind = "max_error" if precision == "float32" else "mean_error"
    bound, worst = getattr(TOLERANCES[precision], kind), max(getattr(check, kind) for _, check in ours)
    what = f"{kind.replace('_', ' ')}, {precision}"
    verdicts = [Verdict(what, bound, worst, False, "against the float64 reference")]
    if precision == "float32":
        return verdicts
    theirs = {id(cell): check.mean_error for cell, check in torchs}
    over = [check.mean_error / theirs[id(cell)] for cell, check in ours if theirs.get(id(cell))]
    if over:
        note = "worst cell"
        verdicts.append(
            Verdict(f"mean error over torch's, {precision}", BFLOAT16_ERROR_OVER_TORCH, max(over), False, note, "x")
        )
    return verdicts
