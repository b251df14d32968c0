"""stable-baselines3's critics steer a cloned flow, and prefer its actions then."""

from __future__ import annotations

import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")


@pytest.mark.usefixtures("one_thread")
def test_sac_critics_value_the_steered_actions_more():
    from examples import quickstart_sb3

    assert quickstart_sb3.main(["--steps", "150"]) > 1e-4
