"""How well one call of the shipped meta flow map draws from the frozen flow's posterior, on episodes it never saw.

At states of the play data, x = t x1 + (1-t) e is formed from the action that was taken. The truth is the flow's own
posterior ODE (GLASS) in many steps; the map and GLASS in few steps start from the same noise, so that each draw has
its own true end point and no error of sampling enters.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
from play_data import PlayData
from torch import Tensor
from train_posterior import HELD_OUT

from qpilots_fast.demo.ogbench_cube import ASSETS, CubePolicy
from qpilots_fast.files import replacing
from qpilots_fast.meta_flow_map import glass_velocity

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
TRUTH_STEPS = 128
Draw = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (obs, noise, x, t) -> x1 [rows, A]


def glass_draw(policy: CubePolicy, steps: int) -> Draw:
    """`steps` Euler steps of the posterior ODE, one flow call each."""

    def draw(obs: Tensor, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        xbar = noise
        for k in range(steps):
            s = torch.full_like(t, k / steps)
            xbar = xbar + glass_velocity(policy.flow, obs, xbar, x, t, s) / steps
        return xbar

    return draw


def errors(draws: Tensor, truth: Tensor) -> dict[str, float]:
    """Of draws [rows, count, A], in units of each row's true spread (root of the mean variance over A)."""
    std = truth.var(1).mean(-1).sqrt()
    spread = draws.var(1).mean(-1).sqrt() / std
    return {
        "mean error / std": ((draws.mean(1) - truth.mean(1)).square().mean(-1).sqrt() / std).mean().item(),
        "spread / true": spread.mean().item(),
        "spread, 5 %": spread.quantile(0.05).item(),
        "spread, 95 %": spread.quantile(0.95).item(),
        "draw error / std": ((draws - truth).square().mean((1, 2)).sqrt() / std).mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/cube-single-play.npz"))
    parser.add_argument("--weights", type=Path, default=ASSETS)
    parser.add_argument("--out", type=Path, default=Path("out/ogbench_cube"))
    parser.add_argument("--states", type=int, default=40, help="for each time (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=256, help="for each state (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    policy = CubePolicy.load(args.weights)
    if policy.posterior is None:
        raise SystemExit(f"{args.weights} has no posterior; train_posterior.py adds it.")
    posterior = policy.posterior
    data = PlayData(args.data, seed=0)
    data.keep_episodes(-HELD_OUT, None)
    rows = args.states * len(TIMES)
    obs, actions = data.sample_behaviour(rows)
    t = torch.tensor(TIMES).repeat_interleave(args.states)[:, None]
    x = t * actions + (1 - t) * torch.randn_like(actions)
    noise = torch.randn(rows * args.draws, actions.shape[1])
    repeated = [value.repeat_interleave(args.draws, 0) for value in (obs, x, t)]

    def draws(way: Draw) -> Tensor:
        with torch.no_grad():
            return way(repeated[0], noise, repeated[1], repeated[2]).view(rows, args.draws, -1)

    truth = draws(glass_draw(policy, TRUTH_STEPS))
    ways: list[tuple[str, Draw]] = [("meta flow map, 1 call", posterior)]
    ways += [(f"GLASS, m = {m}", glass_draw(policy, m)) for m in (1, 2, 4, 8, 16, 32)]
    table: list[dict[str, object]] = []
    for name, way in ways:
        got = draws(way)
        table.append({"draws": name, "t": "all"} | errors(got, truth))
        if way is posterior:
            for i, time in enumerate(TIMES):
                part = slice(i * args.states, (i + 1) * args.states)
                table.append({"draws": name, "t": time} | errors(got[part], truth[part]))
    args.out.mkdir(parents=True, exist_ok=True)
    with replacing(args.out / "posterior_check.csv") as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        for row in table:
            row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
