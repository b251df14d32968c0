"""What becomes of finished actions: ascent steps, values, the choice among candidates; critics of noised actions."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering, calibrate_gate
from qpilots_fast.reference import aggregate
from qpilots_fast.testing import assert_close, make_case
from tests.marks import needs_cpu

S, A, B = 3, 4, 32
FLOW, CRITIC = FlowMLP(S, A, (16,)), CriticEnsemble(S, A, 3, (16,))
OBS, NOISE = torch.randn(B, S), torch.randn(B, A)
BOX = dict(action_low=-1.5, action_high=1.5)


def opaque(network):
    return lambda *arguments: network(*arguments)


# ---------------------------------------------------------------- final steps


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("aggregation", ["pessimistic", "mean", "min"])
@pytest.mark.parametrize("how", ["packed", "callable", "callable flow"])
def test_final_steps_are_ascent_on_the_finished_action(how, aggregation, alpha, backend):
    steering = Steering.qpilots_u(alpha, rho=0.7)
    steering = replace(steering, aggregation=aggregation, final_steps=3, final_step_size=0.4, steered_dims=(0, 1, 3))
    flow = FLOW if how == "packed" else opaque(FLOW)
    critic = opaque(CRITIC) if how == "callable" else CRITIC
    sampler = SteeredSampler(flow, critic, steering, backend=backend, **BOX)
    x = SteeredSampler(flow, critic, replace(steering, final_steps=0), backend=backend, **BOX)(OBS, NOISE)
    for _ in range(3):
        leaf = x.detach().requires_grad_()
        q_bar = aggregate(CRITIC(OBS, leaf), aggregation, 0.7).sum()
        g = torch.autograd.grad(q_bar, leaf)[0] * torch.tensor([1.0, 1, 0, 1])
        x = (x + 0.4 * g).clamp(-1.5, 1.5)
    for _ in range(2):
        got, info = sampler(OBS, NOISE, return_info=True)
        assert_close(got, x)
        assert_close(sampler(OBS, NOISE), x)
    assert_close(info.q_values, CRITIC(OBS, x))


def test_a_row_without_a_finite_gradient_keeps_its_action():
    critic = lambda obs, a: CRITIC(obs, a) + torch.where(obs[:, 0] > 0, math.nan, 0.0)  # noqa: E731
    steering = replace(Steering.unsteered(), final_steps=2, final_step_size=0.4)
    plain = SteeredSampler(opaque(FLOW), None, Steering.unsteered(), **BOX)(OBS, NOISE)
    moved = (SteeredSampler(opaque(FLOW), critic, steering, **BOX)(OBS, NOISE) != plain).any(1)
    assert torch.equal(moved, OBS[:, 0] <= 0)


def test_candidates_climb_before_they_are_ranked():
    steering = replace(Steering.best_of_n(4), final_steps=2, final_step_size=0.3)
    candidates = torch.randn(B, 4, A)
    one = SteeredSampler(FLOW, CRITIC, replace(steering, num_candidates=1), **BOX)
    each = torch.stack([one(OBS, candidates[:, n]) for n in range(4)], 1)
    values = torch.stack([CRITIC(OBS, each[:, n]).mean(0) for n in range(4)], 1)
    expected = each[torch.arange(B), values.argmax(1)]
    for critic in (CRITIC, opaque(CRITIC)):
        assert_close(SteeredSampler(FLOW, critic, steering, **BOX)(OBS, candidates), expected)


def test_final_steps_of_a_frozen_sampler_keep_their_critic():
    flow, critic = FlowMLP(S, A, (8,)), CriticEnsemble(S, A, 2, (8,))
    steering = replace(Steering.qpilots_u(), final_steps=2, final_step_size=0.5)
    frozen, live = (SteeredSampler(flow, critic, steering, **BOX) for _ in range(2))
    before = frozen.freeze()(OBS, NOISE)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(2)
    assert torch.equal(frozen(OBS, NOISE), before)
    assert (live(OBS, NOISE) - before).abs().max() > 1e-3


def test_final_steps_compiled():
    steering = replace(Steering.qpilots_u(), final_steps=2, final_step_size=0.5)
    sampler = SteeredSampler(FLOW, CRITIC, steering, **BOX)
    compiled = torch.compile(sampler, fullgraph=True, backend="eager")
    assert_close(compiled(OBS, NOISE), sampler(OBS, NOISE))


@pytest.mark.parametrize(
    "settings, error",
    [
        (dict(final_steps=-1), ValueError),
        (dict(final_steps=1.5), TypeError),
        (dict(final_step_size=0.0), ValueError),
        (dict(selection="best"), ValueError),
        (dict(selection_temperature=0.0), ValueError),
        (dict(critic_time=True), ValueError),
        (dict(critic_time=1, estimate="noisy"), TypeError),
    ],
)
def test_bad_values(settings, error):
    with pytest.raises(error, match=f"Steering.{next(iter(settings))}"):
        Steering(**settings)


def test_final_steps_need_a_critic():
    with pytest.raises(ValueError, match="critic is None"):
        SteeredSampler(FLOW, None, replace(Steering.unsteered(), final_steps=1))


# ---------------------------------------------------------------- softmax selection


def test_softmax_draws_candidates_by_their_values():
    """Frequencies over 20 000 rows of one observation against p ~ exp(Qbar / T), by a chi-squared test."""
    rows = 20_000
    candidates = torch.randn(5, A).expand(rows, 5, A)
    obs = OBS[:1].expand(rows, S)
    plain = SteeredSampler(FLOW, None, Steering.unsteered(), **BOX)
    each = torch.stack([plain(obs[:1], candidates[:1, n]) for n in range(5)], 1)[0]
    values = CRITIC(obs[:5], each).mean(0).detach()
    temperature = float(values.std())
    p = torch.softmax(values / temperature, 0)
    steering = replace(Steering.best_of_n(5), selection="softmax", selection_temperature=temperature)
    sampler = SteeredSampler(FLOW, CRITIC, steering, **BOX)
    chosen = sampler(obs, candidates, generator=torch.Generator().manual_seed(0))
    counts = torch.stack([((chosen - a).abs().amax(1) < 1e-5).sum() for a in each]).double()
    assert counts.sum() == rows
    chi_squared = ((counts - rows * p).square() / (rows * p)).sum()
    assert chi_squared < 23.5  # 4 degrees of freedom: exceeded once in ten thousand


@pytest.mark.parametrize("critic", [CRITIC, opaque(CRITIC)], ids=["packed", "callable"])
def test_softmax_follows_generator_and_seeds(critic):
    steering = replace(Steering.best_of_n(6), selection="softmax", selection_temperature=10.0)
    sampler = SteeredSampler(FLOW, critic, steering, **BOX)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    one, same = (sampler(OBS, generator=g) for g in generators)
    assert torch.equal(one, same)
    assert not torch.equal(one, sampler(OBS, generator=torch.Generator().manual_seed(4)))
    seeds = list(range(B))
    batch = sampler(OBS, seeds=seeds)
    alone = torch.cat([sampler(OBS[i : i + 1], seeds=[i]) for i in range(B)])
    torch.testing.assert_close(alone, batch, rtol=0, atol=1e-5)
    given = sampler(OBS, NOISE, seeds=seeds)  # the candidates are fixed, the choice follows the seeds
    assert torch.equal(given, sampler(OBS, NOISE, seeds=seeds))
    assert not torch.equal(given, sampler(OBS, NOISE, seeds=[s + 1 for s in seeds]))


def test_softmax_at_a_low_temperature_is_argmax_and_never_takes_what_is_not_finite():
    steering = Steering.best_of_n(6)
    cold = replace(steering, selection="softmax", selection_temperature=1e-6)
    assert torch.equal(SteeredSampler(FLOW, CRITIC, cold, **BOX)(OBS, NOISE), best(steering))
    hot = replace(steering, selection="softmax", selection_temperature=1e6)
    noise = torch.randn(B, 6, A)
    alone = [SteeredSampler(FLOW, None, Steering.unsteered(), **BOX)(OBS, noise[:, i]) for i in range(6)]
    has_value = torch.stack([actions[:, 0] <= 0 for actions in alone])
    assert has_value.any() and not has_value.all()
    for bad, choice in ((math.nan, hot), (math.inf, hot), (math.inf, steering)):
        critic = lambda obs, a, bad=bad: CRITIC(obs, a) + torch.where(a[:, 0] > 0, bad, 0.0)  # noqa: E731
        chosen = SteeredSampler(FLOW, critic, choice, **BOX)(OBS, noise)
        assert torch.equal(chosen[:, 0] <= 0, has_value.any(0))  # a row none of whose candidates has a value takes one


def best(steering):
    return SteeredSampler(FLOW, CRITIC, steering, **BOX)(OBS, NOISE)


# ---------------------------------------------------------------- critics of noised actions


class TimedCritic(torch.nn.Module):
    """Q(obs, a, t) whose preferred action is a direction at t < 0.5, and its opposite later."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.direction = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.5, 2.0]))

    def forward(self, obs, a, t):
        assert t.shape == (len(a), 1)
        self.times.append(float(t[0]))
        return ((a * self.direction).sum(-1) * torch.where(t[:, 0] < 0.5, 1.0, -1.0)).expand(2, -1)


