"""docs/pictures.py: the pictures come from the product and the records, and say what the page says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import pictures


@pytest.mark.usefixtures("one_thread")
def test_the_shares_are_what_the_page_says():
    found = {name: pictures.shares(pictures.paths(steering, 400)[-1]) for name, steering in pictures.METHODS.items()}
    best, inside = found["unsteered"]
    assert 0.15 < best < 0.35 and inside > 0.98
    assert found["QPILOTS-U, alpha 1"][1] < 0.7 < found["QPILOTS-U, alpha 0.5"][1]  # outruns the flow at the end
    best, inside = found["QPILOTS-U, alpha 2 while t < 0.5"]
    assert best > found["QPILOTS-U, alpha 0.5"][0] and inside > 0.98
    assert found["QGF, weight 1"][0] > 0.98


def test_the_pictures_are_drawn_small(tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert pictures.main(["--out", str(tmp_path)]) == 0
    drawn = sorted(tmp_path.glob("*.png"))
    assert {path.name for path in drawn} == {path.name for path in pictures.PICTURES.glob("*.png")}
    assert all(5_000 < path.stat().st_size < 150_000 for path in (*drawn, *pictures.PICTURES.glob("*.png")))
