"""`qpilots-fast demo`: one trained policy, steered and unsteered, in a real robot-arm environment."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import backends
from .errors import BackendUnavailable
from .ogbench_cube import CubePolicy, CubeTasks, Rollouts, wilson_interval
from .reference import aggregate
from .sampler import SteeredSampler
from .steering import Steering

ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5)
DEFAULT_ALPHA = 0.2  # of the table's bold row and the timings; the paper's default, not picked from this run
CANDIDATES = 16
DRAWS = 4  # posterior draws of QPILOTS-M, the paper's number
VALUE_STATES = 512  # observations of the unsteered policy at which all methods' actions are valued
RHO = 0.5
NEEDED = {"ogbench": "ogbench", "rich": "rich", "matplotlib": "matplotlib", "safetensors": "safetensors"}


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    steering: Steering

    @property
    def alpha(self) -> float | None:
        """Strength, where the method lies on QPILOTS-U's curve over alpha (unsteered is its 0)."""
        on_curve = self.steering in (Steering.unsteered(), Steering.qpilots_u(self.steering.alpha, rho=RHO))
        return self.steering.alpha if on_curve else None


@dataclass(frozen=True)
class Outcome:
    """What a method did."""

    method: Method
    rollouts: Rollouts
    value: float  # mean pessimistic critic value of its actions at the unsteered policy's observations

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success rate."""
        return wilson_interval(int(self.rollouts.success.sum()), self.rollouts.success.size)


def draws_method(num_samples: int = DRAWS, alpha: float = DEFAULT_ALPHA) -> Method:
    """QPILOTS-M with the policy's meta flow map."""
    steering = Steering.qpilots_m(alpha, rho=RHO, num_samples=num_samples)
    return Method(f"QPILOTS-M  alpha {alpha:g}, N={num_samples}", steering)


def standard_methods(alphas: tuple[float, ...] = ALPHAS, posterior: bool = True) -> list[Method]:
    """Unsteered, best-of-n, QPILOTS-U over the strengths, and QPILOTS-M where the policy has a posterior."""
    return [
        Method("unsteered", Steering.unsteered()),
        Method(f"best of {CANDIDATES}", Steering.best_of_n(CANDIDATES, aggregation="pessimistic")),
        *(Method(f"QPILOTS-U  alpha {alpha:g}", Steering.qpilots_u(alpha, rho=RHO)) for alpha in alphas),
        *([draws_method()] if posterior else []),
    ]


def sampler_of(policy: CubePolicy, steering: Steering, backend: str, precision: str = "float32") -> SteeredSampler:
    """The policy's networks behind one frozen sampler."""
    posterior = policy.posterior if steering.estimate == "mfm" else None
    sampler = SteeredSampler(
        policy.flow, policy.critic, steering, posterior=posterior, backend=backend, precision=precision
    )
    return sampler.freeze()


def mean_value(policy: CubePolicy, sampler: SteeredSampler, obs: Tensor, seed: int) -> float:
    """Mean pessimistic value of the sampler's actions at obs [B, S], with the same noise for every sampler."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(obs), policy.flow.spec.action_dim, generator=generator)
    with torch.no_grad():
        actions = sampler(obs, noise, generator=generator)
        return float(aggregate(policy.critic(obs, actions), "pessimistic", RHO).mean())


def compare(
    policy: CubePolicy, tasks: CubeTasks, methods: list[Method], rounds: int, *, seed: int = 0, backend: str = "auto",
    max_steps: int | None = None, on_round: Callable[[Method], None] = lambda method: None,
) -> Iterator[Outcome]:  # fmt: skip
    """Runs every method on the same episodes, one at a time.

    Args:
        policy, tasks: the shipped ones, or your own.
        methods: the first one's observations are those at which values are compared.
        rounds: episodes of every task for each method.
        seed: of starts and noise, shared by all methods.
        backend: of the sampler.
        max_steps: shorter episodes (for a quick look).
        on_round: called after every round of episodes.
    """
    value_obs: Tensor | None = None
    for method in methods:
        sampler = sampler_of(policy, method.steering, backend)
        act = partial(sampler, generator=torch.Generator().manual_seed(seed))  # of posterior draws alone
        limit = {} if max_steps is None else {"max_steps": max_steps}
        rollouts = tasks.rollout(policy, act, rounds, seed, on_round=partial(on_round, method), **limit)
        if value_obs is None:
            seen = torch.stack(rollouts.obs)
            value_obs = seen[:: max(1, len(seen) // VALUE_STATES)][:VALUE_STATES].contiguous()
        yield Outcome(method, rollouts, mean_value(policy, sampler, value_obs, seed))


def time_per_action(policy: CubePolicy, backend: str, steering: Steering, precision: str, seconds: float) -> float:
    """Median seconds of one call at B = 1 with frozen weights."""
    sampler = sampler_of(policy, steering, backend, precision)
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(1, policy.flow.spec.obs_dim, generator=generator)
    noise = torch.randn(1, policy.flow.spec.action_dim, generator=generator)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    with torch.inference_mode():
        for _ in range(3):
            sampler(obs, noise, generator=generator)
        while len(times) < 5 or time.perf_counter() < deadline:
            start = time.perf_counter()
            sampler(obs, noise, generator=generator)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclass(frozen=True)
class Timing:
    """A backend's seconds per action chunk by method, or why it does not run."""

    backend: str
    precision: str
    seconds: dict[str, float]
    absent: str = ""


