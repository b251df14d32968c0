"""The native and the emulated backends compute the same bits as before the refactoring began."""

from __future__ import annotations

import pytest

from qpilots_fast import backends
from tests import same_bits

cuda_emulator = pytest.importorskip("cuda_emulator")


@pytest.mark.skipif(backends.unavailable_reason("cpu") is not None, reason="the native backend is missing")
def test_cpu() -> None:
    assert same_bits.differences("cpu") == []


@pytest.mark.skipif(cuda_emulator.compiler() is None, reason="g++ is missing")
def test_cuda() -> None:
    assert same_bits.differences("cuda") == []
