"""`python -m bench.gpu.host`: the host's time of a call on a GPU backend before its first launch, on any machine.

A GPU waits for it at every call that is not a replayed graph. Tensors are on the CPU here and kernels do nothing, so
what is measured is this package's own work and torch's allocations and checks. On a GPU the launches themselves come on
top (ctypes about 3 us each, Triton more).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

from qpilots_fast import SteeredSampler, backends
from qpilots_fast.backends import Backend

from .. import report
from ..cases import CASES, Workload, make_workload

BATCH_SIZES = {"cuda": (1, 16), "triton": (64, 1024)}


class Clock:
    """When the first launch of a call was, or the first copy into a recorded graph's inputs."""

    first: float | None = None

    def launched(self, *_: Any, **__: Any) -> None:
        if self.first is None:
            self.first = time.perf_counter()


def cuda_backend(clock: Clock) -> Backend:
    """On CPU tensors, its library a stub."""
    from qpilots_fast.backends.cuda import CudaBackend
    from qpilots_fast.backends.cuda.library import Library

    class Stub(Library):
        device_type: ClassVar[str] = "cpu"

        def __init__(self) -> None:
            self.path = Path("stub")

        def call(self, name: str, *arguments: Any, memory: Any = None) -> None:
            clock.launched()

        def unavailable_reason(self) -> str | None:
            return None

        def multiprocessors(self, device: torch.device) -> int:
            return 132

        def stream(self, device: torch.device) -> int:
            return 0

        def failure_word(self) -> Tensor:
            return torch.zeros(1, dtype=torch.int32)

    return CudaBackend(Stub())


def triton_backend(clock: Clock) -> Backend:
    """On CPU tensors, its launches and the graphs that plain calls are recorded in stubs."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: CPU tensors are then taken
    from qpilots_fast.backends.triton import TritonBackend, launcher

    class Stub:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return clock.launched

    class Graph:
        def record(self, enqueue: Callable[[], Any]) -> Any:
            return enqueue()

        def replay(self) -> None:
            clock.launched()

    launcher.kernel_of = lambda name: Stub()  # type: ignore[assignment]
    return TritonBackend(new_graph=lambda device: Graph())


def host_times(call: Callable[[], Any], clock: Clock, seconds: float) -> tuple[float, float]:
    """Median seconds before the first launch, and of the whole call."""
    before, whole = [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(whole) < 20:
        clock.first = None
        begin = time.perf_counter()
        call()
        whole.append(time.perf_counter() - begin)
        assert clock.first is not None, "nothing was launched"
        before.append(clock.first - begin)
    return statistics.median(before), statistics.median(whole)


def measure(backend: Backend, clock: Clock, workload: Workload, frozen: bool, seconds: float) -> tuple[float, float]:
    """`host_times` of the sampler's call."""
    sampler: SteeredSampler = workload.sampler("auto", "bfloat16", frozen)
    arguments = (workload.obs, workload.noise, workload.posterior_noise)

    def enqueue_copy(target: Tensor, _: Tensor) -> Tensor:
        clock.launched()  # on a GPU it is queued as a kernel is; here M's noise at B = 1024 takes 90 us
        return target

    with (
        mock.patch.object(backends, "choose", lambda request: backends.Choice(backend, {})),
        mock.patch("qpilots_fast.runs.check_actions"),  # nothing computed them
    ):
        for _ in range(5):
            sampler(*arguments)
        with mock.patch.object(Tensor, "copy_", enqueue_copy):
            return host_times(lambda: sampler(*arguments), clock, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.host", description="The host's time of a GPU call.")
    parser.add_argument("--seconds", type=float, default=1.0, help="a cell (default 1)")
    parser.add_argument("--backend", choices=BATCH_SIZES, nargs="+", default=list(BATCH_SIZES))
    options = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    rows = []
    torch.set_num_threads(1)
    for name in options.backend:
        clock = Clock()
        backend = cuda_backend(clock) if name == "cuda" else triton_backend(clock)
        for method in ("U", "M"):
            for batch_size in BATCH_SIZES[name]:
                workload = make_workload(CASES["paper"], method, batch_size)
                for frozen in (False, True):
                    before, whole = measure(backend, clock, workload, frozen, options.seconds)
                    row = {
                        "backend": name,
                        "method": method,
                        "B": batch_size,
                        "weights": "frozen" if frozen else "live",
                    }
                    rows.append(row | {"us before the first launch": round(before * 1e6), "us": round(whole * 1e6)})
    Console(width=100).print(report.row_table("host time", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
