"""The reference's explicit vector-Jacobian products against autograd, and its edge cases."""

from __future__ import annotations

import math

import pytest
import torch

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, Steering, reference
from qpilots_fast.activations import ACTIVATIONS
from qpilots_fast.evaluators import reference_evaluators
from qpilots_fast.spec import BoundNetworks
from qpilots_fast.times import time_features

S, A, B = 7, 5, 4
EXACT = 1e-12  # float64 against float64: a few hundred roundings


@pytest.mark.parametrize("norm", [None, "pre", "post", (None, "pre")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_networks_match_autograd(activation, norm):
    flow = FlowMLP(S, A, (13, 9), activation, norm, "sinusoidal").double()
    critic = CriticEnsemble(S, A, 3, (11, 8), activation, norm).double()
    posterior = MetaFlowMap(S, A, (11, 8), activation, norm, "fourier", 8).double()
    obs, x = torch.randn(B, S).double(), torch.randn(B, A).double().requires_grad_()
    eps, d, t = torch.randn_like(x), torch.randn_like(x), 0.3
    bound = BoundNetworks(flow.bound(), critic.bound(), posterior.bound())
    net = reference_evaluators(bound, obs, torch.float64, "float64")
    weights = torch.randn(3, B).double()
    for (value, pullback), expected, cotangent in (
        (net.flow(x, t), flow(obs, x, torch.full((B, 1), t, dtype=torch.float64)), d),
        (net.critic(x), critic(obs, x), weights),
        (net.posterior(eps, x, t), posterior(obs, eps, x, torch.full((B, 1), t, dtype=torch.float64)), d),
    ):
        (grad,) = torch.autograd.grad(expected, x, cotangent)
        assert (value - expected).abs().max() < EXACT
        assert (pullback(cotangent) - grad).abs().max() < EXACT


@pytest.mark.parametrize("apart", [0, 1, 7])  # in units of the last place
def test_weights_of_members_that_nearly_agree_sum_to_one(apart):
    q = torch.full((7, 1000), 0.1).mul_(torch.rand(1000) + 1)
    for _ in range(apart):
        q[3] = torch.nextafter(q[3], torch.tensor(9.0))
    weights = reference.member_weights(q, "pessimistic", 0.5)
    torch.testing.assert_close(weights.sum(0), torch.ones(1000), rtol=0, atol=1e-5)
    assert (reference.ensemble_std(q) == 0).all() == (apart == 0)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_derivative(kind):
    z = torch.cat([torch.linspace(-8, 8, 101), torch.tensor([-60.0, 60.0])]).double().requires_grad_()
    y = ACTIVATIONS[kind].value(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    inside = z.detach().abs() > 1e-9  # relu's kink
    assert (ACTIVATIONS[kind].derivative(z) - slope).abs()[inside].max() < EXACT
    extreme = torch.tensor([-1e30, -1e4, 1e4, 1e30])
    assert torch.isfinite(ACTIVATIONS[kind].value(extreme)).all()
    assert torch.isfinite(ACTIVATIONS[kind].derivative(extreme)).all()


def test_pessimistic_weights_are_the_gradient_and_sum_to_one():
    q = torch.randn(6, B).double().requires_grad_()
    for aggregation in ("pessimistic", "mean", "min"):
        (grad,) = torch.autograd.grad(reference.aggregate(q, aggregation, 0.7).sum(), q)
        weights = reference.member_weights(q, aggregation, 0.7)
        assert (weights - grad).abs().max() < EXACT
        assert (weights.sum(0) - 1).abs().max() < EXACT


def test_equal_members_and_ties():
    q = torch.full((4, 2), 1.5).double()
    assert torch.equal(reference.member_weights(q, "pessimistic", 0.5), torch.full_like(q, 0.25))
    tied = torch.tensor([[1.0], [0.0], [0.0]]).double()
    assert reference.member_weights(tied, "min", 0.5).flatten().tolist() == [0.0, 0.5, 0.5]
    leaf = q.requires_grad_()
    (grad,) = torch.autograd.grad(reference.aggregate(leaf, "pessimistic", 0.5).sum(), leaf)
    assert torch.equal(grad, torch.full_like(q, 0.25))


def test_row_norm_of_extremes():
    x = torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]])
    assert torch.allclose(reference.row_norm(x).flatten(), torch.tensor([5e30, 5e-30, 0.0]), rtol=1e-6, atol=0)


