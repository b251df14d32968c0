"""What makes QGF and QPILOTS-U differ when both steer by the same frozen critics: every combination of their settings.

    python -m examples.offline_to_online.ladder shipped --out examples/offline_to_online/results/ladder.csv
    python -m examples.offline_to_online.ladder out/offline_to_online_bench/*/qpilots_u/seed0 --out out/ladder.csv

A source is `shipped` (the policy and critics of `qpilots-fast demo`) or the folder of a finished run. Every variant is
tried at the same number of strengths, in one batch, on the same episodes, and reported at its best one on other
episodes. Strengths are those of ALPHAS; an absolute weight is an alpha times the source's median ||v|| / ||g||, so that
both grids push alike. With --strengths FILE nothing is tried: a variant takes the first one that FILE reports it at.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, SteeredSampler, Steering
from qpilots_fast.demo.ogbench_cube import CHUNK, CubePolicy, CubeTasks, Rollouts, wilson_interval
from qpilots_fast.files import write_text
from qpilots_fast.steering import JACOBIANS, Jacobian

from .agents import make_agent
from .checkpoint import load_networks
from .config import Config
from .pretrain import holds, load_pretrained, new_posterior
from .tasks import dataset_path, make_env, normalisation

ALPHAS = (0.05, 0.1, 0.2, 0.4, 0.8)
QUANTILES = torch.tensor([0.1, 0.5, 0.9])  # of the norms over states
CHOOSE_SEED, REPORT_SEED = 9_000_000, 5_000_000
# what QPILOTS-U and QGF do differently, U's level first; at an identity Jacobian their clips are the same. A variant
# is named by its levels: 0000 is U, 1111 is QGF, 1000 is U with an absolute weight
FACTORS: dict[str, tuple[Any, Any]] = {
    "scale": ("norm_match", "absolute"),
    "steer_first_step": (False, True),
    "jacobian": ("full", "identity"),
    "aggregation": ("pessimistic", "min"),
}
COLUMNS = ("source", "variant", "stage", "strength", "episodes", "success", "low", "high", "steps", "outcomes")


@dataclass(frozen=True)
class Variant:
    """A way to steer; its strength is chosen."""

    name: str
    steering: Steering
    finer: int = 1  # multiplies the source's K

    @property
    def tuned(self) -> bool:
        return self.steering.alpha > 0


def factorial() -> list[Variant]:
    """All sixteen combinations of FACTORS: QPILOTS-U, QGF, what is one change from either, then what is two."""
    variants = []
    for taken in sorted(product((0, 1), repeat=len(FACTORS)), key=lambda taken: min(sum(taken), 4 - sum(taken))):
        changes = {name: levels[which] for (name, levels), which in zip(FACTORS.items(), taken)}
        name = "".join(map(str, taken))
        variants.append(Variant(name, replace(Steering.qpilots_u(), **changes)))
    return variants


def around() -> list[Variant]:
    """One change at a time to QPILOTS-U and QGF, in what the factorial leaves alone."""
    variants = []
    for name, base in (("U", Steering.qpilots_u()), ("QGF", Steering.qgf(0.1))):
        changes = {
            "t in 0.3 .. 0.7": {"window": (0.3, 0.7)},
            "t >= 0.5": {"window": (0.5, 1.0)},
            "mean of critics": {"aggregation": "mean"},
            "rho 1": {"aggregation": "pessimistic", "rho": 1.0},
            "best of 8 on top": {"num_candidates": 8, "candidate_aggregation": "pessimistic"},
        }
        variants += [Variant(f"{name}, {what}", replace(base, **change)) for what, change in changes.items()]
        variants.append(Variant(f"{name}, 2 K steps", base, finer=2))
    return variants


def draws() -> list[Variant]:
    """QPILOTS-M over N, with its map; and with GLASS draws, which need none, at both scales."""
    learned = [Variant(f"M, N = {n}", Steering.qpilots_m(num_samples=n)) for n in (1, 2, 4, 8)]
    glass = Steering(estimate="glass", glass_steps=4, num_samples=4)
    absolute = replace(glass, scale="absolute", steer_first_step=True)
    return [*learned, Variant("M, N = 4, GLASS", glass), Variant("M, N = 4, GLASS, absolute", absolute)]


def plain() -> list[Variant]:
    """Nothing to tune: the clone, and the best of its samples."""
    ranked = [Variant(f"best of {n}", Steering.best_of_n(n, "pessimistic")) for n in (8, 32)]
    return [Variant("unsteered", Steering.unsteered()), *ranked]


SETS: dict[str, Callable[[], list[Variant]]] = {
    "factorial": factorial, "around": around, "draws": draws, "plain": plain,
}  # fmt: skip


# ---------------------------------------------------------------- where the critics come from


class TaskCopies(CubeTasks):
    """Copies of one singletask environment, which start alike, stepped side by side."""

    def __init__(self, task: str, copies: int) -> None:
        self.tasks = (0,)
        self.envs = [make_env(task) for _ in range(copies)]

    def _reset(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        states = np.stack([env.reset(seed=seed)[0] for env in self.envs])
        return states, np.zeros((len(states), 3))


@dataclass
class RunPolicy:
    """The networks of a finished run; its critics know their task, so the goal is not observed."""

    flow: FlowMLP
    critic: CriticEnsemble
    posterior: MetaFlowMap | None
    mean: np.ndarray  # [S]
    std: np.ndarray  # [S]

    def obs(self, states: np.ndarray, goals: np.ndarray) -> Tensor:
        """[B, S], as the networks see them."""
        return torch.from_numpy(((states - self.mean) / self.std).astype(np.float32))


@dataclass
class Source:
    """Frozen networks and where they act: as many copies of the environments as there are strengths.

    Args:
        num_steps: K, where a variant does not say.
    """

    name: str
    policy: Any  # CubePolicy or RunPolicy
    num_steps: int
    tasks: CubeTasks

    @staticmethod
    def load(name: str, copies: int) -> Source:
        """`shipped`, or a run's folder."""
        if name == "shipped":
            return Source(name, CubePolicy.load(), 10, CubeTasks(copies=copies))
        folder = Path(name)
        config = Config(**json.loads((folder / "config.json").read_text()))
        if config.action_chunk != CHUNK:
            raise ValueError(f"{name} acts in chunks of {config.action_chunk}; expected a run with --chunk {CHUNK}.")
        tasks = TaskCopies(config.task, copies)
        mean, std = normalisation(np.load(dataset_path(config))["observations"].astype(np.float32))
        if not config.normalise_obs:
            mean, std = np.zeros_like(mean), np.ones_like(std)
        agent = make_agent(config, len(mean), config.action_chunk * tasks.envs[0].action_space.shape[0])
        load_networks(folder / "checkpoint.safetensors", {"flow": agent.flow, "target": agent.target})
        posterior = None
        if config.pretrained and holds(config.pretrained, "posterior"):
            posterior = new_posterior(config, len(mean), agent.flow.spec.action_dim)
            load_pretrained(config.pretrained, {"posterior": posterior})
        policy = RunPolicy(agent.flow, agent.target, posterior, mean, std)
        return Source("/".join(folder.parts[-4:]), policy, config.num_steps, tasks)

    def sampler(self, variant: Variant, strength: float) -> SteeredSampler:
        """The variant's sampler, its weights packed once."""
        steering = replace(variant.steering, alpha=strength) if variant.tuned else variant.steering
        posterior = self.policy.posterior if steering.estimate == "mfm" else None
        return SteeredSampler(
            self.policy.flow, self.policy.critic, steering, num_steps=self.num_steps * variant.finer,
            posterior=posterior, action_low=-1.0, action_high=1.0,
        ).freeze()  # fmt: skip

    def rollout(self, variant: Variant, strengths: tuple[float, ...], rounds: int, seed: int) -> list[Rollouts]:
        """What happened at each strength, on the same starts and noise, all strengths in one batch."""
        tasks = self.tasks if len(strengths) > 1 else self.tasks.first_copy()
        act = partial(self.sampler(variant, max(strengths)), generator=torch.Generator().manual_seed(seed))
        rows = torch.tensor(strengths).repeat_interleave(len(tasks.tasks)) if variant.tuned else None
        limit = tasks.envs[0].spec.max_episode_steps
        every = tasks.rollout(self.policy, act, rounds, seed, alpha=rows, max_steps=limit)
        return [every.of(tasks.columns(which)) for which in range(len(strengths))]

    def norms(self, jacobian: Jacobian = "identity", rounds: int = 2) -> tuple[Tensor, Tensor]:
        """||v|| [B], averaged over t, and ||g|| [K, B], at observations of the unsteered policy."""
        (seen,) = self.rollout(Variant("unsteered", Steering.unsteered()), (0.0,), rounds, CHOOSE_SEED)
        obs = torch.stack(seen.obs)
        noise = torch.randn(len(obs), self.policy.flow.spec.action_dim, generator=torch.Generator().manual_seed(0))
        probe = Variant("probe", Steering.qgf(1e-9, "pessimistic", jacobian))
        actions, info = self.sampler(probe, 1e-9)(obs, noise, return_info=True)
        return (actions - noise).norm(dim=-1), info.gradient_norms

    def weight_per_alpha(self) -> float:
        """Median ||v|| over median ||g||: an alpha times this is a weight."""
        velocity, gradient = self.norms()
        return float(velocity.median() / gradient.median())


