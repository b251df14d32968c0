"""Lets the frozen policy play the six tasks, told in its trained phrasings, and keeps every chunk and every end.

python examples/generalist/rollouts.py --weights /tmp/generalist --out /tmp/rollouts.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from qpilots_fast.demo.generalist.instructions import ASSETS, TASKS, TRAINED
from qpilots_fast.demo.generalist.tasks import Episode, Tasks
from qpilots_fast.demo.generalist.weights import load_policy
from qpilots_fast.files import replacing

SEED = 1000  # of these episodes; evaluate.py's are others
STEPS = 128  # more than an evaluated episode has: late successes teach too


def save_episodes(episodes: list[Episode], path: Path) -> None:
    """Arrays over all chunks: states [T, 39], chunks [T, C, 4], whether it ended in success, and of
    which episode, task and phrasing it is."""
    rows = [
        (episode.states[k], chunk, episode.success and k + 1 == len(episode.chunks), number)
        for number, episode in enumerate(episodes)
        for k, chunk in enumerate(episode.chunks)
    ]
    before, chunks, done, number = (np.array(column) for column in zip(*rows))
    tasks = np.array([TASKS.index(episode.task) for episode in episodes])
    phrasings = np.array([TRAINED[episode.task].index(episode.sentence) for episode in episodes])
    with replacing(path) as new, new.open("wb") as file:
        np.savez_compressed(
            file, before=before.astype(np.float32), chunks=chunks, done=done, episode=number, task=tasks[number],
            phrasing=phrasings[number],
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=ASSETS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=10, help="environments of each task, side by side")
    parser.add_argument("--rounds", type=int, default=20, help="episodes of each environment")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy, tasks, episodes = load_policy(args.weights), Tasks(args.copies), []
    for r in range(args.rounds):  # saved after every round: what there is can be learned from
        episodes += tasks.rollout(policy.predict_action_chunk, 1, args.seed + r, max_steps=STEPS)
        save_episodes(episodes, args.out)
        done = {task: np.mean([e.success for e in episodes if e.task == task]) for task in TASKS}
        print(f"round {r + 1}: " + ", ".join(f"{task} {rate:.0%}" for task, rate in done.items()), flush=True)


if __name__ == "__main__":
    main()
