"""What `qpilots-fast demo` shows: progress, tables, the picture, and what they mean."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..files import write_figure
from ..sampler import SteeredSampler
from ..steering import Steering
from .methods import (
    ALPHAS,
    DEFAULT_ALPHA,
    DRAWS,
    STRONG_ALPHA,
    Method,
    Outcome,
    Timing,
    compare,
    gate_method,
    standard_methods,
    sweep,
    timings,
    value_states,
)
from .ogbench_cube import EPISODE_STEPS, TASKS, CubePolicy, CubeTasks


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


def results_table(outcomes: list[Outcome]) -> Table:
    """Success with its interval, steps and value of every method; the default strength in bold."""
    episodes = outcomes[0].rollouts.success.size
    table = Table(title=f"One policy, {episodes} episodes a method (the same starts and noise for all)")
    for name in ("method", "success", "95 % interval", "steps", "critic value"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name == "method")
    for outcome in outcomes:
        bold = outcome.method.alpha == DEFAULT_ALPHA
        low, high = outcome.interval
        table.add_row(
            outcome.method.name, _percent(outcome.rollouts.rate), f"{_percent(low)} to {_percent(high)}",
            f"{outcome.rollouts.steps.mean():.0f}", f"{outcome.value:.2f}", style="bold" if bold else None,
        )  # fmt: skip
    return table


def timings_table(rows: list[Timing]) -> Table:
    """Milliseconds an action of each backend that runs; the caption says why the others do not."""
    absent = [f"{row.backend}: {escape(row.absent)}" for row in rows if row.absent]
    table = Table(
        title=f"Time per action chunk, batch of 1, median (steered at alpha {DEFAULT_ALPHA:g})",
        caption="\n".join(["not here:", *absent]) if absent else None,
        caption_justify="left",
    )
    methods = next((row.seconds for row in rows if row.seconds), {})
    for name in ("backend", "precision", *methods):
        table.add_column(name, justify="left" if name == "backend" else "right")
    for row in rows:
        if row.seconds:
            table.add_row(row.backend, row.precision, *(f"{1e3 * value:.3f} ms" for value in row.seconds.values()))
    return table


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Success with its interval, and critic value, against alpha; best-of-n as a line, posterior draws as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curve = sorted((o for o in outcomes if o.method.alpha is not None), key=lambda o: o.method.alpha or 0.0)
    flat = [o for o in outcomes if o.method.alpha is None and not o.method.steering.steers]
    apart = [(o, o.method.steering) for o in outcomes if o.method.alpha is None]
    drawn = [o for o, s in apart if s.uses_posterior or s.window is not None or s.max_disagreement is not None]
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
    write_figure(path, figure, dpi=130)
    plt.close(figure)


def _conclusion(outcomes: list[Outcome]) -> str:
    base, steered = outcomes[0], next(o for o in outcomes if o.method.alpha == DEFAULT_ALPHA)
    text = (
        f"The unsteered policy imitates aimless play and reaches the goal in {_percent(base.rollouts.rate)} of the "
        f"episodes. Steered by the critics at alpha {DEFAULT_ALPHA:g}, the same weights reach it in "
        f"{_percent(steered.rollouts.rate)}."
    )
    strong, window, gated = (
        next((o for o in outcomes if wanted(o.method)), None)
        for wanted in (
            lambda method: method.alpha == STRONG_ALPHA,
            lambda method: method.steering.window is not None,
            lambda method: method.steering.max_disagreement is not None,
        )
    )
    if strong is not None and window is not None and gated is not None:
        text += (
            f" Alpha {STRONG_ALPHA:g} at every step is too much ({_percent(strong.rollouts.rate)}). With a gate on the "
            f"critics' disagreement it is {_percent(gated.rollouts.rate)}, in a window over the middle steps "
            f"{_percent(window.rollouts.rate)}."
        )
    drawn = next((o for o in outcomes if o.method.steering.uses_posterior), None)
    if drawn is not None:
        text += f" With {DRAWS} posterior draws a step (QPILOTS-M) it is {_percent(drawn.rollouts.rate)}."
    if steered.interval[0] > base.interval[1]:
        return text + " The 95 % intervals of the first two do not overlap."
    return text + " With so few episodes the 95 % intervals of the first two overlap; run more with --episodes."


def run(args: argparse.Namespace) -> int:
    """The demo, once its packages are known to be there."""
    console, start = Console(), time.perf_counter()
    rounds = args.episodes or (2 if args.quick else 15)
    policy = CubePolicy.load()
    alphas = (DEFAULT_ALPHA,) if args.quick else ALPHAS
    methods = standard_methods(alphas, policy.posterior is not None)
    probe = SteeredSampler(policy.flow, policy.critic, Steering.qpilots_u(DEFAULT_ALPHA), backend=args.backend)
    mapped = "" if policy.posterior is None else f", meta flow map {policy.posterior.spec.hidden_dims}"
    console.print(
        f"[bold]OGBench cube-single[/bold]: a UR5e arm moves a cube to a goal; {len(TASKS)} tasks, {rounds} episodes "
        f"each for {len(methods) + 1} methods, at most {EPISODE_STEPS} steps an episode.\n"
        f"Policy: flow {policy.flow.spec.hidden_dims}, {policy.critic.spec.num_members} critics "
        f"{policy.critic.spec.hidden_dims}{mapped}, chunks of 5 actions; backend {probe.explain(len(TASKS)).backend}."
    )
    copies = 1 + len(alphas)
    with console.status(f"Starting {copies * len(TASKS)} simulators: all strengths run in one batch"):
        tasks = CubeTasks(copies=copies)
    outcomes = _with_progress(console, policy, tasks, methods, alphas, rounds, args)
    console.print(results_table(outcomes))
    console.print(
        "Critic value: mean - 0.5 std of the critics' estimate of the discounted steps still to go (0 at the goal, "
        "-100 never), of each method's actions at the same observations of the unsteered policy.\n"
    )
    console.print(timings_table(timings(policy, 0.3 if args.quick else 0.7)))
    picture = args.out / "qpilots_demo.png"
    plot(outcomes, picture)
    console.print(_conclusion(outcomes))
    console.print(f"Picture: {picture}   ({time.perf_counter() - start:.0f} s in all)")
    return 0


def _with_progress(
    console: Console, policy: CubePolicy, tasks: CubeTasks, methods: list[Method], alphas: tuple[float, ...],
    rounds: int, args: argparse.Namespace,
) -> list[Outcome]:  # fmt: skip
    """The outcomes in the order of the methods."""
    columns = (TextColumn("{task.description:26}"), BarColumn(), TextColumn("{task.completed}/{task.total} episodes"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("all alphas in one batch", total=(len(methods) + 1) * rounds * len(TASKS))

        def on_round(method: Method) -> None:
            progress.update(bar, advance=len(TASKS), description=method.name)

        def on_sweep() -> None:
            progress.update(bar, advance=(1 + len(alphas)) * len(TASKS))

        how = {"seed": args.seed, "backend": args.backend}
        found = sweep(policy, tasks, alphas, rounds, on_round=on_sweep, **how)
        obs = value_states(found[0].rollouts)
        methods.append(gate_method(policy, obs))  # its number comes from the unsteered policy's observations
        rest = [method for method in methods if method not in [outcome.method for outcome in found]]
        one = tasks.first_copy()
        found += compare(policy, one, rest, rounds, on_round=on_round, value_obs=obs, **how)
        return sorted(found, key=lambda outcome: methods.index(outcome.method))
