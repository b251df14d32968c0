"""The one place where a kernel is launched, and counted."""

from __future__ import annotations

import threading
from typing import Any

import torch


class LaunchCounter:
    """Kernel launches by name since the last reset, over all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, name: str) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + 1

    def reset(self) -> None:
        with self._lock:
            self._counts.clear()

    @property
    def by_name(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    @property
    def total(self) -> int:
        return sum(self.by_name.values())


launches = LaunchCounter()


def kernel_of(name: str) -> Any:
    """The jitted kernel of this name; imports Triton."""
    from . import chains, deltas, layers, pack, rows

    modules = (layers, chains, deltas, rows, pack)
    return next(kernel for module in modules if (kernel := getattr(module, f"_{name}_kernel", None)))


def launch(name: str, grid: tuple[int, ...], **arguments: Any) -> Any:
    """Launches on the current stream; the compiled kernel. torch dtypes among the arguments become Triton's."""
    import triton.language as tl

    for key, value in arguments.items():
        if isinstance(value, torch.dtype):
            arguments[key] = getattr(tl, str(value).removeprefix("torch."))
    launches.add(name)
    return kernel_of(name)[grid](**arguments)
