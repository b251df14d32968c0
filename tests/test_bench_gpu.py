"""`bench --gpu` without a GPU: the CPU's kernels in their place, a clock of its own; what is done, in what order."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from rich.console import Console

from bench import cli, contestants, records
from bench.cases import CASES, make_workload
from bench.gpu import check, command, prices
from bench.gpu.check import KernelCheck, ShippedCall
from bench.gpu.command import Deadline, Session
from bench.gpu.times import TimedCall
from bench.machine import Peaks
from bench.peers import Contestant, build_eager
from qpilots_fast import backends
from qpilots_fast.backends.cpu import CpuBackend
from qpilots_fast.backends.cuda.build import find_nvcc, find_sources
from qpilots_fast.backends.triton import LaunchTable
from qpilots_fast.testing import Comparison

REASON = backends.unavailable_reason("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

TINY = replace(CASES["paper"], hidden_dims=(24, 24), num_critics=3, obs_dim=5, action_dim=4, num_steps=4)
CALLS = (ShippedCall("cpu", "U", "float32", 3, 1), ShippedCall("triton", "M", "float32", 70, 100))
TIMES = (
    TimedCall("cuda", "U", "float32", 1),
    TimedCall("triton", "U", "tf32", 1),
    TimedCall("cpu", "M", "float32", 71),
)
PLANNED = (CALLS[0], replace(CALLS[1], backend="cpu"))  # of a dry run


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "paper", TINY)
    monkeypatch.setattr(command, "SHIPPED", CALLS)
    monkeypatch.setattr(command, "TIMED", TIMES)
    monkeypatch.setattr(command, "_DRY_BATCH", 70)
    monkeypatch.setattr(command, "_BATCH_SIZES", (1, 3))
    monkeypatch.setattr(command, "measure_peaks", lambda device: Peaks({"float32": 1e9}, 1e9, 1e9, device))
    for name in ("check_samplers", "check_networks"):
        right = KernelCheck("cpu", name, "float32", Comparison(0.0, 0.0))
        monkeypatch.setattr(command, name, lambda *a, right=right: iter([right] * 3))


class Clock:
    """Tells the seconds that were added to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def session(tmp_path: Path, *arguments: str, clock: Callable[[], float] | None = None, limit: float = 480.0) -> Session:
    given = ["--gpu", "--out", str(tmp_path), "--no-plots", "--rounds", "2", "--budget", "0.01", *arguments]
    options = cli.build_parser().parse_args(given)
    return Session(Console(quiet=True), options, Deadline(limit, clock or Clock()), device="cpu")


def saved(tmp_path: Path) -> dict[str, Any]:
    (file,) = tmp_path.rglob("*.jsonl")
    return records.load(file)


def eager(name: str, compile_s: float) -> Contestant:
    return Contestant(name, "float32", lambda workload: build_eager(workload, "float32"), compile_s=compile_s)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [eager("quick", 0.1), eager("compiled", 60)]
    monkeypatch.setattr(command, "peer_contestants", lambda workload, choice, device: some)


PRICES = "prices of the primitives"  # need a card
ONE_METHOD = ("--method", "U", "--precision", "float32")


@pytest.mark.usefixtures("peers")
def test_with_time_everything_is_done(tmp_path: Path) -> None:
    run = session(tmp_path, *ONE_METHOD)
    assert command.run(run) == 0 and run.left_out == [PRICES]
    record = saved(tmp_path)
    (timed,) = record["times"]  # of those that a CPU runs, below the dry run's largest batch
    assert (timed["backend"], timed["batch_size"], timed["right"]) == ("cpu", 1, True)
    assert 0 < timed["eager_us"]["p10"] <= timed["eager_us"]["p50"] <= timed["eager_us"]["p99"]
    assert record["dry_run"] is True and len(record["checks"]) == 2 + 2 * 6  # of both precisions
    assert [cell["batch_size"] for cell in record["cells"]] == [1, 3]
    for cell in record["cells"]:
        assert {"quick", "compiled"} <= {result["name"] for result in cell["results"]}


