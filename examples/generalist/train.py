"""Trains the policy by imitation of the demonstrations: flow matching on chunks, as pi0's action expert.

python examples/generalist/train.py --demonstrations /tmp/demonstrations.npz --out /tmp/generalist
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qpilots_fast.demo.generalist.instructions import TASKS, TRAINED, embedding
from qpilots_fast.demo.generalist.policy import (
    ACTION_DIM,
    CHUNK,
    PADDED_DIM,
    ActionExpertFlow,
    GeneralistConfig,
    GeneralistPolicy,
)
from qpilots_fast.demo.generalist.weights import save
from qpilots_fast.objectives import polyak_update

POLYAK = 0.999  # the policy that is kept is the average of the last thousand or so updates
WARM_UP = 100  # updates


class Windows:
    """Every chunk of every demonstration: a state, the C actions from there on, and which of them are real."""

    def __init__(self, path: Path) -> None:
        arrays = np.load(path)
        states, chunks, real, tasks = [], [], [], []
        for number, task in enumerate(TASKS):
            lengths = arrays[f"{task}.lengths"]
            ends = np.repeat(np.cumsum(lengths), lengths)  # of each step's demonstration
            steps = np.arange(len(ends))[:, None] + np.arange(CHUNK)
            inside = steps < ends[:, None]
            states.append(arrays[f"{task}.states"])
            chunks.append(arrays[f"{task}.actions"][np.minimum(steps, len(ends) - 1)] * inside[..., None])
            real.append(inside)
            tasks.append(np.full(len(ends), number))
        self.states, self.chunks, self.real, self.tasks = (
            torch.from_numpy(np.concatenate(part)) for part in (states, chunks, real, tasks)
        )
        self.sentences = torch.stack([torch.stack([embedding(s) for s in TRAINED[task]]) for task in TASKS])

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States [B, 39], embeddings of a random phrasing [B, 384], padded chunks [B, C, 32], real steps [B, C]."""
        rows = torch.randint(len(self.states), (size,))
        phrasing = torch.randint(self.sentences.shape[1], (size,))
        padded = torch.nn.functional.pad(self.chunks[rows], (0, PADDED_DIM - ACTION_DIM))
        return self.states[rows], self.sentences[self.tasks[rows], phrasing], padded, self.real[rows]


def flow_loss(model: ActionExpertFlow, states: Tensor, language: Tensor, actions: Tensor, real: Tensor) -> Tensor:
    """|| u(x_tau, tau) - (noise - action) ||^2, the mean over real dimensions plus that over the padding's.

    tau is drawn as pi0 does, more often near the noise: tau = 0.999 Beta(1.5, 1) + 0.001.
    """
    cache = model.embed_prefix(states, language)
    noise = torch.randn_like(actions)
    tau = torch.rand(len(actions)).pow(1 / 1.5) * 0.999 + 0.001
    x_tau = tau[:, None, None] * noise + (1 - tau[:, None, None]) * actions
    error = (model.denoise_step(cache, x_tau, tau) - (noise - actions)).square() * real[..., None]
    count = real.sum()
    chosen, padding = error.split((ACTION_DIM, PADDED_DIM - ACTION_DIM), -1)
    return chosen.sum() / (count * ACTION_DIM) + padding.sum() / (count * (PADDED_DIM - ACTION_DIM))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demonstrations", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=20, help="stops earlier than --updates; the rate follows it")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    windows, config = Windows(args.demonstrations), GeneralistConfig()
    model, kept = GeneralistPolicy(config).model, GeneralistPolicy(config)
    kept.model.load_state_dict(model.state_dict())
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    args.out.mkdir(parents=True, exist_ok=True)
    start, losses = time.perf_counter(), []
    with (args.out / "policy_curve.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["update", "loss", "minutes"])
        for update in range(1, args.updates + 1):
            minutes = (time.perf_counter() - start) / 60
            done = max(update / args.updates, minutes / args.minutes)
            rate = args.learning_rate * min(1.0, update / WARM_UP) * max(0.01, 1 - done)
            optimiser.param_groups[0]["lr"] = rate
            loss = flow_loss(model, *windows.batch(args.batch))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item())
            polyak_update(kept.model, model, 1 - POLYAK)
            if update % 200 == 0 or done >= 1:
                rows.writerow([update, f"{np.mean(losses):.4f}", f"{minutes:.1f}"])
                file.flush()
                print(f"update {update}, loss {np.mean(losses):.4f}, {minutes:.1f} minutes", flush=True)
                losses.clear()
            if done >= 1:
                break
    save(kept, args.out / "policy.safetensors")


if __name__ == "__main__":
    main()
