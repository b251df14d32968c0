"""PNG plots of a result file: latency against batch size, speed-up bars, percent of peak."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from qpilots_fast.files import write_figure

# Okabe and Ito's colours, distinguishable with any colour vision; ours are the first two
_OURS = {"float32": "#0072B2", "bfloat16": "#D55E00"}
_PEERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000", "#F0E442", "#7A5195")


def _by_workload(record: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in record["cells"]:
        groups[cell["case"], cell["method"]].append(cell)
    return {key: sorted(cells, key=lambda cell: cell["batch_size"]) for key, cells in groups.items()}


def _lines(cells: list[dict[str, Any]]) -> dict[tuple[str, str, bool], list[tuple[int, float]]]:
    """(name, precision, ours) -> [(B, p50)], live weights only."""
    lines: dict[tuple[str, str, bool], list[tuple[int, float]]] = defaultdict(list)
    for cell in cells:
        for r in cell["results"]:
            if "p50_s" in r and not r["frozen"]:
                lines[r["name"], r["precision"], r["ours"]].append((cell["batch_size"], r["p50_s"]))
    return lines


def plot_latency(cells: list[dict[str, Any]], title: str, path: Path) -> None:
    """p50 against B on logarithmic axes, one line a contestant, with our floors drawn in."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5))
    peers = sorted({name for name, _, ours in _lines(cells) if not ours})
    for (name, precision, ours), points in sorted(_lines(cells).items(), key=lambda item: item[0]):
        colour = _OURS.get(precision, "#0072B2") if ours else _PEERS[peers.index(name) % len(_PEERS)]
        dash = "-" if precision == "float32" else "--"
        axes.plot(
            *zip(*[(b, s * 1e3) for b, s in points]), dash, color=colour, marker="o" if ours else ".",
            linewidth=2.4 if ours else 1.1, label=f"{name}, {precision}",
        )  # fmt: skip
    for precision, colour in _OURS.items():
        floor = [(c["batch_size"], c["floor_s"][precision] * 1e3) for c in cells if c["floor_s"].get(precision)]
        if floor:
            axes.plot(*zip(*floor), ":", color=colour, label=f"floor of this machine, {precision}")
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="one call, median [ms]", title=title)
    axes.set_xticks([c["batch_size"] for c in cells], [str(c["batch_size"]) for c in cells])
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7)
    _save(figure, path)


def plot_speedup(cells: list[dict[str, Any]], title: str, path: Path) -> None:
    """Our speed-up over the best float32 peer (float32) and the best peer of all (bfloat16), by batch size."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(7.5, 4))
    for index, precision in enumerate(_OURS):
        heights = []
        for cell in cells:
            fair = [r for r in cell["results"] if "p50_s" in r and not r["frozen"]]
            ours = [r["p50_s"] for r in fair if r["ours"] and r["precision"] == precision]
            peers = [
                r["p50_s"] for r in fair if not r["ours"] and (precision != "float32" or r["precision"] == "float32")
            ]
            heights.append(min(peers) / min(ours) if ours and peers else float("nan"))
        bars = axes.bar(
            np.arange(len(cells)) + 0.4 * (index - 0.5), heights, 0.38, color=_OURS[precision],
            label=f"{precision}, over the best {'float32 peer' if precision == 'float32' else 'peer of any precision'}",
        )  # fmt: skip
        axes.bar_label(bars, [f"{h:.1f}x" if h == h else "" for h in heights], fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cells)), [f"B={c['batch_size']}" for c in cells])
    axes.set(ylabel="times faster (median)", title=title)
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_percent_of_peak(cells: list[dict[str, Any]], title: str, path: Path) -> None:
    """Percent of the multiply-add peak of the same run, ours and the best peer, by batch size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4))
    for precision, colour in _OURS.items():
        for ours, dash in ((True, "o-"), (False, ".:")):
            points = []
            for cell in cells:
                fair = [
                    r for r in cell["results"] if (r["ours"], r["precision"], r["frozen"]) == (ours, precision, False)
                ]
                rates = [r["percent_of_peak_flops"] for r in fair if r.get("percent_of_peak_flops")]
                if rates:
                    points.append((cell["batch_size"], max(rates)))
            if points:
                axes.plot(
                    *zip(*points), dash, color=colour, label=f"{'qpilots_fast' if ours else 'best peer'}, {precision}"
                )
    axes.set(xscale="log", xlabel="batch size", ylabel="% of the multiply-add peak", ylim=(0, 105), title=title)
    axes.set_xticks([c["batch_size"] for c in cells], [str(c["batch_size"]) for c in cells])
    axes.grid(True, alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    write_figure(path, figure, dpi=130)
    plt.close(figure)


def plot_all(record: dict[str, Any], stem: Path) -> list[Path]:
    """Every plot of a result, named after its file; none where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    machine = record["machine"]
    where = (machine["gpu"] or {}).get("name") or f"{machine['cpu']}, {machine['torch_threads']} threads"
    paths = []
    for (case, method), cells in _by_workload(record).items():
        if not any("p50_s" in r for cell in cells for r in cell["results"]):
            continue
        for name, plot in (("latency", plot_latency), ("speedup", plot_speedup), ("peak", plot_percent_of_peak)):
            path = stem.with_name(f"{stem.stem}_{case}_{method}_{name}.png")
            plot(cells, f"{case}, {method}: {where}", path)
            paths.append(path)
    return paths
