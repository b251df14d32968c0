"""Every C++ header includes what it uses: it compiles alone, and those of a path with each kind of vector."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ("-std=c++17", "-fsyntax-only", "-x", "c++", "-w")
INCLUDES = (f"-I{CSRC / 'cpu'}", f"-I{CSRC / 'include'}")
AVX512 = ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16")
FLAGS_OF = {"portable": (), "avx2": ("-mavx2", "-mfma"), "avx512": AVX512}  # by vector header


def commands() -> dict[str, list[str]]:
    found = {}
    for header in sorted([*(CSRC / "cpu").rglob("*.h"), *(CSRC / "include").rglob("*.h")]):
        name = str(header.relative_to(CSRC))
        if not name.endswith("-inl.h"):
            found[name] = [str(header)]
            continue
        own = header.name.removeprefix("vec_").removesuffix("-inl.h")
        paths = (own,) if own in FLAGS_OF else ("avx512",) if header.parent.name == "amx" else ("portable", "avx512")
        for path in paths:
            isa = (f"-DQPILOTS_ISA=isa_{path}", f'-DQPILOTS_ISA_VEC="path/vec_{path}-inl.h"')
            found[f"{name} {path}"] = [*FLAGS_OF[path], *isa, str(header)]
    return found


def python_includes() -> list[str] | None:
    """Flags for the headers of the bindings; None where pybind11 is not installed."""
    try:
        import pybind11
    except ImportError:
        return None
    return ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]


@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ for x86-64")
def test_every_header_compiles_alone():
    python = python_includes()

    def check(arguments: list[str]) -> str:
        command = ["g++", *FLAGS, *INCLUDES, *(python or ()), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr if done.returncode else ""

    found = {name: c for name, c in commands().items() if python is not None or not name.startswith("cpu/python/")}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = dict(zip(found, pool.map(check, found.values())))
    assert not {name: text[:600] for name, text in errors.items() if text}
