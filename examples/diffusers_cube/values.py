"""What the critics say of the policy's chunks at states of the play data, over strengths and numbers of DDIM steps."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from examples.ogbench_cube.play_data import PlayData
from qpilots_fast.demo.ogbench_cube import CubePolicy
from qpilots_fast.reference import aggregate

from .evaluate import RHO, act, steered_scheduler
from .policy import HORIZON, STEP_WIDTH, WEIGHTS, load, new_scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/cube-single-play.npz"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=(10, 20, 50))
    parser.add_argument("--alphas", type=float, nargs="+", default=(0.1, 0.2, 0.3, 0.5))
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    network, cube, data = load(args.weights), CubePolicy.load(), PlayData(args.data, seed=args.seed)
    batch = data.sample(args.rows)
    noise = torch.randn(args.rows, HORIZON * STEP_WIDTH, generator=torch.Generator().manual_seed(args.seed))

    def value(actions: Tensor) -> float:
        with torch.no_grad():
            return float(aggregate(cube.critic(batch.obs, actions), "pessimistic", RHO).mean())

    print(f"the data's own chunks {value(batch.actions):.2f}")
    for steps in args.steps:
        plain = act(network, new_scheduler(), batch.obs, noise, steps)
        print(f"{steps:3} steps  unsteered {value(plain):.2f}", flush=True)
        for alpha in args.alphas:
            moved = act(network, steered_scheduler(cube, alpha), batch.obs, noise, steps)
            size = (moved - plain).square().mean().sqrt()
            print(f"{steps:3} steps  alpha {alpha:g}  {value(moved):.2f}, moved by {size:.3f}", flush=True)


if __name__ == "__main__":
    main()
