"""Shared fixtures."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from qpilots_fast import backends


# backends that run on plain CPU tensors in this process; Triton's interpreter has a process of its own
@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = backends.unavailable_reason(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Module):  # what a file draws as it is imported, whatever files come before it
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_recompilations_of_earlier_tests() -> Iterator[None]:
    """torch.compile counts the recompilations of one function over a whole process, whoever calls it."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
