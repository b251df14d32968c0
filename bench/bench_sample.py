"""pytest-benchmark of whole calls: `pytest bench/bench_sample.py --benchmark-group-by=param:batch_size`."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import CASES, make_workload
from bench.contestants import native_backend
from bench.machine import measure_peaks
from bench.measure import check_actions, count_cost


@pytest.fixture(scope="module")
def peaks() -> Any:
    """Measured once, in the same process as the times."""
    return measure_peaks()


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [1, 16, 64, 256])
@pytest.mark.parametrize("method", ["U", "M"])
def test_sample(benchmark: Any, peaks: Any, method: str, batch_size: int, precision: str, frozen: bool) -> None:
    """One steered call on the paper's networks; correctness first."""
    workload = make_workload(CASES["paper"], method, batch_size)
    sampler = workload.sampler(native_backend(), precision, frozen)
    inputs = (workload.obs, workload.noise, workload.posterior_noise)
    check = check_actions(sampler(*inputs), workload, precision, ours=True)
    assert check.passed, check.words

    def setup() -> None:
        sampler(*inputs)  # caches and threads are this call's own again

    benchmark.pedantic(lambda: sampler(*inputs), setup=setup, rounds=10 if batch_size < 256 else 3)
    flops, _, traffic = count_cost(workload, (precision,))
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "flops": flops,
        "weight_traffic_bytes": traffic[precision],
        "percent_of_peak_flops": peaks.percent_of_flops(flops, median, precision),
        "percent_of_cache_bandwidth": peaks.percent_of_bytes(traffic[precision], median),
    }
