"""Shared fixtures."""

from __future__ import annotations

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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
