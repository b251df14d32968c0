"""One cell of a table: a workload, its contestants, correctness first, then time, then the ratios."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from qpilots_fast.backends import BACKENDS
from qpilots_fast.backends.counts import network_macs
from qpilots_fast.testing import Comparison, compare

from .cases import Workload
from .machine import Peaks
from .peers import Contestant, Run
from .timing import Load, Timing, interleave, peak_extra_bytes, percentile, prepare, ratio_spread

# peers in 16 bits round every activation, ours only the operands of products
_PEER_TOLERANCE_SCALE = 3.0

Say = Callable[[str], None]


def check_actions(actions: Tensor, workload: Workload, precision: str, ours: bool) -> Comparison:
    """Holds the checked rows to the precision's tolerance (three times it for a peer)."""
    if actions.shape != workload.noise.shape:
        return compare(actions, workload.noise)  # says so
    rows = actions.detach().cpu()[workload.checked_rows]
    return compare(rows, workload.expected, precision, 1.0 if ours else _PEER_TOLERANCE_SCALE)


@dataclass
class Result:
    """One contestant in one cell. timing is None where it could not run at all."""

    contestant: Contestant
    check: Comparison | None
    timing: Timing | None
    failure: str = ""
    control_loop: dict[str, dict[str, float]] = field(default_factory=dict)  # by mode, where it was measured

    @property
    def usable(self) -> bool:
        """Whether its time may be compared: it ran, and its actions agree with the reference."""
        return self.timing is not None and bool(self.timing.samples) and self.check is not None and self.check.passed


@dataclass
class Cell:
    """All contestants on one workload."""

    workload: Workload
    results: list[Result]
    load: Load | None
    flops: int
    weight_bytes: dict[str, int]  # by precision, each weight once
    traffic_bytes: dict[str, int]  # by precision, each weight once a pass that reads it
    workspace_bytes: dict[str, int] = field(default_factory=dict)  # of our live sampler, by precision
    explained_floor_s: dict[str, float | None] = field(default_factory=dict)
    explained_notes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what that floor was made of
    fma_flops: dict[str, float] = field(default_factory=dict)  # per second, the median of before every round

    def ours(self, precision: str, frozen: bool = False) -> Result | None:
        """Our fastest usable result of this kind."""
        found = [
            r
            for r in self.results
            if r.usable and r.contestant.ours and r.contestant.precision == precision and r.contestant.frozen == frozen
        ]
        return min(found, key=_p50, default=None)

    def best_peer(self, precision: str | None = None) -> Result | None:
        """The fastest usable peer, of one precision or of any."""
        found = [
            r
            for r in self.results
            if r.usable and not r.contestant.ours and precision in (None, r.contestant.precision)
        ]
        return min(found, key=_p50, default=None)

    def ratio(self, precision: str, against: str | None, frozen: bool = False) -> tuple[float, float, float] | None:
        """(median of the best peer / ours, quartiles over the rounds); None where either did not run correctly."""
        mine, peer = self.ours(precision, frozen), self.best_peer(against)
        if mine is None or peer is None:
            return None
        assert mine.timing is not None and peer.timing is not None
        return ratio_spread(peer.timing, mine.timing)

    def floor_s(self, precision: str, peaks: Peaks | None) -> float | None:
        """The backend's own floor where it knows one, else from the peaks of this run."""
        stated = self.explained_floor_s.get(precision)
        if stated is not None or peaks is None or precision not in self.weight_bytes:
            return stated
        return peaks.floor_s(self.flops, self.traffic_bytes[precision], self.weight_bytes[precision], precision)

    def to_json(self, peaks: Peaks | None) -> dict[str, Any]:
        workload = self.workload
        return {
            "case": workload.case.name,
            "method": workload.method,
            "batch_size": workload.batch_size,
            "num_samples": workload.steering.num_samples,
            "num_steps": workload.num_steps,
            "flops": self.flops,
            "weight_bytes": self.weight_bytes,
            "traffic_bytes": self.traffic_bytes,
            "workspace_bytes": self.workspace_bytes,
            "floor_s": {precision: self.floor_s(precision, peaks) for precision in self.weight_bytes},
            "floor_notes": self.explained_notes,
            "fma_flops": self.fma_flops,
            "load": None if self.load is None else asdict(self.load),
            "results": [self._result_json(result, peaks) for result in self.results],
        }

    def _result_json(self, result: Result, peaks: Peaks | None) -> dict[str, Any]:
        c = result.contestant
        row: dict[str, Any] = {key: getattr(c, key) for key in ("name", "precision", "ours", "frozen")}
        row["failure"] = result.failure
        if result.check is not None:
            check = result.check
            row |= {"correct": check.passed, "max_error": check.max_error, "mean_error": check.mean_error}
            row["reason"] = check.words
        if result.timing is not None and result.timing.samples:
            p50 = result.timing.p50
            row |= result.timing.summary()
            row["gflops_per_s"] = self.flops / p50 / 1e9
            traffic = self.traffic_bytes.get(c.precision, 0)
            row["weight_gbytes_per_s"] = traffic / p50 / 1e9
            if peaks is not None:
                row["percent_of_peak_flops"] = peaks.percent_of_flops(self.flops, p50, c.precision)
                row["percent_of_peak_bytes"] = peaks.percent_of_bytes(traffic, p50)
        if result.control_loop:
            row["control_loop"] = result.control_loop
        return row


