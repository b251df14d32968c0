"""Play data for OGBench cube-single: the scripted oracle of the `ogbench` wheel moves the cube to random places.

The same recipe as OGBench's `cube-single-play`: an open-loop plan oracle (pick, carry, place, retreat) towards a
new random target every time it is done, with temporally correlated noise; no task is ever shown. Every episode is
seeded by itself, so the file does not depend on how many workers made it. The result loads with
`ogbench.utils.load_dataset(path, add_info=True)`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import numpy as np

ENV_NAME = "cube-single-v0"
KEYS = ("observations", "actions", "terminals", "qpos")
DTYPES = {"observations": np.float32, "actions": np.float32, "terminals": np.bool_, "qpos": np.float32}

_env = None  # one environment a process, built on first use: compiling the MuJoCo model takes a second


def _environment(episode_steps: int):
    global _env
    if _env is None:
        import gymnasium
        import ogbench.manipspace  # noqa: F401  (registers the environments)

        _env = gymnasium.make(
            ENV_NAME, terminate_at_goal=False, mode="data_collection", max_episode_steps=episode_steps,
            visualize_info=False,
        )  # fmt: skip
    return _env


def collect_episode(seed: int, episode_steps: int, noise: float, noise_smoothing: float) -> dict[str, np.ndarray]:
    """One play episode.

    Args:
        seed: of the environment and of the oracle, which draws from numpy's global generator.
        episode_steps: environment steps; the episode never ends early.
        noise: of the oracle's plan, in units of the largest action.
        noise_smoothing: width in steps of the filter that correlates the noise in time.

    Returns:
        observations [T, 28], actions [T, 5], terminals [T] (True at the last step) and qpos [T, 21].
    """
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

    env = _environment(episode_steps)
    np.random.seed(seed)
    obs, info = env.reset(seed=seed)
    oracle = CubePlanOracle(env=env, noise=noise, noise_smoothing=noise_smoothing)
    oracle.reset(obs, info)
    rows: dict[str, list] = {key: [] for key in KEYS}
    done = False
    while not done:
        action = oracle.select_action(obs, info)
        next_obs, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        rows["observations"].append(obs)
        rows["actions"].append(action)
        rows["terminals"].append(done)
        rows["qpos"].append(info["prev_qpos"])
        obs = next_obs
        if oracle.done:
            obs, info = env.unwrapped.set_new_target(p_stack=0.0)
            oracle.reset(obs, info)
    return {key: np.asarray(values, dtype=DTYPES[key]) for key, values in rows.items()}


def _collect(arguments: tuple) -> dict[str, np.ndarray]:
    return collect_episode(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=250)
    parser.add_argument("--episode-steps", type=int, default=1001, help="OGBench's own length (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--noise-smoothing", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0, help="episode i uses seed + i")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("data/cube-single-play.npz"))
    args = parser.parse_args()

    jobs = [(args.seed + i, args.episode_steps, args.noise, args.noise_smoothing) for i in range(args.episodes)]
    start, episodes = time.perf_counter(), []
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for episode in pool.imap(_collect, jobs):
            episodes.append(episode)
            if len(episodes) % 10 == 0 or len(episodes) == len(jobs):
                steps, seconds = len(episodes) * args.episode_steps, time.perf_counter() - start
                print(f"{len(episodes)}/{len(jobs)} episodes, {steps} steps, {steps / seconds:.0f} steps/s", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **{key: np.concatenate([e[key] for e in episodes]) for key in KEYS})
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
