"""Trains the meta flow map of the closed-form base policy and compares its one-call draws with the true posterior.

python -m examples.meta_flow_map.posterior            # trains (minutes on one core), then measures
python -m examples.meta_flow_map.posterior --measure  # measures the stored map alone
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from tqdm import trange

from qpilots_fast import MetaFlowMap
from qpilots_fast.files import fill, read_tensors, replacing, write_figure, write_tensors
from qpilots_fast.meta_flow_map import CONSISTENCIES, glass_velocity
from qpilots_fast.objectives import meta_flow_map_loss, polyak_update

from .closed_form import Posterior
from .problem import BASE, States, states_at

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
Draw = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_map() -> MetaFlowMap:
    """The network of this example; it sees no observation."""
    return MetaFlowMap(0, 2, (128, 128, 128), time_embedding="fourier", time_embedding_dim=16)


def stored_map(consistency: str = "eulerian") -> MetaFlowMap:
    """The map that `python -m examples.meta_flow_map.posterior` has trained."""
    network = make_map()
    path = RESULTS / f"map_{consistency}.safetensors"
    fill({"": network}, read_tensors(path)[0], path)
    return network


def train(consistency: str, steps: int, batch_size: int, seed: int) -> MetaFlowMap:
    """Distils the base policy; returns the slow copy."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    base, obs = BASE.to(torch.float32), torch.zeros(batch_size, 0)
    network, slow = make_map(), make_map()
    slow.load_state_dict(network.state_dict())
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in trange(steps, desc=consistency):
        x1 = base.sample(batch_size, generator)
        loss = meta_flow_map_loss(network, base.velocity, obs, x1, consistency=consistency, generator=generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        polyak_update(slow, network, 1e-3)
    return slow


def map_draw(network: MetaFlowMap) -> Draw:
    """One call of the map: (eps, x [B, 2], t [B, 1]) -> draws [B, 2]."""

    def draw(eps: Tensor, x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return network(eps[:, :0].float(), eps.float(), x.float(), t.float()).double()

    return draw


def glass_draws(num_steps: int) -> Draw:
    """num_steps calls of the base policy, no training."""

    def draw(xbar: Tensor, x: Tensor, t: Tensor) -> Tensor:
        for index in range(num_steps):
            s = torch.full_like(t, index / num_steps)
            xbar = xbar + glass_velocity(BASE.velocity, None, xbar, x, t, s) / num_steps
        return xbar

    return draw


def mode_shares(draws: Tensor) -> Tensor:
    """Share of each mode's nearest draws, [B, 3], of draws [B, count, 2]."""
    nearest = (draws.unsqueeze(-2) - BASE.means).square().sum(-1).argmin(-1)
    return torch.nn.functional.one_hot(nearest, len(BASE.means)).double().mean(1)


def errors(draws: Tensor, posterior: Posterior, truth: Tensor) -> dict[str, float]:
    """How far draws [B, count, 2] are from the posterior; truth are its own draws, more of them."""
    std = posterior.variance.sqrt()
    spread = draws.std(1) / std
    return {
        "mean error / std": ((draws.mean(1) - posterior.mean).abs() / std).mean().item(),
        "spread / true": spread.mean().item(),
        "spread, 5 %": spread.quantile(0.05).item(),
        "spread, 95 %": spread.quantile(0.95).item(),
        "mode weights, TV": (mode_shares(draws) - mode_shares(truth)).abs().sum(-1).mean().item() / 2,
    }


def measure(
    rows: int, count: int, consistencies: list[str], glass_steps: tuple[int, ...] = (1, 2, 4, 8, 32, 128)
) -> list[dict[str, object]]:
    """One line per way to draw, at random (t, x), t ~ U(0, 0.9); the first line is the measurement's own noise."""
    generator = torch.Generator().manual_seed(1)
    states = states_at(0.9 * torch.rand(rows, 1, generator=generator, dtype=torch.float64), generator)
    posterior = BASE.posterior(states.x, states.t)
    truth = posterior.sample(4 * count, generator)
    eps = torch.randn(rows * count, 2, generator=generator, dtype=torch.float64)
    x, t = (value.repeat_interleave(count, 0) for value in (states.x, states.t))
    ways: dict[str, Draw] = {f"meta flow map, {name}": map_draw(stored_map(name)) for name in consistencies}
    calls = dict.fromkeys(ways, 1)
    for m in glass_steps:
        ways[f"GLASS, m = {m}"], calls[f"GLASS, m = {m}"] = glass_draws(m), m
    table: list[dict[str, object]] = [
        {"draws": "true posterior", "calls": 0} | errors(posterior.sample(count, generator), posterior, truth)
    ]
    for name, draw in ways.items():
        table.append(
            {"draws": name, "calls": calls[name]} | errors(draw(eps, x, t).view(rows, count, 2), posterior, truth)
        )
    return table


def write_table(table: list[dict[str, object]], stem: str) -> None:
    """results/<stem>.csv, and Markdown on the terminal."""
    with replacing(RESULTS / f"{stem}.csv") as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in table)
    print("| " + " | ".join(table[0]) + " |\n|" + "---|" * len(table[0]))
    for row in table:
        print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def plot(path: Path) -> None:
    """True posterior, the map's draws and two-step GLASS draws at three states of growing t."""
    generator = torch.Generator().manual_seed(3)
    t = torch.tensor([[0.2], [0.5], [0.7]], dtype=torch.float64)
    states = States(t * torch.tensor([[0.1, 0.25]], dtype=torch.float64), t)
    posterior = BASE.posterior(states.x, t)
    count = 1500
    eps = torch.randn(3 * count, 2, generator=generator, dtype=torch.float64)
    x_rows, t_rows = (value.repeat_interleave(count, 0) for value in (states.x, t))
    columns = {
        "true posterior": posterior.sample(count, generator),
        "meta flow map, 1 call": map_draw(stored_map())(eps, x_rows, t_rows).view(3, count, 2),
        "GLASS, m = 2": glass_draws(2)(eps, x_rows, t_rows).view(3, count, 2),
        "GLASS, m = 8": glass_draws(8)(eps, x_rows, t_rows).view(3, count, 2),
    }
    figure, axes = plt.subplots(3, len(columns), figsize=(2.6 * len(columns), 7.4), sharex=True, sharey=True)
    for column, (title, draws) in enumerate(columns.items()):
        for row in range(3):
            axis = axes[row, column]
            axis.scatter(*draws[row].T, s=1.5, alpha=0.4, color="tab:blue", linewidths=0)
            axis.plot(*posterior.mean[row], "x", color="tab:red", label="posterior mean (QPILOTS-U)")
            axis.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
            if row == 0:
                axis.set_title(title, fontsize=10)
            if column == 0:
                axis.set_ylabel(f"t = {t[row].item():.1f}")
    axes[0, 0].legend(fontsize=6, loc="lower right")
    figure.tight_layout()
    write_figure(path, figure, dpi=110)


def main() -> None:
    """Trains where asked to, then writes results/posterior.{csv,png}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the stored maps, train nothing")
    parser.add_argument("--consistency", choices=CONSISTENCIES, nargs="+", default=list(CONSISTENCIES))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    RESULTS.mkdir(exist_ok=True)
    for consistency in () if arguments.measure else arguments.consistency:
        start = time.perf_counter()
        network = train(consistency, arguments.steps, arguments.batch_size, arguments.seed)
        write_tensors(RESULTS / f"map_{consistency}.safetensors", network.state_dict())
        print(f"{consistency}: {time.perf_counter() - start:.0f} s")
    write_table(measure(400, 1000, arguments.consistency), "posterior")
    plot(RESULTS / "posterior.png")


if __name__ == "__main__":
    main()
