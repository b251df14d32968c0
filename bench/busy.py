"""The control loop with other processes beside it that want the processors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .cases import CASES, make_workload
from .contestants import EAGER, native_backend, our_contestants, peer_contestants
from .timing import control_loop

_SECONDS = 6.0  # of each contestant, thread count and round
_ROUNDS = 2


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """`count` processes that never wait."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure_under_load(load: int, precisions: Sequence[str]) -> list[dict[str, Any]]:
    """U at B = 1 on one thread and on all, in turns, beside `load` busy processes: milliseconds of each."""
    workload = make_workload(CASES["paper"], "U", 1)
    eager = [peer for peer in peer_contestants(workload, "best", ("float32",)) if peer.name == EAGER]
    ours = [c for c in our_contestants(workload, tuple(precisions), "cpu", frozen=False) if native_backend() in c.name]
    everywhere, rows = torch.get_num_threads(), []
    try:
        with busy_processes(load):
            for contestant in (*ours, *eager):
                run = contestant.build(workload)
                for round_ in range(_ROUNDS):
                    for threads in sorted({1, everywhere}):
                        torch.set_num_threads(threads)
                        guess = control_loop(run, 5)["p50_s"]
                        stats = control_loop(run, int(min(max(_SECONDS / guess, 10), 2000)))
                        named = {f"{name} ms": round(stats[f"{name}_s"] * 1e3, 3) for name in ("p50", "p99", "max")}
                        rows.append(
                            {"contestant": contestant.key, "threads": threads, "busy processes": load,
                             "round": round_ + 1, "calls": stats["calls"], **named}
                        )  # fmt: skip
    finally:
        torch.set_num_threads(everywhere)
    return rows