@pytest.mark.parametrize("flow", [FLOW, opaque(FLOW)], ids=["packed", "callable"])
def test_critic_time(flow):
    critic = TimedCritic()
    steering = replace(Steering.noisy(0.5), critic_time=True, scale="absolute")
    got, info = SteeredSampler(flow, critic, steering, num_steps=4, **BOX)(OBS, NOISE, return_info=True)
    first = 0 if steering.steer_first_step else 1
    assert critic.times[:-1] == pytest.approx([k / 4 for k in range(first, 4)]) and critic.times[-1] == 1.0
    x, direction = NOISE, critic.direction.detach()
    for k in range(4):
        push = 0.5 * direction * (1 if k < 2 else -1) if k >= first else 0.0
        x = x + (FLOW(OBS, x, torch.full((B, 1), k / 4)).detach() + push) / 4
    assert_close(got, x.clamp(-1.5, 1.5))
    assert info.q_values.shape == (2, B)


def test_critic_time_with_candidates_final_steps_and_a_list_of_critics():
    critics = [TimedCritic(), TimedCritic()]
    steering = replace(Steering.noisy(0.5), critic_time=True, num_candidates=3, final_steps=1)
    sampler = SteeredSampler(FLOW, critics, steering, num_steps=2, **BOX)
    assert sampler(OBS, NOISE).shape == (B, A)
    assert set(critics[1].times[-6:]) == {1.0}


