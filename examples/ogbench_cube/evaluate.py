"""Success of the trained policy on the five singletask goals: unsteered, best-of-n, and steered over alphas.

The same comparison as `qpilots-fast demo`, with more episodes, per-task rates and a CSV.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch

from qpilots_fast.demo import ALPHAS, CANDIDATES, RHO, Method, Outcome, compare, plot, standard_methods
from qpilots_fast.ogbench_cube import ASSETS, TASKS, CubePolicy, CubeTasks
from qpilots_fast.steering import Steering


def evaluation_methods(alphas: tuple[float, ...]) -> list[Method]:
    """The demo's methods, the fast Jacobian of U, and U with candidates on top."""
    steered_candidates = Steering(alpha=0.2, rho=RHO, num_candidates=CANDIDATES, candidate_aggregation="pessimistic")
    return [
        *standard_methods(alphas),
        Method("QPILOTS-U identity 0.2", Steering.qpilots_u(0.2, rho=RHO, jacobian="identity")),
        Method(f"QPILOTS-U 0.2, best of {CANDIDATES}", steered_candidates),
    ]


def write_csv(outcomes: list[Outcome], path: Path) -> None:
    """One row a method: rate, Wilson interval, per-task rates, steps, value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=ASSETS)
    parser.add_argument("--episodes", type=int, default=20, help="per task and method (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=100_000, help="the demo's default is 0, this differs on purpose")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/ogbench_cube"))
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    policy, tasks, start = CubePolicy.load(args.weights), CubeTasks(), time.perf_counter()
    outcomes: list[Outcome] = []
    methods = evaluation_methods(tuple(args.alphas))
    for outcome in compare(policy, tasks, methods, args.episodes, seed=args.seed, backend=args.backend):
        outcomes.append(outcome)
        low, high = outcome.interval
        print(
            f"{outcome.method.name:24} {outcome.rollouts.rate:6.1%}  [{low:.1%}, {high:.1%}]  tasks "
            + " ".join(f"{rate:.2f}" for rate in outcome.rollouts.success.mean(0))
            + f"  value {outcome.value:.2f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    write_csv(outcomes, args.out / "evaluation.csv")
    plot(outcomes, args.out / "evaluation.png")


if __name__ == "__main__":
    main()
