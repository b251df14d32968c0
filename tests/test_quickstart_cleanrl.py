"""The example in CleanRL's style runs, and its critics prefer the steered actions."""

from __future__ import annotations

import pytest

pytest.importorskip("gymnasium", reason="gymnasium is not installed; the extra demo brings it")


@pytest.mark.usefixtures("one_thread")
def test_critics_value_the_steered_actions_more():
    from examples import quickstart_cleanrl

    assert quickstart_cleanrl.main(["--steps", "40"]) > 1e-4
