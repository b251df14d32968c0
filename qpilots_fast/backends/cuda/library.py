"""The compiled CUDA kernels through ctypes, and what a launch says about the memory that it touches."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ..params import interface_mismatch
from .build import library_paths
from .layout import NetworkLayout
from .structs import LISTS, STRUCTURES

BUILD_HINT = "`qpilots-fast build-cuda` compiles it where nvcc is installed"

# what a kernel may touch: first byte, size, name, read-only
MemoryRange = tuple[int, int, str, bool]
# asked for by the test emulator alone
MemoryMap = Callable[[], list[MemoryRange]]


class Library:
    """The compiled kernels through their C ABI.

    Raises:
        OSError, RuntimeError: at construction, where the file does not load or was built from other sources.
    """

    device_type: ClassVar[str] = "cuda"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._multiprocessors: dict[int, int] = {}
        self._functions = ctypes.CDLL(str(path))
        self._functions.qpilots_cuda_last_error.restype = ctypes.c_char_p
        compiled = [self._functions.qpilots_cuda_struct_bytes(i) for i in range(len(STRUCTURES))]
        if compiled != [ctypes.sizeof(structure) for structure in STRUCTURES]:
            raise RuntimeError(f"{path} was built from another version of the sources; {BUILD_HINT}")
        self._functions.qpilots_cuda_interface_text.restype = ctypes.c_char_p
        text = self._functions.qpilots_cuda_interface_text().decode()
        mismatch = interface_mismatch(text, LISTS)
        if mismatch is not None:
            raise RuntimeError(f"{path}: {mismatch}; {BUILD_HINT}")

    def call(self, name: str, *arguments: Any, memory: MemoryMap | None = None) -> None:
        """Calls qpilots_cuda_<name>; a failure becomes an exception with the message of CUDA."""
        code = getattr(self._functions, f"qpilots_cuda_{name}")(*arguments)
        if code != 0:
            message = self._functions.qpilots_cuda_last_error().decode()
            raise (BackendUnavailable if code == 1 else RuntimeError)(f"backend 'cuda': {message}")

    def unavailable_reason(self) -> str | None:
        """Why no kernel can run: the message of the CUDA runtime."""
        count = ctypes.c_int()
        try:
            self.call("device_count", ctypes.byref(count))
        except RuntimeError as error:
            return f"the CUDA runtime finds no usable GPU ({error})"
        return None if count.value > 0 else "the CUDA runtime finds no GPU"

    def multiprocessors(self, device: torch.device) -> int:
        index = device.index or 0
        if index not in self._multiprocessors:
            count = ctypes.c_int()
            self.call("multiprocessors", index, ctypes.byref(count))
            self._multiprocessors[index] = count.value
        return self._multiprocessors[index]

    def stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def failure_word(self) -> Tensor:
        """A word of host memory that kernels write to when they give up."""
        return torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=True)


class Loader:
    """The library, loaded when first asked for.

    Args:
        library: the kernels; None: those that were built.
    """

    def __init__(self, library: Library | None = None) -> None:
        self._library, self._lock = library, threading.Lock()
        self.device_type = Library.device_type if library is None else library.device_type
        self.failure: str | None = None  # why there is none, once it was asked for

    def find(self) -> Library | None:
        """The library, or None where it is not there or does not load."""
        with self._lock:
            if self._library is None and self.failure is None:
                path = next((p for p in library_paths() if p.is_file()), None)
                if path is None:
                    self.failure = f"its kernels are not built; {BUILD_HINT}"
                else:
                    try:
                        self._library = Library(path)
                    except (OSError, RuntimeError) as error:
                        self.failure = f"its kernels do not load: {error}"
            return self._library

    def get(self) -> Library:
        """The library.

        Raises:
            BackendUnavailable: where there is none, with the reason.
        """
        library = self.find()
        if library is None:
            raise BackendUnavailable(f"backend 'cuda' cannot run here: {self.failure}.")
        return library


def float32_rows(tensor: Tensor) -> Tensor:
    """What kernels read: contiguous float32, apart from autograd."""
    return tensor.detach().to(torch.float32).contiguous()


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def place(library: Library, device: torch.device) -> tuple[int, ctypes.c_void_p]:
    """Device index and current stream."""
    index = device.index if device.index is not None else 0
    return index, ctypes.c_void_p(library.stream(device))


def memory_map(constants: Mapping[str, Tensor | None], changing: Mapping[str, Tensor | None]) -> list[MemoryRange]:
    named = [(name, tensor, True) for name, tensor in constants.items()]
    named += [(name, tensor, False) for name, tensor in changing.items()]
    entries = []
    for name, tensor, read_only in named:
        if tensor is not None and tensor.numel() > 0:
            extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            entries.append((tensor.data_ptr(), extent * tensor.element_size(), name, read_only))
    return entries


def weight_regions(layouts: Sequence[NetworkLayout], weights: Tensor, read_only: bool) -> list[MemoryRange]:
    regions = [region for layout in layouts for region in layout.regions()]
    return [(weights.data_ptr() + region.start, region.size, region.name, read_only) for region in regions]
