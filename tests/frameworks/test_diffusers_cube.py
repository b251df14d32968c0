"""The example's diffusion policy, sampled by diffusers' DDIM: what steering it does at states of the environment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed: make test-integrations")
pytest.importorskip("ogbench", reason="ogbench is not installed")

from examples.diffusers_cube.evaluate import act, steered_scheduler
from examples.diffusers_cube.policy import HORIZON, STEP_WIDTH, load, new_scheduler
from qpilots_fast.demo.ogbench_cube import ACTION_DIM, CHUNK, STATE_DIM, CubePolicy, CubeTasks


@pytest.fixture(scope="module")
def cube() -> CubePolicy:
    return CubePolicy.load()


@pytest.fixture(scope="module")
def obs(cube) -> Tensor:
    """Starts of the five tasks, and what is seen of them with random actions."""
    act_at_random = lambda obs, noise: noise[:, :ACTION_DIM].clamp(-1, 1)  # noqa: E731
    return torch.stack(CubeTasks().rollout(cube, act_at_random, 1, 3, max_steps=40).obs)


def test_the_critics_value_steered_chunks_more_and_the_policy_knows_no_goal(cube, obs):
    network, noise = load(), torch.randn(len(obs), HORIZON * STEP_WIDTH)
    value = lambda actions: cube.critic(obs, actions).mean(0)  # noqa: E731
    plain = act(network, new_scheduler(), obs, noise)
    elsewhere = obs.clone()
    elsewhere[:, STATE_DIM:] += 1.0
    assert torch.equal(act(network, new_scheduler(), elsewhere, noise), plain)
    scheduler = steered_scheduler(cube, 0.3)
    steered = act(network, scheduler, obs, noise)
    assert (value(steered) - value(plain)).mean() > 0.1 and (value(steered) > value(plain)).float().mean() > 0.9
    assert not torch.equal(act(network, scheduler, elsewhere, noise), steered)
    assert torch.equal(act(network, steered_scheduler(cube, 0.0), obs, noise), plain)
    assert steered.shape == (len(obs), ACTION_DIM) and CHUNK < HORIZON and steered.abs().max() <= 1