def test_critic_time_is_not_for_packed_critics():
    with pytest.raises(ValueError, match="packed as Q"):
        SteeredSampler(FLOW, CRITIC, replace(Steering.noisy(0.5), critic_time=True))


# ---------------------------------------------------------------- the gate's number from data


@pytest.mark.parametrize("critic", [CRITIC, opaque(CRITIC)], ids=["packed", "callable"])
def test_calibrate_gate(critic):
    gated = replace(Steering.qpilots_u(0.5), max_disagreement=1e-9, window=(0.3, 0.8))
    sampler = SteeredSampler(FLOW, critic, gated, **BOX)
    noise = torch.randn(B, A)
    gate = calibrate_gate(sampler, OBS, 0.75, noise=noise)
    ungated = SteeredSampler(FLOW, critic, replace(gated, max_disagreement=None), **BOX)
    info = ungated(OBS, noise, return_info=True)[1]
    steered = info.q_std[3:8]
    assert (info.q_std[:3] == 0).all() and (info.q_std[8:] == 0).all()
    assert gate == pytest.approx(np.quantile(steered.numpy(), 0.75), rel=1e-6)
    calibrated = SteeredSampler(FLOW, critic, replace(gated, max_disagreement=gate), **BOX)
    assert 0 < calibrated(OBS, noise, return_info=True)[1].gated.sum() < steered.numel() / 2
    assert sampler.steering is gated


def test_calibrate_gate_refuses():
    sampler = SteeredSampler(FLOW, CRITIC, Steering.qpilots_u())
    for quantile in (-0.1, 1.5, "a"):
        with pytest.raises((ValueError, TypeError), match="quantile"):
            calibrate_gate(sampler, OBS, quantile)
    with pytest.raises(ValueError, match="steer"):
        calibrate_gate(SteeredSampler(FLOW, None, Steering.unsteered()), OBS, 0.5)


# ---------------------------------------------------------------- time grids