def _p50(result: Result) -> float:
    assert result.timing is not None
    return result.timing.p50


def count_cost(workload: Workload, precisions: Sequence[str]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Useful flops, weight bytes and weight traffic of a call (by precision), the same for every contestant.

    Traffic counts each network's weights once a forward pass and once an input gradient: one member already
    exceeds a core's own cache.
    """
    footprint = workload.sampler("reference").explain(workload.batch_size).footprint
    assert footprint is not None
    steered = sum(step.weight > 0 for step in workload.steering.schedule(workload.num_steps))
    pulled_back = steered if workload.steering.pulls_flow else 0
    networks = [(workload.flow.spec, workload.num_steps + pulled_back), (workload.critic.spec, 2 * steered)]
    if workload.posterior is not None:
        networks.append((workload.posterior.spec, 2 * steered))
    elements = [network_macs(spec) * spec.num_members for spec, _ in networks]
    visited = sum(count * visits for count, (_, visits) in zip(elements, networks))
    sizes = {p: 4 if p in ("float32", "tf32") else 2 for p in precisions}
    weight_bytes = {p: sum(elements) * size for p, size in sizes.items()}
    return footprint.flops, weight_bytes, {p: visited * size for p, size in sizes.items()}


def measure_cell(
    workload: Workload,
    contestants: Sequence[Contestant],
    *,
    precisions: Sequence[str] = ("float32", "bfloat16"),
    rounds: int | None = None,
    budget_s: float = 20.0,
    min_rounds: int = 5,
    memory: bool = True,
    say: Say = lambda text: None,
    control_loop: Callable[[Run], dict[str, dict[str, float]]] | None = None,
    fma_rates: Callable[[], Mapping[str, float]] = dict,
) -> Cell:
    """Runs every contestant once and checks it, then times the ones that agree with the reference in turns.

    Args:
        memory: also measure the peak extra memory of a call of each.
        say: told what happens, for the terminal.
        fma_rates: asked before every round how many flops per second multiply-adds reach, by precision.
        control_loop: measures a correct contestant, while it is still built, in the modes that it names.
    """
    cuda = workload.obs.is_cuda
    results, runs, timings = [], {}, {}
    for contestant in contestants:
        say(f"{workload.case.name} {workload.method} B={workload.batch_size}: first call of {contestant.key}")
        result, run = _first_call(contestant, workload)
        results.append(result)
        if run is not None and result.timing is not None and result.check is not None and result.check.passed:
            if memory:
                result.timing.peak_extra_bytes = peak_extra_bytes(run, cuda)
            runs[contestant.key] = run
            timings[contestant.key] = result.timing
    load = None
    rates: dict[str, list[float]] = {}

    def ask_rates() -> None:
        for precision, rate in fma_rates().items():
            rates.setdefault(precision, []).append(rate)

    if runs:
        say(f"{workload.case.name} {workload.method} B={workload.batch_size}: {len(runs)} contestants in turns")
        load = interleave(
            runs, timings, rounds=rounds, budget_s=budget_s, min_rounds=min_rounds, cuda=cuda, before_round=ask_rates
        )
        for result in results:
            if control_loop is not None and result.contestant.key in runs:
                say(f"control loop of {result.contestant.key}")
                result.control_loop = control_loop(runs[result.contestant.key])
    flops, weight_bytes, traffic_bytes = count_cost(workload, precisions)
    cell = Cell(workload, results, load, flops, weight_bytes, traffic_bytes)
    cell.fma_flops = {precision: percentile(values, 50) for precision, values in rates.items()}
    _explain_ours(cell)
    runs.clear()
    gc.collect()
    return cell


def _first_call(contestant: Contestant, workload: Workload) -> tuple[Result, Run | None]:
    try:
        run, timing, actions = prepare(lambda: contestant.build(workload))
    except Exception as error:  # a peer that fails to compile must not end the table
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Result(contestant, None, None, f"{type(error).__name__}: {first_line}"[:300]), None
    check = check_actions(actions, workload, contestant.precision, contestant.ours)
    return Result(contestant, check, timing), run


def _explain_ours(cell: Cell) -> None:
    for result in cell.results:
        c = result.contestant
        if not (c.ours and result.usable) or c.precision in cell.workspace_bytes:
            continue
        backend = c.name.split()[1]
        if backend not in BACKENDS:  # callables: nothing is known of what they cost
            continue
        footprint = cell.workload.sampler(backend, c.precision).explain(cell.workload.batch_size).footprint
        if footprint is not None:
            cell.workspace_bytes[c.precision] = footprint.workspace_bytes
            cell.explained_floor_s[c.precision] = footprint.floor_s
            cell.explained_notes[c.precision] = footprint.notes


def rows_do_not_depend_on_batch_mates(workload: Workload, precision: str, backend: str) -> bool:
    """Whether a row's actions are bitwise the same alone, among others, and in another order."""
    sampler = workload.sampler(backend, precision)

    def actions(index: Tensor) -> Tensor:
        some = workload.rows(index)
        return sampler(some.obs, some.noise, some.posterior_noise)

    everyone = torch.arange(workload.batch_size)
    together = actions(everyone)
    reversed_order = actions(everyone.flip(0)).flip(0)
    probes = sorted({0, 1, workload.batch_size // 2, workload.batch_size - 1} & set(range(workload.batch_size)))
    alone = torch.cat([actions(torch.tensor([row])) for row in probes])
    return torch.equal(together, reversed_order) and torch.equal(alone, together[probes])
