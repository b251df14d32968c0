"""Trains the ten critics offline on the frozen policy's own rollouts, with success as the only reward.

    python examples/generalist/critics.py --rollouts /tmp/rollouts.npz --out /tmp/generalist

Q(s, chunk) learns the discounted success that followed: the frozen policy's own value, SARSA with whole returns. No
chunk is valued that the policy did not play. The critics differ in first weights and in the episodes that they see.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch

from qpilots_fast.demo.generalist.critics import NUM_CRITICS, GeneralistCritics, critic_obs
from qpilots_fast.demo.generalist.instructions import TASKS, TRAINED, embedding
from qpilots_fast.demo.generalist.weights import save

GAMMA = 0.9  # a chunk
SEEN = 0.7  # share of the episodes that a critic learns from
HELD_OUT = 10  # every tenth episode is for the scores alone


class Chunks:
    """The rollouts' chunks, as the critics read them."""

    def __init__(self, path: Path) -> None:
        arrays = np.load(path)
        language = torch.stack([
            embedding(TRAINED[TASKS[task]][phrasing]) for task, phrasing in zip(arrays["task"], arrays["phrasing"])
        ])  # fmt: skip
        self.before = critic_obs(
            {"observation.state": torch.from_numpy(arrays["before"]), "observation.language": language}
        )
        self.chunks = torch.from_numpy(arrays["chunks"]).flatten(1).clamp(-1, 1)
        self.returns = torch.from_numpy(discounted_returns(arrays["episode"], arrays["done"])).float()
        self.task, self.episode = arrays["task"], torch.from_numpy(arrays["episode"])
        held_out = self.episode % HELD_OUT == 0
        self.train, self.held_out = (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


def discounted_returns(episode: np.ndarray, done: np.ndarray) -> np.ndarray:
    """GAMMA ** (chunks still to go after this one) in episodes that succeed, else 0; rows are in order of time."""
    returns, following = np.zeros(len(done)), 0.0
    for row in reversed(range(len(done))):
        last = row + 1 == len(done) or episode[row + 1] != episode[row]
        following = float(done[row]) if last else GAMMA * following
        returns[row] = following
    return returns


def ranking_score(values: np.ndarray, returns: np.ndarray) -> float:
    """Chance that of a chunk whose episode succeeds and one whose episode fails the first has the higher value."""
    order = np.argsort(np.argsort(values))
    good = returns > 0
    pairs = good.sum() * (~good).sum()
    return float((order[good].sum() - good.sum() * (good.sum() - 1) / 2) / pairs) if pairs else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=10, help="stops earlier than --updates")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data, trained = Chunks(args.rollouts), GeneralistCritics()
    critics = trained.ensemble
    seen = torch.rand(NUM_CRITICS, int(data.episode.max()) + 1) < SEEN
    optimiser = torch.optim.AdamW(critics.parameters(), lr=args.learning_rate, weight_decay=0.01)
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "critic_curve.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["update", "loss", "held_out_error", "held_out_ranking", *TASKS])
        for update in range(1, args.updates + 1):
            done = max(update / args.updates, (time.perf_counter() - start) / 60 / args.minutes)
            optimiser.param_groups[0]["lr"] = args.learning_rate * max(0.01, 1 - done)
            rows = data.train[torch.randint(len(data.train), (args.batch,))]
            error = critics(data.before[rows], data.chunks[rows]) - data.returns[rows]
            loss = error.square()[seen[:, data.episode[rows]]].mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                if update % 250 == 0 or done >= 1:
                    rows = data.held_out
                    held = critics(data.before[rows], data.chunks[rows]).mean(0)
                    error = (held - data.returns[rows]).square().mean().sqrt()
                    scores = [
                        ranking_score(held.numpy()[which], data.returns[rows].numpy()[which])
                        for which in [slice(None), *(data.task[rows.numpy()] == t for t in range(len(TASKS)))]
                    ]
                    line = [update, f"{loss:.5f}", f"{error:.4f}", *(f"{s:.3f}" for s in scores)]
                    table.writerow(line)
                    file.flush()
                    print(*line, flush=True)
            if done >= 1:
                break
    save(trained, args.out / "critics.safetensors")


if __name__ == "__main__":
    main()
