"""Callables inside the loop: the reference's numbers, from one graph and one backward a steered step."""

from __future__ import annotations

import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch

from qpilots_fast import SteeredSampler, Steering
from qpilots_fast.testing import PRESETS, Case, assert_close, make_case, settings_grid

EXACT = 1e-9  # in float64
K = 4
GRID = {**settings_grid("noisy", "tweedie", "mfm", "glass"), **PRESETS}
EXTRAS = {
    "steered dims": {"steered_dims": (0, 3)},
    "gate": {"max_disagreement": 0.35},
    "batch std": {"q_scale": "batch_std"},
    "a number as scale": {"q_scale": 3.0, "tau": 0.7},
}


def called(case: Case, **changes) -> SteeredSampler:
    """The case's networks as functions of which nothing is known."""
    networks = {
        "flow": lambda obs, x, t: case.flow(obs, x, t),
        "critic": lambda obs, a: case.critic(obs, a),
        "posterior": lambda obs, e, x, t: case.posterior(obs, e, x, t),
    }
    return SteeredSampler(**{**networks, **changes}, steering=case.steering, num_steps=case.num_steps)


def assert_same_run(sampler: SteeredSampler, case: Case, **arguments) -> None:
    """Actions and reports are those of the reference on packed networks."""
    given = (case.obs, case.noise, case.posterior_noise)
    expected, known = case.sampler("reference", "float64")(*given, return_info=True, **arguments)
    actions, info = sampler(*given, return_info=True, **arguments)
    torch.testing.assert_close(actions, expected, rtol=0, atol=EXACT)
    for name in ("q_values", "gradient_norms", "nonfinite", "q_std", "gated"):
        torch.testing.assert_close(getattr(info, name), getattr(known, name), rtol=EXACT, atol=EXACT)
    assert torch.equal(sampler(*given, **arguments), actions)  # with and without a report


@pytest.mark.parametrize("name", list(GRID))
def test_every_setting_is_the_references(name):
    case = make_case(GRID[name], num_steps=K).double()
    assert_same_run(called(case), case)


@pytest.mark.parametrize("extra", list(EXTRAS))
@pytest.mark.parametrize("preset", ["qpilots_u", "qpilots_u_identity", "qpilots_m", "glass"])
def test_extras_are_the_references(preset, extra):
    case = make_case(replace(PRESETS[preset], **EXTRAS[extra]), num_steps=K).double()
    assert_same_run(called(case), case)
    if extra == "gate":
        assert 0 < called(case)(case.obs, case.noise, case.posterior_noise, return_info=True)[1].gated_count < 17 * K


@pytest.mark.parametrize("preset", ["qpilots_u", "qpilots_m"])
def test_a_strength_for_each_row(preset):
    case = make_case(PRESETS[preset], num_steps=K).double()
    assert_same_run(called(case), case, alpha=torch.rand(17, dtype=torch.float64))


