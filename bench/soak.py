"""`python -m bench.soak --minutes 60`: does memory grow, or a call slow down, while a sampler runs for long?

Batch-1 actions, now and then a mixed batch, weights written in place, settings changed and samplers made anew, as a
robot's week would have them. Calls are timed by the processor's clock too, which a busy machine does not stretch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qpilots_fast import SteeredSampler, Steering
from qpilots_fast.files import write_text
from qpilots_fast.testing import Case, make_case

from .machine import header
from .records import RESULTS, processor

INTERVALS = 20  # of which the first is left out: pools and caches fill
GROWTH_MIB, DRIFT = 4.0, 1.10  # more than this over the run is called growth, or drift
_WRITE_EVERY, _BATCH_EVERY, _MAKE_EVERY = 50, 200, 2000  # calls


def resident_mib() -> float:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def _samplers(case: Case) -> list[SteeredSampler]:
    return [case.sampler("auto"), case.sampler("auto", "bfloat16")]


def interval(case: Case, samplers: list[SteeredSampler], seconds: float, first_call: int) -> dict[str, Any]:
    """Calls for so long; what an action took, and the memory at the end."""
    obs, noise = case.obs[:1], case.noise[:1]
    generator = torch.Generator().manual_seed(first_call)
    wall, cpu, calls, end = [], [], first_call, time.perf_counter() + seconds
    while time.perf_counter() < end:
        calls += 1
        sampler = samplers[calls % len(samplers)]
        start, used = time.perf_counter(), time.process_time()
        sampler(obs, noise)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        if calls % _WRITE_EVERY == 0:
            with torch.no_grad():
                for parameter in case.critic.parameters():
                    parameter.mul_(1.0)
        if calls % _BATCH_EVERY == 0:
            rows = int(torch.randint(1, len(case.obs) + 1, (), generator=generator))
            sampler(case.obs[:rows], case.noise[:rows], return_info=True)
        if calls % _MAKE_EVERY == 0:
            samplers[:] = _samplers(case)
            samplers[0].steering = Steering.qpilots_u(0.1 + 0.1 * (calls % 3))
    quantiles = {f"p{q}_us": round(1e6 * float(np.percentile(wall, q)), 2) for q in (50, 99)}
    return {
        "calls": calls - first_call, **quantiles, "cpu_p50_us": round(1e6 * float(np.median(cpu)), 2),
        "max_ms": round(1e3 * max(wall), 2), "resident_mib": round(resident_mib(), 2),
    }  # fmt: skip


def verdict(intervals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Growth of memory after the first interval, and the last third's median over the first third's."""
    kept = intervals[1:]
    third = max(len(kept) // 3, 1)

    def drift(name: str) -> float:
        ends = [float(np.median([i[name] for i in part])) for part in (kept[:third], kept[-third:])]
        return round(ends[1] / ends[0], 3)

    growth = round(kept[-1]["resident_mib"] - kept[0]["resident_mib"], 2)
    cpu = drift("cpu_p50_us")
    return {
        "calls": sum(i["calls"] for i in intervals), "growth_mib": growth, "p50_drift": drift("p50_us"),
        "cpu_p50_drift": cpu, "passed": growth <= GROWTH_MIB and cpu <= DRIFT,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Writes bench/results/<processor>/soak_<date>.json; 1 where memory grew or calls slowed down."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    case = make_case(batch_size=64, obs_dim=28, action_dim=7, hidden_dims=(128, 128), num_critics=4)
    samplers, intervals, calls = _samplers(case), [], 0
    about = header("soak", [], None) | {
        "command": f"python -m bench.soak --minutes {args.minutes:g} --threads {args.threads}"
    }
    for _ in range(INTERVALS):
        intervals.append(interval(case, samplers, args.minutes * 60 / INTERVALS, calls))
        calls += intervals[-1]["calls"]
        print(json.dumps(intervals[-1]), flush=True)
    found = verdict(intervals)
    print(json.dumps(found))
    stamp = about["date"][:19].replace(":", "").replace("-", "")
    path = args.out / processor(about["machine"]) / f"soak_{stamp}.json"
    write_text(path, json.dumps({**about, "verdict": found, "intervals": intervals}, indent=1) + "\n")
    return int(not found["passed"])


if __name__ == "__main__":
    sys.exit(main())
