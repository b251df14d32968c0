"""`qpilots-fast relabel` on a Ray cluster of this machine: bytes, a killed worker, a killed command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from relabel_case import columns, observations, same_bytes, sampler_file

from qpilots_fast import cli

pytest.importorskip("ray", reason="ray is not installed")
psutil = pytest.importorskip("psutil", reason="psutil, which finds Ray's workers, is not installed")

ROWS = 4000


def command(tmp_path: Path, out: str, *more: str) -> list[str]:
    if not (tmp_path / "data.npz").exists():
        np.savez(tmp_path / "data.npz", obs=observations(ROWS))
    sampler = f"{sampler_file(tmp_path)}:make"
    where = ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / out), "--sampler", sampler]
    return ["relabel", *where, "--part-rows", "50", *more]


def started(arguments: list[str]) -> subprocess.Popen[bytes]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", "qpilots_fast", *arguments], **quiet)


def wait_for_parts(out: Path, count: int) -> None:
    until = time.monotonic() + 120
    while len(list(out.glob("part-*.parquet"))) < count:
        assert time.monotonic() < until, "no parts were written"
        time.sleep(0.005)


@pytest.fixture
def expected(tmp_path):
    assert cli.main([*command(tmp_path, "local"), "--local"]) == 0
    return columns(tmp_path / "local")


def test_workers_and_batch_sizes_change_no_byte(tmp_path, expected):
    for workers, batch_size in (("1", "17"), ("2", "64")):
        out = f"with_{workers}"
        assert cli.main([*command(tmp_path, out), "--workers", workers, "--batch-size", batch_size]) == 0
        assert same_bytes(columns(tmp_path / out), expected)


def test_a_killed_worker_loses_and_doubles_no_row(tmp_path, expected):
    process = started([*command(tmp_path, "out"), "--workers", "2", "--batch-size", "1"])
    wait_for_parts(tmp_path / "out", 3)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "_OnRay" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) < ROWS // 50, "it ended before a worker was killed"
    assert process.wait(timeout=240) == 0
    assert same_bytes(columns(tmp_path / "out"), expected)


def test_a_killed_command_goes_on(tmp_path, expected):
    process = started([*command(tmp_path, "out"), "--workers", "2", "--batch-size", "1"])
    wait_for_parts(tmp_path / "out", 3)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) < ROWS // 50, "it ended before it was killed"
    assert cli.main([*command(tmp_path, "out"), "--workers", "2"]) == 0
    assert same_bytes(columns(tmp_path / "out"), expected)


def test_what_a_worker_raises_is_what_is_said(tmp_path, capsys):
    arguments = command(tmp_path, "out")
    arguments[arguments.index("--sampler") + 1] += "_nothing"
    assert cli.main(arguments) == 1
    assert "has no function make_nothing" in capsys.readouterr().err
