"""Success of the trained policy on the five singletask goals: unsteered, best-of-n, and steered over alphas.

The same comparison as `qpilots-fast demo`, with more episodes, per-task rates and a CSV.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch

from qpilots_fast.demo.methods import ALPHAS, CANDIDATES, RHO, Method, Outcome, compare, draws_method, standard_methods
from qpilots_fast.demo.ogbench_cube import ASSETS, TASKS, CubePolicy, CubeTasks, Rollouts
from qpilots_fast.demo.report import plot
from qpilots_fast.files import replacing
from qpilots_fast.steering import Steering


def evaluation_methods(alphas: tuple[float, ...], posterior: bool) -> list[Method]:
    """The demo's methods, the fast Jacobian of U, U with candidates on top, and M in four ways."""
    steered_candidates = Steering(alpha=0.2, rho=RHO, num_candidates=CANDIDATES, candidate_aggregation="pessimistic")
    glass = Steering(alpha=0.2, rho=RHO, estimate="glass", glass_steps=4, num_samples=4)
    return [
        *standard_methods(alphas, posterior=False),
        Method("QPILOTS-U identity 0.2", Steering.qpilots_u(0.2, rho=RHO, jacobian="identity")),
        Method(f"QPILOTS-U 0.2, best of {CANDIDATES}", steered_candidates),
        *((draws_method(4), draws_method(16), draws_method(4, alpha=0.5)) if posterior else ()),
        Method("QPILOTS-M  0.2, N=4, GLASS m=4", glass),
    ]


def write_csv(outcomes: list[Outcome], path: Path) -> None:
    """One row a method: rate, Wilson interval, per-task rates, steps, value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new, new.open("w", newline="") as file:
        writer = csv.writer(file)
        tasks = [f"task{task}" for task in TASKS]
        writer.writerow(["method", "episodes", "success", "low", "high", *tasks, "steps", "value"])
        for outcome in outcomes:
            success = outcome.rollouts.success
            numbers = [
                success.mean(),
                *outcome.interval,
                *success.mean(0),
                outcome.rollouts.steps.mean(),
                outcome.value,
            ]
            writer.writerow([outcome.method.name, success.size, *(round(float(n), 4) for n in numbers)])


def read_csv(path: Path, methods: list[Method]) -> dict[str, Outcome]:
    """The outcomes that `write_csv` wrote, by method; order and steps of single episodes are not kept."""
    outcomes: dict[str, Outcome] = {}
    for row in csv.DictReader(path.open()) if path.exists() else ():
        method = next((m for m in methods if m.name == row["method"]), None)
        if method is not None:
            rounds = int(row["episodes"]) // len(TASKS)
            counts = [round(rounds * float(row[f"task{task}"])) for task in TASKS]
            success = np.arange(rounds)[:, None] < np.asarray(counts)
            rollouts = Rollouts(success, np.full(success.shape, float(row["steps"])))
            outcomes[method.name] = Outcome(method, rollouts, float(row["value"]))
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=ASSETS)
    parser.add_argument("--episodes", type=int, default=20, help="per task and method (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=100_000, help="the demo's default is 0, this differs on purpose")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/ogbench_cube"))
    parser.add_argument(
        "--methods", nargs="+", metavar="TEXT", default=[""],
        help="run methods whose names contain one of these (and the unsteered, at whose observations actions are "
        "valued); other rows stay as the CSV in --out has them",
    )  # fmt: skip
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    policy, tasks, start = CubePolicy.load(args.weights), CubeTasks(), time.perf_counter()
    methods = evaluation_methods(tuple(args.alphas), policy.posterior is not None)
    outcomes = {} if args.methods == [""] else read_csv(args.out / "evaluation.csv", methods)
    chosen = [m for m in methods if m is methods[0] or any(text in m.name for text in args.methods)]
    for outcome in compare(policy, tasks, chosen, args.episodes, seed=args.seed, backend=args.backend):
        outcomes[outcome.method.name] = outcome
        low, high = outcome.interval
        print(
            f"{outcome.method.name:30} {outcome.rollouts.rate:6.1%}  [{low:.1%}, {high:.1%}]  tasks "
            + " ".join(f"{rate:.2f}" for rate in outcome.rollouts.success.mean(0))
            + f"  value {outcome.value:.2f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    ordered = [outcomes[m.name] for m in methods if m.name in outcomes]
    write_csv(ordered, args.out / "evaluation.csv")
    plot(ordered, args.out / "evaluation.png")


if __name__ == "__main__":
    main()
