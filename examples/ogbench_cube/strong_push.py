"""What mends too strong a push (alpha 0.5): a window over the flow's time, or a gate on the critics' disagreement?

Windows and gates are tried on one set of starts; the best window is run again, beside alpha 0.2, on starts that nothing
was picked by.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import torch

from qpilots_fast.demo.methods import RHO, STRONG_ALPHA, WINDOW, Method, compare, gate_method, value_states
from qpilots_fast.demo.ogbench_cube import ASSETS, CubePolicy, CubeTasks
from qpilots_fast.files import replacing
from qpilots_fast.steering import Steering

WINDOWS = ((0.0, 0.3), (0.0, 0.5), (0.3, 0.7), (0.5, 1.0), (0.7, 1.0))
QUANTILES = (0.25, 0.5, 0.75, 0.9)
SEED, FRESH_SEED = 100_000, 200_000  # the first as evaluate.py's


def tried(policy: CubePolicy, tasks: CubeTasks) -> list[Method]:
    """The push as it is, in windows, and behind gates whose numbers come from the unsteered policy's observations."""
    strong = Steering.qpilots_u(STRONG_ALPHA, rho=RHO)
    windows = [Method(f"alpha {STRONG_ALPHA:g}, t {a} to {b}", replace(strong, window=(a, b))) for a, b in WINDOWS]
    (unsteered,) = compare(policy, tasks, [Method("unsteered", Steering.unsteered())], 2)
    obs = value_states(unsteered.rollouts)
    gates = [
        Method(f"alpha {STRONG_ALPHA:g}, gate at quantile {q:g}", gate_method(policy, obs, quantile=q).steering)
        for q in QUANTILES
    ]
    return [Method(f"alpha {STRONG_ALPHA:g}", strong), *windows, *gates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=20, help="per task and method (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/ogbench_cube"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    policy, tasks = CubePolicy.load(ASSETS), CubeTasks()
    methods = tried(policy, tasks)
    again = [m for m in methods if m.steering.window in (None, WINDOW) and m.steering.max_disagreement is None]
    again.append(Method("alpha 0.2", Steering.qpilots_u(0.2, rho=RHO)))
    args.out.mkdir(parents=True, exist_ok=True)
    with replacing(args.out / "strong_push.csv") as new, new.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "method", "episodes", "success", "low", "high", "steps", "value"])
        for seed, chosen in ((SEED, methods), (FRESH_SEED, again)):
            for outcome in compare(policy, tasks, chosen, args.episodes, seed=seed):
                numbers = [outcome.rollouts.rate, *outcome.interval, outcome.rollouts.steps.mean(), outcome.value]
                row = [round(float(number), 4) for number in numbers]
                writer.writerow([seed, outcome.method.name, outcome.rollouts.success.size, *row])
                print(f"{outcome.method.name:34} {outcome.rollouts.rate:6.1%}  starts of seed {seed}", flush=True)


if __name__ == "__main__":
    main()
