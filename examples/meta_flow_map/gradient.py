"""Steering gradients against the exact gradient of V(x, t) = log E[exp(tau Q(x1)) | x_t = x], and what they steer to.

python -m examples.meta_flow_map.gradient             # about two minutes on one core; uses the stored map
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from qpilots_fast import MetaFlowMap, SteeredSampler, Steering, backends
from qpilots_fast.evaluators import evaluators
from qpilots_fast.files import write_figure
from qpilots_fast.reference import steer_velocity, steering_gradient

from .posterior import RESULTS, stored_map, write_table
from .problem import BASE, CRITICS, TAU, States, exact_gradient, states_at

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Critic = Callable[[Tensor], Tensor]
TIMES = [k / 10 for k in range(1, 10)]  # the steered steps of K = 10
COUNTS = [1, 4, 16, 64]
ROWS_PER_TIME = 80
DRAWS_PER_STATE = 64  # 64 / N repeats of an estimate of N draws
ALPHA = 0.3


def estimators() -> dict[str, Steering]:
    """What is compared; num_samples is set later. GLASS with m = 32 stands nearly for the exact map."""
    plain = Steering(clip="none", aggregation="mean", tau=TAU, alpha=ALPHA)
    return {
        "QPILOTS-U": plain,
        "QPILOTS-M": replace(plain, estimate="mfm"),
        **{f"GLASS m = {m}": replace(plain, estimate="glass", glass_steps=m) for m in (2, 4, 8, 32)},
    }


def estimate(steering: Steering, critic: Critic, network: MetaFlowMap, x: Tensor, t: float, seed: int) -> Tensor:
    """The library's gradient [B, 2] at x [B, 2]."""
    obs = x[:, :0]
    net = evaluators(
        BASE.velocity, lambda obs, a: critic(a).unsqueeze(0), network, steering, backends.get("reference"), "float64",
        obs,
    )  # fmt: skip
    eps = None
    if steering.uses_posterior:
        generator = torch.Generator().manual_seed(seed)
        eps = torch.randn(len(x), steering.num_samples, 2, generator=generator, dtype=x.dtype)
    v, pullback = net.flow(x, t)
    return steering_gradient(net, steering, x, v, pullback, t, eps, (-2.0, 2.0))[0].detach()


def draw_states() -> States:
    """ROWS_PER_TIME states at each of TIMES."""
    t = torch.tensor(TIMES, dtype=torch.float64).repeat_interleave(ROWS_PER_TIME).unsqueeze(-1)
    return states_at(t, torch.Generator().manual_seed(2))


def gradient_table(network: MetaFlowMap) -> list[dict[str, object]]:
    """Per critic, estimator and N: mean cosine with the exact gradient and relative RMS error, by kind of state."""
    states, table = draw_states(), []
    kinds = {"bimodal": states.bimodal, "unimodal": states.unimodal}
    for critic_name, critic in CRITICS.items():
        exact = exact_gradient(critic, states)
        for name, steering in estimators().items():
            for count in COUNTS if steering.uses_posterior else [1]:
                repeats = DRAWS_PER_STATE // count if steering.uses_posterior else 1
                setting = replace(steering, num_samples=count)
                g = torch.cat(
                    [
                        estimate(setting, critic, network, rows.repeat_interleave(repeats, 0), t, seed)
                        for seed, (t, rows) in enumerate(zip(TIMES, states.x.split(ROWS_PER_TIME)))
                    ]
                ).view(len(exact), repeats, 2)
                line: dict[str, object] = {"critic": critic_name, "estimate": name, "N": count}
                cosine = torch.cosine_similarity(g, exact.unsqueeze(1), dim=-1)
                error = (g - exact.unsqueeze(1)).square().sum(-1).mean(1)
                for kind, rows in kinds.items():
                    line[f"cosine, {kind}"] = cosine[rows].mean().item()
                    line[f"error, {kind}"] = (error[rows].sum() / exact[rows].square().sum()).sqrt().item()
                table.append(line)
    return table


