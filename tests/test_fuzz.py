"""The fuzz run in short, and what it would find: its judge is given answers with faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qpilots_fast import CriticEnsemble, FlowMLP
from tests.fuzz.calls import Call
from tests.fuzz.judge import Finding, Judge, Tally
from tests.fuzz.run import run
from tests.fuzz.samplers import Subject


def test_a_short_run_finds_nothing():
    tally = run(600, 0)
    assert tally.sampled > 300 and sum(tally.refused.values()) > 50
    assert sum(tally.tolerated.values()) < tally.sampled / 4, tally.tolerated


def _judge(settings: dict[str, Any] | None = None) -> Judge:
    torch.manual_seed(0)
    networks = {"flow": FlowMLP(3, 2, (8,)), "critic": CriticEnsemble(3, 2, 2, (8,)), "posterior": None}
    return Judge(Subject(networks, frozenset(), {}, settings or {}, frozenset()), "cpu", Tally())


def _call(**changes: Any) -> Call:
    generator = torch.Generator().manual_seed(1)
    arguments = {"obs": torch.randn(4, 3, generator=generator), "noise": torch.randn(4, 2, generator=generator)}
    return Call({**arguments, **changes}, "nothing", "nothing")


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "1 % off in one row": lambda actions: actions.index_fill(0, torch.tensor([2]), 0) + 0.01,
    "beyond the bounds": lambda actions: actions + 3,
    "not finite": lambda actions: actions.index_fill(1, torch.tensor([0]), torch.nan),
    "another shape": lambda actions: actions[:, None],
    "rows exchanged": lambda actions: actions.flip(0),
}


def test_the_judge_accepts_what_is_right():
    judge = _judge()
    judge(_call())
    assert judge.tally.sampled == 1 and not judge.tally.tolerated


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_judge_finds_wrong_actions(fault):
    judge = _judge()
    right = judge.sampler
    judge.sampler = lambda **arguments: fault(right(**arguments))
    with pytest.raises(Finding):
        judge(_call())


@pytest.mark.parametrize("error", [RuntimeError("broken"), IndexError("list index"), ValueError("no")], ids=repr)
def test_the_judge_finds_exceptions_that_are_not_documented(error):
    judge = _judge()

    def broken(**_: Any) -> None:
        raise error

    judge.sampler = broken
    with pytest.raises(Finding):
        judge(_call())


def test_the_judge_finds_a_refusal_of_what_is_in_range(monkeypatch):
    judge = _judge()
    monkeypatch.setattr("qpilots_fast.inputs.Reader._check_noise", _refused)
    judge.sampler.backend = "reference"
    with pytest.raises(Finding, match="refused what is in range"):
        judge(_call(alpha=torch.ones(4)))


def _refused(*_: Any) -> None:
    from qpilots_fast.bounds import read_bound

    read_bound("action_low", float("nan"))