# ---------------------------------------------------------------- what is tried


class Records:
    """A CSV of outcomes that grows; what it has is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_text(path, ",".join(COLUMNS) + "\n")
        self.rows = list(csv.DictReader(path.open()))

    def of(self, source: str, variant: str, stage: str) -> list[dict[str, str]]:
        """The rows of one stage."""
        return [r for r in self.rows if (r["source"], r["variant"], r["stage"]) == (source, variant, stage)]

    def add(self, source: str, variant: str, stage: str, strength: float, rollouts: Rollouts) -> None:
        """Appends one row; outcomes are 1 for a success, round by round, task by task."""
        success = rollouts.success
        low, high = wilson_interval(int(success.sum()), success.size)
        numbers = (f"{v:.4f}" for v in (success.mean(), low, high))
        outcomes = "".join("01"[int(value)] for value in success.ravel())
        values = (source, variant, stage, f"{strength:.4g}", success.size, *numbers, f"{rollouts.steps.mean():.1f}")
        self.rows.append(dict(zip(COLUMNS, map(str, (*values, outcomes)))))
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(self.rows[-1])


def choose(source: Source, variant: Variant, records: Records, rounds: int, per_alpha: float) -> float:
    """The strength with the fewest environment steps to success, a failure counting as the whole episode."""
    if not variant.tuned:
        return 0.0
    if not records.of(source.name, variant.name, "choose"):
        unit = per_alpha if variant.steering.scale == "absolute" else 1.0
        strengths = tuple(unit * alpha for alpha in ALPHAS)
        for strength, rollouts in zip(strengths, source.rollout(variant, strengths, rounds, CHOOSE_SEED)):
            records.add(source.name, variant.name, "choose", strength, rollouts)
    tried = records.of(source.name, variant.name, "choose")
    return float(min(tried, key=lambda row: float(row["steps"]))["strength"])


def print_norms(source: Source) -> None:
    """How much ||v|| and ||g|| differ between states, and ||g|| between steps."""
    print(f"\n{source.name}\n\n| | 10 % of states | median | 90 % | medians over the steps |\n|---|---:|---:|---:|---|")
    rows = []
    for jacobian in JACOBIANS:
        velocity, gradient = source.norms(jacobian, rounds=10)
        steps = ", ".join(f"{value:.2g}" for value in gradient.median(1).values)
        rows.append((f"gradient, {jacobian}", gradient.mean(0), steps))
    for name, norm, steps in (("velocity", velocity, ""), *rows):
        print("| {} | {:.3g} | {:.3g} | {:.3g} | {} |".format(name, *norm.quantile(QUANTILES).tolist(), steps))


# ---------------------------------------------------------------- what it says


def effects(reports: list[dict[str, str]], resamples: int = 2000) -> dict[str, tuple[int, float, float, float]]:
    """What QGF's level of each factor adds to the success of the variants that differ in it alone.

    Args:
        reports: of one source.

    Returns:
        For each factor how many such pairs there are, the mean over them, and its 95 % interval: a bootstrap over
        episodes, which every variant met alike.
    """
    outcomes = {row["variant"]: np.array([int(outcome) for outcome in row["outcomes"]]) for row in reports}
    rng, result = np.random.default_rng(0), {}
    for index, factor in enumerate(FACTORS):
        pairs = [
            outcomes[name[:index] + "1" + name[index + 1 :]] - outcomes[name]
            for name in outcomes
            if name[index : index + 1] == "0" and name[:index] + "1" + name[index + 1 :] in outcomes
        ]
        if pairs:
            added = np.mean(pairs, axis=0)  # [episodes]
            means = added[rng.integers(len(added), size=(resamples, len(added)))].mean(1)
            low, high = np.quantile(means, (0.025, 0.975))
            result[factor] = (len(pairs), float(added.mean()), float(low), float(high))
    return result


def print_tables(rows: list[dict[str, str]]) -> None:
    """Markdown for each source: the chosen strength and the success of every variant, and the factors' effects."""
    reports = [row for row in rows if row["stage"] == "report"]
    for source in dict.fromkeys(row["source"] for row in reports):
        mine = [row for row in reports if row["source"] == source]
        print(f"\n{source}\n\n| variant | strength | success | steps |\n|---|---:|---:|---:|")
        for row in mine:
            rate, low, high = (f"{100 * float(row[key]):.0f}" for key in ("success", "low", "high"))
            print(f"| {row['variant']} | {row['strength']} | {rate} % [{low}, {high}] | {float(row['steps']):.0f} |")
        print("\n| QGF's level of | pairs | adds |\n|---|---:|---:|")
        for factor, (pairs, *numbers) in effects(mine).items():
            print("| {} | {} | {:+.0f} % [{:+.0f}, {:+.0f}] |".format(factor, pairs, *(100 * n for n in numbers)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="`shipped`, or folders of runs; none: tables of what --out has")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="of these sets, only these, e.g. 0000 1111")
    parser.add_argument("--choose-rounds", type=int, default=2, help="episodes a task for each strength")
    parser.add_argument("--rounds", type=int, default=12, help="episodes a task at the chosen strength")
    parser.add_argument("--strengths", type=Path, metavar="FILE", help="take them from this file's reports")
    parser.add_argument("--out", type=Path, default=Path("out/ladder.csv"), help="a .csv file; goes on where it stands")
    parser.add_argument("--norms", action="store_true", help="only print how ||v|| and ||g|| differ between states")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    records, start = Records(args.out), time.perf_counter()
    given: dict[str, float] = {}
    if args.strengths:
        reports = (row for row in Records(args.strengths).rows if row["stage"] == "report")
        given = {row["variant"]: float(row["strength"]) for row in reversed(list(reports))}  # the first stands
    for name in args.sources:
        source = Source.load(name, 1 if given or args.norms else len(ALPHAS))
        if args.norms:
            print_norms(source)
            continue
        per_alpha = 1.0 if given else source.weight_per_alpha()
        for variant in (variant for chosen in args.sets for variant in SETS[chosen]()):
            if (args.variants and variant.name not in args.variants) or records.of(source.name, variant.name, "report"):
                continue
            if variant.steering.estimate == "mfm" and source.policy.posterior is None:
                continue
            strength = given[variant.name] if given else choose(source, variant, records, args.choose_rounds, per_alpha)
            (rollouts,) = source.rollout(variant, (strength,), args.rounds, REPORT_SEED)
            records.add(source.name, variant.name, "report", strength, rollouts)
            seconds = time.perf_counter() - start
            print(f"{source.name}  {variant.name:30} {strength:.4g}  {rollouts.rate:.1%}  {seconds:.0f} s", flush=True)
    print_tables(records.rows)


if __name__ == "__main__":
    main()
