"""Files: whole or not at all, whatever stops the process or the disk; damaged checkpoints are refused by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from relabel_case import observations, sampler_file
from torch import nn

from qpilots_fast import FlowMLP, cli
from qpilots_fast.demo.ogbench_cube import ASSETS, CubePolicy
from qpilots_fast.files import fill, read_tensors, replacing, write_tensors, write_text
from tests.fuzz import checkpoints

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------- checkpoints


def test_damaged_checkpoints_are_refused_by_name():
    assert checkpoints.run(200, 0) > 50


def test_every_flipped_weight_is_noticed(tmp_path):
    path = tmp_path / "flow.safetensors"
    whole, tensors = checkpoints.written(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in range(header, len(whole), 13):
        assert checkpoints.check(path, checkpoints.Damage(at, bytes([whole[at] ^ 1])), whole, tensors), at


def test_what_does_not_fit_or_is_not_finite_is_named(tmp_path):
    path = tmp_path / "flow.safetensors"
    flow = FlowMLP(3, 2, (8,))
    with torch.no_grad():
        flow.output.bias[1] = torch.nan
    write_tensors(path, flow.state_dict())
    with pytest.raises(ValueError, match=r"flow.safetensors: output.bias has 1 values that are not finite"):
        read_tensors(path)
    write_tensors(path, FlowMLP(3, 2, (8,)).state_dict())
    for other, says in (
        (FlowMLP(3, 2, (9,)), r"has one of shape \[8, 6\] for hidden.0.weight; expected one of shape \[9, 6\]"),
        (FlowMLP(3, 2, (8, 8)), r"has one of shape \[8, 6\]|has none for hidden.1.weight"),
        (nn.Linear(3, 2), "has none for weight"),
    ):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(ValueError, match=says):
            fill({"": other}, read_tensors(path)[0], path)
        assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match=r"none.safetensors does not exist"):
        read_tensors(tmp_path / "none.safetensors")


def test_a_newer_schema_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "new.safetensors", {"schema": "2"})
    with pytest.raises(ValueError, match="has schema 2; expected 1"):
        read_tensors(tmp_path / "new.safetensors")


def test_the_shipped_policy_is_whole_and_says_so_where_it_is_not(tmp_path):
    assert {"schema", "crc32"} <= read_tensors(ASSETS / "policy.safetensors")[1].keys()
    copied = tmp_path / "policy"
    shutil.copytree(ASSETS, copied)
    whole = (copied / "policy.safetensors").read_bytes()
    (copied / "policy.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"policy.safetensors cannot be read"):
        CubePolicy.load(copied)
    (copied / "policy.safetensors").write_bytes(whole)
    (copied / "policy.json").write_text((ASSETS / "policy.json").read_text()[:100])
    with pytest.raises(ValueError, match=r"policy.json cannot be read"):
        CubePolicy.load(copied)


# ---------------------------------------------------------------- whole or not at all


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a folder" / "log.csv"
    write_text(path, "before")
    with pytest.raises(RuntimeError, match="stopped"), replacing(path) as new:
        new.write_text("half")
        raise RuntimeError("stopped")
    assert path.read_text() == "before" and os.listdir(path.parent) == ["log.csv"]


def started(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Python code in a process of its own."""
    options.setdefault("env", {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)


SMALL_DISK = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))\n"


def test_a_full_disk_ends_in_clear_words(tmp_path):
    path = tmp_path / "net.safetensors"
    write_tensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    code = SMALL_DISK + (
        "import torch\nfrom pathlib import Path\nfrom qpilots_fast.files import write_tensors, write_text\n"
        "for write in (lambda p: write_tensors(p, {'a': torch.zeros(4096)}), lambda p: write_text(p, 'x' * 9999)):\n"
        "    try:\n        write(Path(sys.argv[1]))\n    except OSError as error:\n        print(error)\n"
    )
    said = started(code, str(path)).stdout
    assert said.count("could not be written") == 2 and said.count("free some space") == 2, said
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.safetensors"]


