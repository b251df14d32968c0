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


def reported(case, backend, **arguments):
    return case.sampler(backend)(case.obs, case.noise, case.posterior_noise, return_info=True, **arguments)


STRENGTHS = torch.tensor([0.0, 0.1, 0.5, 2.0, 1.0])
SCALES = {
    "u": U,
    "m": Steering.qpilots_m(num_samples=2),
    "gaf": Steering.gaf(0.5),
    "absolute": Steering.qgf(0.1),
    "weights": replace(U, step_weights=(0.0, 2.0) * 5),
    "candidates": replace(U, num_candidates=2),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_strength_for_each_row_is_that_row_s_own_sampler(name, backend):
    case = make_case(SCALES[name], batch_size=5)
    actions, info = reported(case, backend, alpha=STRENGTHS)
    for row, alpha in enumerate(STRENGTHS[1:].tolist(), start=1):
        alone = replace(case, steering=replace(case.steering, alpha=alpha))
        expected, its_info = reported(alone, backend)
        assert_close(actions[row], expected[row])
        torch.testing.assert_close(info.gradient_norms[:, row], its_info.gradient_norms[:, row], rtol=1e-3, atol=1e-6)
    if name != "candidates":  # of which the critics still choose
        assert_close(actions[:1], case.with_steering(Steering.unsteered()).run(backend)[:1])


@pytest.mark.parametrize("name", SCALES)
def test_strengths_reach_callables_and_compiled_samplers(name, backend):
    case = make_case(SCALES[name], batch_size=5)
    expected = case.sampler(backend)(case.obs, case.noise, case.posterior_noise, alpha=STRENGTHS)
    mixed = SteeredSampler(
        lambda *blocks: case.flow(*blocks), case.critic, case.steering, posterior=case.posterior, backend=backend
    )
    assert_close(mixed(case.obs, case.noise, case.posterior_noise, alpha=STRENGTHS), expected)
    if name in ("u", "m") and backend == "cpu":
        compiled = torch.compile(case.sampler(backend), fullgraph=True, backend="eager")
        assert torch.equal(compiled(case.obs, case.noise, case.posterior_noise, alpha=STRENGTHS), expected)


def test_bad_strengths(backend):
    case = make_case(U, batch_size=5)
    sampler = case.sampler(backend)
    for alpha, error, words in (
        (0.5, ValueError, r"alpha has shape \[\]; expected \[5\]"),
        ("0.5", TypeError, "expected a floating Tensor"),
        (torch.ones(5, dtype=torch.int64), TypeError, "alpha is torch.int64"),
        (torch.ones(4), ValueError, r"alpha has shape \[4\]; expected \[5\]"),
        (torch.tensor([0, 1, -1.0, 1, 1]), ValueError, "alpha is -1 in row 2"),
        (torch.tensor([0, 1, 1, 1, float("nan")]), ValueError, "alpha is nan in row 4"),
    ):
        with pytest.raises(error, match=words):
            sampler(case.obs, case.noise, alpha=alpha)
    with pytest.raises(ValueError, match="build it with a Steering of alpha > 0"):
        case.with_steering(Steering.unsteered()).sampler(backend)(case.obs, case.noise, alpha=STRENGTHS)


@pytest.mark.parametrize("name", SCALES)
def test_the_gate_leaves_rows_on_the_base_flow(name, backend):
    case = make_case(SCALES[name], batch_size=32)
    actions, info = reported(case, backend)
    steered = info.q_std > 0
    assert steered.any() and not info.gated.any() and info.gated_count == 0
    gate = float(info.q_std[steered].median())
    _, gated = reported(replace(case, steering=replace(case.steering, max_disagreement=gate)), backend)
    assert 0 < gated.gated_count < steered.sum()
    if name != "candidates":
        assert torch.equal(gated.gated, gated.q_std > gate)
    shut = replace(case, steering=replace(case.steering, max_disagreement=0.0))
    if name != "candidates":
        assert_close(shut.run(backend), case.with_steering(Steering.unsteered()).run(backend))
    opened = replace(case, steering=replace(case.steering, max_disagreement=1e9))
    assert torch.equal(opened.run(backend), actions)


def test_q_std_is_the_members_std_at_the_estimate(backend):
    case = make_case(Steering.noisy(0.1), batch_size=7)  # asked at x itself, and at step 0 x is the noise
    _, info = reported(case, backend)
    expected = case.critic(case.obs, case.noise).std(0, unbiased=False)
    torch.testing.assert_close(info.q_std[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings, error, words",
    [
        (dict(step_weights="ab"), TypeError, "expected a tuple of K numbers"),
        (dict(step_weights=()), TypeError, "expected a tuple of K numbers"),
        (dict(step_weights=(1.0, -1.0)), ValueError, "expected a finite number >= 0"),
        (dict(step_weights=(1.0, float("nan"))), ValueError, "expected a finite number >= 0"),
        (dict(max_disagreement=-1.0), ValueError, "expected a finite number >= 0"),
        (dict(max_disagreement="auto"), TypeError, "expected a number"),
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