@pytest.mark.parametrize("members", [1, 4])
@pytest.mark.parametrize("preset", ["qpilots_u", "qpilots_u_identity", "qpilots_m"])
def test_members_that_agree_have_a_gradient(preset, members):
    case = make_case(PRESETS[preset], num_critics=1, num_steps=K).double()
    repeated = called(case, critic=lambda obs, a: case.critic(obs, a).expand(members, -1))
    expected = case.sampler("reference", "float64")(case.obs, case.noise, case.posterior_noise)
    actions = repeated(case.obs, case.noise, case.posterior_noise)
    torch.testing.assert_close(actions, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("clip", ["straight_through", "masked"])
def test_a_recorded_output_may_be_saved_by_its_own_derivative(clip):
    """tanh keeps what it returned: clipping it in place would spoil its gradient."""
    case = make_case(replace(Steering.qpilots_m(), clip=clip), num_steps=K).double()
    twice = called(case, posterior=lambda o, e, x, t: torch.tanh(3 * case.posterior(o, e, x, t)))
    doubled = called(case, posterior=lambda o, e, x, t: torch.tanh(3 * case.posterior(o, e, x, t)) + 0)
    for sampler in (twice, doubled):
        sampler.action_low, sampler.action_high = -0.5, 0.5
    given = (case.obs, case.noise, case.posterior_noise)
    torch.testing.assert_close(twice(*given), doubled(*given), rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("preset", "forwards"),
    [("qpilots_u", 1), ("qpilots_u_identity", 1), ("qpilots_m", 4), ("glass", 2), ("qgf_jacobian", 1), ("noisy", 1)],
)
def test_one_backward_a_steered_step(preset, forwards):
    case = make_case(PRESETS[preset], num_steps=K)
    asked = []

    def counted(name):
        network = getattr(case, name)
        return lambda *inputs: (asked.append((name, torch.is_grad_enabled())), network(*inputs))[1]

    sampler = called(case, **{name: counted(name) for name in ("flow", "critic", "posterior")})
    steered = K if case.steering.steer_first_step else K - 1
    with mock.patch("torch.autograd.grad", side_effect=torch.autograd.grad) as backward:
        sampler(case.obs, case.noise, case.posterior_noise)
    assert backward.call_count == steered
    assert asked.count(("critic", True)) == steered * forwards and ("critic", False) not in asked
    inner = steered * 4 if preset == "glass" else 0
    recorded = inner if preset != "glass" and not case.steering.pulls_flow else inner or steered
    assert asked.count(("flow", True)) == recorded and asked.count(("flow", False)) == K + inner - recorded


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("preset", ["qpilots_u", "qpilots_u_identity", "qpilots_m", "glass", "qgf_jacobian"])
def test_rows_without_a_finite_value_follow_the_flow(preset, bad):
    case = make_case(PRESETS[preset], num_steps=K)

    def critic(obs, a):
        q = case.critic(obs, a)
        return torch.cat([q[:, :2], q[:, 2:4].detach() + bad, q[:, 4:]], 1)  # of which the derivative is finite: 0

    given = (case.obs, case.noise, case.posterior_noise)
    actions, info = called(case, critic=critic)(*given, return_info=True)
    unsteered = case.with_steering(Steering.unsteered()).run("reference")
    expected = called(case)(*given)
    assert_close(actions[2:4], unsteered[2:4])
    assert_close(torch.cat([actions[:2], actions[4:]]), torch.cat([expected[:2], expected[4:]]))
    assert info.nonfinite_rows.tolist() == [row in (2, 3) for row in range(17)]


def test_a_flow_without_a_derivative_says_so():
    case = make_case()
    for detached in (lambda o, x, t: case.flow(o, x, t).detach(), torch.no_grad()(lambda o, x, t: case.flow(o, x, t))):
        with pytest.raises(RuntimeError, match=r"flow's output .* detached.*or use jacobian='identity'"):
            called(case, flow=detached)(case.obs, case.noise)
    identity = case.with_steering(Steering.qpilots_u(jacobian="identity"))
    assert_close(called(identity, flow=detached)(case.obs, case.noise), identity.expected())
    with pytest.raises(RuntimeError, match=r"critic's output .* autograd see the computation\."):
        called(case, critic=lambda o, a: case.critic(o, a).detach())(case.obs, case.noise)


@pytest.mark.parametrize("count", [1, 3])
def test_a_critic_that_has_to_be_probed_is_probed_once(count):
    """Also where it is shown chunks, or only ranks candidates."""
    case = make_case(replace(Steering.qpilots_u(), num_candidates=count), num_critics=17, action_dim=6, num_steps=K)
    sizes = []

    def critic(obs, a):
        sizes.append(len(a))
        return case.critic(obs, a.flatten(1)).T

    flow = lambda o, x, t: case.flow(o, x.flatten(1), t).view_as(x)  # noqa: E731
    for sampler in (
        SteeredSampler(flow, critic, case.steering, chunk_shape=(2, 3), num_steps=K),
        SteeredSampler(case.flow, critic, Steering.best_of_n(2), chunk_shape=(2, 3), num_steps=K),
    ):
        for _ in range(2):
            sampler(case.obs, case.noise, return_info=True)
    assert sizes.count(16) == 1 and set(sizes) == {16, 17}


@pytest.mark.parametrize("preset", ["qpilots_u", "qpilots_m", "glass"])
@pytest.mark.filterwarnings("ignore:.*default bounds")
def test_padding_is_noticed_without_another_result(preset):
    """The critic's own gradient tells, which the first call asks for beside the whole one's."""
    case = make_case(PRESETS[preset], num_steps=K)
    sampler = called(case, critic=lambda o, a: case.critic(o, torch.cat([a[:, :3], 0 * a[:, :2].detach()], 1)))
    given = (case.obs, case.noise, case.posterior_noise)
    with pytest.warns(UserWarning, match=r"exactly zero in columns 3 to 4 of 5"):
        first = sampler(*given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sampler(*given), first)
