"""Prices of what the kernels are made of, measured on the card at hand: see prices.cu.

The model of predicted times (bench/gpu/model.py) rests on prices that others published; these replace them.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qpilots_fast.backends.cuda.build import find_nvcc, find_sources, visible_architectures

SOURCE = Path(__file__).with_name("prices.cu")
_COMPILE_S, _RUN_S = 60.0, 30.0


def compile_command(nvcc: str, csrc: Path, architectures: Sequence[int], target: Path) -> list[str]:
    """nvcc on prices.cu; an object file where target ends in .o, else a program."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    kind = ["-c"] if target.suffix == ".o" else ["-cudart=static"]
    includes = [f"-I{csrc / 'include'}", f"-I{csrc / 'cuda'}"]
    return [nvcc, "-O3", "-std=c++17", *includes, *codes, *kind, str(SOURCE), "-o", str(target)]


def measure_prices() -> tuple[list[dict[str, Any]], str]:
    """Rows of "price", "value" and "unit", and why there are none, or no more; "" where all are there."""
    nvcc, csrc = find_nvcc(), find_sources()
    if nvcc is None or csrc is None:
        return [], "nvcc is missing"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "prices"
        try:
            command = compile_command(nvcc, csrc, visible_architectures(), program)
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILE_S)
            done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=_RUN_S)
        except subprocess.CalledProcessError as error:
            return [], f"nvcc failed: {error.stderr.strip()[-500:]}"
        except subprocess.TimeoutExpired as error:
            return parse(_text(error.stdout)), f"it took more than {error.timeout:.0f} s"
    return parse(done.stdout), "" if done.returncode == 0 else done.stderr.strip()[-500:] or f"exit {done.returncode}"


def parse(printed: str) -> list[dict[str, Any]]:
    """What prices.cu printed, whole lines of it."""
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{") and line.endswith("}")]


def _text(printed: str | bytes | None) -> str:
    return printed.decode(errors="replace") if isinstance(printed, bytes) else printed or ""
