"""examples/generalist/lerobot_checkpoint.py on LeRobot's own classes, tiny and random."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed: make test-integrations")
import lerobot_policies as policies

policies.make_importable()

EXAMPLE = Path(__file__).parents[2] / "examples" / "generalist"


def test_an_action_expert_is_steered_and_left_as_it_was(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from lerobot_checkpoint import compare

    torch.manual_seed(0)
    policy = policies.smolvla().eval()
    torch.nn.init.normal_(policy.model.action_out_proj.weight, std=0.3)
    found = compare(policy)
    assert found["unsteered"][1] == 0 and min(found["U, identity"][1], found["U, full"][1]) > 1e-3
    assert "denoise_step" not in vars(policy.model)


def test_a_saved_policy_is_read_and_steered(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from lerobot_checkpoint import try_checkpoint

    policies.diffusion("DDIM").save_pretrained(tmp_path)
    config = tmp_path / "config.json"  # which names its type where draccus is as new as LeRobot wants it
    config.write_text(json.dumps({"type": "diffusion", **json.loads(config.read_text())}))
    try_checkpoint(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("unsteered") and line.endswith("0.000") for line in lines)
    assert any(line.startswith("U, identity") and not line.endswith("0.000") for line in lines)