@pytest.mark.usefixtures("peers")
def test_compiled_peers_wait_until_everything_else_was_measured(tmp_path: Path) -> None:
    run, order = session(tmp_path, *ONE_METHOD), []

    def note(key: tuple[str, str, int], workload: Any, who: list[Contestant], *rest: Any) -> None:
        order.append((key[2], any(c.name == "compiled" for c in who)))

    run.measure_cell = note  # type: ignore[method-assign]
    run.measure()
    assert order == [(1, False), (3, False), (1, True), (3, True)]


@pytest.mark.usefixtures("peers")
def test_nothing_begins_that_would_not_end_in_time(tmp_path: Path) -> None:
    clock = Clock()
    run = session(tmp_path, *ONE_METHOD, clock=clock, limit=200.0)
    measured, measure_cell = [], run.measure_cell

    def slow(key: tuple[str, str, int], *rest: Any) -> None:
        before = len(run.left_out)
        measure_cell(key, *rest)
        if len(run.left_out) == before:
            measured.append(key[2])
            clock.now += 70.0

    run.measure_cell = slow  # type: ignore[method-assign]
    run.measure_times = lambda usable: None  # type: ignore[method-assign]
    assert command.run(run) == 0
    # 30 s a first call: at 140 s both cells are there, and 60 s more for a compiled peer are not
    assert measured == [1, 3]
    assert run.left_out == [PRICES, "compiled peers of paper U B=1", "compiled peers of paper U B=3"]
    assert saved(tmp_path)["complete"] is False and saved(tmp_path)["left_out"] == run.left_out


def test_without_time_the_file_says_what_is_missing(tmp_path: Path) -> None:
    run = session(tmp_path, *ONE_METHOD, limit=10.0)
    assert command.run(run) == 0
    record = saved(tmp_path)
    assert [what for what in record["left_out"] if "ShippedCall" in what] == [f"check of {call}" for call in PLANNED]
    assert record["cells"] == [] and len(record["checks"]) == 12  # the small checks go on until the end


def test_small_checks_end_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    run = session(tmp_path, clock=clock, limit=5.0)

    def slow(*arguments: Any) -> Any:
        for i in range(100):
            clock.now += 2.0
            yield KernelCheck("cpu", f"check {i}", "float32", Comparison(0.0, 0.0))

    monkeypatch.setattr(command, "check_samplers", slow)
    run.check_grid(["cpu"])
    assert [check.what for check in run.checks][:3] == ["check 0", "check 1", "check 2"]
    assert run.left_out[-2] == "small checks of cpu float32 from check 2 on"
    assert len(run.checks) == 3 + 1  # one of the other precision: the clock is asked after each


def test_a_wrong_kernel_withholds_no_times_but_they_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: ShippedCall, device: str) -> KernelCheck:
        return KernelCheck("cpu", "U", "float32", Comparison(0.0, 0.0), differing=1)

    monkeypatch.setattr(command, "check_shipped", wrong)
    run = session(tmp_path, *ONE_METHOD, "--peers", "none")
    assert command.run(run) == 1
    record = saved(tmp_path)
    assert record["checks"][0]["differing"] == 1
    assert [row["right"] for row in record["times"]] == [False] and len(record["cells"]) == 2


def test_a_failure_is_noted_and_the_rest_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(command, "check_shipped", fails)
    run = session(tmp_path, *ONE_METHOD, "--peers", "none")
    assert command.run(run) == 1
    record = saved(tmp_path)
    assert len(record["failures"]) == 2 and "RuntimeError: an illegal memory access" in record["failures"][0]
    assert len(record["times"]) == 1 and len(record["cells"]) == 2


def test_what_is_known_is_saved_before_the_end(tmp_path: Path) -> None:
    run = session(tmp_path, *ONE_METHOD, "--peers", "none")
    at: list[tuple[int, int]] = []
    keep = run.save

    def save() -> None:
        keep()
        record = saved(tmp_path)
        at.append((len(record["times"]), len(record["cells"])))

    run.save = save  # type: ignore[method-assign]
    command.run(run)
    assert at == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 2)]


def test_an_interruption_keeps_what_was_found(tmp_path: Path) -> None:
    run = session(tmp_path, *ONE_METHOD)

    def interrupted() -> None:
        raise KeyboardInterrupt

    run.measure = interrupted  # type: ignore[method-assign]
    assert command.run(run) == 1
    record = saved(tmp_path)
    assert len(record["checks"]) == 2 and record["complete"] is False


