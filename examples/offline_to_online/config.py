"""One run's settings as a dataclass, and the tasks that can be named."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

SAMPLED = ("bc", "best_of_n", "qpilots_u", "qpilots_m", "qgf")  # the clone's samples, steered or not
METHODS = (*SAMPLED, "fql", "fbrac")

# environment -> (its dataset's kind, action chunk); five singletask goals each
ENVIRONMENTS: dict[str, tuple[str, int]] = {
    "antmaze-large": ("navigate", 1),
    "antmaze-giant": ("navigate", 1),
    "humanoidmaze-medium": ("navigate", 1),
    "humanoidmaze-large": ("navigate", 1),
    "antsoccer-arena": ("navigate", 1),
    "cube-single": ("play", 5),
    "cube-double": ("play", 5),
    "scene": ("play", 5),
    "puzzle-3x3": ("play", 5),
    "puzzle-4x4": ("play", 5),
}
# more that the same code runs: harder stacks, and the maze whose data the local generator can make
MORE_ENVIRONMENTS: dict[str, tuple[str, int]] = {
    "cube-triple": ("play", 5),
    "cube-quadruple": ("play", 5),
    "puzzle-4x5": ("play", 5),
    "puzzle-4x6": ("play", 5),
    "antmaze-medium": ("navigate", 1),
    "antsoccer-medium": ("navigate", 1),
    "humanoidmaze-giant": ("navigate", 1),
    "pointmaze-medium": ("navigate", 1),
    "pointmaze-large": ("navigate", 1),
    "pointmaze-giant": ("navigate", 1),
}


def _names(environments: dict[str, tuple[str, int]]) -> tuple[str, ...]:
    return tuple(
        f"{env}-{kind}-singletask-task{n}-v0" for env, (kind, _) in environments.items() for n in (1, 2, 3, 4, 5)
    )


TASKS = _names(ENVIRONMENTS)  # the 50 state-based tasks
ALL_TASKS = TASKS + _names(MORE_ENVIRONMENTS)


def split_task(task: str) -> tuple[str, str]:
    """(environment, dataset name) of a task: cube-single, cube-single-play-v0."""
    environment, _, rest = task.partition("-singletask")
    return environment.rpartition("-")[0], f"{environment}-{rest.rpartition('-')[2]}"


@dataclass(frozen=True)
class Config:
    """Defaults follow the paper's protocol at full size; --preset small fits two CPU cores.

    Args:
        task: one of ALL_TASKS, e.g. cube-single-play-singletask-task2-v0.
        method: one of METHODS.
        data: the dataset (.npz); None looks for data/<dataset>.npz, then ~/.ogbench/data/<dataset>.npz.
        chunk: actions executed open loop a decision; 0 takes the task's own (5 for manipulation).
        offline_steps, online_steps: gradient steps; online, also environment steps (one update each).
        sparse: reward -1 until all of the task is solved, in place of OGBench's sum over its parts.
        alpha: steering strength; for qgf its absolute weight.
        steering: JSON of the Steering fields that shall differ from the method's, e.g. '{"scale": "absolute"}'.
        target: the method whose sampler takes the next action in the TD target, at the run's alpha ("bc": the clone);
            "" the run's own.
        distill_weight: FQL's weight of distillation, against the normalised value; its authors use 300 against values
            of about -30 on these tasks (arXiv 2502.02538).
        value_weight: FBRAC's weight of the normalised value, against behaviour cloning.
        pretrained: file of pretrain.py; its flow (and posterior) then stay as they are, except that fbrac trains on.
        start_from: checkpoint of another run of the same shapes; this one takes its critics and begins online.
        critic_dim, critic_layers: of the critics; 0 takes hidden_dim and hidden_layers.
        initial_value: what the critics say at first; near the tasks' values, TD need not climb down from 0.
        compile, autocast: torch.compile and bfloat16 autocast for the critics' regression.
        eval_seed: of the evaluation's first episode at seed 0; each further seed has its own thousand.
        online_capacity: rows of the environment that are kept; later ones are not added.
        backend: of the sampler; "reference" is the eager PyTorch loop that the native one is compared with.
    """

    task: str = "cube-single-play-singletask-task1-v0"
    method: str = "qpilots_u"
    seed: int = 0
    data: str | None = None
    out: str = "out/offline_to_online"
    chunk: int = 0
    offline_steps: int = 1_000_000
    online_steps: int = 500_000
    batch_size: int = 256
    hidden_dim: int = 512
    hidden_layers: int = 4
    num_critics: int = 10
    learning_rate: float = 3e-4
    discount: float = 0.99
    polyak: float = 0.005
    posterior_polyak: float = 1e-3
    rho: float = 0.5
    alpha: float = 0.2
    steering: str = "{}"
    target: str = ""
    num_samples: int = 4
    candidates: int = 32
    num_steps: int = 10
    distill_weight: float = 10.0
    value_weight: float = 0.1
    pretrained: str | None = None
    start_from: str | None = None
    critic_dim: int = 0
    critic_layers: int = 0
    initial_value: float = 0.0
    compile: bool = False
    autocast: bool = False
    sparse: bool = False
    normalise_obs: bool = True
    eval_every: int = 50_000
    eval_episodes: int = 50
    eval_seed: int = 1_000_000
    checkpoint_every: int = 50_000
    log_every: int = 500
    online_capacity: int = 1_000_000
    backend: str = "auto"
    precision: str = "float32"
    threads: int = 1
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.task not in ALL_TASKS:
            raise ValueError(f"task is {self.task!r}; expected e.g. {TASKS[0]!r} (--list-tasks prints all).")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}.")
        if self.target and self.target not in SAMPLED:
            raise ValueError(f"target is {self.target!r}; expected '' or one of {', '.join(SAMPLED)}.")

    @property
    def action_chunk(self) -> int:
        """Actions executed open loop a decision."""
        return self.chunk or (ENVIRONMENTS | MORE_ENVIRONMENTS)[split_task(self.task)[0]][1]

    @property
    def critic_hidden(self) -> tuple[int, ...]:
        """Widths of the critics' hidden layers."""
        return (self.critic_dim or self.hidden_dim,) * (self.critic_layers or self.hidden_layers)

    @property
    def total_steps(self) -> int:
        """Gradient steps of both phases."""
        return self.offline_steps + self.online_steps

    @property
    def folder(self) -> Path:
        """Where this run writes."""
        return Path(self.out) / self.task / self.method / f"seed{self.seed}"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {
        "offline_steps": 10_000, "online_steps": 2_000, "hidden_dim": 256, "hidden_layers": 3, "eval_every": 5_000,
        "eval_episodes": 20, "checkpoint_every": 2_500,
    },
    "bench": {
        "offline_steps": 3_000, "online_steps": 1_000, "hidden_dim": 256, "hidden_layers": 3, "critic_dim": 128,
        "critic_layers": 2, "num_steps": 5, "precision": "bfloat16", "chunk": 5, "learning_rate": 1e-3,
        "initial_value": -50.0, "compile": True, "autocast": True, "alpha": 0.1, "num_samples": 2, "candidates": 8,
        "eval_every": 1_500, "eval_episodes": 20, "log_every": 100, "checkpoint_every": 100_000,
        "out": "out/offline_to_online_bench",
    },
}  # fmt: skip
# what a method changes in a preset; the bench's strengths were chosen among three each, for qpilots_u (0.05, 0.1, 0.2)
# and qgf (0.005, 0.02, 0.1), on cube-single task 2 with training seed 100 and --eval-seed 9000000
METHOD_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {"bench": {"qgf": {"alpha": 0.02}}}

