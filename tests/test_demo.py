"""The demo: its statistics, its shipped policy, and one short run in the real environment."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from qpilots_fast import MetaFlowMap, SteeredSampler, Steering
from qpilots_fast.demo import command, methods
from qpilots_fast.demo.ogbench_cube import (
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

EXAMPLE = Path(__file__).parents[1] / "examples" / "ogbench_cube"


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
    assert policy.posterior is not None
    for network in (policy.flow, policy.posterior):
        assert torch.count_nonzero(network.hidden[0].weight[:, STATE_DIM:OBS_DIM]) == 0
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
        methods.mean_value(policy, SteeredSampler(policy.flow, policy.critic, s, backend="reference"), obs, 0)
        for s in (Steering.unsteered(), Steering.qpilots_u(0.1), Steering.qpilots_u(0.3))
    ]
    assert values[0] < values[1] < values[2]


@pytest.mark.parametrize("mapped", [False, True])
def test_policy_survives_saving(tmp_path, mapped):
    policy = new_policy((8, 8), (8,), 3, np.zeros(STATE_DIM), np.ones(STATE_DIM))
    if mapped:
        policy.posterior = MetaFlowMap(OBS_DIM, ACTION_DIM, (8, 8), time_embedding="fourier", time_embedding_dim=6)
    policy.save(tmp_path, {"command": "test"})
    again = CubePolicy.load(tmp_path)
    assert list(again.networks) == ["flow", "critic"] + ["posterior"] * mapped
    for key, old in policy.networks.items():
        assert again.networks[key].spec == old.spec
        for name, tensor in old.state_dict().items():
            torch.testing.assert_close(again.networks[key].state_dict()[name], tensor.to(torch.bfloat16).float())
    assert json.loads((tmp_path / "policy.json").read_text())["about"] == {"command": "test"}


def test_shipped_map_draws_from_the_shipped_flows_posterior(monkeypatch):
    pytest.importorskip("ogbench")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from check_posterior import errors, glass_draw

    policy, draws = CubePolicy.load(), 32
    plain = SteeredSampler(policy.flow, None, Steering.unsteered(), backend="reference")
    obs = torch.stack(CubeTasks().rollout(policy, plain, rounds=1, seed=5, max_steps=40).obs)
    torch.manual_seed(0)
    start, t = torch.randn(len(obs), ACTION_DIM), torch.full((len(obs), 1), 0.3)
    x = t * plain(obs, start) + (1 - t) * torch.randn_like(start)
    obs, x, t = (value.repeat_interleave(draws, 0) for value in (obs, x, t))
    noise = torch.randn_like(x)
    with torch.no_grad():
        got = errors(
            policy.posterior(obs, noise, x, t).unflatten(0, (-1, draws)),
            glass_draw(policy, 64)(obs, noise, x, t).unflatten(0, (-1, draws)),
        )
    # check_posterior.py finds 0.43, 0.21 and 1.03 at this time
    assert got["draw error / std"] < 0.6 and got["mean error / std"] < 0.35
    assert 0.9 < got["spread / true"] < 1.2


def test_methods_of_the_table():
    names = [method.name for method in methods.standard_methods()]
    assert names[0] == "unsteered" and names[-1] == "QPILOTS-M  alpha 0.2, N=4"
    steering = methods.standard_methods()[-1].steering
    assert steering == Steering.qpilots_m() and methods.draws_method(16).steering.num_samples == 16
    assert [m.name for m in methods.standard_methods(posterior=False)] == names[:-1]
    # what is not on U's curve over alpha has no place on it
    assert [m.alpha for m in methods.standard_methods((0.2,))] == [0.0, None, 0.2, None, None]


def test_goal_features_vanish_at_the_goal():
    state = np.zeros((1, STATE_DIM))
    state[:, CUBE_OBS] = [[1.0, -2.0, 0.2]]  # 0.1 m before the centre, 0.2 m aside, lying on the floor
    np.testing.assert_allclose(goal_features(state, np.array([[0.525, -0.2, 0.02]])), 0.0, atol=1e-12)
    np.testing.assert_allclose(goal_features(state, np.array([[0.535, -0.2, 0.02]])), [[0.1, 0.0, 0.0]], atol=1e-12)


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    monkeypatch.setattr(command, "NEEDED", {"no_such_module_here": "some-wheel"})
    assert command.main([]) == 2
    assert "pip install some-wheel" in capsys.readouterr().err


def test_bad_episode_count_is_refused(capsys):
    assert command.main(["--episodes", "0"]) == 2
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
    chosen = [
        m for m in methods.standard_methods((0.2,))[2:] if m.steering.window is None
    ]  # U and M, whose posterior draws are random too
    first, second = (
        list(methods.compare(policy, tasks, chosen, 1, seed=11, backend="reference", max_steps=20)) for _ in range(2)
    )
    assert len(chosen) == len(first) == 2
    for a, b in zip(first, second):
        assert len(a.rollouts.obs) == len(b.rollouts.obs) == 8 and a.rollouts.success.shape == (1, 2)
        assert all(torch.equal(x, y) for x, y in zip(a.rollouts.obs, b.rollouts.obs))
        assert a.value == b.value
    # every method meets the same starts
    assert all(torch.equal(first[0].rollouts.obs[i], first[1].rollouts.obs[i]) for i in range(2))


def test_a_sweep_in_one_batch_is_each_strength_alone():
    pytest.importorskip("ogbench")
    policy, alphas = CubePolicy.load(), (0.2, 0.5)
    swept = methods.sweep(policy, CubeTasks((1,), copies=3), alphas, 1, seed=11, backend="reference", max_steps=20)
    assert [outcome.method.alpha for outcome in swept] == [0.0, *alphas]
    alone = methods.compare(
        policy, CubeTasks((1,)), [outcome.method for outcome in swept], 1, seed=11, backend="reference", max_steps=20
    )
    for together, single in zip(swept, alone, strict=True):
        assert np.array_equal(together.rollouts.steps, single.rollouts.steps)
        torch.testing.assert_close(
            torch.stack(together.rollouts.obs), torch.stack(single.rollouts.obs), rtol=0, atol=1e-3
        )
        assert together.value == pytest.approx(single.value, abs=1e-3)


def test_timings_list_every_method():
    policy = CubePolicy.load()
    rows = [row for row in methods.timings(policy, 0.0) if row.seconds]
    assert {row.backend for row in rows} >= {"reference"}
    assert all(list(row.seconds) == ["unsteered", "QPILOTS-U", "QPILOTS-M, N=4"] for row in rows)
    policy.posterior = None
    assert all("QPILOTS-M, N=4" not in row.seconds for row in methods.timings(policy, 0.0))


def test_evaluation_keeps_the_rows_it_does_not_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import evaluate

    table = (EXAMPLE / "evaluation.csv").read_text()
    (tmp_path / "evaluation.csv").write_text(table)
    known = evaluate.read_csv(tmp_path / "evaluation.csv", evaluate.evaluation_methods(methods.ALPHAS, True))
    evaluate.write_csv(list(known.values()), tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text().splitlines() == table.splitlines()
    assert evaluate.read_csv(tmp_path / "missing.csv", []) == {}


@pytest.fixture
def play_data(tmp_path, monkeypatch):
    """Two made-up episodes of 40 steps; in the first the cube is carried from (0.40, 0) to (0.45, 0.1)."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
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
    data.keep_episodes(-1, None)
    assert set(data.starts) == set(range(40, 71))


