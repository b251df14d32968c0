"""`qpilots-fast bench --gpu`: every kernel checked on the card first, then the measured table.

Nothing here was run by its authors on a GPU: its first run on one is the measurement.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from rich.console import Console

from qpilots_fast import BackendUnavailable, backends
from qpilots_fast.activations import ACTIVATIONS
from qpilots_fast.testing import PRESETS, Comparison, compare, make_case

from .. import plots, records, report
from ..cases import CASES, make_workload
from ..contestants import forget_compiled, our_contestants, peer_contestants
from ..machine import header, measure_peaks
from ..measure import measure_cell

GPU_BACKENDS = ("triton", "cuda")
_BATCH_SIZES = (1, 16, 64, 256, 1024, 4096, 16384)
# odd on purpose: each leaves a different remainder in every block shape
_CHECKED_BATCHES = (1, 3, 16, 17, 257)
_CHECKED_SHAPES: tuple[dict[str, Any], ...] = (
    dict(hidden_dims=(96, 72)),
    dict(hidden_dims=(512, 300), obs_dim=40, action_dim=25, num_critics=4),
)


@dataclass(frozen=True)
class KernelCheck:
    """One comparison with the float64 reference on the CPU."""

    backend: str
    what: str
    precision: str
    compared: Comparison


def check_samplers(backend: str, precision: str, device: str = "cuda") -> list[KernelCheck]:
    """Every preset at every checked shape and batch size."""
    found = []
    for (name, steering), shape, batch in product(PRESETS.items(), _CHECKED_SHAPES, _CHECKED_BATCHES):
        case = make_case(steering, batch_size=batch, **shape)
        try:
            actions = case.to(device).run(backend, precision)
        except BackendUnavailable:  # the backend states that it does not run this setting
            continue
        what = f"sample {name} B={batch} {shape['hidden_dims']}"
        found.append(KernelCheck(backend, what, precision, compare(actions, case.expected(), precision)))
    return found


def check_networks(backend: str, precision: str, device: str = "cuda") -> list[KernelCheck]:
    """forward and vjp of the three kinds of network, over activations and LayerNorm placements."""
    found = []
    engine, oracle = backends.get(backend), backends.get("reference")
    generator = torch.Generator().manual_seed(0)
    for activation, norm in product(ACTIVATIONS, (None, "pre", "post")):
        case = make_case(activation=activation, layer_norm=norm, critic_layer_norm=norm)
        for kind in ("flow", "critic", "posterior"):
            exact, bound = getattr(case.double(), kind).bound(), getattr(case.to(device), kind).bound()
            blocks = [torch.randn(33, exact.spec.block_dim(b), generator=generator) for b in exact.spec.input_order]
            wide, here = [block.double() for block in blocks], [block.to(device) for block in blocks]
            forward = oracle.forward(exact, wide, "float64")
            cotangent = torch.randn(forward.shape, generator=generator)
            handle = engine.prepare(bound, precision)
            pairs = {
                "forward": (engine.forward(handle, here, precision), forward),
                "vjp": (
                    engine.vjp(handle, here, cotangent.to(device), precision),
                    oracle.vjp(exact, wide, cotangent.double(), "float64"),
                ),
            }
            for what, (actual, expected) in pairs.items():
                scale = max(expected.abs().max().item(), 1.0) * 4  # outputs are not within [-1, 1]
                compared = compare(actual, expected, precision, scale)
                found.append(KernelCheck(backend, f"{what} {kind} {activation} {norm}", precision, compared))
    return found


def check_every_kernel(console: Console) -> list[KernelCheck]:
    """Runs all checks of the backends that can run; prints the failures and one line a backend."""
    found: list[KernelCheck] = []
    for backend in GPU_BACKENDS:
        reason = backends.unavailable_reason(backend)
        if reason is not None:
            console.print(f"{backend}: not here ({reason})")
            continue
        for precision in backends.get(backend).precisions:
            checks = check_samplers(backend, precision) + check_networks(backend, precision)
            wrong = [check for check in checks if not check.compared.passed]
            worst = max((check.compared.max_error for check in checks), default=float("nan"))
            console.print(f"{backend} {precision}: {len(checks)} checks, {len(wrong)} wrong, worst error {worst:.1e}")
            for check in wrong:
                console.print(f"  [red]WRONG[/red] {check.what}: {check.compared.words}")
            found += checks
    return found


def main(options: argparse.Namespace) -> int:
    """Checks, then times; the exit status is 2 without a GPU, 1 where a kernel is wrong."""
    console = Console(width=max(Console().width, 160))
    if not torch.cuda.is_available():
        console.print(
            "bench --gpu needs an NVIDIA GPU and a CUDA build of torch; torch.cuda.is_available() is False here. "
            "Without one: `python -m bench.gpu_static` compiles every kernel and reads its machine code."
        )
        return 2
    checks = check_every_kernel(console)
    if any(not check.compared.passed for check in checks):
        console.print("[red]no times: some kernels are wrong[/red]")
        return 1
    peaks = measure_peaks("cuda")
    console.print(report.peaks_text(peaks))
    cells = []
    for name in options.case:
        for method in options.method or CASES[name].methods:
            for batch in options.batch or _BATCH_SIZES:
                forget_compiled()
                workload = make_workload(CASES[name], method, batch, device="cuda")
                ours = our_contestants(workload, options.precision, "cuda")
                peers = peer_contestants(workload, options.peers, device="cuda")
                limits = dict(rounds=options.rounds, budget_s=min(options.budget, 5.0))
                cell = measure_cell(workload, [*ours, *peers], precisions=options.precision, **limits)
                cells.append(cell)
                console.print(report.cell_table(cell, peaks))
    record: dict[str, Any] = header("gpu", ["--gpu"], peaks)
    record |= {"cells": [cell.to_json(peaks) for cell in cells], "checks": [asdict(check) for check in checks]}
    path = records.save(record, options.out)
    console.print(f"saved {path}")
    if not options.no_plots:
        plots.plot_all(record, path)
    return int(any(r.contestant.ours and not r.usable for cell in cells for r in cell.results))
