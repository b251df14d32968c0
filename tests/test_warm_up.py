"""warm_up: what first calls do, done ahead of time."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering
from qpilots_fast.testing import make_case
from tests.marks import needs_cpu

FLOW, CRITIC = FlowMLP(3, 4, (16,)), CriticEnsemble(3, 4, 2, (16,))
OBS = torch.randn(5, 3)
BOX = dict(action_low=-1.0, action_high=1.0)


SOFTMAX = replace(Steering.best_of_n(3), selection="softmax")


@pytest.mark.parametrize("steering", [Steering.qpilots_u(), Steering.qpilots_m(), Steering.best_of_n(3), SOFTMAX])
def test_results_and_draws_are_those_of_a_cold_sampler(steering, backend):
    case = make_case(steering)
    cold, warm = case.sampler(backend), case.sampler(backend)
    torch.manual_seed(1)
    expected = cold(case.obs)
    torch.manual_seed(1)
    assert warm.warm_up((1, np.int64(17), 4)) is warm
    assert torch.equal(warm(case.obs), expected)  # nothing was drawn in between


@needs_cpu
def test_the_next_call_takes_the_quick_way():
    sampler = SteeredSampler(FLOW, CRITIC, Steering.qpilots_u(), backend="cpu", **BOX)
    assert sampler._run.quick("cpu") is None
    sampler.warm_up()
    assert sampler._run.quick("cpu") is not None


def test_it_makes_no_remark_and_uses_none_up():
    away = lambda obs, x, t: 0 * x + 5.0  # noqa: E731  (clipped from any start, zeros included)
    sampler = SteeredSampler(away, None, Steering.unsteered(), chunk_shape=(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.warm_up((1, 2, 3, 4, 5), obs=OBS)
    with pytest.warns(UserWarning, match="default bounds"):
        sampler(OBS, torch.zeros(5, 4))


@pytest.mark.parametrize("obs", [OBS, {"task": ["a", "b", "c", "d", "e"], "state": OBS}], ids=["tensor", "dict"])
def test_callables_are_called_with_the_rows_given(obs):
    seen = []

    def flow(o, x, t):
        state = o["state"] if isinstance(o, dict) else o
        seen.append((len(x), tuple(x.shape[1:]), len(state)))
        return FLOW(state, x.flatten(1), t).view_as(x)

    sampler = SteeredSampler(flow, None, Steering.unsteered(), num_steps=1, chunk_shape=(2, 2), **BOX)
    sampler.warm_up((2, 8), obs=obs)
    assert set(seen) == {(2, (2, 2), 2), (8, (2, 2), 8)}


def test_an_obs_whose_rows_are_not_known_is_refused():
    sampler = SteeredSampler(lambda o, x, t: -x, None, Steering.unsteered(), chunk_shape=(2, 2), **BOX)
    for obs in ({"task": "a"}, {"state": OBS, "other": OBS[:2]}):
        with pytest.raises(ValueError, match="do not share a first dimension"):
            sampler.warm_up(obs=obs)


def test_double_and_chunks():
    flow = FlowMLP(3, 4, (16,)).double()
    sampler = SteeredSampler(flow, None, Steering.unsteered(), backend="reference", chunk_shape=(2, 2), **BOX)
    assert sampler.warm_up()(OBS.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "sizes, error, words",
    [
        (3, TypeError, r"expected a sequence, e.g. \(3,\)"),
        ((0,), ValueError, "integers >= 1"),
        ((1.5,), ValueError, "1.5"),
    ],
)  # fmt: skip
def test_bad_batch_sizes(sizes, error, words):
    with pytest.raises(error, match=words):
        SteeredSampler(FLOW, CRITIC, Steering.qpilots_u()).warm_up(sizes)


def test_callables_need_obs_and_a_width():
    flow = lambda obs, x, t: -x  # noqa: E731
    with pytest.raises(ValueError, match="obs is None"):
        SteeredSampler(flow, None, Steering.unsteered()).warm_up()
    with pytest.raises(ValueError, match="chunk_shape"):
        SteeredSampler(flow, None, Steering.unsteered()).warm_up(obs=OBS)


def test_explain_says_what_is_kept():
    assert "kept between calls" in str(SteeredSampler(FLOW, CRITIC, Steering.qpilots_u()).explain(1))
    final = replace(Steering.qpilots_u(), final_steps=2)
    assert "2 final steps are not counted" in str(SteeredSampler(FLOW, CRITIC, final).explain(1))
