"""stable-baselines3's critics steer a cloned flow, and prefer its actions then."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart_sb3.py"  # by path: frameworks bring their own `examples`


@pytest.mark.usefixtures("one_thread")
def test_sac_critics_value_the_steered_actions_more():
    assert runpy.run_path(str(EXAMPLE))["main"](["--steps", "150"]) > 1e-4
