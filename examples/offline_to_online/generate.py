"""Datasets from what ships in the ogbench wheel: scripted oracles (cube, scene, puzzle) and the maze's own planner.

The recipe is OGBench's: an oracle pursues one random target after another with temporally correlated noise (play), or
a point moves along the shortest way to one random goal after another with Gaussian noise (navigate).

    python -m examples.offline_to_online.generate scene-play-v0 --episodes 200 --workers 2
"""

from __future__ import annotations

import argparse
import multiprocessing
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

STACKING = {"cube-double": 0.1, "cube-triple": 0.2, "cube-quadruple": 0.3}  # chance that a target is a stack
MANIPULATION_STEPS = 1001


@lru_cache(maxsize=1)
def _environment(name: str, steps: int) -> Any:
    import gymnasium
    import ogbench

    if name.startswith("pointmaze"):
        import ogbench.locomaze

        return gymnasium.make(f"{name}-v0", terminate_at_goal=False, max_episode_steps=steps)
    import ogbench.manipspace  # noqa: F401

    return gymnasium.make(
        f"{name}-v0", terminate_at_goal=False, mode="data_collection", max_episode_steps=steps, visualize_info=False
    )


def _oracles(env: Any, name: str, noise: float) -> dict[str, Any]:
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    settings = {"env": env, "noise": noise, "noise_smoothing": 0.5}
    if name.startswith("cube"):
        return {"cube": CubePlanOracle(**settings)}
    if name.startswith("puzzle"):
        return {"button": ButtonPlanOracle(gripper_always_closed=True, **settings)}
    return {
        "cube": CubePlanOracle(**settings),
        "button": ButtonPlanOracle(**settings),
        "drawer": DrawerPlanOracle(**settings),
        "window": WindowPlanOracle(**settings),
    }


def play_episode(name: str, steps: int, noise: float, seed: int) -> dict[str, np.ndarray]:
    """One episode of an oracle at play; the seed decides everything."""
    env = _environment(name, steps)
    np.random.seed(seed)  # the oracles draw from numpy's global generator
    obs, info = env.reset(seed=seed)
    oracles = _oracles(env, name, noise)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(obs, info)
    rows: dict[str, list] = {key: [] for key in ("observations", "actions", "terminals", "qpos", "button_states")}
    done = False
    while not done:
        action = np.clip(np.asarray(oracle.select_action(obs, info)), -1, 1)
        next_obs, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        for key, value in (
            ("observations", obs),
            ("actions", action),
            ("terminals", done),
            ("qpos", info["prev_qpos"]),
        ):
            rows[key].append(value)
        if "prev_button_states" in info:
            rows["button_states"].append(info["prev_button_states"])
        obs = next_obs
        if oracle.done:
            obs, info = env.unwrapped.set_new_target(p_stack=STACKING.get(name, 0.0))
            oracle = oracles[info["privileged/target_task"]]
            oracle.reset(obs, info)
    return {key: np.asarray(values) for key, values in rows.items() if values}


def navigate_episode(name: str, steps: int, noise: float, seed: int) -> dict[str, np.ndarray]:
    """One episode of a point on its way to random cells of the maze."""
    env = _environment(name, steps)
    rng = np.random.default_rng(seed)
    np.random.seed(seed)
    maze = env.unwrapped
    free = [tuple(int(i) for i in cell) for cell in np.argwhere(maze.maze_map == 0)]

    def cell() -> tuple[int, ...]:
        return free[rng.integers(len(free))]

    obs, _ = env.reset(seed=seed, options={"task_info": {"init_ij": cell(), "goal_ij": cell()}})
    rows: dict[str, list] = {key: [] for key in ("observations", "actions", "terminals", "qpos")}
    done = False
    while not done:
        subgoal, _ = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)
        way = np.asarray(subgoal) - maze.get_xy()
        action = way / (np.linalg.norm(way) + 1e-6) + rng.normal(0, noise, way.shape)
        action = np.clip(action, -1, 1).astype(np.float32)
        next_obs, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        for key, value in (
            ("observations", obs),
            ("actions", action),
            ("terminals", done),
            ("qpos", info["prev_qpos"]),
        ):
            rows[key].append(value)
        obs = next_obs
        if info["success"]:
            maze.set_goal(goal_ij=cell())
    return {key: np.asarray(values) for key, values in rows.items()}


def generate(dataset: str, episodes: int, out: Path, *, seed: int = 0, workers: int = 1, steps: int = 0) -> None:
    """Writes `episodes` episodes in OGBench's format; episode i is seeded by seed + i, whatever the workers."""
    name = dataset.rsplit("-", 2)[0]
    if name.startswith(("cube", "scene", "puzzle")):
        episode = partial(play_episode, name, steps or MANIPULATION_STEPS, 0.1)
    elif name.startswith("pointmaze"):
        episode = partial(navigate_episode, name, steps or MANIPULATION_STEPS, 0.5)
    else:
        raise ValueError(
            f"dataset is {dataset!r}: no scripted policy for it ships with ogbench; download the dataset, or expected "
            "a cube, scene, puzzle or pointmaze one."
        )
    seeds = [seed + i for i in range(episodes)]
    if workers == 1:
        parts = [episode(s) for s in tqdm(seeds, desc=dataset)]
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            parts = list(tqdm(pool.imap(episode, seeds), total=episodes, desc=dataset))
    out.parent.mkdir(parents=True, exist_ok=True)
    dtypes: dict[str, type] = {"terminals": np.bool_, "button_states": np.int64}
    columns: dict[str, Any] = {
        key: np.concatenate([p[key] for p in parts]).astype(dtypes.get(key, np.float32)) for key in parts[0]
    }
    np.savez_compressed(out, **columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="e.g. cube-single-play-v0, scene-play-v0, pointmaze-medium-navigate-v0")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or Path("data") / f"{args.dataset}.npz"
    generate(args.dataset, args.episodes, out, seed=args.seed, workers=args.workers)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
