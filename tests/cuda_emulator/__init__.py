"""The CUDA kernels compiled with g++ against the emulator, and the library object that the backend takes."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qpilots_fast.backends.cuda.build import SOURCES
from qpilots_fast.backends.cuda.library import Library, MemoryMap

FOLDER = Path(__file__).resolve().parent
CSRC = FOLDER.parents[1] / "csrc"
FLAGS = ("-std=c++17", "-ffp-contract=off", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas", "-Werror")


def compiler() -> str | None:
    return shutil.which("g++")


def compile_shared(
    sources: Sequence[Path],
    name: str,
    include: Path = CSRC / "cuda",
    flags: Sequence[str] = ("-O2",),
    folder: Path | None = None,
) -> Path:
    """A shared object of .cu files for the CPU, kept in `folder` (default: temporary) under a hash of its sources."""
    files = {*sources, *FOLDER.glob("*.h"), *include.glob("*.h"), *(CSRC / "include").rglob("*.h")}
    digest = hashlib.sha256(" ".join((*FLAGS, *flags)).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    path = (folder or Path(tempfile.gettempdir())) / f"qpilots_{name}_{digest.hexdigest()[:16]}.so"
    if not path.is_file():
        includes = [f"-I{CSRC / 'include'}", f"-I{include}", f"-I{FOLDER}"]
        with tempfile.TemporaryDirectory() as build:
            objects = [Path(build) / f"{source.stem}.o" for source in sources]
            command = [str(compiler()), "-x", "c++", *FLAGS, *flags, *includes, "-c"]
            running = [
                subprocess.Popen([*command, str(source), "-o", str(target)]) for source, target in zip(sources, objects)
            ]
            assert all([process.wait() == 0 for process in running]), "g++ failed"
            linked = Path(build) / "linked.so"
            subprocess.run([str(compiler()), "-shared", *map(str, objects), "-o", str(linked)], check=True)
            shutil.move(linked, path)
    return path


class Emulator:
    """Control of the emulator inside a shared object."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions
        functions.cuda_emulator_error.restype = ctypes.c_char_p
        functions.cuda_emulator_configure.argtypes = [ctypes.c_uint64, *(ctypes.c_int for _ in range(6))]
        functions.cuda_emulator_register.argtypes = [
            ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip

    def configure(
        self,
        seed: int = 0,
        num_sms: int = 4,
        max_shared_bytes: int = 232448,
        preempt_every: int = 256,
        blocks_per_sm: int = 1,
        has_device: bool = True,
        max_delay: int = 4,
    ) -> None:
        self._functions.cuda_emulator_configure(
            seed, num_sms, max_shared_bytes, preempt_every, blocks_per_sm, int(has_device), max_delay
        )

    def register(self, pointer: int, size: int, name: str, *, read_only: bool, initialised: bool) -> None:
        self._functions.cuda_emulator_register(pointer, size, name.encode(), int(read_only), int(initialised))

    def forget_memory(self) -> None:
        self._functions.cuda_emulator_forget_memory()

    def allowed_shared_bytes(self) -> int:
        """Of the kernel that may have the least, among those that were allowed any number; 0 without one."""
        return self._functions.cuda_emulator_allowed_shared_bytes()

    def error(self) -> str:
        return self._functions.cuda_emulator_error().decode()


class EmulatedLibrary(Library):
    """The same host code and kernels on CPU tensors; every launch is checked."""

    device_type: ClassVar[str] = "cpu"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.emulator = Emulator(self._functions)
        self.emulator.configure()

    def call(self, name: str, *arguments: Any, memory: MemoryMap | None = None) -> None:
        for pointer, size, label, read_only in memory() if memory is not None else []:
            initialised = read_only or label in ("failure word", "result") or label.startswith("words of")
            self.emulator.register(pointer, size, label, read_only=read_only, initialised=initialised)
        try:
            super().call(name, *arguments)
        finally:
            self.emulator.forget_memory()

    def multiprocessors(self, device: torch.device) -> int:
        self._multiprocessors.clear()  # configure changes them
        return super().multiprocessors(device)

    def stream(self, device: torch.device) -> int:
        return 0

    def failure_word(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int32)


def emulated_kernels() -> EmulatedLibrary:
    return EmulatedLibrary(compile_shared([CSRC / "cuda" / f"{source}.cu" for source in SOURCES], "cuda_emulated"))
