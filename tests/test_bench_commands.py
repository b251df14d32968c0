"""The commands `bench` and `profile` end to end on tiny networks: files, plots, comparisons, traces."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

import qpilots_fast.cli
from bench import callables, cli, loops, markdown, profile, records, targets
from bench.cases import CASES, Case, Workload, make_workload
from bench.contestants import our_contestants
from bench.gpu import check
from bench.machine import Peaks, header
from bench.measure import rows_do_not_depend_on_batch_mates
from qpilots_fast.activations import ACTIVATIONS
from qpilots_fast.testing import assert_close

TINY = replace(CASES["paper"], hidden_dims=(24, 24), num_critics=3, obs_dim=5, action_dim=4, num_steps=4)
TINY_QGF = replace(CASES["qgf"], hidden_dims=(24, 24), flow_norm=("pre", None), obs_dim=5, action_dim=4, num_steps=4)
WORKLOADS: dict[str, tuple[Case, str]] = {"U": (TINY, "U"), "M": (TINY, "M"), "QGF": (TINY_QGF, "QGF")}


def _record(p50: float, peer: float | None = None) -> dict[str, Any]:
    results = [{"name": "qpilots_fast cpu", "precision": "float32", "ours": True, "p50_s": p50}]
    if peer is not None:
        results.append({"name": "torch eager", "precision": "float32", "ours": False, "p50_s": peer})
    return {"cells": [{"case": "paper", "method": "U", "batch_size": 1, "results": results}]}


def test_a_result_names_no_folder_of_its_machine() -> None:
    given = ["--table", "targets", "--out", "/home/a/b", "--compare=/home/a/old.json", "--budget", "10"]
    assert cli.without_paths(given) == ["--table", "targets", "--budget", "10"]
    assert cli.without_paths(["--out=x", "--quick"]) == ["--quick"]


def test_comparison_finds_regressions_and_allows_for_a_slower_machine() -> None:
    (slower,) = records.compare(_record(1.0), _record(1.3))
    assert slower["verdict"] == "REGRESSION" and slower["slow-down"] == pytest.approx(1.3)
    (same,) = records.compare(_record(1.0, 4.0), _record(1.3, 5.2))  # everything is 1.3 times slower
    assert same["verdict"] == "same" and same["time now / then"] == pytest.approx(1.3)
    (faster,) = records.compare(_record(1.0), _record(0.5))
    assert faster["verdict"] == "faster"
    other = _record(1.0)
    other["cells"][0]["method"] = "M"
    assert records.compare(_record(1.0), other) == []


def test_results_are_added_never_overwritten(tmp_path: Path) -> None:
    record = {**header("quick", [], None), "cells": []}
    first, second = records.save(record, tmp_path), records.save(record, tmp_path)
    assert first != second and records.load(first)["git"] == record["git"]
    for text in ("[]", "", '{"cells": [{}]}', "{\n"):
        (tmp_path / "other.jsonl").write_text(text)
        with pytest.raises(ValueError, match="not a benchmark result"):
            records.load(tmp_path / "other.jsonl")


def test_a_result_keeps_four_digits_one_line_a_contestant_in_its_processors_folder(tmp_path: Path) -> None:
    record = {**header("quick", [], None), **_record(0.0123456, 1234567.0)}
    record["git"] = {"commit": None, "dirty": None}
    record["machine"] |= {"cpu": "AMD EPYC 9R14 96-Core Processor", "gpu": None}
    path = records.save(record, tmp_path)
    assert path.parent.name == "amd-epyc-9r14" and path.name.endswith("_unknown.jsonl")
    assert len(path.read_text().splitlines()) == 3
    read = records.load(path)
    assert [r["p50_s"] for r in read["cells"][0]["results"]] == [0.01235, 1235000.0]
    assert read | {"cells": []} == record | {"cells": []}
    named = {name: records.processor({"cpu": name, "gpu": None}) for name in ("Intel(R) Xeon(R) Processor", "")}
    assert named == {"Intel(R) Xeon(R) Processor": "intel-xeon", "": "unknown"}
    assert records.processor({"cpu": "", "gpu": {"name": "NVIDIA H100 80GB HBM3"}}) == "nvidia-h100-80gb-hbm3"


def test_a_whole_small_run_writes_a_result_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CASES, "paper", TINY)
    monkeypatch.setattr(loops, "_LOOP_S", 0.05)
    monkeypatch.setattr(cli, "measure_peaks", lambda: Peaks({"float32": 1e11}, 1e10, 1e11, "test"))
    old = ["--quick", "--rounds", "1", "--precision", "float32", "--out", str(tmp_path), "--no-plots"]
    assert cli.main(old) == 0
    (before,) = tmp_path.glob("*/*.jsonl")
    new = ["--batch", "1,2", "--method", "U", "--peers", "none", "--rounds", "1", "--precision", "float32"]
    assert cli.main([*new, "--control-loop", "--out", str(tmp_path / "new"), "--compare", str(before)]) == 0
    (path,) = (tmp_path / "new").glob("*/*.jsonl")
    record = records.load(path)
    assert record["command"] == " ".join(["qpilots-fast", "bench", *new, "--control-loop"])  # and no folder
    assert [cell["batch_size"] for cell in record["cells"]] == [1, 2]
    loops_of = [[list(r.get("control_loop", [])) for r in cell["results"]] for cell in record["cells"]]
    assert set(map(tuple, loops_of[0])) == {("back to back", "after a torch op")} and not any(loops_of[1])
    assert record["machine"]["torch_threads"] >= 1
    pytest.importorskip("matplotlib")
    assert len(list(path.parent.glob("*.png"))) == 3
    assert "against" in capsys.readouterr().out


def test_callables_against_the_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callables, "SMALL", replace(callables.SMALL, hidden_dims=(12,), num_critics=3, num_steps=3))
    monkeypatch.setattr(callables, "BATCH_SIZES", (2,))
    assert callables.main(["--rounds", "1", "--out", str(tmp_path)]) == 0  # every loop's actions are the reference's
    (path,) = tmp_path.glob("*/*.jsonl")
    cells = records.load(path)["cells"]
    assert [cell["method"] for cell in cells] == ["U", "U-identity", "M"]
    assert all([r["ours"] for r in cell["results"]] == [True, False] for cell in cells)


def test_rows_that_depend_on_their_mates_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = make_workload(TINY, "U", 5)
    ours = our_contestants(workload, ("float32",), "cpu", frozen=False)
    assert len(ours) == 1

    class Leaky:
        def __call__(self, obs: torch.Tensor, noise: torch.Tensor, eps: torch.Tensor | None) -> torch.Tensor:
            return noise + noise.mean()

    monkeypatch.setattr(Workload, "sampler", lambda self, *a, **k: Leaky())
    assert not rows_do_not_depend_on_batch_mates(workload, "float32", "cpu")


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("method", ["U", "M", "QGF"])
def test_profile_accounts_for_every_phase(method: str, backend: str) -> None:
    workload = make_workload(*WORKLOADS[method], 3)
    name = workload.sampler(backend).explain(3).backend
    record = profile.Recorder()
    actions = profile.record_loop(workload, name, "float32", record)
    assert_close(actions, workload.expected)
    phases = {span.phase for span in record.spans}
    assert {"pack", "denoise", "gradient", "update"} <= phases and ("project" in phases) == (method != "M")
    steered = 4 if method == "QGF" else 3
    draws = 4 if method == "M" else 1
    assert sum(s.what == "critic input gradient" for s in record.spans) == steered * draws
    assert sum(s.what == "flow forward" for s in record.spans) == 4
    assert all(span.self_s >= -1e-9 for span in record.spans)
    trace = profile.chrome_trace(record.spans, {"denoise": 1e-3})
    assert json.loads(json.dumps(trace))["traceEvents"]


@pytest.mark.parametrize("value", ["0", "-3", "many"])
@pytest.mark.parametrize("option", ["--batch", "--calls", "--rounds"])
def test_counts_below_one_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = cli.main if option == "--rounds" else profile.main
    with pytest.raises(SystemExit):
        main([option, value])
    assert f"argument {option}: '{value}'; expected an integer >= 1" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as told:
        qpilots_fast.cli.main(["--version"])
    assert told.value.code == 0 and capsys.readouterr().out == f"qpilots-fast {qpilots_fast.__version__}\n"


def test_profile_command_writes_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "paper", TINY)
    assert profile.main(["--out", str(tmp_path), "--calls", "2", "--backend", "reference"]) == 0
    (path,) = tmp_path.glob("*.trace.json")
    assert {event["cat"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"} >= {"denoise"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_commands_say_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--gpu"]) == 2
    assert profile.main(["--gpu"]) == 2
    assert "NVIDIA GPU" in capsys.readouterr().out


def test_gpu_checks_compare_every_network_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, with the reference backend in the GPU's place."""
    networks = [*check.check_networks("reference", "float32", "cpu")]
    assert len(networks) == len(ACTIVATIONS) * 3 * 3 * 2 and all(check.compared.passed for check in networks)
    monkeypatch.setattr(check, "_CHECKED_BATCHES", (3,))
    monkeypatch.setattr(check, "_CHECKED_SHAPES", check._CHECKED_SHAPES[:1])
    samplers = [*check.check_samplers("reference", "float32", "cpu")]
    assert len(samplers) >= 8 and all(check.compared.passed for check in samplers)


