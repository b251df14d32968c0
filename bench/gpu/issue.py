"""Instructions that a launch issues, from its machine code: what the roofline of flops and bytes leaves out."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from qpilots_fast.backends.triton.counts import launch_counts
from qpilots_fast.backends.triton.evaluation import Launch

from . import sass
from .aot import compile_key, compile_launch
from .static_triton import tool

_known: dict[tuple[int, Any, int], int] = {}


def warp_instructions(launch: Launch, sm: int) -> int:
    """Of one warp: its code once, and the loop of its product as often as it has steps; compiled once a key."""
    steps = launch_counts(launch, 1).steps
    key = (sm, compile_key(launch), steps)
    if key not in _known:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compile_launch(launch, sm).asm["cubin"])
            listing = subprocess.run([tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
        (instructions,) = sass.parse(listing).values()
        products = [loop for loop in sass.loops(instructions) if loop.innermost and loop.counts["tensor"]]
        again = sum(len(loop.instructions) for loop in products) * max(0, steps - 1)
        _known[key] = len(instructions) + again
    return _known[key]
