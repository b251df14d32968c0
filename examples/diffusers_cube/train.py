"""Trains the diffusion policy on the cube's play data, as diffusion policies are trained: it predicts the noise."""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from examples.ogbench_cube.play_data import PlayData
from qpilots_fast.demo.ogbench_cube import CubePolicy
from qpilots_fast.objectives import polyak_update

from .policy import HORIZON, TRAINING_STEPS, new_network, new_scheduler, save

LOG_EVERY = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/cube-single-play.npz"))
    parser.add_argument("--out", type=Path, default=Path("out/diffusers_cube/weights.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3_500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data, network, scheduler = PlayData(args.data, seed=args.seed), new_network(), new_scheduler()
    cube = CubePolicy.load()  # its critics will steer: states are normalised as theirs
    states = torch.from_numpy((data.obs - cube.mean) / cube.std).float()
    actions = torch.from_numpy(data.actions)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    start, total = time.perf_counter(), 0.0
    for step in range(1, args.steps + 1):
        index = data.starts[data.rng.integers(len(data.starts), size=args.batch)]
        clean = actions[index[:, None] + np.arange(HORIZON)]  # [B, HORIZON, STEP_WIDTH]
        noise, timesteps = torch.randn_like(clean), torch.randint(TRAINING_STEPS, (args.batch,))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = network(scheduler.add_noise(clean, noise, timesteps), timesteps, states[index])
        loss = nn.functional.mse_loss(predicted.float(), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        polyak_update(average, network, min(0.1, 10 / step))
        total += loss.item()
        if step % LOG_EVERY == 0:
            print(f"step {step}  loss {total / LOG_EVERY:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
            total = 0.0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save(average, args.out)


if __name__ == "__main__":
    main()