@pytest.mark.parametrize(
    "arguments", [["--batch", "0"], ["--method", "X"], ["--case", "nope"], ["--compare", "/none.json"]]
)
def test_bad_arguments_are_refused_with_what_was_expected(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "expected" in capsys.readouterr().err or arguments[0] == "--compare"


def test_markdown_shows_live_weights_against_the_peers_they_answer_to(tmp_path: Path) -> None:
    def row(name: str, precision: str, ours: bool, p50: float, frozen: bool = False) -> dict[str, Any]:
        return {"name": name, "precision": precision, "ours": ours, "frozen": frozen, "p50_s": p50, "min_s": p50}

    results = [
        row("qpilots_fast cpu", "float32", True, 0.010),
        row("qpilots_fast cpu frozen", "float32", True, 0.008, frozen=True),
        row("torch eager", "float32", False, 0.030),
        row("torch eager", "bfloat16", False, 0.020),
        {**row("qpilots_fast cpu", "bfloat16", True, 0.005)},
    ]
    cell = {
        "case": "paper",
        "method": "U",
        "batch_size": 1,
        "results": results,
        "floor_s": {"float32": 0.002, "bfloat16": None},
    }
    record = {**header("targets", [], None), "cells": [cell], "verdicts": []}
    record["verdicts"] = [
        targets.Verdict("U bfloat16 B=1", 6.0, 5.0, True, "", "x", frozen=6.5, ceiling=7.25).to_json(),
    ]
    (goal,) = (line for line in markdown.goals([record, record]).splitlines() if "U bfloat16 | 1 |" in line)
    assert goal == "| U bfloat16 | 1 | 6.0 | **5.00** (6.50) | **5.00** (6.50) | 7.2 |"
    lines = markdown.headline(record).splitlines()
    assert lines[2] == "| U | 1 | float32 | 10.00 ms | 30.00 ms (torch eager, float32) | 3.0x | 2.00 ms |"
    assert lines[3] == "| U | 1 | bfloat16 | 5.00 ms | 20.00 ms (torch eager, bfloat16) | 4.0x | - ms |"
    assert markdown.main([str(records.save(record, tmp_path))]) == 0


def test_scaling_varies_one_size_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "paper", TINY)
    monkeypatch.setattr(loops, "SCALING", {"B": (1, 2), "E": (2, 3), "N": (1, 2), "K": (2, 3), "H": (8, 16)})
    rows, cells = loops.measure_scaling(("float32",), 0.05, lambda text: None)
    assert {row["dimension"] for row in rows} == set("BENKH") and len(cells) == 10
    shapes = [
        (c.workload.batch_size, c.workload.critic.spec.num_members, c.workload.steering.num_samples) for c in cells
    ]
    assert shapes[:6] == [(1, 3, 1), (2, 3, 1), (16, 2, 1), (16, 3, 1), (16, 3, 1), (16, 3, 2)]
    assert [cell.workload.num_steps for cell in cells[6:8]] == [2, 3]
    assert [cell.workload.flow.spec.hidden_dims for cell in cells[8:]] == [(8, 8), (16, 16)]
    assert all(len(row["p50_s"]) == 2 for row in rows) and loops.scaling_rows(rows)[0]["sizes"] == "1, 2"
