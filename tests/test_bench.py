"""The benchmark harness: its arithmetic, its peers against the float64 reference, no time for wrong actions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")

from bench import cli, loops, peers_jax, report, targets
from bench.cases import CASES, Case, Workload, make_workload
from bench.contestants import peer_contestants
from bench.machine import Peaks, multiply_add_rates
from bench.measure import (
    Cell,
    check_actions,
    count_cost,
    measure_cell,
)
from bench.peers import (
    Contestant,
    Run,
    build_compiled_loop,
    build_compiled_step,
    build_eager,
)
from bench.timing import (
    LoadMonitor,
    Timing,
    combine_loads,
    control_loop,
    fit_exponent,
    interleave,
    peak_extra_bytes,
    percentile,
    ratio_spread,
)
from qpilots_fast import backends

TINY = replace(CASES["paper"], hidden_dims=(24, 24), num_critics=3, obs_dim=5, action_dim=4, num_steps=4)
TINY_QGF = replace(CASES["qgf"], hidden_dims=(24, 24), flow_norm=("pre", None), obs_dim=5, action_dim=4, num_steps=4)
WORKLOADS: dict[str, tuple[Case, str]] = {
    "U": (TINY, "U"),
    "U-identity": (TINY, "U-identity"),
    "M": (TINY, "M"),
    "QGF": (TINY_QGF, "QGF"),
}


def tiny(method: str = "U", batch_size: int = 3) -> Workload:
    case, name = WORKLOADS[method]
    return make_workload(case, name, batch_size)


# ---------------------------------------------------------------- arithmetic


def test_percentiles_interpolate_between_ranks() -> None:
    samples = [4.0, 1.0, 3.0, 2.0]
    assert percentile(samples, 0) == 1.0
    assert percentile(samples, 50) == 2.5
    assert percentile(samples, 90) == pytest.approx(3.7)
    assert percentile(samples, 100) == 4.0
    assert percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_exponent_of_a_power_law_and_of_noise_around_it() -> None:
    sizes = [1, 2, 4, 8]
    assert fit_exponent(sizes, [3 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    assert fit_exponent(sizes, [5.0] * 4) == pytest.approx(0)
    assert fit_exponent(sizes, [1.0, 2.2, 3.9, 8.1]) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="two distinct"):
        fit_exponent([4, 4], [1.0, 2.0])


def test_ratio_is_of_medians_and_its_spread_is_round_by_round() -> None:
    slow = Timing(0, 0, [10.0, 10.0, 40.0], [10.0, 10.0, 40.0])
    fast = Timing(0, 0, [5.0, 5.0, 5.0], [5.0, 5.0, 10.0])
    ratio, low, high = ratio_spread(slow, fast)
    assert ratio == 2.0
    assert (low, high) == (2.0, 3.0)


def test_peaks_give_percentages_and_the_longer_floor() -> None:
    peaks = Peaks({"float32": 1e9}, dram_bytes=1e9, cache_bytes=2e9, source="test")
    assert peaks.percent_of_flops(5e8, 1.0, "float32") == 50
    assert peaks.percent_of_flops(1, 1.0, "bfloat16") is None
    assert peaks.floor_s(4e9, traffic_bytes=1e9, weight_bytes=1.0, precision="float32") == 4.0
    best = peaks.best_of(Peaks({"float32": 3e9}, dram_bytes=None, cache_bytes=1e9, source="again"))
    assert (best.flops, best.dram_bytes, best.cache_bytes) == ({"float32": 3e9}, 1e9, 2e9)
    # tile registers do what multiply-adds on vectors would take 5 times as long for
    tiles = Peaks({"float32": 1e9, "bfloat16": 1e10}, None, None, "test", {"bfloat16": 2e9})
    assert tiles.percent_of_flops(5e9, 1.0, "bfloat16") == 50
    assert tiles.percent_of_fma(5e9, 1.0, "bfloat16") == 250
    assert tiles.percent_of_fma(5e8, 1.0, "float32") == 50
    assert tiles.best_of(Peaks({}, None, None, "again", {"bfloat16": 3e9})).fma_flops == {"bfloat16": 3e9}
    # weights beyond any cache move at memory's pace
    assert peaks.floor_s(1.0, traffic_bytes=3e9, weight_bytes=1e15, precision="float32") == 3.0


def test_cost_counts_every_weight_and_each_pass_over_it() -> None:
    workload = tiny("U")
    flow = 24 * (5 + 4 + 1) + 24 * 24 + 24 * 4
    critics = 3 * (24 * (5 + 4) + 24 * 24 + 24)
    flops, weights, traffic = count_cost(workload, ("float32", "bfloat16"))
    assert weights == {"float32": 4 * (flow + critics), "bfloat16": 2 * (flow + critics)}
    assert traffic["bfloat16"] == 2 * (flow * (4 + 3) + critics * 2 * 3)  # 4 steps, 3 of them steered
    assert flops == count_cost(tiny("U", 1), ("float32",))[0] * 3


# ---------------------------------------------------------------- peers


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", WORKLOADS)
def test_eager_peer_agrees_with_the_reference(method: str, precision: str) -> None:
    workload = tiny(method)
    check = check_actions(build_eager(workload, precision)(), workload, precision, ours=False)
    assert check.passed, check


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", WORKLOADS)
def test_functional_peers_agree_with_the_reference(
    method: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.func + fullgraph capture, without the minutes that code generation takes."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **named: compiler(f, backend="eager", fullgraph=True, dynamic=False)
    )
    workload = tiny(method)
    for build in (build_compiled_step, build_compiled_loop):
        torch._dynamo.reset()
        check = check_actions(build(workload, precision)(), workload, precision, ours=False)
        assert check.passed, (build.__name__, check)


@pytest.mark.skipif(peers_jax.unavailable_reason() is not None, reason="JAX does not run here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", WORKLOADS)
def test_jax_peer_agrees_with_the_reference(method: str, precision: str) -> None:
    workload = tiny(method)
    check = check_actions(peers_jax.build_jax(workload, precision)(), workload, precision, ours=False)
    assert check.passed, check


def test_peers_refuse_a_steering_that_they_do_not_have() -> None:
    workload = replace(tiny("U"), steering=replace(tiny("U").steering, scale="gaf"))
    with pytest.raises(ValueError, match="peers have no"):
        build_eager(workload, "float32")


def test_choice_of_peers() -> None:
    workload = tiny("U")
    everyone = {c.name for c in peer_contestants(workload, "all")}
    assert {"torch eager", "torch.compile", "torch.compile per step"} <= everyone
    assert {c.name for c in peer_contestants(workload, "best")} == {"torch eager", "torch.compile per step"}
    assert peer_contestants(workload, "none") == []


# ---------------------------------------------------------------- correctness before time


def _contestant(name: str, change: float, ours: bool = False, precision: str = "float32") -> Contestant:
    def build(workload: Workload) -> Run:
        run = build_eager(workload, precision)
        return lambda: run() + change

    return Contestant(name, precision, build, ours=ours)


@pytest.fixture(scope="module")
def cell() -> Cell:
    def fails(workload: Workload) -> Run:
        raise RuntimeError("no compiler\nsecond line")

    contestants = [
        _contestant("qpilots_fast cpu", 0.0, ours=True),
        _contestant("right", 0.0),
        _contestant("wrong", 0.01),
        _contestant("nan", math.nan),
        Contestant("broken", "float32", fails),
    ]
    return measure_cell(tiny("U"), contestants, precisions=("float32",), rounds=2)


def test_wrong_actions_are_neither_timed_nor_compared(cell: Cell) -> None:
    usable = {r.contestant.name: r.usable for r in cell.results}
    assert usable == {"qpilots_fast cpu": True, "right": True, "wrong": False, "nan": False, "broken": False}
    by_name = {r.contestant.name: r for r in cell.results}
    for name in ("wrong", "nan"):
        timing = by_name[name].timing
        assert timing is not None and timing.samples == []
        row = report._cells(cell, by_name[name], None)
        assert row[2] == "WRONG" and row[5] == ""  # no time, no speed-up
    assert by_name["broken"].failure == "RuntimeError: no compiler"
    best = cell.best_peer()
    assert best is not None and best.contestant.name == "right"
    rows = {r["name"]: r for r in cell.to_json(None)["results"]}
    assert "p50_s" in rows["right"] and "p50_s" not in rows["wrong"] and rows["wrong"]["correct"] is False


def test_ours_when_wrong_has_no_ratio_and_fails_its_target() -> None:
    paper = replace(TINY, name="paper")
    workload = make_workload(paper, "U", 1)
    wrong = measure_cell(
        workload, [_contestant("qpilots_fast cpu", 0.01, ours=True), _contestant("right", 0.0)],
        precisions=("float32",), rounds=1, memory=False,
    )  # fmt: skip
    assert wrong.ratio("float32", None) is None
    (first, *_) = targets.judge_ratios([wrong])
    assert first.measured is None and first.passed is None


def test_a_cell_keeps_the_median_rate_of_before_its_rounds() -> None:
    rates = iter([1e9, 5e9, 2e9])
    cell = measure_cell(
        tiny("U"), [_contestant("right", 0.0)], precisions=("float32",), rounds=3, memory=False,
        fma_rates=lambda: {"float32": next(rates)},
    )  # fmt: skip
    assert cell.fma_flops == cell.to_json(None)["fma_flops"] == {"float32": 2e9}


@pytest.mark.skipif(backends.unavailable_reason("cpu") is not None, reason="the native module is not built")
def test_the_native_module_measures_rates_of_multiply_adds() -> None:
    rates = multiply_add_rates(("float32", "bfloat16"), seconds=0.001)
    assert set(rates) == {"float32", "bfloat16"} and all(rate > 1e8 for rate in rates.values())


def test_ours_has_a_stricter_tolerance_than_peers() -> None:
    workload = tiny("U")
    for off_by, ours_passes, peer_passes in ((5e-6, True, True), (2e-5, False, True), (2e-4, False, False)):
        actions = workload.expected + off_by
        assert check_actions(actions, workload, "float32", ours=True).passed is ours_passes
        assert check_actions(actions, workload, "float32", ours=False).passed is peer_passes


def test_large_batches_are_checked_at_both_ends_and_between() -> None:
    rows = tiny("U", 1000).checked_rows.tolist()
    assert rows[:16] == [*range(16)] and rows[-16:] == [*range(984, 1000)]
    assert len(set(rows)) == 64 and rows == sorted(rows) and rows[31] < 700 and rows[32] > 300
    workload = tiny("U", 70)
    actions = build_eager(workload, "float32")()
    assert check_actions(actions, workload, "float32", ours=True).passed
    assert "expected [70, 4]" in check_actions(actions[:64], workload, "float32", ours=True).words


# ---------------------------------------------------------------- targets


def _cell_with(method: str, batch: int, times: dict[tuple[str, str, bool], float]) -> Cell:
    """A cell whose contestants took the given seconds."""
    workload = replace(make_workload(TINY, method, 1), batch_size=batch, case=replace(TINY, name="paper"))
    from bench.measure import Result
    from qpilots_fast.testing import Comparison

    results = [
        Result(
            Contestant(name, precision, lambda w: torch.zeros, ours=ours),
            Comparison(1e-6, 1e-6),
            Timing(0, 0, [s], [s]),
        )
        for (name, precision, ours), s in times.items()
    ]
    return Cell(workload, results, None, 10**6, {"float32": 4, "bfloat16": 2}, {"float32": 8, "bfloat16": 4})


def test_float32_meets_float32_peers_and_bfloat16_the_best_of_any() -> None:
    cell = _cell_with(
        "U",
        1,
        {
            ("qpilots_fast cpu", "float32", True): 10.0,
            ("qpilots_fast cpu", "bfloat16", True): 5.0,
            ("torch eager", "float32", False): 31.0,
            ("torch eager", "bfloat16", False): 29.0,
        },
    )
    verdicts = {v.name: v for v in targets.judge_ratios([cell])}
    assert verdicts["U float32 B=1"].measured == pytest.approx(3.1) and verdicts["U float32 B=1"].passed is True
    assert verdicts["U bfloat16 B=1"].measured == pytest.approx(5.8) and verdicts["U bfloat16 B=1"].passed is False
    assert set(verdicts) == {"U float32 B=1", "U bfloat16 B=1"}
    assert verdicts["U float32 B=1"].ceiling is None


def test_a_ratio_says_what_the_machine_would_allow() -> None:
    cell = _cell_with("U", 1, {("qpilots_fast cpu", "float32", True): 10.0, ("torch eager", "float32", False): 31.0})
    # 10^6 flops at 10^6 a second: a call of 1 second at best
    peaks = Peaks({"float32": 1e6, "bfloat16": 1e6}, dram_bytes=1e9, cache_bytes=1e9, source="test")
    cell.explained_floor_s = {"float32": 1.0}
    (verdict,) = targets.judge_ratios([cell], ("float32",), peaks)
    peer = cell.best_peer()
    assert peer is not None and peer.timing is not None
    assert verdict.ceiling == pytest.approx(peer.timing.p50 / 1.0) and verdict.frozen is None


def test_the_share_of_the_peak_is_that_of_multiply_adds() -> None:
    cell = _cell_with("U", 256, {("qpilots_fast cpu", "bfloat16", True): 10.0})  # 10^6 flops
    peaks = Peaks({"bfloat16": 4e5}, None, None, "test", {"bfloat16": 5e4})
    shares = [v for v in targets.judge_limits([cell], peaks, ("bfloat16",)) if v.name.startswith("FMA peak")]
    assert [share.measured for share in shares] == [pytest.approx(200.0)]
    assert "25 % of the tile registers' peak" in shares[0].note
    cell.fma_flops = {"bfloat16": 4e4}  # the clock was lower between the rounds than in the best loop
    (share,) = [v for v in targets.judge_limits([cell], peaks, ("bfloat16",)) if v.name.startswith("FMA peak")]
    assert share.measured == pytest.approx(250.0) and "200 % of the best loop" in share.note


def test_the_table_holds_every_required_row() -> None:
    options = cli.build_parser().parse_args(["--table", "targets"])
    plan = cli.make_plan(options)
    paper = [("paper", "U", b) for b in (1, 16, 64, 256, 1024)] + [("paper", "M", b) for b in (1, 16, 64)]
    assert plan == paper + [(case, "U", b) for case in ("residual", "c51") for b in (1, 16, 256)]
    assert len(targets.TARGETS) == 22


def test_only_winners_run_at_the_largest_batch() -> None:
    from rich.console import Console

    session = cli.Session(Console(quiet=True), ("float32", "bfloat16"), "all", 1.0)
    small = {
        ("torch eager", "float32", False): 3.0,
        ("torch.compile per step", "float32", False): 2.0,
        ("torch eager", "bfloat16", False): 1.0,
    }
    session.cells = [_cell_with("U", 256, small)]
    workload = replace(session.cells[0].workload, batch_size=1024)
    peers = [c.key for c in session.contestants(workload) if not c.ours]
    assert sorted(peers) == ["torch eager, bfloat16", "torch.compile per step, float32"]


# ---------------------------------------------------------------- timing


def test_rounds_interleave_and_rotate() -> None:
    order: list[str] = []
    rounds: list[int] = []
    runs: dict[str, Run] = {name: (lambda n=name: order.append(n) or torch.zeros(1)) for name in "abc"}  # type: ignore[misc]
    timings = {name: Timing(0, 0) for name in runs}
    interleave(runs, timings, rounds=3, before_round=lambda: rounds.append(len(order)))
    assert rounds == [6, 6 + 63, 6 + 2 * 63]  # after two calls each, and before 3 turns of 1 + 20 calls
    turns = [name for i, name in enumerate(order[6:]) if i == 0 or order[6:][i - 1] != name]
    assert turns == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert all(len(t.round_medians) == 3 and len(t.samples) == 60 for t in timings.values())


def test_rounds_end_when_the_budget_is_spent() -> None:
    import time

    runs: dict[str, Run] = {"slow": lambda: time.sleep(0.02) or torch.zeros(1)}  # type: ignore[func-returns-value]
    timings = {"slow": Timing(0, 0)}
    interleave(runs, timings, rounds=1000, budget_s=0.05)
    assert 3 <= len(timings["slow"].round_medians) < 20


def test_load_and_memory_are_measured_or_unknown() -> None:
    with LoadMonitor() as monitor:
        sum(range(100_000))
    summary = combine_loads([monitor.load, None])
    assert summary is None or summary["worst"]["other_cpus"] >= 0
    assert combine_loads([None]) is None
    extra = peak_extra_bytes(lambda: torch.ones(8 * 2**20))  # 32 MiB
    assert extra is None or extra > 24 * 2**20


def test_control_loop_runs_the_operation_between_calls() -> None:
    calls: list[str] = []
    stats = control_loop(lambda: calls.append("ours") or torch.zeros(1), 10, lambda: calls.append("torch"))  # type: ignore[func-returns-value]
    assert stats["calls"] == 10 and calls.count("torch") == 10 and calls.count("ours") == 13
    assert stats["p50_s"] <= stats["p99_s"] <= stats["max_s"]
    cell = _cell_with("U", 1, {("torch eager", "float32", False): 1.0})
    assert loops.control_loop_rows([cell]) == []
    cell.results[0].control_loop = {"m": stats}
    (row,) = loops.control_loop_rows([cell])
    assert row["p99/p50"] >= 1 and row["contestant"] == "torch eager, float32" and row["mode"] == "m"