# ---------------------------------------------------------------- the checks at the shipped shape


class Unsteady(CpuBackend):
    """The third call of all differs in one row in the middle, or small batches do."""

    def __init__(self, at_call: int, only_below: int | None = None) -> None:
        super().__init__()
        self._calls, self._at_call, self._only_below = 0, at_call, only_below

    def quick_call(self, *arguments: Any) -> None:
        return None

    def sample(self, call: Any) -> Any:
        raw = super().sample(call)
        self._calls += 1
        below = self._only_below is not None and len(raw.actions) < self._only_below
        if self._calls == self._at_call or below:
            raw.actions[len(raw.actions) // 2] += 1e-6
        return raw


def test_right_kernels_pass() -> None:
    for call in PLANNED:
        assert check.check_shipped(replace(call, repeats=1), "cpu").words == ""


@pytest.mark.parametrize("backend, words", [(Unsteady(3), "1 repeats have other bits"), (Unsteady(0, 50), "alone")])
def test_races_and_rows_that_see_their_batch_are_found(
    backend: Unsteady, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda r: backends.Choice(backend, {}) if r.name == "cpu" else choose(r))
    found = check.check_shipped(ShippedCall("cpu", "U", "float32", 70, 4), "cpu")
    assert found.compared.passed and words in found.words


def test_what_ships_is_asked_for() -> None:
    """Every precision of every backend at the paper's widths, sizes of programs, chunks, blocks and a head."""
    assert {(call.backend, call.precision) for call in check.SHIPPED} == {
        *(("cuda", precision) for precision in ("float32", "bfloat16")),
        *(("triton", precision) for precision in ("float32", "tf32", "bfloat16", "float16")),
    }
    assert {call.case for call in check.SHIPPED} == {"paper", "residual", "c51"}
    assert max(call.batch_size for call in check.SHIPPED if call.backend == "cuda") == 16
    tile = LaunchTable().tile("layer", "bfloat16", 90)
    batches = [c.batch_size for c in check.SHIPPED if (c.backend, c.method, c.precision) == ("triton", "U", "bfloat16")]
    assert {tile.for_rows(10 * batch) for batch in batches} == {
        tile.for_rows(rows) for rows in (1, *(rows for rows, _, _ in tile.larger))
    }
    assert max(batches) > 2 * 1664  # rows of a chunk, tests/test_triton_backend.py


def test_a_backend_is_no_contestant_beyond_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "max_batch_size", 2)
    found = [len(contestants.our_contestants(make_workload(TINY, "U", batch), ("float32",), "cpu")) for batch in (2, 3)]
    assert found == [2, 0]  # live and frozen


def test_the_default_limit_fits_ten_minutes() -> None:
    assert cli.build_parser().parse_args(["--gpu"]).minutes <= 8
    assert torch.cuda.is_available() or cli.main(["--gpu", "--minutes", "1"]) == 2


def test_prices_are_read_as_far_as_they_were_printed() -> None:
    row = {"price": "a kernel in a graph", "value": 1.4, "unit": "us"}
    whole = json.dumps(row) + "\n"
    assert prices.parse("noise\n" + whole + whole[:20]) == [row]


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is missing")
@pytest.mark.parametrize("target", [80, 90])
def test_the_prices_compile(target: int, tmp_path: Path) -> None:
    sources = find_sources()
    assert sources is not None
    command = prices.compile_command(str(find_nvcc()), sources, [target], tmp_path / "prices.o")
    subprocess.run(command, check=True)


def test_tiles_to_try_fit_the_card_and_the_likely_ones_come_first() -> None:
    pytest.importorskip("triton")
    from bench.gpu import tune

    small, large = (tune.candidates("layer", "bfloat16", kib << 10) for kib in (99, 227))
    assert set(small) < set(large)
    for tile in small:
        assert (tile.block_b + tile.block_n) * tile.block_k * tile.num_stages * 2 <= 99 << 10
    assert {tile.num_stages for tile in large[:4]} == {3} and large[0].num_warps == 8


def test_tuning_says_that_it_needs_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    from bench.gpu import tune

    assert torch.cuda.is_available() or tune.main(["--minutes", "1"]) == 2
    assert "cannot tune here" in capsys.readouterr().out or torch.cuda.is_available()
