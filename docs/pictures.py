"""`python -m docs.pictures`: the pictures of docs/gallery.md, from fixed seeds and recorded results.

How paths bend: a flow whose velocity is known in closed form, four Gaussian modes in the plane, and critics that prefer
one of them.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bench.machine import ROOT
from bench.plots import plot_latency
from bench.records import load
from examples.meta_flow_map.closed_form import GaussianMixture
from qpilots_fast import SteeredSampler, Steering
from qpilots_fast.files import replacing, write_figure

PICTURES = ROOT / "docs" / "pictures"
SUCCESS = ROOT / "examples" / "ogbench_cube" / "evaluation.csv"
LATENCY = ROOT / "bench" / "results" / "intel-xeon" / "20261126T073836_dc204be1b1.jsonl"

_MODES = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
_STD = 0.12  # of each mode
_FLOW = GaussianMixture(torch.full((4,), 0.25), _MODES, torch.full((4,), _STD))
_BEST = 0  # the mode that the critics prefer
_STEPS = 20
_SPREAD = 0.25  # by which the critics disagree about where the best action is
_COLOURS_KEPT = 64  # of a picture, which makes its file a third
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito's


@dataclass(frozen=True)
class WatchedFlow:
    """The four modes' velocity, which keeps the x that it is asked at.

    seen: [B, 2] at each step's own time so far.
    """

    seen: list[Tensor]

    def __call__(self, obs: Tensor, noisy_actions: Tensor, t: Tensor) -> Tensor:
        if abs(float(t[0]) - len(self.seen) / _STEPS) < 1e-6:  # inner steps of GLASS draws are at times between
            self.seen.append(noisy_actions.detach())
        return _FLOW.velocity(obs, noisy_actions, t)


def critics(obs: Tensor, actions: Tensor) -> Tensor:
    """q_values [4, B]: minus the squared distance to four guesses at the best mode."""
    guesses = _MODES[_BEST] + _SPREAD * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    return -(actions - guesses[:, None]).square().sum(-1)


METHODS = {
    "unsteered": Steering.unsteered(),
    "QPILOTS-U, alpha 0.5": Steering.qpilots_u(alpha=0.5),
    "QPILOTS-U, alpha 1": Steering.qpilots_u(alpha=1.0),
    "QPILOTS-U, alpha 2 while t < 0.5": replace(Steering.qpilots_u(alpha=2.0), window=(0.0, 0.5)),
    "QPILOTS-M, alpha 0.5, 4 GLASS draws": replace(
        Steering.qpilots_m(alpha=0.5, num_samples=4), estimate="glass", glass_steps=4
    ),
    "QGF, weight 1": Steering.qgf(weight=1.0),
}


def paths(steering: Steering, rows: int, seed: int = 0) -> Tensor:
    """Where `rows` actions are at every step, [K + 1, B, 2]."""
    flow = WatchedFlow([])
    sampler = SteeredSampler(
        flow, critics, steering, num_steps=_STEPS, action_low=None, action_high=None, backend="reference"
    )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, 2, generator=generator)
    last = sampler(torch.zeros(rows, 1), noise=noise, generator=generator)
    return torch.stack([*flow.seen, last])


def shares(ends: Tensor) -> tuple[float, float]:
    """Of actions [B, 2]: the share in the preferred mode, and the share in any mode (within four of its std)."""
    distance = (ends[:, None] - _MODES).norm(dim=-1)
    inside = distance.min(1).values < 4 * _STD
    return float((inside & (distance.argmin(1) == _BEST)).float().mean()), float(inside.float().mean())


def draw_paths(path: Path, rows: int = 2000, drawn: int = 60) -> None:
    """One panel a method: paths coloured by the mode in which they end, over the critics' mean value."""
    plt = _pyplot()
    figure, panels = plt.subplots(2, 3, figsize=(9, 6.6), sharex=True, sharey=True, layout="constrained")
    grid = torch.linspace(-2.3, 2.3, 60)
    at = torch.cartesian_prod(grid, grid)
    value = critics(torch.zeros(len(at), 1), at).mean(0).reshape(60, 60).T
    for panel, (name, steering) in zip(panels.flat, METHODS.items()):
        moved = paths(steering, rows)
        best, inside = shares(moved[-1])
        panel.contour(grid, grid, value, levels=12, colors="0.85", linewidths=0.7, zorder=0)
        nearest = (moved[-1][:, None] - _MODES).norm(dim=-1).argmin(1)
        for row in range(drawn):
            panel.plot(*moved[:, row].T, color=_COLOURS[nearest[row]], linewidth=0.7, alpha=0.8)
        panel.scatter(*moved[-1, :drawn].T, color=[_COLOURS[i] for i in nearest[:drawn]], s=7, zorder=3)
        panel.set_title(f"{name}\n{100 * best:.0f} % in the best mode, {100 * inside:.0f} % in any", fontsize=9)
        panel.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal")
    write_figure(path, figure, dpi=100)
    plt.close(figure)


def draw_success(path: Path) -> None:
    """Success against alpha, with 95 % Wilson intervals, from the example's evaluation."""
    plt = _pyplot()
    with SUCCESS.open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for label, stem, tail, colour in (
        ("QPILOTS-U", "QPILOTS-U  alpha ", "", _COLOURS[0]),
        ("QPILOTS-M, N = 4", "QPILOTS-M  alpha ", ", N=4", "#D55E00"),
    ):
        found = [name for name in rows if name.startswith(stem) and name.endswith(tail)]
        alphas = [float(name.removeprefix(stem).removesuffix(tail)) for name in found]
        low, rate, high = ([100 * float(rows[name][key]) for name in found] for key in ("low", "success", "high"))
        below, above = [r - v for r, v in zip(rate, low)], [v - r for r, v in zip(rate, high)]
        axes.errorbar(alphas, rate, (below, above), color=colour, marker="o", capsize=3, label=label)
    for name, dash in (("unsteered", ":"), ("best of 16", "--")):
        axes.axhline(100 * float(rows[name]["success"]), color="0.4", linestyle=dash, label=name)
    axes.set(xlabel="alpha", ylabel="success [%], 100 episodes", ylim=(0, 100))
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    write_figure(path, figure, dpi=110)
    plt.close(figure)


def draw_latency(path: Path) -> None:
    """One call against the batch size, ours and the peers', from a recorded run."""
    _pyplot()
    record = load(LATENCY)
    cells = [cell for cell in record["cells"] if (cell["case"], cell["method"]) == ("paper", "U")]
    plot_latency(cells, f"QPILOTS-U, the paper's networks: {record['machine']['cpu']}, 2 threads", path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def main(argv: Sequence[str] | None = None) -> int:
    """Draws all of them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m docs.pictures", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder of the pictures (default: %(default)s)")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    for draw, name in ((draw_paths, "paths"), (draw_success, "success"), (draw_latency, "latency")):
        path = out / f"{name}.png"
        draw(path)
        with Image.open(path) as picture:
            few = picture.convert("RGB").quantize(_COLOURS_KEPT, dither=Image.Dither.NONE)
        with replacing(path) as new:
            few.save(new, format="PNG", optimize=True)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
