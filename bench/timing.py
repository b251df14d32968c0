"""Measuring: interleaved rounds, percentiles, memory, control loops, and whether the machine was quiet."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Tensor]

# a turn lasts at least this long where calls are short: long enough to be back in one's own cache state
_TURN_S = 0.04
_MAX_CALLS_A_TURN = 20
# calls longer than this stream far more than any cache holds, so a turn needs no untimed call of its own
_WARM_CALL_UP_TO_S = 0.3


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear interpolation between closest ranks; samples need not be sorted."""
    if not samples:
        raise ValueError("percentile of no samples; expected at least one.")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """p of the least-squares fit seconds = c * sizes^p, on logarithms."""
    if len(sizes) != len(seconds) or len(set(sizes)) < 2:
        raise ValueError(f"fit_exponent got {len(sizes)} sizes, {len(seconds)} times; expected two distinct sizes.")
    x = [math.log(size) for size in sizes]
    y = [math.log(second) for second in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return covariance / sum((a - mean_x) ** 2 for a in x)


@dataclass
class Timing:
    """Times of one contestant, in seconds.

    Args:
        build_s: set-up before the first call (stacking, tracing objects), without the first call.
        first_call_s: the first call, with whatever is compiled or packed then.
        samples: every timed call, round by round.
        round_medians: one value a round; the ratio of two contestants' is compared round by round.
    """

    build_s: float
    first_call_s: float
    samples: list[float] = field(default_factory=list)
    round_medians: list[float] = field(default_factory=list)
    peak_extra_bytes: int | None = None

    @property
    def p50(self) -> float:
        return percentile(self.samples, 50)

    def summary(self) -> dict[str, Any]:
        """What the JSON keeps."""
        return {
            "build_s": self.build_s,
            "first_call_s": self.first_call_s,
            "calls": len(self.samples),
            "rounds": len(self.round_medians),
            "min_s": min(self.samples),
            "p50_s": self.p50,
            "p90_s": percentile(self.samples, 90),
            "p99_s": percentile(self.samples, 99),
            "round_medians_s": self.round_medians,
            "peak_extra_bytes": self.peak_extra_bytes,
        }


def ratio_spread(slower: Timing, faster: Timing) -> tuple[float, float, float]:
    """(ratio of medians, lowest and highest quartile of the ratio round by round)."""
    pairs = [a / b for a, b in zip(slower.round_medians, faster.round_medians)]
    return slower.p50 / faster.p50, percentile(pairs, 25), percentile(pairs, 75)


# ---------------------------------------------------------------- the machine's other work


@dataclass(frozen=True)
class Load:
    """CPU time over a window: ours, everyone's and the hypervisor's, as a number of busy CPUs."""

    seconds: float
    own_cpus: float
    other_cpus: float
    stolen_cpus: float

    @property
    def quiet(self) -> bool:
        """Whether others took at most a twentieth of one CPU."""
        return self.other_cpus + self.stolen_cpus <= 0.05


class LoadMonitor:
    """Reads /proc/stat at the start and the end of a with block; `load` is None where there is no /proc."""

    def __init__(self) -> None:
        self.load: Load | None = None

    def __enter__(self) -> LoadMonitor:
        self._start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        end = self._read()
        if self._start is None or end is None:
            return
        wall, busy, stolen, own = (b - a for a, b in zip(self._start, end))
        if wall > 0:
            self.load = Load(wall, own / wall, max(busy - own, 0) / wall, stolen / wall)

    @staticmethod
    def _read() -> tuple[float, float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        except OSError:
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _wait, irq, softirq, stolen = (int(value) / ticks for value in fields[:8])
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return time.perf_counter(), user + nice + system + irq + softirq, stolen, own


def combine_loads(loads: Sequence[Load | None]) -> dict[str, Any] | None:
    """The worst and the time-weighted load over several windows, for the JSON."""
    known = [load for load in loads if load is not None]
    if not known:
        return None
    total = sum(load.seconds for load in known)
    return {
        "mean_other_cpus": sum((load.other_cpus + load.stolen_cpus) * load.seconds for load in known) / total,
        "worst": asdict(max(known, key=lambda load: load.other_cpus + load.stolen_cpus)),
        "quiet": all(load.quiet for load in known),
    }


# ---------------------------------------------------------------- memory


def _status_kib(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)


def peak_extra_bytes(run: Run, cuda: bool = False) -> int | None:
    """How far one call raises memory above where it stood; None where it cannot be known.

    On a GPU the allocator's peak; on Linux the resident set's high-water mark, after freed memory was given back.
    """
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_gpu = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before_gpu
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status_kib("VmRSS")
    run()
    after = _status_kib("VmHWM")
    return None if before is None or after is None else max(after - before, 0) * 1024


# ---------------------------------------------------------------- rounds


def prepare(build: Callable[[], Run]) -> tuple[Run, Timing, Tensor]:
    """Builds a contestant and makes its first call; returns it, its timing so far and the actions."""
    start = time.perf_counter()
    run = build()
    built = time.perf_counter()
    actions = run()
    if actions.is_cuda:
        torch.cuda.synchronize()
    return run, Timing(built - start, time.perf_counter() - built), actions


def _timed(run: Run, cuda: bool) -> float:
    if not cuda:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def interleave(
    runs: dict[str, Run],
    timings: dict[str, Timing],
    *,
    rounds: int | None = None,
    budget_s: float = 20.0,
    min_rounds: int = 5,
    max_rounds: int = 40,
    cuda: bool = False,
    before_round: Callable[[], object] = lambda: None,
) -> Load | None:
    """Times the contestants in turns, so that a slow spell of the machine hits all of them.

    A turn is one untimed call, so that caches and threads are the contestant's own, then as many timed calls as
    fill 40 ms. The order rotates by one each round.

    Args:
        rounds: how many; None for as many as fit budget_s, between min_rounds and max_rounds. They stop early, but
            not before the third, where they take three times budget_s.
        before_round: run, untimed, before every round; as the order rotates, no contestant always follows it.

    Returns:
        How busy other processes kept the machine meanwhile.
    """
    once = {}
    for name, run in runs.items():
        once[name] = min(_timed(run, cuda) for _ in range(2))
    calls = {name: min(max(math.ceil(_TURN_S / s), 1), _MAX_CALLS_A_TURN) for name, s in once.items()}
    warms = {name: once[name] <= _WARM_CALL_UP_TO_S for name in runs}
    if rounds is None:
        round_s = sum(once[name] * (calls[name] + warms[name]) for name in runs)
        rounds = min(max(int(budget_s / round_s), min_rounds), max_rounds)
    names = list(runs)
    start = time.perf_counter()
    with LoadMonitor() as monitor:
        for index in range(rounds):
            if index >= min(3, rounds) and time.perf_counter() - start > 3 * budget_s:
                break
            before_round()
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                if warms[name]:
                    runs[name]()
                taken = [_timed(runs[name], cuda) for _ in range(calls[name])]
                timings[name].samples += taken
                timings[name].round_medians.append(percentile(taken, 50))
    return monitor.load


def control_loop(run: Run, calls: int, between: Callable[[], object] | None = None) -> dict[str, float]:
    """B = 1 back to back, as a robot's loop calls it.

    Args:
        between: run, untimed, right before every call (a torch operation, as real loops have).

    Returns:
        p50, p90, p99, the slowest call and the jitter (standard deviation), in seconds.
    """
    for _ in range(3):
        run()
    samples = []
    for _ in range(calls):
        if between is not None:
            between()
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    mean = sum(samples) / len(samples)
    return {
        "calls": calls,
        "p50_s": percentile(samples, 50),
        "p90_s": percentile(samples, 90),
        "p99_s": percentile(samples, 99),
        "max_s": max(samples),
        "jitter_s": math.sqrt(sum((s - mean) ** 2 for s in samples) / len(samples)),
    }
