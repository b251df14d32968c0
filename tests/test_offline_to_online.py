"""The offline-to-online example end to end on a tiny maze: every method trains, acts, and goes on from a checkpoint."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("ogbench")
TASK = "pointmaze-medium-navigate-singletask-task1-v0"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny networks: more threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example's modules and a dataset of three short episodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from examples.offline_to_online import config, generate, report, run, tasks

        data = tmp_path_factory.mktemp("data") / "maze.npz"
        generate.generate("pointmaze-medium-navigate-v0", 3, data, steps=40)

        def settings(method, out, **changes):
            defaults = dict(
                task=TASK, method=method, data=str(data), out=str(out), chunk=5, offline_steps=3, online_steps=7,
                batch_size=8, hidden_dim=8, hidden_layers=2, num_critics=2, num_steps=3, candidates=2, num_samples=2,
                eval_every=100, eval_episodes=1, checkpoint_every=4, log_every=2,
            )  # fmt: skip
            return config.Config(**(defaults | changes))

        yield dict(config=config, run=run, tasks=tasks, report=report, settings=settings)


def test_fifty_tasks_are_named(example):
    tasks = example["config"].TASKS
    assert len(set(tasks)) == 50
    assert example["config"].split_task(tasks[-1]) == ("puzzle-4x4", "puzzle-4x4-play-v0")
    with pytest.raises(ValueError, match="task is 'cube'"):
        example["config"].Config(task="cube")


def test_chunks_stop_at_a_success_and_stay_in_their_episode(example):
    masks = np.array([1, 1, 0, 1, 1, 1, 1, 1], np.float32)
    rows = {
        "observations": np.arange(8, dtype=np.float32)[:, None], "actions": np.arange(8, dtype=np.float32)[:, None],
        "rewards": masks * -1, "masks": masks, "terminals": np.array([0, 0, 0, 0, 1, 0, 0, 1], np.float32),
    }  # fmt: skip
    buffer = example["tasks"].ReplayBuffer(rows, chunk=2, discount=0.5, capacity=4, seed=0)
    assert buffer.starts == [0, 1, 2, 5]
    batch = buffer.sample(64)
    expected = {0: (-1.5, 0.25), 1: (-1.0, 0.0), 2: (0.0, 0.0), 5: (-1.5, 0.25)}
    for obs, actions, reward, discount, next_obs in zip(*(v.tolist() for v in vars(batch).values())):
        assert (reward, discount) == expected[obs[0]]
        assert actions == [obs[0], obs[0] + 1] and next_obs == [obs[0] + 2]


@pytest.mark.parametrize("method", ["bc", "best_of_n", "qpilots_u", "qpilots_m", "qgf", "fql", "fbrac"])
def test_every_method_runs_both_phases(example, method, tmp_path):
    config = example["settings"](method, tmp_path)
    run = example["run"].Run(config)
    before = {name: [p.clone() for p in network.parameters()] for name, network in run.agent.networks.items()}
    run.go()
    for name, parameters in before.items():
        moved = any(not torch.equal(p, q) for p, q in zip(parameters, run.agent.networks[name].parameters()))
        assert moved == (method != "bc" or name == "flow"), name
    assert run.buffer.size > run.buffer.offline_size
    with (config.folder / "eval.csv").open() as file:
        assert [row["phase"] for row in csv.DictReader(file)] == ["offline", "online"]
    example["report"].write_table(tmp_path, tmp_path)
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 3


def test_a_run_goes_on_from_its_checkpoint_exactly(example, tmp_path):
    settings = example["settings"]
    whole = example["run"].Run(settings("qpilots_m", tmp_path / "whole", offline_steps=8, online_steps=0))
    whole.go()
    part = example["run"].Run(settings("qpilots_m", tmp_path / "part", offline_steps=4, online_steps=0))
    part.go()
    rest = example["run"].Run(settings("qpilots_m", tmp_path / "part", offline_steps=8, online_steps=0))
    rest.go()
    for name, network in whole.agent.networks.items():
        for p, q in zip(network.parameters(), rest.agent.networks[name].parameters()):
            assert torch.equal(p, q), name
    with pytest.raises(ValueError, match="other settings of num_critics"):
        example["run"].Run(settings("qpilots_m", tmp_path / "part", num_critics=3)).go()
