"""Bounds of actions as environments give them, in every place that takes bounds."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering, ops
from qpilots_fast.integrations import diffusion
from qpilots_fast.testing import make_case

LOW, HIGH = np.array([-2, -1, -1, 0, 0, -0.5], np.float32), np.array([2, 1, 0.5, 1, 1, 1], np.float32)
FLOW, CRITIC = FlowMLP(3, 6, (16,)), CriticEnsemble(3, 6, 2, (16,))
OBS, NOISE = torch.randn(64, 3), 3 * torch.randn(64, 6)


def run(low, high, flow=FLOW, critic=CRITIC, noise=NOISE, **settings):
    sampler = SteeredSampler(flow, critic, Steering.qpilots_u(0.5), action_low=low, action_high=high, **settings)
    return sampler(OBS[: len(noise)], noise)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "callable"])
def test_every_form_of_the_same_bounds(packed):
    flow = FLOW if packed else lambda obs, x, t: FLOW(obs, x, t)
    expected = run(LOW, HIGH, flow)
    assert ((expected >= torch.from_numpy(LOW)) & (expected <= torch.from_numpy(HIGH))).all()
    assert (expected == torch.from_numpy(HIGH)).any(0).all()
    forms = [torch.from_numpy, list, tuple, lambda b: b.astype(np.float64), lambda b: b.reshape(2, 3)]
    for form in forms:
        assert torch.equal(run(form(LOW), form(HIGH), flow), expected)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "callable"])
def test_numbers_of_any_kind(packed):
    flow = FLOW if packed else lambda obs, x, t: FLOW(obs, x, t)
    expected = run(-2.0, 1.0, flow)
    for low, high in [(np.float32(-2), np.float64(1)), (-2, 1), (np.array(-2), torch.tensor(1.0)), (-2, [1.0] * 6)]:
        assert torch.equal(run(low, high, flow), expected)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "callable"])
def test_no_bounds_is_no_clip(packed):
    flow = FLOW if packed else lambda obs, x, t: FLOW(obs, x, t)
    free = run(None, None, flow)
    assert free.abs().max() > 3
    assert torch.equal(free, run(-np.inf, np.inf, flow))
    assert torch.equal(run(None, 1.0, flow) > 1, torch.zeros(64, 6) > 0) and run(None, 1.0, flow).min() < -3


@pytest.mark.parametrize("chunk_shape", [None, (2, 3)])
def test_bounds_of_a_chunk(chunk_shape):
    step_low, step_high = np.float32([-1, 0, -0.5]), np.float32([0.5, 1, 0.5])
    chunks = NOISE.view(64, 2, 3)
    expected = run(np.tile(step_low, 2), np.tile(step_high, 2))
    for low, high in [(step_low, step_high), (np.tile(step_low, (2, 1)), np.tile(step_high, (2, 1)))]:
        assert torch.equal(run(low, high, noise=chunks, chunk_shape=chunk_shape).flatten(1), expected)


def test_bounds_of_a_step_without_chunks_are_refused_at_the_call():
    with pytest.raises(ValueError, match=r"action_low has shape \[3\]; expected a number, None, or \[6\]"):
        run(LOW[:3], HIGH[:3])


@pytest.mark.parametrize(
    "low, high, error, words",
    [
        (LOW[:4], HIGH[:4], ValueError, r"action_low has shape \[4\]"),
        ([LOW] * 2, [HIGH] * 2, ValueError, r"shape \[2, 6\].*give env\.single_action_space\.low"),
        (LOW, HIGH[:3], ValueError, "expected the same"),
        (HIGH, LOW, ValueError, "expected action_low <= action_high"),
        ([0.5] * 6, [1, 1, 0.4, 1, 1, 1], ValueError, r"0\.5 and action_high 0\.4 at \[2\]"),
        (1.0, 1.0, ValueError, "expected action_low < action_high"),
        (float("nan"), 1.0, ValueError, "NaN"),
        (True, 1.0, TypeError, "expected None, a number"),
        ("a", 1.0, TypeError, "expected None, a number"),
        ([[[-1.0]]], 1.0, TypeError, "expected None, a number"),
        (None, -math.inf, ValueError, "action_low < action_high"),
        ([math.inf] * 6, None, ValueError, "action_low <= action_high"),
    ],
)
def test_bad_bounds(low, high, error, words):
    with pytest.raises(error, match=words):
        run(low, high)


def test_a_side_without_a_bound_clips_nothing_however_far():
    far = 1e9 * NOISE
    low, high = run(None, 1.0, noise=far), run(-1.0, None, noise=far)
    assert low.min() < -1e8 and low.max() <= 1 and high.max() > 1e8 and high.min() >= -1


def test_a_bound_may_be_assigned_later_and_survives_copies():
    sampler = SteeredSampler(FLOW, CRITIC, Steering.qpilots_u(0.5), action_low=None, action_high=None)
    sampler(OBS, NOISE)
    sampler.action_low, sampler.action_high = LOW, HIGH
    expected = run(LOW, HIGH)
    for same in (sampler, copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(same(OBS, NOISE), expected)
    with pytest.raises(ValueError, match="action_low"):
        sampler.action_low = LOW[:4]
    assert torch.equal(sampler(OBS, NOISE), expected)


def test_compiled_with_bounds_of_each_dimension():
    sampler = SteeredSampler(FLOW, CRITIC, Steering.qpilots_u(0.5), action_low=LOW, action_high=HIGH)
    compiled = torch.compile(sampler, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(OBS, NOISE), sampler(OBS, NOISE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", ["steer_step", "steer_velocity"])
def test_ops(op):
    """The bounds of the estimate decide where the critic is asked."""
    steering = Steering.qpilots_u(0.5, jacobian="identity")
    v = torch.randn(64, 6)

    def ask(low, high, critic=CRITIC):
        dt = () if op == "steer_velocity" else (0.1,)
        named = dict(obs=OBS, critic=critic, steering=steering, action_low=low, action_high=high)
        return getattr(ops, op)(NOISE, v, 0.5, *dt, **named)

    for low, high in [(LOW, HIGH), (None, 1.0), (-np.inf, np.inf), (torch.from_numpy(LOW), None)]:
        rows = [torch.as_tensor(sign * math.inf if b is None else b) for sign, b in ((-1, low), (1, high))]
        a = ops.clean_actions(NOISE, v, 0.5).clamp(*(row.expand(6) for row in rows)).requires_grad_()
        g = torch.autograd.grad(ops.pessimistic_q(OBS, a, CRITIC).sum(), a)[0]
        expected = v + 0.5 * v.norm(dim=1, keepdim=True) / g.norm(dim=1, keepdim=True) * g
        got = ask(low, high)
        got = (got - NOISE) / 0.1 if op == "steer_step" else got
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="action_low"):
        ask(LOW[:4], HIGH)


def test_ddim():
    path = diffusion.GaussianPath.from_alphas_cumprod(torch.linspace(0.999, 0.01, 50))
    actions, _ = diffusion.ddim_steered_sample(
        lambda obs, x, t: 0.1 * x, CRITIC, Steering.qpilots_u(), path, OBS, NOISE, num_steps=5,
        action_low=LOW, action_high=HIGH,
    )  # fmt: skip
    assert ((actions >= torch.from_numpy(LOW)) & (actions <= torch.from_numpy(HIGH))).all()


# ---------------------------------------------------------------- what is said once


def remarks(words, *calls):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return sum(words in str(warning.message) for warning in seen)


def test_default_bounds_that_clip_much_say_so_once():
    sampler = SteeredSampler(FLOW, CRITIC, Steering.qpilots_u())
    assert remarks("action_low=None", lambda: sampler(OBS, NOISE), lambda: sampler(OBS, NOISE)) == 1
    later = SteeredSampler(FLOW, CRITIC, Steering.qpilots_u())
    quiet, loud = (lambda: later(OBS, 0.01 * NOISE)), (lambda: later(OBS, NOISE))
    assert remarks("action_low=None", quiet, quiet, loud) == 1  # the third call takes the quick way


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (None, None), (LOW, HIGH)])
def test_bounds_that_were_given_say_nothing(bounds):
    sampler = SteeredSampler(FLOW, CRITIC, Steering.qpilots_u(), action_low=bounds[0], action_high=bounds[1])
    assert remarks("bounds", lambda: sampler(OBS, NOISE)) == 0


def test_actions_inside_the_default_bounds_say_nothing():
    sampler = SteeredSampler(FLOW, CRITIC, Steering.qpilots_u())
    few = 0.01 * NOISE
    few[:4] = 5.0  # 24 of 384 entries
    assert remarks("bounds", lambda: sampler(OBS, few)) == 0


def padded(first: int, total: int) -> tuple:
    """A critic whose gradient is 0 from column `first` on: as a callable, and packed."""
    critic = CriticEnsemble(3, total, 2, (16,))
    with torch.no_grad():
        weight = next(iter(critic.parameters()))
        weight[..., critic.spec.moving_columns][..., first:] = 0
    return critic, lambda obs, a: critic(obs, a)


@pytest.mark.parametrize("which", [0, 1], ids=["packed", "callable"])
def test_columns_that_the_critic_does_not_see(which):
    critic, flow = padded(4, 6)[which], FLOW if which == 0 else lambda obs, x, t: FLOW(obs, x, t)
    make = lambda steering: SteeredSampler(flow, critic, steering)  # noqa: E731
    sampler = make(Steering.qpilots_u())
    words = "columns 4 to 5 of 6 of the actions (padding?), but Steering.steered_dims is None"
    assert remarks(words, lambda: sampler(OBS, NOISE), lambda: sampler(OBS, NOISE)) == 1
    advised = make(replace(Steering.qpilots_u(), steered_dims=tuple(range(4))))
    assert remarks("columns", lambda: advised(OBS, NOISE)) == 0
    assert remarks("columns", lambda: make(Steering.qgf(0.1))(OBS, NOISE)) == 0  # no norm of v in its push
    seen = SteeredSampler(flow, padded(6, 6)[which], Steering.qpilots_u())
    assert remarks("columns", lambda: seen(OBS, NOISE)) == 0


def test_the_columns_are_named():
    critic = CriticEnsemble(3, 6, 2, (16,))
    mask = torch.tensor([0.0, 1, 1, 0, 0, 1])
    sampler = SteeredSampler(FLOW, lambda obs, a: critic(obs, a * mask), Steering.qpilots_u())
    assert remarks("columns 0, 3 to 4 of 6", lambda: sampler(OBS, NOISE)) == 1


def test_case_of_the_testing_module_passes_its_bounds_on():
    case = replace(make_case(Steering.unsteered()), bounds=(-0.1, 0.1))
    assert case.run("reference").abs().max() == pytest.approx(0.1)


CALLS = {
    "call": lambda sampler: sampler(OBS),
    "act": lambda sampler: sampler.act(OBS),
    "inside a module": lambda sampler: torch.nn.Sequential(sampler)(OBS),
    "callables": lambda sampler: SteeredSampler(lambda *a: 30 + FLOW(*a), CRITIC, Steering.qpilots_u(), num_steps=2)(
        OBS
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_remarks_name_the_user_s_line(call):
    flow = copy.deepcopy(FLOW)
    with torch.no_grad():
        flow.output.bias.fill_(30.0)
    with pytest.warns(UserWarning, match="default bounds") as caught:
        call(SteeredSampler(flow, CRITIC, Steering.unsteered(), num_steps=2))
    assert {warning.filename for warning in caught} == {__file__}


def test_a_bound_beyond_float32_is_no_clip():
    case = make_case()
    flow = lambda obs, x, t: case.flow(obs, x, t)  # noqa: E731
    free, huge = (SteeredSampler(flow, case.critic, case.steering, action_high=high) for high in (None, 1e300))
    assert huge.action_high == math.inf
    assert torch.equal(huge(case.obs, case.noise), free(case.obs, case.noise))
