"""Draws the training curves that train.py logged."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

from qpilots_fast.files import write_figure

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANELS = (  # file, columns, axis label, log scale
    ("flow_curve.csv", ("loss",), "flow matching loss", True),
    ("critic_curve.csv", ("critic_loss", "value_loss"), "implicit Q-learning losses", True),
    ("critic_curve.csv", ("q_mean",), "mean Q of the data", False),
    ("critic_curve.csv", ("q_std",), "std over the critics", False),
    ("posterior_curve.csv", ("loss",), "meta flow map loss", True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", type=Path, default=Path("out/ogbench_cube"), help="folder of the CSV files")
    args = parser.parse_args()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2), constrained_layout=True)
    for axis, (name, columns, label, log) in zip(axes, PANELS):
        rows = list(csv.DictReader((args.curves / name).open()))
        steps = [int(row["step"]) for row in rows]
        for column in columns:
            axis.plot(steps, [float(row[column]) for row in rows], label=column)
        axis.set(xlabel="update", ylabel=label, yscale="log" if log else "linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    write_figure(args.curves / "training.png", figure, dpi=110)


if __name__ == "__main__":
    main()