def test_norm_match_adds_alpha_times_the_velocity():
    v, g = torch.randn(B, A).double(), torch.randn(B, A).double() * 1e3
    steered, report = reference.steer_velocity(v, g, Steering.qpilots_u(alpha=0.3))
    assert ((steered - v).norm(dim=1) / v.norm(dim=1) - 0.3).abs().max() < 1e-9
    assert torch.allclose(report.gradient_norms, g.norm(dim=1)) and not report.nonfinite.any()


def test_zero_and_nonfinite_rows_follow_the_flow():
    v, g = torch.randn(4, A), torch.randn(4, A)
    g[1] = 0
    g[2, 0], g[3, 1] = math.nan, math.inf
    for steering in (Steering.qpilots_u(), Steering.qgf(0.5), Steering.gaf()):
        steered, report = reference.steer_velocity(v, g, steering, torch.zeros(4))
        assert torch.equal(steered[1:], v[1:]) and not torch.equal(steered[0], v[0])
        assert report.nonfinite.tolist() == [False, False, True, True]
        assert report.gradient_norms[1:].tolist() == [0, 0, 0]
    zero_velocity, _ = reference.steer_velocity(torch.zeros(4, A), g, Steering.qpilots_u())
    assert torch.equal(zero_velocity, torch.zeros(4, A))


def test_steered_dims_leave_the_rest_alone():
    v, g = torch.randn(B, A), torch.randn(B, A)
    g[:, 4] = math.nan  # outside: must not matter
    steering = Steering(steered_dims=(0, 2))
    steered, report = reference.steer_velocity(v, g, steering)
    assert torch.equal(steered[:, [1, 3, 4]], v[:, [1, 3, 4]]) and not report.nonfinite.any()
    expected = v[:, [0, 2]] + 0.2 * v[:, [0, 2]].norm(dim=1, keepdim=True) * torch.nn.functional.normalize(g[:, [0, 2]])
    assert torch.allclose(steered[:, [0, 2]], expected, atol=1e-6)
    assert torch.allclose(report.gradient_norms, g[:, [0, 2]].norm(dim=1))


def test_time_features_keep_float64_phase():
    t = torch.tensor([[0.1], [0.7]], dtype=torch.float64)
    features = time_features(t, "sinusoidal", 16)
    angles = [[time * 1e4 * 1e4 ** (-i / 8) for i in range(8)] for time in (0.1, 0.7)]
    expected = torch.tensor([[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]).double()
    assert (features - expected).abs().max() < 1e-7
    fourier = time_features(t, "fourier", 64)
    assert fourier.shape == (2, 64) and abs(fourier[0, 3].item() - math.cos(0.3)) < EXACT


def test_glass_with_one_step_is_tweedie_in_the_mean():
    """At s = 0 the posterior velocity is x + (1 - t) v - xbar, so one Euler step lands on Tweedie's estimate."""
    flow = FlowMLP(S, A, (16,)).double()
    obs, x, eps = torch.randn(B, S).double(), torch.randn(B, A).double(), torch.randn(B, A).double()
    net = reference_evaluators(BoundNetworks(flow.bound()), obs, torch.float64, "float64")
    v, _ = net.flow(x, 0.4)
    draw, _ = reference.glass_draw(net.flow, eps, x, 0.4, 1)
    assert (draw - reference.clean_actions(x, v, 0.4)).abs().max() < EXACT


def test_glass_pullback_matches_autograd():
    flow = FlowMLP(S, A, (16, 8), "silu", "post").double()
    obs, eps, d = torch.randn(B, S).double(), torch.randn(B, A).double(), torch.randn(B, A).double()
    x = torch.randn(B, A).double().requires_grad_()
    net = reference_evaluators(BoundNetworks(flow.bound()), obs, torch.float64, "float64")

    def differentiable(at, t):
        return flow(obs, at, torch.full((B, 1), t, dtype=torch.float64)), None

    for t in (0.0, 0.3, 0.9):
        draw, pullback = reference.glass_draw(net.flow, eps, x.detach(), t, 3)
        xbar = eps
        for i in range(3):
            c = reference.glass_coefficients(t, i / 3)
            v, _ = differentiable(c.p_x * x + c.p_xbar * xbar, c.t_star)
            xbar = xbar + (c.c_x * x + c.c_xbar * xbar + c.c_v * v) / 3
        (grad,) = torch.autograd.grad(xbar, x, d)
        assert (draw - xbar).abs().max() < EXACT and (pullback(d) - grad).abs().max() < EXACT