@pytest.mark.parametrize("flow", [FLOW, opaque(FLOW)], ids=["packed", "callable"])
def test_a_time_grid_of_any_kind(flow):
    grid = [0.0, 0.1, 0.5, 1.0]
    expected = SteeredSampler(flow, CRITIC, Steering.qpilots_u(), time_grid=grid, **BOX)
    assert expected.num_steps == 3
    x = NOISE
    for t, u in pairwise(grid):
        x = x + (u - t) * FLOW(OBS, x, torch.full((B, 1), t)).detach()
    plain = SteeredSampler(flow, None, Steering.unsteered(), time_grid=tuple(grid), **BOX)
    assert_close(plain(OBS, NOISE), x.clamp(-1.5, 1.5))
    for same in (np.array(grid), torch.tensor(grid), np.float32(grid)):
        sampler = SteeredSampler(flow, CRITIC, Steering.qpilots_u(), time_grid=same, **BOX)
        assert_close(sampler(OBS, NOISE), expected(OBS, NOISE))


def test_a_time_grid_assigned_and_taken_back():
    sampler = SteeredSampler(FLOW, CRITIC, Steering.qpilots_u(), **BOX)
    even = sampler(OBS, NOISE)
    sampler.time_grid = [0, 0.2, 1]
    assert sampler.num_steps == 2 and not torch.equal(sampler(OBS, NOISE), even)
    with pytest.raises(ValueError, match="time_grid has 3 times"):
        sampler.num_steps = 10
    sampler.time_grid = None
    sampler.num_steps = 10
    assert torch.equal(sampler(OBS, NOISE), even)


@pytest.mark.parametrize(
    "grid, error",
    [
        ([0.0], ValueError),
        ([0.0, 0.5, 0.5, 1.0], ValueError),
        ([1.0, 0.5, 0.0], ValueError),
        ([0.1, 1.0], ValueError),
        ([0.0, 0.9], ValueError),
        (5, TypeError),
        (["a", "b"], TypeError),
        ([0.0, float("nan"), 1.0], ValueError),
    ],
)
def test_bad_time_grids(grid, error):
    with pytest.raises(error, match="time_grid"):
        SteeredSampler(FLOW, CRITIC, Steering.qpilots_u(), time_grid=grid)


def test_a_time_grid_beside_other_num_steps():
    with pytest.raises(ValueError, match="num_steps is 7, but time_grid has 3 times"):
        SteeredSampler(FLOW, CRITIC, Steering.qpilots_u(), num_steps=7, time_grid=[0, 0.5, 1])
    with pytest.raises(ValueError, match="step_weights has 10 entries"):
        SteeredSampler(FLOW, CRITIC, Steering(step_weights=(1.0,) * 10), time_grid=[0, 0.5, 1])


def test_final_values_of_a_case_do_not_depend_on_the_backend(backend):
    steering = replace(Steering.qpilots_u(), final_steps=2, final_step_size=0.2)
    case = make_case(steering)
    assert_close(case.run(backend), case.expected())


NOWHERE = replace(Steering.qpilots_u(), window=(0.31, 0.39))


@pytest.mark.parametrize("members", [3, 10])
@needs_cpu
def test_final_steps_of_a_row_have_the_same_bits_in_any_batch(members):
    torch.manual_seed(0)
    flow, critic = FlowMLP(40, 25, (8, 8)), CriticEnsemble(40, 25, members, (8, 8))
    sampler = SteeredSampler(flow, critic, replace(Steering.qpilots_u(), final_steps=3), num_steps=2)
    obs, noise = torch.randn(64, 40), torch.randn(64, 25)
    alone = torch.cat([sampler(obs[i : i + 1], noise[i : i + 1]) for i in range(64)])
    assert torch.equal(sampler(obs, noise), alone)


def test_the_gate_of_a_steering_that_steers_nowhere():
    sampler = SteeredSampler(FlowMLP(3, 2, (8,)), CriticEnsemble(3, 2, 2, (8,)), NOWHERE, num_steps=10)
    with pytest.raises(ValueError, match="steers at no step"):
        calibrate_gate(sampler, torch.randn(4, 3))


@pytest.mark.parametrize("steering, steps", [(NOWHERE, 10), (Steering.qpilots_u(), 1)])
def test_a_steering_that_steers_nowhere_says_so(steering, steps):
    flow, critic = FlowMLP(3, 2, (8,)), CriticEnsemble(3, 2, 2, (8,))
    with pytest.warns(UserWarning, match=f"none of the {steps} steps is steered") as caught:
        sampler = SteeredSampler(flow, critic, steering, num_steps=steps)
        sampler.num_steps = steps
    assert len(caught) == 1 and caught[0].filename == __file__
