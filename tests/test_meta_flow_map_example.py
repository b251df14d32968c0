"""The stored meta flow map of examples/meta_flow_map: what docs/meta_flow_maps.md claims, on fewer states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def example():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))
        from examples.meta_flow_map import gradient, posterior, problem

        yield dict(gradient=gradient, posterior=posterior, problem=problem)
    torch.set_num_threads(threads)


def test_one_call_draws_follow_the_true_posterior(example):
    truth, eulerian, semigroup = example["posterior"].measure(60, 600, ["eulerian", "semigroup"], ())
    for line, mean_error, weight_error in ((eulerian, 0.15, 0.08), (semigroup, 0.2, 0.1)):
        assert truth["mean error / std"] < line["mean error / std"] < mean_error
        assert abs(line["spread / true"] - 1) < 0.06
        assert line["mode weights, TV"] < weight_error


def test_exact_gradient_is_the_derivative_of_the_potential(example):
    # central differences of V by its own quadrature
    problem = example["problem"]
    states = problem.states_at(torch.full((3, 1), 0.5, dtype=torch.float64), torch.Generator().manual_seed(0))
    axis = torch.linspace(-2, 2, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    critic, step = problem.supported, 1e-5

    def potential(x):
        log_posterior = problem.BASE.log_density(grid) - (x[:, None] - 0.5 * grid).square().sum(-1) / (2 * 0.5**2)
        return torch.logsumexp(log_posterior + problem.TAU * critic(grid), -1) - torch.logsumexp(log_posterior, -1)

    nudges = step * torch.eye(2, dtype=torch.float64)
    slopes = [(potential(states.x + nudge) - potential(states.x - nudge)) / (2 * step) for nudge in nudges]
    torch.testing.assert_close(problem.exact_gradient(critic, states), torch.stack(slopes, -1), atol=1e-7, rtol=1e-6)


def test_m_beats_u_where_the_posterior_is_bimodal_and_gains_by_draws(example):
    gradient, problem = example["gradient"], example["problem"]
    states = problem.states_at(torch.full((150, 1), 0.5, dtype=torch.float64), torch.Generator().manual_seed(0))
    rows, critic = states.bimodal, problem.supported
    exact = problem.exact_gradient(critic, states, points=121)
    network, settings = example["posterior"].stored_map().double(), gradient.estimators()

    def cosine(setting):
        g = gradient.estimate(setting, critic, network, states.x, 0.5, seed=0)
        return torch.cosine_similarity(g, exact, dim=-1)[rows].mean().item()

    few, some, many = (cosine(replace(settings["QPILOTS-M"], num_samples=n)) for n in (1, 8, 64))
    assert few < some < many and many > 0.75
    assert some > cosine(settings["QPILOTS-U"]) + 0.3
