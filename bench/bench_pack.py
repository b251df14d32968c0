"""pytest-benchmark of packing: what live weights cost a call, and what freeze() saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import CASES, make_workload
from bench.contestants import native_backend
from bench.machine import measure_peaks
from bench.measure import count_cost


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["U", "M"])
def test_pack(benchmark: Any, method: str, precision: str) -> None:
    """freeze() and the first call after it at B = 1, less one frozen call, is the pack."""
    workload = make_workload(CASES["paper"], method, 1)
    sampler = workload.sampler(native_backend(), precision)
    inputs = (workload.obs, workload.noise, workload.posterior_noise)
    live = sampler(*inputs)

    def setup() -> None:
        sampler.freeze()

    frozen = benchmark.pedantic(lambda: sampler(*inputs), setup=setup, rounds=10)
    assert torch.equal(live, frozen)
    _, weight_bytes, _ = count_cost(workload, (precision,))
    read = count_cost(workload, ("float32",))[1]["float32"]
    moved = read + weight_bytes[precision]
    benchmark.extra_info |= {
        "bytes_read_and_written": moved,
        "percent_of_memory_bandwidth": 100 * moved / benchmark.stats.stats.median / (measure_peaks().dram_bytes or 1),
    }