def steer_exactly(critic: Critic, noise: Tensor, num_steps: int = 10) -> Tensor:
    """The sampler's loop with the exact gradient in place of an estimate."""
    x, steering = noise, estimators()["QPILOTS-U"]
    for k in range(num_steps):
        t = k / num_steps
        v = BASE.velocity(None, x, t)
        if k:
            g = exact_gradient(critic, States(x, torch.full_like(x[:, :1], t)), points=121)
            v = steer_velocity(v, g, steering)[0]
        x = x + v / num_steps
    return x


def outcome_table(network: MetaFlowMap, rows: int) -> list[dict[str, object]]:
    """What K = 10 steered steps end in: mean Q with its standard error, share at the best mode, log-density."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    settings = {"unsteered": Steering.unsteered()}
    for name, steering in estimators().items():
        for count in (4, 16) if steering.uses_posterior else (1,):
            settings[f"{name}, N = {count}" if steering.uses_posterior else name] = replace(steering, num_samples=count)
    table: list[dict[str, object]] = []
    for critic_name, critic in CRITICS.items():
        results = {
            name: SteeredSampler(
                BASE.velocity, lambda obs, a, q=critic: q(a).unsqueeze(0), setting,
                posterior=network if setting.estimate == "mfm" else None, action_low=-2, action_high=2,
                backend="reference", precision="float64",
            )(noise[:, :0], noise, generator=torch.Generator().manual_seed(5))
            for name, setting in settings.items()
        }  # fmt: skip
        results["exact gradient"] = steer_exactly(critic, noise)
        for name, actions in results.items():
            q = critic(actions)
            best = (actions.unsqueeze(1) - BASE.means).square().sum(-1).argmin(-1) == 0
            table.append(
                {
                    "critic": critic_name,
                    "steering": name,
                    "mean Q": q.mean().item(),
                    "standard error": (q.std() / rows**0.5).item(),
                    "best mode": best.double().mean().item(),
                    "log p": BASE.log_density(actions).mean().item(),
                }
            )
    return table


def plot(table: list[dict[str, object]], path: Path) -> None:
    """Cosine and error against N at bimodal states, one column per critic."""
    figure, axes = plt.subplots(2, len(CRITICS), figsize=(4.6 * len(CRITICS) + 2, 6.4), sharex=True)
    for column, critic in enumerate(CRITICS):
        for name in estimators():
            lines = [row for row in table if row["critic"] == critic and row["estimate"] == name]
            for axis, metric in zip(axes[:, column], ("cosine, bimodal", "error, bimodal")):
                values = [row[metric] for row in lines]
                if name == "QPILOTS-U":
                    axis.axhline(values[0], color="black", linestyle="--", label=name)
                    continue
                label = f"{name} (almost the exact map)" if name.endswith("32") else name
                style = {"marker": "o", "linewidth": 2.5} if name == "QPILOTS-M" else {"marker": ".", "alpha": 0.7}
                axis.plot(COUNTS, values, label=label, **style)
        axes[0, column].set(title=f'critic "{critic}"', ylim=(None, 1.02))
        axes[1, column].set(xscale="log", yscale="log", xlabel="draws N")
        axes[1, column].set_xticks(COUNTS, [str(n) for n in COUNTS])
    axes[0, 0].set_ylabel("mean cosine with the exact gradient")
    axes[1, 0].set_ylabel("relative RMS error")
    axes[0, -1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.suptitle("Steering gradients where the posterior is bimodal")
    figure.tight_layout()
    write_figure(path, figure, dpi=110)


def main() -> None:
    """Writes results/gradient.{csv,png} and results/outcome.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--outcome-rows", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    network = stored_map().double()
    states = draw_states()
    print(f"{len(states.x)} states, {int(states.bimodal.sum())} bimodal, {int(states.unimodal.sum())} unimodal")
    table = gradient_table(network)
    write_table(table, "gradient")
    plot(table, RESULTS / "gradient.png")
    write_table(outcome_table(network, arguments.outcome_rows), "outcome")


if __name__ == "__main__":
    main()
