"""Demonstrations of the six tasks: Meta-World's scripted policies, made noisy, mistaken and partial.

    python examples/generalist/demonstrations.py --out /tmp/demonstrations.npz

Each demonstration is clumsy in its own way, so that its imitation succeeds sometimes: what the script believes about
places is off by some centimetres for the whole episode; spells of 8 steps push the hand somewhere; every action has
noise; and a third of the demonstrations end early, wherever they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from metaworld.policies import ENV_POLICY_MAP

from qpilots_fast.demo.generalist.instructions import TASKS
from qpilots_fast.demo.generalist.policy import ACTION_DIM
from qpilots_fast.demo.generalist.tasks import make_env, quiet, reset

MISTAKES = (0.0, 0.005, 0.02)  # metres, of which each demonstration has one as its std
SPELL_STEPS, SPELL_SHARE, SPELL_STD = 8, 0.15, 0.6
ACTION_STD = 0.1
PARTIAL_SHARE = 1 / 3
STEPS = 160


def demonstrate(task: str, env: object, seed: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """States [T, 39], actions [T, 4] and whether the task was done."""
    rng = np.random.default_rng(seed)
    script, state = ENV_POLICY_MAP[task](), reset(env, seed)
    mistake = np.zeros(39)
    mistake[4:7] = rng.normal(0, rng.choice(MISTAKES), 3)
    states, actions, done = [], [], False
    for k in range(STEPS):
        if k % SPELL_STEPS == 0:
            push = rng.normal(0, SPELL_STD, ACTION_DIM) * (rng.random() < SPELL_SHARE)
        action = np.clip(script.get_action(state + mistake), -1, 1) + push + rng.normal(0, ACTION_STD, ACTION_DIM)
        states.append(state)
        actions.append(np.clip(action, -1, 1))
        state, _, _, _, info = env.step(actions[-1])
        done = info["success"] > 0
        if done:
            break
    if rng.random() < PARTIAL_SHARE:
        end = int(rng.uniform(0.3, 1) * len(states))
        states, actions = states[:end], actions[:end]
    return np.stack(states), np.stack(actions), done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    arrays: dict[str, np.ndarray] = {}
    with quiet():
        for number, task in enumerate(TASKS):
            env, found = make_env(task), []
            for i in range(args.per_task):
                found.append(demonstrate(task, env, args.seed + 100_000 * number + i))
            arrays[f"{task}.states"] = np.concatenate([states for states, _, _ in found]).astype(np.float32)
            arrays[f"{task}.actions"] = np.concatenate([actions for _, actions, _ in found]).astype(np.float32)
            arrays[f"{task}.lengths"] = np.array([len(states) for states, _, _ in found])
            done = np.mean([done for _, _, done in found])
            print(f"{task}: {args.per_task} demonstrations, done {done:.0%}, {len(arrays[f'{task}.states'])} steps")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **arrays)


if __name__ == "__main__":
    main()
