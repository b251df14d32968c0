"""pytest-benchmark of a call at B = 1 with live weights: watched for writes, read at every call, changed before it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bench.cases import CASES, make_workload
from qpilots_fast.backends.native import WATCH_VARIABLE


@pytest.mark.parametrize("weights", ["frozen", "watched", "read", "all written, unchanged", "all changed"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_call(benchmark: Any, monkeypatch: pytest.MonkeyPatch, precision: str, weights: str) -> None:
    """`all written, unchanged` is the first call after an optimiser's step of nothing: watched pages were written."""
    if weights == "read":
        monkeypatch.setenv(WATCH_VARIABLE, "0")
    workload = make_workload(CASES["paper"], "U", 1)
    sampler = copy.deepcopy(workload.sampler("cpu", precision))  # with networks that nobody has called yet
    inputs = (workload.obs, workload.noise, workload.posterior_noise)
    if weights == "frozen":
        sampler.freeze()
    for _ in range(10):
        expected = sampler(*inputs)

    def write() -> None:
        for parameter in sampler.critic.parameters():
            parameter.data.mul_(1.0 if weights == "all written, unchanged" else -1.0)

    def read() -> None:
        sampler(*inputs)

    before = write if weights.startswith("all") else read
    actions = benchmark.pedantic(lambda: sampler(*inputs), setup=before, rounds=50)
    if weights != "all changed":
        assert torch.equal(actions, expected)