def test_map_training_resumes_where_it_stopped(play_data, tmp_path, monkeypatch):
    data, _ = play_data
    import train_posterior

    monkeypatch.setattr(train_posterior, "CHECKPOINT_EVERY", 2)
    policy = new_policy((8,), (8,), 2, np.zeros(STATE_DIM), np.ones(STATE_DIM))

    def run(folder: str, steps: int = 6) -> MetaFlowMap:
        args = Namespace(
            out=tmp_path / folder, seed=0, steps=steps, batch=4, lr=1e-3, eager=True,
            consistency="semigroup", consistency_weight=1.0, endpoint_fraction=0.3,
        )  # fmt: skip
        data.seed(0)
        return train_posterior.train(policy, data, args)

    def save_and_stop(state: train_posterior.Run, *rest: object) -> None:
        save(state, *rest)
        if state.step == 4:
            raise KeyboardInterrupt

    whole, save = run("whole"), train_posterior.Run.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_posterior.Run, "save", save_and_stop)
        run("resumed")
    resumed = run("resumed")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    assert torch.count_nonzero(whole.hidden[0].weight[:, STATE_DIM:OBS_DIM]) == 0
    with pytest.raises(SystemExit, match="other settings of steps"):
        run("whole", steps=8)


@pytest.mark.slow
def test_quick_demo_runs(tmp_path, capsys):
    for module in ("ogbench", "matplotlib", "rich"):
        pytest.importorskip(module)
    assert command.main(["--quick", "--episodes", "1", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "QPILOTS-U" in text and "QPILOTS-M" in text and "best of" in text and "reference" in text
    assert (tmp_path / "qpilots_demo.png").stat().st_size > 10_000