def timings(policy: CubePolicy, seconds: float) -> list[Timing]:
    """Unsteered, QPILOTS-U and, where the policy has a posterior, QPILOTS-M on each backend."""
    methods = {"unsteered": Steering.unsteered(), "QPILOTS-U": Steering.qpilots_u(DEFAULT_ALPHA, rho=RHO)}
    if policy.posterior is not None:
        methods[f"QPILOTS-M, N={DRAWS}"] = draws_method().steering
    rows: list[Timing] = []
    for name in backends.BACKENDS:
        reason = backends.unavailable_reason(name)
        if reason is not None:
            rows.append(Timing(name, "-", {}, reason))
            continue
        for precision in ("float32", "bfloat16"):
            if precision == "bfloat16" and (name == "reference" or precision not in backends.get(name).precisions):
                continue
            try:
                times = {key: time_per_action(policy, name, s, precision, seconds) for key, s in methods.items()}
                rows.append(Timing(name, precision, times))
            except BackendUnavailable as error:
                rows.append(Timing(name, precision, {}, str(error)))
    return rows


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Success with its interval, and critic value, against alpha; best-of-n as a line, posterior draws as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curve = sorted((o for o in outcomes if o.method.alpha is not None), key=lambda o: o.method.alpha or 0.0)
    flat = [o for o in outcomes if o.method.alpha is None and not o.method.steering.steers]
    drawn = [o for o in outcomes if o.method.steering.uses_posterior]
    alphas = [o.method.alpha for o in curve]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    low, high = zip(*(o.interval for o in curve))
    left.fill_between(alphas, low, high, alpha=0.2, color="tab:blue", linewidth=0, label="95 % interval")
    left.plot(alphas, [o.rollouts.rate for o in curve], "o-", color="tab:blue", label="QPILOTS-U")
    right.plot(alphas, [o.value for o in curve], "o-", color="tab:blue", label="QPILOTS-U")
    for axis, values in ((left, [o.rollouts.rate for o in flat]), (right, [o.value for o in flat])):
        for outcome, value in zip(flat, values):
            axis.axhline(value, color="tab:orange", linestyle="--", label=outcome.method.name)
        for i, outcome in enumerate(drawn):  # a little apart, for their strengths are equal
            at, style = outcome.method.steering.alpha + 0.006 * (i + 1), {"color": f"C{i + 2}", "marker": "s"}
            if axis is left:
                middle, (bottom, top) = outcome.rollouts.rate, outcome.interval
                around = [[middle - bottom], [top - middle]]
                axis.errorbar(at, middle, around, label=outcome.method.name, capsize=3, linestyle="", **style)
            else:
                axis.plot(at, outcome.value, label=outcome.method.name, linestyle="", **style)
        axis.set_xlabel("alpha (0 = unsteered)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    left.set_ylim(-0.02, 1.02)
    left.set_ylabel("success rate, five tasks")
    right.set_ylabel("critic value of the chosen actions")
    episodes = outcomes[0].rollouts.success.size
    figure.suptitle(f"OGBench cube-single, singletask 1-5: one policy, {episodes} episodes a point")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def missing_packages() -> list[str]:
    """pip names of what the demo needs and this interpreter lacks."""
    return [pip for module, pip in NEEDED.items() if importlib.util.find_spec(module) is None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qpilots-fast demo",
        description="Steers one behaviour-cloned policy through the five OGBench cube-single tasks, without training.",
    )
    parser.add_argument("--episodes", type=int, default=None, help="per task and method (default 15; 2 with --quick)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the picture (default: here)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", choices=("auto", *backends.BACKENDS))
    parser.add_argument("--quick", action="store_true", help="a look in well under a minute: fewer alphas and episodes")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the process's exit status."""
    args = _parser().parse_args(argv)
    missing = missing_packages()
    if missing:
        print(
            f"qpilots-fast demo needs {', '.join(missing)}, which this Python does not have.\n"
            f"Install with:  {Path(sys.executable).name} -m pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    if args.episodes is not None and args.episodes < 1:
        print(f"qpilots-fast demo: --episodes is {args.episodes}; expected at least 1.", file=sys.stderr)
        return 2
    from .demo_report import run

    try:
        return run(args)
    except BackendUnavailable as error:
        print(f"qpilots-fast demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qpilots-fast demo: stopped.", file=sys.stderr)
        return 130
