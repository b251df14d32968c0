"""The GLASS teacher against quadrature, and the meta flow map loss where the exact map is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import FlowMLP, MetaFlowMap, Steering
from qpilots_fast.meta_flow_map import CONSISTENCIES, glass_velocity, meta_flow_map_loss
from qpilots_fast.reference import Evaluators, glass_coefficients, glass_draw, steering_gradient

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = [(0.0, 0.0), (0.0, 0.6), (0.7, 0.0), (0.3, 0.5), (0.5, 0.3), (0.9, 0.2), (0.2, 0.9), (0.9, 0.9), (0.5, 0.95)]
TOLERANCE = {
    "quadrature": 1e-6,  # float64 teacher against the density alone
    "exact map": 1e-20,  # squared residual of the loss at its solution, float64
    "trained map": 0.1,  # RMS; measured 0.06 (Eulerian) and 0.08 (semigroup), 0.65 untrained
}
TRAINING_STEPS = 1000


def _load_closed_form():
    path = Path(__file__).parents[1] / "examples" / "meta_flow_map" / "closed_form.py"
    spec = importlib.util.spec_from_file_location("closed_form", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["closed_form"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


GaussianMixture = _load_closed_form().GaussianMixture


def mixture(dim: int) -> GaussianMixture:
    means = torch.tensor([[0.6, -0.2], [-0.5, 0.4], [0.1, 0.1]], dtype=F64)[:, :dim]
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=F64), means, torch.tensor([0.2, 0.1, 0.3], dtype=F64))


def look(x1: Tensor, time: float, generator: torch.Generator) -> Tensor:
    """time x1 + (1 - time) noise."""
    return time * x1 + (1 - time) * torch.randn(x1.shape, generator=generator, dtype=x1.dtype)


def grid_points(dim: int) -> Tensor:
    axis = torch.linspace(-2.5, 2.5, 4001 if dim == 1 else 401, dtype=F64)
    return axis.unsqueeze(-1) if dim == 1 else torch.cartesian_prod(axis, axis)


def quadrature_mean(base, looks: list[tuple[float, Tensor]]) -> Tensor:
    """E[x1 | every look] by the trapezoid rule over the prior density; a look is (time, state [B, A])."""
    grid = grid_points(looks[0][1].shape[-1])
    log_weight = base.log_density(grid).expand(len(looks[0][1]), -1)
    for time, state in looks:
        log_weight = log_weight - (state.unsqueeze(1) - time * grid).square().sum(-1) / (2 * (1 - time) ** 2)
    return torch.softmax(log_weight, -1) @ grid


# ---------------------------------------------------------------- the teacher


@pytest.mark.parametrize("t, s", TIMES)
@pytest.mark.parametrize("dim", [1, 2])
def test_glass_velocity_is_the_posterior_velocity(dim, t, s):
    base, generator = mixture(dim), torch.Generator().manual_seed(0)
    x1 = base.sample(16, generator)
    x, xbar = look(x1, t, generator), look(x1, s, generator)
    column = torch.ones(16, 1, dtype=F64)
    w = glass_velocity(base.velocity, None, xbar, x, t * column, s * column)
    expected = (quadrature_mean(base, [(t, x), (s, xbar)]) - xbar) / (1 - s)
    assert (w - expected).abs().max() < TOLERANCE["quadrature"]


@pytest.mark.parametrize("t", [0.0, 0.4, 0.95])
def test_the_closed_form_base_is_right(t):
    base, generator = mixture(2), torch.Generator().manual_seed(0)
    x = look(base.sample(16, generator), t, generator)
    mean = quadrature_mean(base, [(t, x)])
    torch.testing.assert_close(base.velocity(None, x, t), (mean - x) / (1 - t), atol=1e-8, rtol=0)
    torch.testing.assert_close(base.posterior(x, t).mean, mean, atol=1e-9, rtol=0)


def test_glass_velocity_has_its_limits():
    base, generator = mixture(2), torch.Generator().manual_seed(0)
    x, xbar = (torch.randn(16, 2, generator=generator, dtype=F64) for _ in range(2))
    time, zero, one = torch.rand(16, 1, generator=generator, dtype=F64), torch.zeros(16, 1), torch.ones(16, 1)

    def w(t, s):
        return glass_velocity(base.velocity, None, xbar, x, t, s)

    torch.testing.assert_close(w(time, zero), x + (1 - time) * base.velocity(None, x, time) - xbar)
    torch.testing.assert_close(w(zero, time), base.velocity(None, xbar, time))
    torch.testing.assert_close(w(time, one), base.velocity(None, xbar, one), atol=0.05, rtol=0.01)
    assert w(one, one).isfinite().all()


def test_glass_coefficients_of_tensors_are_those_of_numbers():
    times = torch.tensor([0.0, 1e-9, 0.3, 0.999, 1.0], dtype=F64)
    t, s = (grid.reshape(-1) for grid in torch.meshgrid(times, times, indexing="ij"))
    together = glass_coefficients(t, s)
    for index in range(len(t)):
        alone = glass_coefficients(float(t[index]), float(s[index]))
        for name, value in vars(alone).items():
            assert float(getattr(together, name)[index]) == pytest.approx(value, rel=1e-13, abs=1e-300)


def with_pullback(flow):
    """(x, t) -> velocity and its pullback, as reference.glass_draw asks."""

    def call(x, t):
        leaf = x.detach().requires_grad_()
        v = flow(None, leaf, t)
        return v.detach(), lambda d_v: torch.autograd.grad(v, leaf, d_v, retain_graph=True)[0]

    return call


def test_one_glass_step_is_the_posterior_mean_and_many_are_a_draw():
    base, generator = mixture(2), torch.Generator().manual_seed(0)
    t, count = 0.6, 4000
    x = look(base.sample(4, generator), t, generator)
    mean = x + (1 - t) * base.velocity(None, x, t)
    eps = torch.randn(4, 2, generator=generator, dtype=F64)
    torch.testing.assert_close(glass_draw(with_pullback(base.velocity), eps, x, t, 1)[0], mean)

    eps = torch.randn(4 * count, 2, generator=generator, dtype=F64)
    rows = x.repeat_interleave(count, 0)
    draws = glass_draw(lambda x, t: (base.velocity(None, x, t), None), eps, rows, t, 256)[0].view(4, count, 2)
    posterior = base.posterior(x, t)
    std = posterior.variance.sqrt()
    assert ((draws.mean(1) - posterior.mean) / std).abs().max() < 0.08  # 5 standard errors
    assert (draws.std(1) / std - 1).abs().max() < 0.05  # Euler narrows the draws by O(1/256)


# ---------------------------------------------------------------- the loss where its solution is known

MEAN, STD = 0.2, 0.5


class GaussianMap(nn.Module):
    """Exact vhat for x1 ~ N(MEAN, STD^2), plus delta (u - s), an error off the diagonal alone."""

    def __init__(self, delta: float = 0.0) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.tensor(delta, dtype=F64))

    def average_velocity(self, obs, xbar, x, t, s, u):
        # inside the posterior N(mean, var) the flow is affine: X_{s,u} = u mean + std_u / std_s (xbar - s mean)
        precision = t**2 / (1 - t) ** 2 + 1 / STD**2
        mean, var = (t * x / (1 - t) ** 2 + MEAN / STD**2) / precision, 1 / precision
        std_s, std_u = ((v**2 * var + (1 - v) ** 2).sqrt() for v in (s, u))
        slope = ((u + s) * var - (2 - u - s)) / (std_s * (std_u + std_s))
        return mean + slope * (xbar - s * mean) + self.delta * (u - s)

    def forward(self, obs, xbar, x, t, s=0.0, u=1.0):
        return xbar + (u - s) * self.average_velocity(obs, xbar, x, *(torch.full_like(x[:, :1], v) for v in (t, s, u)))


GAUSSIAN = GaussianMixture(*(torch.tensor(v, dtype=F64) for v in ([1.0], [[MEAN]], [STD])))


def gaussian_loss(network, consistency, count=512, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    x1 = GAUSSIAN.sample(count, generator)
    settings = {"generator": generator, "consistency": consistency} | settings
    return meta_flow_map_loss(network, GAUSSIAN.velocity, torch.zeros(count, 0), x1, **settings)


@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_loss_vanishes_at_the_exact_map(consistency):
    assert gaussian_loss(GaussianMap(), consistency) < TOLERANCE["exact map"]


@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_loss_pulls_an_error_off_the_diagonal_back(consistency):
    network = GaussianMap(delta=0.3)
    assert gaussian_loss(network, consistency, consistency_weight=0.0) < TOLERANCE["exact map"]  # diagonal sees nothing
    optimiser = torch.optim.SGD(network.parameters(), 1.0)
    for seed in range(100):
        optimiser.zero_grad()
        gaussian_loss(network, consistency, seed=seed).backward()
        optimiser.step()
    assert network.delta.abs() < 1e-3


def test_eulerian_target_carries_no_gradient():
    # the residual is 2 delta (u-s), half of it from the target: with the target fixed, delta dL/ddelta = L, else 2 L
    network = GaussianMap(delta=0.3)
    loss = gaussian_loss(network, "eulerian", diagonal_weight=0.0)
    loss.backward()
    torch.testing.assert_close(network.delta.grad * network.delta.detach(), loss.detach())


@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_slow_network_makes_the_consistency_targets(consistency):
    fast, slow = GaussianMap(), GaussianMap(delta=0.3)
    loss = gaussian_loss(fast, consistency, slow=slow)
    assert loss > 1e-3
    loss.backward()
    assert fast.delta.grad.abs() > 0 and slow.delta.grad is None


def train(consistency: str, steps: int) -> MetaFlowMap:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    base = GAUSSIAN.to(torch.float32)
    network = MetaFlowMap(0, 1, (64, 64))
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    for _ in range(steps):
        x1 = base.sample(256, generator)
        loss = meta_flow_map_loss(
            network, base.velocity, torch.zeros(256, 0), x1, consistency=consistency, generator=generator
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network


def map_error(network: MetaFlowMap) -> float:
    """RMS distance of the one-call draw from the exact one at t <= 0.9."""
    generator = torch.Generator().manual_seed(1)
    t = 0.9 * torch.rand(1000, 1, generator=generator)
    x = t * GAUSSIAN.sample(1000, generator).float() + (1 - t) * torch.randn(1000, 1, generator=generator)
    eps = torch.randn(1000, 1, generator=generator)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    exact = eps + GaussianMap().average_velocity(None, eps.double(), x.double(), t.double(), zero, one)
    with torch.no_grad():
        return (network(torch.zeros(1000, 0), eps, x, t) - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_training_finds_the_exact_map(consistency):
    untrained, trained = map_error(train(consistency, 0)), map_error(train(consistency, TRAINING_STEPS))
    assert untrained > 0.5 and trained < TOLERANCE["trained map"]


def test_training_repeats_from_its_seed():
    first, second = (train("eulerian", 5).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- M's gradient with the exact map


def m_gradient(critic_slope, critic_value, x: Tensor, t: float, count: int, tau: float) -> Tensor:
    """Steering's gradient at [B, 1] states with a critic given by its value and slope."""
    steering = Steering(estimate="mfm", num_samples=count, tau=tau, aggregation="mean", clip="none")
    exact = GaussianMap()

    def posterior(eps, state, time):
        leaf = state.detach().requires_grad_()
        draw = exact(None, eps, leaf, time)
        return draw.detach(), lambda d_a: torch.autograd.grad(draw, leaf, d_a)[0]

    def critic(a):
        return critic_value(a).view(1, -1), lambda weights: weights.view(-1, 1) * critic_slope(a)

    net = Evaluators(with_pullback(GAUSSIAN.velocity), critic, posterior)
    eps = torch.randn(len(x), count, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    v, pullback = net.flow(x, t)
    return steering_gradient(net, steering, x, v, pullback, t, eps, (-1.0, 1.0))[0]


def gaussian_posterior(x: Tensor, t: float) -> tuple[Tensor, float, float]:
    """Mean, variance and d mean / dx of x1 | x_t = x."""
    posterior = GAUSSIAN.posterior(x, t)
    variance = posterior.variance[0, 0].item()
    return posterior.mean, variance, variance * t / (1 - t) ** 2


def test_m_gradient_is_exact_for_a_linear_critic():
    x, t, tau = torch.linspace(-1, 1, 7, dtype=F64).unsqueeze(-1), 0.4, 1.7
    g = m_gradient(lambda a: torch.full_like(a, 3.0), lambda a: 3 * a, x, t, 1, tau)
    torch.testing.assert_close(g, torch.full_like(x, 3 * tau * gaussian_posterior(x, t)[2]))


def test_m_gradient_converges_to_the_log_tilt_potential():
    # Q = -k a^2 / 2: E exp(tau Q) is Gaussian, V = -tau k mean^2 / (2 (1 + tau k var)) + const
    x, t, tau, k = torch.linspace(-1, 1, 200, dtype=F64).unsqueeze(-1), 0.4, 2.0, 4.0
    mean, variance, slope = gaussian_posterior(x, t)
    exact = -tau * k * mean * slope / (1 + tau * k * variance)
    errors = [
        (m_gradient(lambda a: -k * a, lambda a: -k * a**2 / 2, x, t, n, tau) - exact).square().mean().sqrt().item()
        for n in (1, 16, 256)
    ]
    assert errors[1] < errors[0] / 2.5 and errors[2] < errors[1] / 2.5 and errors[2] < 0.15 * exact.abs().max()


# ---------------------------------------------------------------- draws, gradients, errors


class Recorder(nn.Module):
    """Remembers the times that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def average_velocity(self, obs, xbar, x, t, s, u):
        self.calls.append((t, s, u))
        return xbar * 0


def test_times_are_drawn_as_stated():
    recorder = Recorder()
    gaussian_loss(recorder, "semigroup", count=20000, zero_time_probability=0.25, endpoint_fraction=0.04)
    t, s, u = recorder.calls[-1]
    diagonal_s, diagonal_u = recorder.calls[-2][1:]
    assert torch.equal(diagonal_s, diagonal_u) and abs(diagonal_s.mean() - 0.5) < 0.01
    assert abs((t == 0).double().mean() - 0.25) < 0.01
    assert abs(t[t > 0].mean() - 1 / 3) < 0.01  # E[U^2]
    ends = (s == 0) & (u == 1)
    assert abs(ends.double().mean() - 0.04) < 0.005
    assert (s <= u).all() and abs((u - s)[~ends].mean() - 1 / 3) < 0.01


@pytest.mark.parametrize("consistency", CONSISTENCIES)
@pytest.mark.parametrize("time_embedding", ["raw", "fourier", "sinusoidal"])
def test_gradients_reach_the_map_alone(consistency, time_embedding):
    flow = FlowMLP(3, 2, (16, 16))
    network = MetaFlowMap(3, 2, (16, 16), layer_norm="pre", time_embedding=time_embedding)
    obs, actions = torch.randn(9, 3, requires_grad=True), torch.randn(9, 2, requires_grad=True)
    meta_flow_map_loss(network, flow, obs.detach(), actions, consistency=consistency).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())
    assert actions.grad is None and all(p.grad is None for p in flow.parameters())


def test_obs_may_be_any_object():
    class Reader(GaussianMap):
        def average_velocity(self, obs, xbar, *rest):
            return super().average_velocity(None, xbar, *rest) + obs["offset"]

    x1 = GAUSSIAN.sample(8, torch.Generator().manual_seed(0))
    flow = lambda obs, x, t: GAUSSIAN.velocity(None, x, t) + 0 * obs["offset"]  # noqa: E731
    assert meta_flow_map_loss(Reader(), flow, {"offset": 0.5}, x1) > 0.1


def test_loss_follows_its_generator():
    first, second, other = (gaussian_loss(GaussianMap(0.3), "eulerian", seed=seed) for seed in (3, 3, 4))
    assert first == second and first != other


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"consistency": "lagrangian"}, "consistency is 'lagrangian'; expected one of 'eulerian', 'semigroup'"),
        ({"zero_time_probability": 1.5}, "zero_time_probability is 1.5; expected a number in"),
        ({"endpoint_fraction": -0.1}, "endpoint_fraction is -0.1; expected a finite number >= 0"),
        ({"consistency_weight": float("nan")}, "consistency_weight is nan"),
        ({"actions": torch.zeros(4)}, r"actions has shape \(4,\); expected \[B, A\]"),
        ({"actions": torch.zeros(0, 1)}, "expected .* B >= 1"),
        ({"obs": torch.zeros(5, 0)}, "expected the same number of rows"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    arguments = {"obs": torch.zeros(4, 0), "actions": torch.zeros(4, 1)} | settings
    with pytest.raises(ValueError, match=message):
        meta_flow_map_loss(GaussianMap(), GAUSSIAN.velocity, **arguments)


@pytest.mark.parametrize("name", ["posterior", "slow"])
def test_a_network_without_average_velocity_is_refused(name):
    networks = {"posterior": GaussianMap()} | {name: FlowMLP(0, 1, (4,))}
    with pytest.raises(TypeError, match=f"{name} is FlowMLP, which has no average_velocity"):
        meta_flow_map_loss(**networks, flow=GAUSSIAN.velocity, obs=torch.zeros(4, 0), actions=torch.zeros(4, 1))
