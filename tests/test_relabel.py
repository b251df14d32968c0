"""`qpilots-fast relabel` in one process: what is written, what is set aside, what resumes, what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from relabel_case import ACTION_DIM, columns, observations, same_bytes, sampler_file

from qpilots_fast import SteeredSampler, Steering, cli, ops
from qpilots_fast.relabel.worker import load_sampler

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed; the extra dev brings it")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

ROWS = 600


def run(tmp_path: Path, data: Path, out: str = "out", *more: str, function: str = "make") -> int:
    sampler = f"{sampler_file(tmp_path)}:{function}"
    where = ["--data", str(data), "--out", str(tmp_path / out), "--sampler", sampler, "--local"]
    return cli.main(["relabel", *where, *more])


def npz(tmp_path: Path, **more: np.ndarray) -> Path:
    np.savez(tmp_path / "data.npz", obs=observations(ROWS), **more)
    return tmp_path / "data.npz"


def test_rows_are_those_of_the_sampler_with_their_seeds(tmp_path):
    assert run(tmp_path, npz(tmp_path), "out", "--seed", "5") == 0
    found = columns(tmp_path / "out")
    sampler = load_sampler(f"{sampler_file(tmp_path)}:make")
    base = SteeredSampler(sampler.flow, None, Steering.unsteered(), action_low=-1.0, action_high=1.0)
    obs = torch.from_numpy(observations(ROWS))
    seeds = range(5, 5 + ROWS)
    actions, unsteered = sampler(obs, seeds=seeds), base(obs, seeds=seeds)
    np.testing.assert_array_equal(found["row_id"], np.arange(ROWS))
    np.testing.assert_array_equal(found["actions"], actions.numpy())
    for name, of in (("q_before", unsteered), ("q_after", actions)):
        expected = ops.pessimistic_q(obs, of, sampler.critic, 0.5).detach().numpy()
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
    assert (found["q_after"] > found["q_before"]).mean() > 0.9


@pytest.mark.parametrize("key", ["actions", "action"])
def test_q_before_is_of_the_datas_own_action(tmp_path, key):
    own = np.random.default_rng(1).uniform(-1, 1, (ROWS, ACTION_DIM)).astype(np.float32)
    assert run(tmp_path, npz(tmp_path, **{key: own})) == 0
    critic = load_sampler(f"{sampler_file(tmp_path)}:make").critic
    expected = ops.pessimistic_q(torch.from_numpy(observations(ROWS)), torch.from_numpy(own), critic, 0.5)
    np.testing.assert_allclose(columns(tmp_path / "out")["q_before"], expected.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_batches_parts_and_formats_change_no_byte(tmp_path):
    data = npz(tmp_path)
    folder = tmp_path / "parquet" / "inner"
    folder.mkdir(parents=True)
    lists = pa.array(list(observations(ROWS)), pa.list_(pa.float32()))
    for index, (a, b) in enumerate([(0, 17), (17, 400), (400, ROWS)]):  # no part ends where a file does
        parquet.write_table(pa.table({"obs": lists[a:b]}), folder / f"{index}.parquet", row_group_size=50)
    np.savez_compressed(tmp_path / "small.npz", obs=observations(ROWS))
    assert run(tmp_path, data, "a") == run(tmp_path, data, "b", "--batch-size", "7", "--part-rows", "50") == 0
    assert run(tmp_path, tmp_path / "parquet", "c", "--part-rows", "64") == 0
    assert run(tmp_path, tmp_path / "small.npz", "d.parquet", "--batch-size", "600") == 0
    first = columns(tmp_path / "a")
    assert all(same_bytes(first, columns(tmp_path / other)) for other in ("b", "c", "d.parquet"))
    assert (tmp_path / "d.parquet").is_file() and not list((tmp_path / "d.parquet.parts").glob("part-*"))


def test_bad_rows_are_set_aside_with_their_reasons(tmp_path, capsys):
    rows: list[list[float | None] | None] = observations(ROWS).tolist()
    rows[3] = None
    rows[4] = rows[4][:5]
    rows[299] = [None, *rows[299][1:]]
    rows[300] = [float("nan"), float("inf"), *rows[300][2:]]
    rows[599] = [1e39, *rows[599][1:]]  # finite in float64, not in the sampler's float32
    path = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"obs": pa.array(rows, pa.list_(pa.float64()))}), path)
    assert run(tmp_path, path, "out", "--part-rows", "100") == 0
    aside = parquet.read_table(tmp_path / "out.set_aside.parquet").to_pydict()
    reasons = dict(zip(aside["row_id"], aside["reason"]))
    assert list(reasons) == [3, 4, 299, 300, 599]
    assert reasons[3] == "obs is null" and reasons[4] == "obs has width 5; expected 7"
    assert reasons[299] == "obs holds a null" and reasons[300] == "obs has 2 non-finite values"
    assert "non-finite" in reasons[599]
    found = columns(tmp_path / "out")
    assert found["row_id"].tolist() == [i for i in range(ROWS) if i not in reasons]
    assert "595 rows relabelled, 5 set aside" in capsys.readouterr().err
    good = np.setdiff1d(np.arange(ROWS), list(reasons))
    np.savez(tmp_path / "whole.npz", obs=observations(ROWS))
    assert run(tmp_path, tmp_path / "whole.npz", "whole") == 0
    np.testing.assert_array_equal(found["actions"], columns(tmp_path / "whole")["actions"][good])


def test_a_kill_leaves_whole_parts_and_the_next_run_goes_on(tmp_path):
    data, out = npz(tmp_path), tmp_path / "out"
    function = f"{sampler_file(tmp_path)}:make"
    arguments = ["--data", str(data), "--out", str(out), "--sampler", function, "--part-rows", "20", "--local"]
    command = [sys.executable, "-m", "qpilots_fast", "relabel", *arguments, "--batch-size", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(list(out.glob("part-*.parquet"))) < 3 and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 3 <= len(there) < ROWS // 20
    assert cli.main(["relabel", *arguments]) == 0
    assert all((out / name).stat().st_mtime_ns == when for name, when in there.items()), "made twice"
    assert run(tmp_path, data, "at_once") == 0
    assert same_bytes(columns(out), columns(tmp_path / "at_once"))
    assert json.loads((out / "_manifest.json").read_text())["complete"]
    assert not list(out.glob(".*.tmp"))


def test_a_lost_row_is_noticed_and_its_part_made_anew(tmp_path, capsys):
    data = npz(tmp_path)
    assert run(tmp_path, data, "out", "--part-rows", "100") == 0
    expected = columns(tmp_path / "out")
    manifest = tmp_path / "out" / "_manifest.json"
    begun = {k: v for k, v in json.loads(manifest.read_text()).items() if k in ("rows", "part_rows", "seed", "obs_key")}
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**begun, "files": whole["files"]}))
    part = tmp_path / "out" / "part-00000002.parquet"
    parquet.write_table(parquet.read_table(part).slice(1), part)
    assert run(tmp_path, data, "out") == 1
    assert "had 99 rows, not 200 to 299" in capsys.readouterr().err and not part.exists()
    assert run(tmp_path, data, "out") == 0
    assert same_bytes(columns(tmp_path / "out"), expected)


def test_what_is_refused_says_why(tmp_path, capsys):
    data = npz(tmp_path)
    assert run(tmp_path, data) == 0

    def refused(says: str, *arguments: str, out: str = "new", source: Path = data, function: str = "make") -> None:
        capsys.readouterr()
        assert run(tmp_path, source, out, *arguments, function=function) in (1, 2)
        assert says in capsys.readouterr().err

    refused("was begun with seed = 0, now it is 1", "--seed", "1", out="out")
    refused("--obs-key", "--obs-key", "state")
    refused("does not exist", source=tmp_path / "none.npz")
    refused("has no function nothing", function="nothing")
    refused("has no critic", out="new2", function="no_critic")
    refused("--batch-size is 0", "--batch-size", "0")
    np.savez(tmp_path / "wide.npz", obs=np.zeros((5, 9), np.float32))
    refused("is [9] a row; expected [7]", out="new3", source=tmp_path / "wide.npz")
    np.savez(tmp_path / "integers.npz", obs=np.zeros((5, 7), np.int64))
    refused("expected a floating dtype", out="new4", source=tmp_path / "integers.npz")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").touch()
    refused("a folder with other files in it", out="kept")


def test_another_sampler_does_not_go_on_where_one_began(tmp_path, capsys):
    data = npz(tmp_path)
    assert run(tmp_path, data, "out", "--part-rows", "100") == 0
    manifest = tmp_path / "out" / "_manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({k: v for k, v in told.items() if k != "complete"}))
    (tmp_path / "out" / "part-00000001.parquet").unlink()
    assert run(tmp_path, data, "out", function="other") == 1
    assert "returned another sampler" in capsys.readouterr().err
    assert run(tmp_path, data, "out") == 0


def test_without_ray_or_pyarrow_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    absent = {"ray", "pyarrow"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    assert run(tmp_path, npz(tmp_path)) == 2
    assert 'pip install "qpilots-fast[relabel]"' in capsys.readouterr().err
    absent.remove("pyarrow")
    arguments = ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "o"), "--sampler", "x.py:y"]
    assert cli.main(["relabel", *arguments]) == 2
    assert "--local runs in one process" in capsys.readouterr().err
