"""Starts the interpreter's process: TRITON_INTERPRET must be set before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
@pytest.mark.parametrize(
    "names", [("kernels", "captured", "packing", "rows", "own_columns"), ("chains", "planted")], ids=" ".join
)
def test_kernels_in_the_interpreter(names: tuple[str, ...]) -> None:
    root = Path(__file__).parent.parent
    # one thread: numpy's products are tiny
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    files = [f"tests/test_triton_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
