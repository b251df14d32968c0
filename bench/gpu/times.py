"""The times that a card is first asked for: ours alone, at the paper's shape, in the order of their weight.

Of each: replays of a CUDA graph with hot caches and with a flushed L2, eager calls, and the host's time of a call with
live and with frozen weights. Without a GPU (a dry run) only the eager call is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..cases import CASES, make_workload

_REPLAYS, _EAGER, _HOST = 40, 15, 20
_FLUSH_BYTES = 256 << 20  # more than the L2 of any card


@dataclass(frozen=True)
class TimedCall:
    """One call at the paper's shape."""

    backend: str
    method: str
    precision: str
    batch_size: int


TIMED = (
    *(TimedCall("cuda", method, "bfloat16", batch) for batch in (1, 16) for method in ("U", "M")),
    *(TimedCall("triton", method, "bfloat16", batch) for batch in (256, 4096, 64, 1024) for method in ("U", "M")),
    TimedCall("cuda", "U", "float32", 1),
    TimedCall("triton", "U", "bfloat16", 16),
    TimedCall("triton", "U", "tf32", 256),
    TimedCall("triton", "U", "float32", 256),
    TimedCall("triton", "U", "bfloat16", 65536),
)


def measure_call(call: TimedCall, device: str) -> dict[str, Any]:
    """The call and its times, in microseconds."""
    workload = make_workload(CASES["paper"], call.method, call.batch_size, device=device)
    arguments = (workload.obs, workload.noise, workload.posterior_noise)
    sampler = workload.sampler(call.backend, call.precision)
    row: dict[str, Any] = dict(vars(call))
    row["eager_us"] = spread(lambda: sampler(*arguments), _EAGER, device)
    if device != "cuda":
        return row
    graph = sampler.capture(call.batch_size)
    row["graph_us"] = spread(lambda: graph(*arguments), _REPLAYS, device)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    row["graph_flushed_us"] = spread(lambda: graph(*arguments), _REPLAYS, device, before=flush.zero_)
    for name, frozen in (("host_live_us", False), ("host_frozen_us", True)):
        row[name] = host_us(workload.sampler(call.backend, call.precision, frozen), arguments)
    return row


def spread(
    run: Callable[[], Any], count: int, device: str, before: Callable[[], Any] | None = None
) -> dict[str, float]:
    """p10, p50 and p99 in microseconds, by the GPU's clock where there is one."""
    for _ in range(3):
        run()
    times = []
    for _ in range(count):
        if before is not None:
            before()
        times.append(_timed(run, device))
    times.sort()
    return {"p10": times[count // 10], "p50": statistics.median(times), "p99": times[-1]}


def _timed(run: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def host_us(sampler: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Median microseconds until a call returns, with the GPU idle before it."""
    for _ in range(3):
        sampler(*arguments)
    times = []
    for _ in range(_HOST):
        torch.cuda.synchronize()
        start = time.perf_counter()
        sampler(*arguments)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)
