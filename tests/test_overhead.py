"""The overhead table: every row runs, and the unsteered one is the expert's own loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from bench import overhead, records
from qpilots_fast import backends

TINY = overhead.Sizes(
    width=16, depth=2, heads=2, head_dim=8, mlp=24, prefix=5, chunk=3, padded=4, real=2, features=3, critics=3,
    hidden=(16, 16), draws=2, steps=4, dtype=torch.float32,
)  # fmt: skip


def test_unsteered_is_the_experts_own_loop():
    expert = overhead.make_expert(TINY, "cpu")
    obs, noise, draws = overhead.inputs(TINY, "cpu")
    x, tau = noise.unflatten(1, (TINY.chunk, TINY.padded)), 1.0
    for _ in range(TINY.steps):
        x, tau = x - expert(x, torch.tensor([tau])) / TINY.steps, tau - 1 / TINY.steps
    own = x.flatten(1)
    for name, sampler in overhead.samplers(expert, "cpu").items():
        actions = sampler(obs, noise, draws if sampler.posterior is not None else None)
        real = list(overhead.real_dims(TINY.chunk, TINY.padded, TINY.real))
        if name == overhead.UNSTEERED:
            torch.testing.assert_close(actions, own, rtol=1e-5, atol=1e-5)
        else:
            assert (actions - own)[:, real].abs().max() > 1e-3, name


def test_the_expert_reads_chunk_time_and_prefix():
    expert = overhead.make_expert(TINY, "cpu")
    x, tau = torch.randn(1, TINY.chunk, TINY.padded), torch.tensor([0.5])
    before = expert(x, tau)
    moved = x.clone()
    moved[:, -1] += 1
    assert not torch.allclose(expert(moved, tau)[:, 0], before[:, 0], atol=1e-4)  # actions see one another
    assert not torch.allclose(expert(x, tau + 0.3), before, atol=1e-4)
    expert.prefix[0] += 1
    assert not torch.allclose(expert(x, tau), before, atol=1e-4)


def test_the_table_is_not_made_of_the_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(overhead, "native_backend", lambda: "reference")
    assert overhead.main(["--rounds", "1", "--out", str(tmp_path)]) == 1
    assert "on the reference" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.skipif(backends.unavailable_reason("cpu") is not None, reason="the CPU backend is not built")
def test_the_command_saves_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(overhead, "SIZES", TINY)
    assert overhead.main(["--rounds", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/*.jsonl")
    cells = records.load(path)["cells"]
    assert [cell["method"] for cell in cells] == ["unsteered", "U, identity", "U, full", "M, N = 2"]
    assert all(cell["results"][0]["p50_s"] > 0 for cell in cells)
    printed = capsys.readouterr().out
    assert all(cell["method"] in printed for cell in cells)


def test_the_expert_is_of_the_size_it_says():
    with torch.device("meta"):
        expert = overhead.Expert(overhead.SIZES)
    assert sum(parameter.numel() for parameter in expert.parameters()) == pytest.approx(3e8, rel=0.06)
