"""The demo: its statistics, its shipped policy, and one short run in the real environment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qpilots_fast import SteeredSampler, Steering, demo
from qpilots_fast.ogbench_cube import (
    ACTION_DIM,
    CUBE_OBS,
    OBS_DIM,
    STATE_DIM,
    XYZ_CENTER,
    XYZ_SCALE,
    CubePolicy,
    CubeTasks,
    goal_features,
    new_policy,
    wilson_interval,
)


def test_wilson_interval_against_published_values():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29 by method 3
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        got = wilson_interval(successes, trials)
        assert got == pytest.approx((low, high), abs=5e-5)
    with pytest.raises(ValueError, match="trials is 0"):
        wilson_interval(0, 0)


def test_shipped_policy_ignores_the_goal_unless_steered():
    policy = CubePolicy.load()
    assert torch.count_nonzero(policy.flow.hidden[0].weight[:, STATE_DIM:OBS_DIM]) == 0
    torch.manual_seed(0)
    obs, noise = torch.randn(4, OBS_DIM), torch.randn(4, ACTION_DIM)
    elsewhere = obs.clone()
    elsewhere[:, STATE_DIM:] += 1.0
    plain = SteeredSampler(policy.flow, policy.critic, Steering.unsteered(), backend="reference")
    steered = SteeredSampler(policy.flow, policy.critic, Steering.qpilots_u(0.2), backend="reference")
    assert torch.equal(plain(obs, noise), plain(elsewhere, noise))
    assert (steered(obs, noise) - steered(elsewhere, noise)).abs().max() > 1e-3


def test_steering_raises_the_critics_value():
    policy = CubePolicy.load()
    torch.manual_seed(0)
    obs = torch.randn(64, OBS_DIM)
    values = [
        demo.mean_value(policy, SteeredSampler(policy.flow, policy.critic, s, backend="reference"), obs, 0)
        for s in (Steering.unsteered(), Steering.qpilots_u(0.1), Steering.qpilots_u(0.3))
    ]
    assert values[0] < values[1] < values[2]


def test_policy_survives_saving(tmp_path):
    policy = new_policy((8, 8), (8,), 3, np.zeros(STATE_DIM), np.ones(STATE_DIM))
    policy.save(tmp_path, {"command": "test"})
    again = CubePolicy.load(tmp_path)
    for old, new in ((policy.flow, again.flow), (policy.critic, again.critic)):
        for name, tensor in old.state_dict().items():
            torch.testing.assert_close(new.state_dict()[name], tensor.to(torch.bfloat16).float())
    assert json.loads((tmp_path / "policy.json").read_text())["about"] == {"command": "test"}


def test_goal_features_vanish_at_the_goal():
    state = np.zeros((1, STATE_DIM))
    state[:, CUBE_OBS] = [[1.0, -2.0, 0.2]]  # 0.1 m before the centre, 0.2 m aside, lying on the floor
    np.testing.assert_allclose(goal_features(state, np.array([[0.525, -0.2, 0.02]])), 0.0, atol=1e-12)
    np.testing.assert_allclose(goal_features(state, np.array([[0.535, -0.2, 0.02]])), [[0.1, 0.0, 0.0]], atol=1e-12)


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEEDED", {"no_such_module_here": "some-wheel"})
    assert demo.main([]) == 2
    assert "pip install some-wheel" in capsys.readouterr().err


def test_bad_episode_count_is_refused(capsys):
    assert demo.main(["--episodes", "0"]) == 2
    assert "--episodes is 0" in capsys.readouterr().err


def test_environment_goal_is_what_the_policy_is_shown():
    pytest.importorskip("ogbench")
    tasks = CubeTasks(tasks=(2,))
    states, goals = tasks._reset(seed=3)
    env = tasks.envs[0].unwrapped
    cube = env._data.joint("object_joint_0").qpos[:3]
    np.testing.assert_allclose(goals, [[0.50, 0.0, 0.02]])
    np.testing.assert_allclose(goal_features(states, goals)[0], (goals[0] - cube) * XYZ_SCALE, atol=1e-6)


def test_rollouts_are_reproducible():
    pytest.importorskip("ogbench")
    policy, tasks = CubePolicy.load(), CubeTasks(tasks=(1, 3))
    sampler = SteeredSampler(policy.flow, policy.critic, Steering.qpilots_u(0.2), backend="reference")
    first, second = (tasks.rollout(policy, sampler, rounds=1, seed=11, max_steps=20) for _ in range(2))
    assert len(first.obs) == len(second.obs) == 8
    assert all(torch.equal(a, b) for a, b in zip(first.obs, second.obs))
    assert first.success.shape == (1, 2)


@pytest.fixture
def play_data(tmp_path, monkeypatch):
    """Two made-up episodes of 40 steps; in the first the cube is carried from (0.40, 0) to (0.45, 0.1)."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "ogbench_cube"))
    steps = 40
    qpos = np.zeros((2 * steps, 21), np.float32)
    qpos[:, 14:17] = [0.40, 0.0, 0.02]
    carried = np.linspace(0, 1, 21)[:, None]
    qpos[10:31, 14:17] = [0.40, 0.0, 0.02] + carried * [0.05, 0.1, 0.0] + np.sin(np.pi * carried) * [0.0, 0.0, 0.1]
    qpos[31:steps, 14:17] = [0.45, 0.1, 0.02]
    observations = np.random.default_rng(0).normal(size=(2 * steps, STATE_DIM)).astype(np.float32)
    observations[:, CUBE_OBS] = (qpos[:, 14:17] - np.asarray(XYZ_CENTER)) * XYZ_SCALE
    terminals = np.arange(2 * steps) % steps == steps - 1
    actions = np.random.default_rng(1).uniform(-1, 1, (2 * steps, 5)).astype(np.float32)
    path = tmp_path / "play.npz"
    np.savez(path, observations=observations, actions=actions, qpos=qpos, terminals=terminals)
    from play_data import PlayData

    return PlayData(path, discount=0.99, seed=0, p_future=1.0, goal_jitter=0.0), path


