"""What steers, when and how strongly: the settings of Steering beyond the numbers that every backend test covers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qpilots_fast import SteeredSampler, Steering
from qpilots_fast.testing import assert_close, make_case

U = Steering.qpilots_u(0.5)


def test_a_window_is_short_for_weights(backend):
    case = make_case(U)
    weights = tuple(float(0.3 <= k / 10 < 0.7) for k in range(10))
    window = case.with_steering(replace(U, window=(0.3, 0.7))).run(backend)
    assert torch.equal(window, case.with_steering(replace(U, step_weights=weights)).run(backend))
    assert not torch.equal(window, case.run(backend))


def test_a_window_keeps_the_rule_of_the_first_step():
    first = replace(U, window=(0.0, 0.3))
    assert [step.weight for step in first.schedule(5)] == [0, 1, 0, 0, 0]
    assert [step.weight for step in replace(first, steer_first_step=True).schedule(5)] == [1, 1, 0, 0, 0]
    assert [step.weight for step in replace(U, step_weights=(3.0, 0.0)).schedule(2)] == [3, 0]


def test_weights_multiply_alpha(backend):
    case = make_case(replace(U, step_weights=(0.0,) + (2.0,) * 9))
    assert_close(case.run(backend), make_case(Steering.qpilots_u(1.0)).run(backend))


def test_a_step_of_weight_zero_asks_no_critic():
    case = make_case(U, batch_size=2)
    asked = []

    def critic(obs, actions):
        asked.append(len(actions))
        return case.critic(obs, actions)

    steering = replace(U, step_weights=(0.0, 0.0, 1.0, 0.0, 0.5))
    SteeredSampler(case.flow, critic, steering, num_steps=5)(case.obs, case.noise)
    assert len(asked) == 2


def test_half_a_window_costs_half(backend):
    case = make_case(U)
    full, half = (
        case.with_steering(steering).sampler(backend)._run.spec for steering in (U, replace(U, window=(0.55, 1.0)))
    )
    assert len(full.steered_steps) == 9 and len(half.steered_steps) == 4


@pytest.mark.parametrize(
    "settings, error, words",
    [
        (dict(step_weights=[1.0, 1.0]), TypeError, "expected a tuple of K numbers"),
        (dict(step_weights=()), TypeError, "expected a tuple of K numbers"),
        (dict(step_weights=(1.0, -1.0)), ValueError, "expected a finite number >= 0"),
        (dict(step_weights=(1.0, float("nan"))), ValueError, "expected a finite number >= 0"),
        (dict(window=(0.5, 0.5)), ValueError, "0 <= t_from < t_until"),
        (dict(window=(0.5,)), ValueError, "0 <= t_from < t_until"),
        (dict(window=(0.0, 1.0), step_weights=(1.0,)), ValueError, "expected one of them"),
    ],
)
def test_bad_values(settings, error, words):
    with pytest.raises(error, match=words):
        Steering(**settings)


@pytest.mark.parametrize("packed", [True, False])
def test_a_wrong_count_is_refused_at_construction(packed):
    case = make_case(replace(U, step_weights=(1.0,) * 9), num_steps=9)
    flow = case.flow if packed else lambda *blocks: case.flow(*blocks)
    with pytest.raises(ValueError, match="9 entries, the call 10 steps"):
        SteeredSampler(flow, case.critic, case.steering, num_steps=10)


def test_json_keeps_everything():
    for steering in (replace(U, step_weights=(0.0, 1.5)), replace(U, window=(0.1, 0.5), steered_dims=(0, 2))):
        assert Steering.from_json(steering.json) == steering
