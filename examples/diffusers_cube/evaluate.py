"""Success of the diffusion policy on the cube's five tasks: sampled by DDIM as it is, and steered over alphas."""

from __future__ import annotations

import argparse
import csv
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from qpilots_fast import Steering
from qpilots_fast.demo.methods import value_states
from qpilots_fast.demo.ogbench_cube import ACTION_DIM, CHUNK, STATE_DIM, TASKS, CubePolicy, CubeTasks, wilson_interval
from qpilots_fast.files import replacing
from qpilots_fast.integrations.diffusers import steer_scheduler
from qpilots_fast.reference import aggregate

from .policy import HORIZON, SAMPLING_STEPS, STEP_WIDTH, WEIGHTS, load, new_scheduler, sample
from .unet import ConditionalUnet1D

ALPHAS = (0.1, 0.2)
RHO = 0.5


def critic_of_chunks(cube: CubePolicy) -> Any:
    """The demo's critics, which value the CHUNK executed steps of an action chunk [B, HORIZON, STEP_WIDTH]."""
    return lambda obs, actions: cube.critic(obs, actions[:, :CHUNK].flatten(1))


def steered_scheduler(cube: CubePolicy, alpha: float) -> DDIMScheduler:
    """The policy's scheduler, its steps pushed by the critics; the steps that are not executed follow the policy."""
    steering = Steering(alpha=alpha, rho=RHO, jacobian="identity", steered_dims=tuple(range(ACTION_DIM)))
    return steer_scheduler(new_scheduler(), critic_of_chunks(cube), steering)


def act(
    network: ConditionalUnet1D, scheduler: DDIMScheduler, obs: Tensor, noise: Tensor, steps: int = SAMPLING_STEPS
) -> Tensor:
    """The executed actions [B, ACTION_DIM] for obs [B, S] (state and way to the goal), noise [B, HORIZON STEP_WIDTH].

    The policy is told the state alone; the goal goes to the critics, through the scheduler.
    """
    if hasattr(scheduler, "set_obs"):
        scheduler.set_obs(obs)
    chunk = sample(network, scheduler, obs[:, :STATE_DIM], noise.reshape(-1, HORIZON, STEP_WIDTH), steps)
    return chunk[:, :CHUNK].flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--episodes", type=int, default=20, help="per task and method (default: %(default)s)")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--seed", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/diffusers_cube/evaluation.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network, cube, tasks, start = load(args.weights), CubePolicy.load(), CubeTasks(), time.perf_counter()
    schedulers = {"unsteered": new_scheduler()}
    schedulers |= {f"alpha {alpha:g}": steered_scheduler(cube, alpha) for alpha in args.alphas}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as new, new.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "episodes", "success", "low", "high", *(f"task{task}" for task in TASKS), "value"])
        seen = None
        for name, scheduler in schedulers.items():
            sampler = partial(act, network, scheduler)
            rollouts = tasks.rollout(cube, sampler, args.episodes, args.seed, noise_dim=HORIZON * STEP_WIDTH)
            seen = value_states(rollouts) if seen is None else seen  # of the unsteered policy
            noise = torch.randn(len(seen), HORIZON * STEP_WIDTH, generator=torch.Generator().manual_seed(args.seed))
            value = aggregate(cube.critic(seen, sampler(seen, noise)), "pessimistic", RHO).mean()
            low, high = wilson_interval(int(rollouts.success.sum()), rollouts.success.size)
            numbers = [rollouts.success.mean(), low, high, *rollouts.success.mean(0), float(value)]
            writer.writerow([name, rollouts.success.size, *(round(float(n), 4) for n in numbers)])
            print(
                f"{name:12} {rollouts.rate:6.1%}  [{low:.1%}, {high:.1%}]  tasks "
                + " ".join(f"{rate:.2f}" for rate in rollouts.success.mean(0))
                + f"  value {float(value):.2f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