def test_play_rewards_are_ogbenchs_singletask_rewards(play_data):
    pytest.importorskip("ogbench")
    import ogbench.relabel_utils

    data, path = play_data
    goal = np.array([0.45, 0.1, 0.02], np.float32)
    data._sample_goals = lambda index: np.tile(goal, (len(index), 1))
    data.starts = np.array([0, 20, 22, 24, 26, 30, 33])

    class Draw:  # every start once
        integers = staticmethod(lambda high, size: np.arange(size))

    data.rng = Draw()
    batch = data.sample(len(data.starts))

    class Env:  # the one goal, as relabel_dataset reads it
        _reward_task_id, _num_cubes = 1, 1
        _data = type("Data", (), {"mocap_pos": goal[None].astype(np.float64)})
        unwrapped = property(lambda self: self)
        reset = staticmethod(lambda: None)

    file = dict(np.load(path))
    ogbench.relabel_utils.relabel_dataset("cube-single", Env(), file)
    for row, start in enumerate(data.starts):
        expected, discount = 0.0, 1.0
        for i in range(5):
            expected += discount * file["rewards"][start + i]
            discount *= 0.99 * file["masks"][start + i]
        discount *= file["masks"][start + 5]  # a goal reached at the chunk's end is worth 0 from there on
        assert float(batch.rewards[row]) == pytest.approx(expected, rel=1e-5)
        assert float(batch.discounts[row]) == pytest.approx(discount, rel=1e-5)
    assert 0 < int((batch.discounts > 0).sum()) < len(data.starts)


def test_play_goals_are_later_resting_places_and_chunks_stay_in_their_episode(play_data):
    data, _ = play_data
    assert data.starts.max() == 70 and not ((data.starts > 30) & (data.starts < 40)).any()
    goals = data._sample_goals(np.full(200, 5))
    np.testing.assert_allclose(np.unique(goals[:, :2].round(3), axis=0)[-1], [0.45, 0.1], atol=2e-3)
    obs, actions = data.sample_behaviour(8)
    assert torch.count_nonzero(obs[:, STATE_DIM:]) == 0 and actions.shape == (8, ACTION_DIM)


@pytest.mark.slow
def test_quick_demo_runs(tmp_path, capsys):
    for module in ("ogbench", "matplotlib", "rich"):
        pytest.importorskip(module)
    assert demo.main(["--quick", "--episodes", "1", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "QPILOTS-U" in text and "best of" in text and "reference" in text
    assert (tmp_path / "qpilots_demo.png").stat().st_size > 10_000
