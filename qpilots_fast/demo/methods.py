"""What the demo compares: one trained policy, steered and unsteered, in a real robot-arm environment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..errors import BackendUnavailable
from ..gate import calibrate_gate
from ..reference import aggregate
from ..sampler import SteeredSampler
from ..steering import Steering
from .ogbench_cube import CubePolicy, CubeTasks, Rollouts, wilson_interval

ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5)
DEFAULT_ALPHA = 0.2  # of the table's bold row and the timings; the paper's default, not picked from this run
STRONG_ALPHA = 0.5  # too strong at every step
WINDOW = (0.3, 0.7)  # of the flow's time, in which that push is tried alone
GATE_QUANTILE = 0.9  # of the critics' disagreement, above which it is left out
CANDIDATES = 16
DRAWS = 4  # posterior draws of QPILOTS-M, the paper's number
VALUE_STATES = 512  # observations of the unsteered policy at which all methods' actions are valued
RHO = 0.5


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


def curve_method(alpha: float) -> Method:
    """A point of QPILOTS-U's curve over alpha; its 0 is the unsteered policy."""
    if alpha == 0:
        return Method("unsteered", Steering.unsteered())
    return Method(f"QPILOTS-U  alpha {alpha:g}", Steering.qpilots_u(alpha, rho=RHO))


def window_method(alpha: float = STRONG_ALPHA) -> Method:
    """QPILOTS-U with too strong a push, in the middle steps alone."""
    steering = replace(curve_method(alpha).steering, window=WINDOW)
    return Method(f"QPILOTS-U  alpha {alpha:g}, t {WINDOW[0]} to {WINDOW[1]}", steering)


def gate_method(
    policy: CubePolicy, obs: Tensor, alpha: float = STRONG_ALPHA, quantile: float = GATE_QUANTILE
) -> Method:
    """QPILOTS-U with too strong a push, gated where the critics disagree more than they mostly do at obs [B, S]."""
    steering = curve_method(alpha).steering
    generator = torch.Generator().manual_seed(0)
    gate = calibrate_gate(sampler_of(policy, steering, "auto"), obs, quantile, generator=generator)
    return Method(f"QPILOTS-U  alpha {alpha:g}, gated", replace(steering, max_disagreement=gate))


def standard_methods(alphas: tuple[float, ...] = ALPHAS, posterior: bool = True) -> list[Method]:
    """Unsteered, best-of-n, QPILOTS-U over the strengths and in a window, and QPILOTS-M where there is a posterior."""
    return [
        curve_method(0.0),
        Method(f"best of {CANDIDATES}", Steering.best_of_n(CANDIDATES, aggregation="pessimistic")),
        *map(curve_method, alphas),
        window_method(),
        *([draws_method()] if posterior else []),
    ]


def sampler_of(policy: CubePolicy, steering: Steering, backend: str, precision: str = "float32") -> SteeredSampler:
    """The policy's networks behind one frozen sampler."""
    posterior = policy.posterior if steering.estimate == "mfm" else None
    sampler = SteeredSampler(
        policy.flow, policy.critic, steering, posterior=posterior, backend=backend, precision=precision,
        action_low=-1.0, action_high=1.0,
    )  # fmt: skip
    return sampler.freeze()


def mean_value(
    policy: CubePolicy, sampler: SteeredSampler, obs: Tensor, seed: int, alpha: Tensor | None = None
) -> float:
    """Mean pessimistic value of the sampler's actions at obs [B, S], with the same noise for every sampler."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(obs), policy.flow.spec.action_dim, generator=generator)
    with torch.no_grad():
        actions = sampler(obs, noise, generator=generator, alpha=alpha)
        return float(aggregate(policy.critic(obs, actions), "pessimistic", RHO).mean())


def value_states(rollouts: Rollouts) -> Tensor:
    """Some of the observations that were seen, evenly picked [B, S]."""
    seen = torch.stack(rollouts.obs)
    return seen[:: max(1, len(seen) // VALUE_STATES)][:VALUE_STATES].contiguous()


def compare(
    policy: CubePolicy, tasks: CubeTasks, methods: list[Method], rounds: int, *, seed: int = 0, backend: str = "auto",
    max_steps: int | None = None, on_round: Callable[[Method], None] = lambda method: None,
    value_obs: Tensor | None = None,
) -> Iterator[Outcome]:  # fmt: skip
    """Runs every method on the same episodes, one at a time.

    Args:
        policy, tasks: the shipped ones, or your own.
        methods: the first one's observations are those at which values are compared, where value_obs is None.
        rounds: episodes of every task for each method.
        seed: of starts and noise, shared by all methods.
        backend: of the sampler.
        max_steps: shorter episodes (for a quick look).
        on_round: called after every round of episodes.
        value_obs: observations [B, S] at which values are compared.
    """
    for method in methods:
        sampler = sampler_of(policy, method.steering, backend)
        act = partial(sampler, generator=torch.Generator().manual_seed(seed))  # of posterior draws alone
        limit: dict[str, Any] = {} if max_steps is None else {"max_steps": max_steps}
        rollouts = tasks.rollout(policy, act, rounds, seed, on_round=partial(on_round, method), **limit)
        if value_obs is None:
            value_obs = value_states(rollouts)
        yield Outcome(method, rollouts, mean_value(policy, sampler, value_obs, seed))


def sweep(
    policy: CubePolicy, tasks: CubeTasks, alphas: tuple[float, ...], rounds: int, *, seed: int = 0,
    backend: str = "auto", max_steps: int | None = None, on_round: Callable[[], None] = lambda: None,
) -> list[Outcome]:  # fmt: skip
    """QPILOTS-U at several strengths in one batch: each copy of the tasks has its own, the first is unsteered.

    Args:
        tasks: with 1 + len(alphas) copies. The rest as `compare`.
    """
    strengths = (0.0, *alphas)
    limit: dict[str, Any] = {} if max_steps is None else {"max_steps": max_steps}
    sampler = sampler_of(policy, Steering.qpilots_u(max(alphas), rho=RHO), backend)
    rows = torch.tensor(strengths).repeat_interleave(len(tasks.tasks))
    every = tasks.rollout(policy, sampler, rounds, seed, on_round=on_round, alpha=rows, **limit)
    each = [every.of(tasks.columns(which)) for which in range(len(strengths))]
    obs = value_states(each[0])
    return [
        Outcome(curve_method(alpha), rollouts, mean_value(policy, sampler, obs, seed, torch.full((len(obs),), alpha)))
        for alpha, rollouts in zip(strengths, each)
    ]


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
