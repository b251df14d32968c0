"""The offline-to-online example end to end on a tiny maze: every method trains, acts, and goes on from a checkpoint."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from qpilots_fast import Steering
from qpilots_fast.objectives import td_loss

pytest.importorskip("ogbench")
TASK = "pointmaze-medium-navigate-singletask-task1-v0"
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example's modules and a dataset of three short episodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from examples.offline_to_online import (
            compare,
            config,
            generate,
            ladder,
            pretrain,
            report,
            run,
            speed,
            sweep,
            tasks,
        )

        data = tmp_path_factory.mktemp("data") / "maze.npz"
        generate.generate("pointmaze-medium-navigate-v0", 3, data, steps=40)

        def settings(method, out, **changes):
            defaults = dict(
                task=TASK, method=method, data=str(data), out=str(out), chunk=5, offline_steps=3, online_steps=7,
                batch_size=8, hidden_dim=8, hidden_layers=2, num_critics=2, num_steps=3, candidates=2, num_samples=2,
                eval_every=100, eval_episodes=1, checkpoint_every=4, log_every=2,
            )  # fmt: skip
            return config.Config(**(defaults | changes))

        flow = tmp_path_factory.mktemp("pretrained") / "flow.safetensors"
        pretrain.pretrain(settings("bc", "unused"), flow, steps=4, posterior_steps=2, batch_size=8, rate=1e-3)
        modules = (compare, config, ladder, pretrain, report, run, speed, sweep, tasks)
        names = {module.__name__.rpartition(".")[2]: module for module in modules}
        yield names | dict(settings=settings, flow=str(flow), data=str(data))


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
    assert buffer.starts.tolist() == [0, 1, 2, 5]
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


@pytest.mark.parametrize("method", ["bc", "qpilots_m", "fql", "fbrac"])
def test_a_pretrained_flow_stays_as_it_is_except_under_fbrac(example, method, tmp_path):
    config = example["settings"](method, tmp_path, pretrained=example["flow"])
    run = example["run"].Run(config)
    frozen = {"flow", "posterior", "slow_posterior"} if method != "fbrac" else set()
    before = {name: [p.clone() for p in network.parameters()] for name, network in run.agent.networks.items()}
    with safe_open(example["flow"], "pt") as file:
        assert torch.equal(run.agent.flow.output.weight, file.get_tensor("flow.output.weight"))
    run.go()
    for name, parameters in before.items():
        moved = any(not torch.equal(p, q) for p, q in zip(parameters, run.agent.networks[name].parameters()))
        assert moved == (name not in frozen and method != "bc"), name
    rows = list(csv.DictReader((config.folder / "eval.csv").open()))
    assert [(row["phase"], row["step"]) for row in rows] == [("offline", "3"), ("online", "10")]
    resumed = example["run"].Run(config)
    resumed.go()
    assert list(csv.DictReader((config.folder / "eval.csv").open())) == rows


def test_a_pretrained_file_of_another_shape_is_refused(example, tmp_path):
    with pytest.raises(ValueError, match=r"flow.hidden.0.weight; expected .* give pretrain.py the same"):
        example["run"].Run(example["settings"]("bc", tmp_path, pretrained=example["flow"], hidden_dim=16))


def test_the_target_of_the_critics_is_that_of_the_library(example, tmp_path):
    """The agent splits td_loss to compile the regression alone; loss and gradients are those of td_loss."""
    settings = example["settings"]("qpilots_u", tmp_path, pretrained=example["flow"], initial_value=-7.0)
    run = example["run"].Run(settings)
    agent, batch = run.agent, run.buffer.sample(8)
    torch.nn.init.normal_(agent.target.weights[-1])
    state = agent.generator.get_state()
    expected = td_loss(
        agent.critic, agent.target, batch.obs, batch.actions, batch.rewards, batch.discounts, batch.next_obs,
        sampler=agent.act, rho=settings.rho,
    )  # fmt: skip
    agent.generator.set_state(state)
    assert agent.update(batch)["critic_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def sweep_flags(example, out, *more):
    tiny = dict(
        task=None, method=None, data=example["data"], out=str(out), chunk=5, offline_steps=2, online_steps=6,
        batch_size=8, hidden_dim=8, hidden_layers=2, critic_dim=8, critic_layers=2, num_critics=2, num_steps=3,
        eval_every=100, eval_episodes=1, pretrained_folder=str(out / "pretrained"), pretrain_steps=2, posterior_steps=1,
    )  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in tiny.items() if value is not None]
    return [*flags, "--no-compile", "--no-autocast", "--tasks", TASK, *more]


def test_a_sweep_skips_what_is_finished_or_locked(example, tmp_path, capsys):
    sweep, out = example["sweep"], tmp_path / "out"
    flags = sweep_flags(example, out, "--methods", "bc", "qpilots_u", "--seeds", "0", "1")
    with sweep.lock(out / TASK / "qpilots_u" / "seed0" / "lock", wait=False) as mine:
        assert mine
        sweep.main(flags)
    assert len(list(out.glob("*/*/*/finished.json"))) == 3
    before = (out / TASK / "bc" / "seed1" / "eval.csv").read_text()
    sweep.main(flags)
    assert len(list(out.glob("*/*/*/finished.json"))) == 4
    assert (out / TASK / "bc" / "seed1" / "eval.csv").read_text() == before
    assert "4 runs, 3 finished" in capsys.readouterr().out
    example["report"].write_table(out, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| task | bc | qpilots_u |" in table and "2 episodes of 2 seeds" in table
    example["report"].plot(out, tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_a_sweep_is_ordered_by_seed_then_task_then_method(example):
    queue = example["sweep"].queue(
        {"preset": "bench"}, list(example["config"].BENCH_TASKS), ["bc", "qgf"], [0, 1], set()
    )
    assert len(queue) == 24
    assert [(c.seed, c.method) for c in queue[:3]] == [(0, "bc"), (0, "qgf"), (0, "bc")]
    assert [c.seed for c in queue] == [0] * 12 + [1] * 12


def test_speed_compares_both_samplers_in_both_phases(example, tmp_path, monkeypatch):
    presets = {"bench": dict(hidden_dim=8, hidden_layers=2, num_critics=2, num_steps=2, batch_size=8)}
    monkeypatch.setattr(example["speed"], "PRESETS", presets)
    monkeypatch.setattr(example["speed"], "VARIANTS", dict(list(example["speed"].VARIANTS.items())[:2]))
    example["speed"].main(["--out", str(tmp_path), "--presets", "bench", "--methods", "qpilots_u", "--seconds", "0.01"])
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    assert [(row["sampler"], row["phase"]) for row in rows[:2]] == [("eager", "offline"), ("eager", "online")]
    assert len(rows) == 4 and all(float(row["updates_per_s"]) > 0 for row in rows)


def test_settings_of_steering_and_the_target_of_another_method(example, tmp_path):
    settings = example["settings"]
    changed = {"steering": '{"scale": "absolute"}', "target": "bc", "pretrained": example["flow"]}
    agent = example["run"].Run(settings("qpilots_u", tmp_path, alpha=0.7, **changed)).agent
    assert (agent.sampler.steering.scale, agent.sampler.steering.alpha) == ("absolute", 0.7)
    torch.nn.init.normal_(agent.target.weights[-1])
    obs = torch.randn(3, agent.flow.spec.obs_dim)
    state = agent.generator.get_state()
    steered = agent.act(obs)
    agent.generator.set_state(state)
    aimed_at = agent.next_actions(obs)
    agent.generator.set_state(state)
    noise = torch.randn(3, agent.flow.spec.action_dim, generator=agent.generator)
    assert torch.equal(aimed_at, agent.target_sampler(obs, noise)) and not torch.equal(aimed_at, steered)
    with pytest.raises(ValueError, match="target is 'fql'"):
        settings("qpilots_u", tmp_path, target="fql")


def test_a_run_that_starts_from_anothers_critics_begins_online(example, tmp_path):
    settings = example["settings"]
    first = example["run"].Run(settings("qgf", tmp_path / "first", online_steps=0, pretrained=example["flow"]))
    first.go()
    start_from = str(first.folder / "checkpoint.safetensors")
    changed = {"start_from": start_from, "pretrained": example["flow"], "learning_rate": 0.0}
    run = example["run"].Run(settings("qpilots_u", tmp_path / "second", **changed))
    run.go()
    assert [row["phase"] for row in csv.DictReader((run.folder / "eval.csv").open())] == ["online"]
    for p, q in zip(first.agent.critic.parameters(), run.agent.critic.parameters()):
        assert torch.equal(p, q)
    assert run.counters["step"] >= run.config.total_steps and run.buffer.size > run.buffer.offline_size


def test_variants_are_compared_where_they_met_the_same_starts(example, tmp_path, capsys):
    settings, log = example["settings"], example["run"].CsvLog
    runs = {("norm", 0): (5, 10), ("norm", 1): (10, 20), ("absolute", 0): (10, 20), ("absolute", 1): (15, 20)}
    for (variant, seed), successes in (runs | {("absolute", 2): (20,)}).items():
        config = settings("qpilots_u", tmp_path / variant, seed=seed)
        config.folder.mkdir(parents=True)
        (config.folder / "config.json").write_text(config.to_json())
        for step, phase, count in zip((3, 10), ("offline", "online"), successes):
            log(config.folder / "eval.csv").add(
                {"step": step, "phase": phase, "episodes": 20, "successes": count, "length": 9.5}
            )
    compare, out = example["compare"], tmp_path / "compared.csv"
    compare.main([f"norm={tmp_path / 'norm'}", f"absolute={tmp_path / 'absolute'}", "--out", str(out)])
    printed, rows = capsys.readouterr().out, list(csv.DictReader(out.open()))
    assert len(rows) == 8 and {row["seed"] for row in rows} == {"0", "1"}  # seed 2 has not come to its end
    assert "| all, 2 runs | 38 [24, 53] | 62 [47, 76] |" in printed and "| adds | | +25 [+25, +25] |" in printed
    online = [[row for row in rows if (row["variant"], row["phase"]) == (v, "online")] for v in ("norm", "absolute")]
    assert compare.added(*online)[:2] == (2, 0.25)
    assert compare.added(*online)[3] - 0.25 == pytest.approx(12.71 * np.std((0.0, 0.5), ddof=1) / 2**0.5)
    assert compare.added(online[0], [])[0] == 0
    compare.main(["--out", str(out)])
    assert capsys.readouterr().out == printed
    shutil.rmtree(settings("qpilots_u", tmp_path / "norm", seed=0).folder)  # the file keeps what it has of the run
    compare.main([f"norm={tmp_path / 'norm'}", "--out", str(out), "--variants", "absolute", "norm"])
    assert list(csv.DictReader(out.open())) == rows
    assert "| all, 2 runs | 62 [47, 76] | 38 [24, 53] |" in capsys.readouterr().out
    nowhere = [f"none={tmp_path / 'none'}"]
    for wrong, words in ((nowhere, "has no finished run"), (["--variants", "x"], "no runs of ['x']; expected some of")):
        with pytest.raises(SystemExit):
            compare.main([*wrong, "--out", str(out)])
        assert words in capsys.readouterr().err


def test_the_ladder_goes_from_u_to_qgf_one_setting_at_a_time(example):
    by_name = {variant.name: variant.steering for variant in example["ladder"].factorial()}
    assert by_name["0000"] == Steering.qpilots_u()
    same = dict(alpha=1.0, clip="masked", candidate_aggregation="min")  # neither matters at an identity Jacobian
    assert replace(by_name["1111"], **same) == Steering.qgf(1.0)
    for names in zip(("0000", "1000", "1100", "1110"), ("1000", "1100", "1110", "1111")):
        before, after = (vars(by_name[name]) for name in names)
        assert sum(before[key] != after[key] for key in before if key != "json") == 1
    assert len(by_name) == len(set(by_name.values())) == 16


def test_effects_are_those_of_the_variants_that_differ_in_one_setting_alone(example, capsys):
    outcomes = {"0000": "0000", "1000": "1110", "0001": "1000", "1001": "1111", "1111": "0000", "best of 8": "1111"}
    rows = [
        dict(source="run", variant=name, stage="report", strength="1", success="0.5", low="0", high="1", steps="9",
             outcomes=text)
        for name, text in outcomes.items()
    ]  # fmt: skip
    effects = example["ladder"].effects(rows)
    assert effects.keys() == {"scale", "aggregation"}
    assert effects["scale"][:2] == (2, 0.75) and effects["aggregation"][:2] == (2, 0.25)
    for _, mean, low, high in effects.values():
        assert low < mean < high
    example["ladder"].print_tables(rows)
    assert "| scale | 2 | +75 % [" in capsys.readouterr().out


def test_the_ladder_tries_strengths_together_and_reports_the_chosen_one(example, tmp_path, monkeypatch):
    ladder, factorial = example["ladder"], example["ladder"].factorial
    run = example["run"].Run(example["settings"]("qgf", tmp_path, pretrained=example["flow"]))
    torch.nn.init.normal_(run.agent.target.weights[-1])
    run.save()
    monkeypatch.setattr(ladder, "ALPHAS", (0.5, 4.0))
    monkeypatch.setitem(ladder.SETS, "factorial", lambda: [v for v in factorial() if v.name in ("0000", "1000")])
    flags = [str(run.folder), "--sets", "factorial", "--choose-rounds", "1", "--rounds", "1"]
    records = tmp_path / "ladder.csv"
    ladder.main([*flags, "--out", str(records)])
    rows = list(csv.DictReader(records.open()))
    assert [(row["variant"], row["stage"]) for row in rows] == [
        (name, stage) for name in ("0000", "1000") for stage in ("choose", "choose", "report")
    ]
    for tried in (rows[:3], rows[3:]):
        best = min(tried[:2], key=lambda row: float(row["steps"]))
        assert tried[2]["strength"] == best["strength"]
        assert float(tried[1]["strength"]) == pytest.approx(8 * float(tried[0]["strength"]), rel=1e-3)
    ladder.main([*flags, "--out", str(records)])
    assert list(csv.DictReader(records.open())) == rows
    ladder.main([*flags, "--strengths", str(records), "--out", str(tmp_path / "again.csv")])
    assert list(csv.DictReader((tmp_path / "again.csv").open())) == [rows[2], rows[5]]