def test_relabelling_onto_a_full_disk_keeps_whole_parts_and_goes_on(tmp_path):
    pytest.importorskip("pyarrow")
    np.savez(tmp_path / "data.npz", obs=observations(400))
    out = tmp_path / "out"
    arguments = ["--data", str(tmp_path / "data.npz"), "--out", str(out), "--part-rows", "100", "--local",
                 "--sampler", f"{sampler_file(tmp_path)}:make"]  # fmt: skip
    code = SMALL_DISK + "from qpilots_fast.cli import main\nsys.exit(main(['relabel', *sys.argv[1:]]))"
    done = started(code, *arguments)
    assert done.returncode == 1 and "could not be written (File too large)" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(out.glob(".*.tmp"))
    assert cli.main(["relabel", *arguments]) == 0
    assert json.loads((out / "_manifest.json").read_text())["relabelled"] == 400


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users here")
def test_a_read_only_folder_ends_in_clear_words():
    """As a user without rights: root may write anywhere."""
    folder = Path(tempfile.mkdtemp())
    try:
        closed = folder / "closed"
        closed.mkdir()
        code = (
            "import os, sys\nfrom pathlib import Path\nfrom qpilots_fast.files import write_text\n"
            "if os.geteuid() == 0:\n    os.setuid(65534)\nwrite_text(Path(sys.argv[1]), 'text')"
        )
        folder.chmod(0o755)
        closed.chmod(0o555)
        done = started(code, str(closed / "log.csv"))
        assert "could not be written (Permission denied)" in done.stderr, done.stderr
        assert "name another folder" in done.stderr
    finally:
        shutil.rmtree(folder)


def test_no_home_an_ascii_locale_and_a_path_with_spaces(tmp_path):
    pytest.importorskip("pyarrow")
    folder = tmp_path / "with spaces ü"
    folder.mkdir()
    np.savez(folder / "data.npz", obs=observations(8))
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "LANG") and not k.startswith("LC_")}
    env |= {"LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    code = "import sys\nfrom qpilots_fast.cli import main\nsys.exit(main(sys.argv[1:]))"
    relabel = ["relabel", "--data", str(folder / "data.npz"), "--out", str(folder / "out"), "--local",
               "--sampler", f"{sampler_file(folder)}:make"]  # fmt: skip
    for arguments in (["info"], relabel):
        done = started(code, *arguments, env=env, errors="replace")
        assert done.returncode == 0, (arguments[0], done.stdout, done.stderr)
    assert (folder / "out" / "_manifest.json").exists()


# ---------------------------------------------------------------- killed


def test_a_killed_training_run_goes_on_from_its_last_checkpoint(tmp_path):
    """SIGKILL in the middle of an interval; what was trained after the last checkpoint is trained again, alike."""
    pytest.importorskip("ogbench")
    code = (
        "import sys\nfrom pathlib import Path\nfrom examples.offline_to_online import generate, run\n"
        "data = Path(sys.argv[1])\n"
        "if not data.exists():\n    generate.generate('pointmaze-medium-navigate-v0', 2, data, steps=30)\n"
        "run.main(sys.argv[2:])"
    )
    data = tmp_path / "maze.npz"

    def arguments(out: str, steps: int) -> list[str]:
        flags = dict(
            task="pointmaze-medium-navigate-singletask-task1-v0", method="qpilots_u", data=data, out=tmp_path / out,
            chunk=5, offline_steps=steps, online_steps=0, batch_size=8, hidden_dim=8, hidden_layers=2, num_critics=2,
            num_steps=2, eval_every=100_000, eval_episodes=1, checkpoint_every=10, log_every=1,
        )  # fmt: skip
        return [str(data), *(part for k, v in flags.items() for part in (f"--{k.replace('_', '-')}", str(v)))]

    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments("killed", 100_000)],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until, log = time.monotonic() + 120, None
    while time.monotonic() < until and process.poll() is None:
        log = next((tmp_path / "killed").rglob("train.csv"), None)
        if log is not None and len(log.read_text().splitlines()) > 25:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and log is not None
    reached = len(log.read_text().split("\n")) - 2  # without the head, and the line that may be cut off
    tensors, about = read_tensors(next((tmp_path / "killed").rglob("checkpoint.safetensors")))
    saved = json.loads(about["counters"])["step"]
    assert tensors and reached - saved <= 11, "more than an interval was lost"
    for out in ("killed", "whole"):
        assert started(code, *arguments(out, saved + 5), env=env).returncode == 0
    files = [next((tmp_path / out).rglob("checkpoint.safetensors")) for out in ("killed", "whole")]
    ours, whole = (read_tensors(file)[0] for file in files)
    assert all(torch.equal(ours[name], value) for name, value in whole.items())
    assert len(log.read_text().splitlines()) == 1 + saved + 5, "a line was lost, or written twice"