BENCH_TASKS = (*_names({"cube-single": ("play", 5)}), "scene-play-singletask-task1-v0")


def make_parser(description: str | None, skip: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """A flag for each field of Config outside `skip`, unset by default, and --preset."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="full")
    types = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if field.name in skip:
            continue
        flag = "--" + field.name.replace("_", "-")
        if types[field.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction)
        else:
            kind = types[field.name] if types[field.name] in (int, float, str) else str
            parser.add_argument(flag, type=kind, choices=METHODS if field.name == "method" else None)
    return parser


def config_of(given: dict[str, Any]) -> Config:
    """A Config of what `make_parser` read: the preset, changed by the flags that were given."""
    changes = {name: value for name, value in given.items() if value is not None and name != "preset"}
    of_method = METHOD_SETTINGS.get(given["preset"], {}).get(changes.get("method", Config.method), {})
    return Config(**(PRESETS[given["preset"]] | of_method | changes))


def parse_config(argv: list[str] | None = None, description: str | None = None) -> Config:
    """The command line of one run."""
    parser = make_parser(description)
    parser.add_argument("--list-tasks", action="store_true")
    given = vars(parser.parse_args(argv))
    if given.pop("list_tasks"):
        print("\n".join(ALL_TASKS))
        raise SystemExit
    return config_of(given)
