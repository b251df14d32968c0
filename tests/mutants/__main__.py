"""Command line of the mutation check: `python -m tests.mutants [--only TEXT] [--no-native]`.

Each fault runs its tests in a fork of a process that has torch loaded, on a copy of the repository. The C++ faults are
built for the portable path alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutants"
WANTED = 0.95  # of the faults planted, caught


def main(argv: list[str] | None = None) -> int:
    """Prints each fault's fate; 1 where fewer than WANTED are caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose file has this in its name")
    parser.add_argument("--no-native", action="store_true", help="without those of csrc, which are compiled")
    args = parser.parse_args(argv)
    chosen = [f for f in FAULTS if args.only in f.file and not (args.no_native and f.native)]
    torch.set_num_threads(1)
    _copy(any(fault.native for fault in chosen))
    passing = _run(tuple(dict.fromkeys(name for fault in chosen for name in fault.tests)))
    if passing != 0:
        print("the tests fail without a fault; mend them first")
        return 2
    missed = []
    for fault in chosen:
        start = time.perf_counter()
        caught = _is_caught(fault)
        missed += [] if caught else [fault]
        seconds = time.perf_counter() - start
        print(f"{'caught' if caught else 'MISSED'} {seconds:4.0f} s  {fault.file}: {fault.wrong[:90]!r}", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    return int(len(chosen) - len(missed) < WANTED * len(chosen))


def _copy(native: bool) -> None:
    """The tracked files, and the compiled module: as it is here, or built for the portable path."""
    shutil.rmtree(COPY / "qpilots_fast", ignore_errors=True)
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.split("\0"):
        if name and (ROOT / name).is_file():
            target = COPY / name
            target.parent.mkdir(parents=True, exist_ok=True)
            text = (ROOT / name).read_bytes()
            if not target.exists() or target.read_bytes() != text:  # unchanged sources are not compiled again
                target.write_bytes(text)
    if native:
        _build()
    else:
        for built in (*(ROOT / "qpilots_fast").glob("_C*.so"), ROOT / "qpilots_fast" / "_build_info.json"):
            shutil.copy2(built, COPY / "qpilots_fast" / built.name)


def _build() -> bool:
    """Whether the copy's C++ sources compile."""
    env = {**os.environ, "QPILOTS_NATIVE": "1"}
    env["QPILOTS_CMAKE_ARGS"] = "-DQPILOTS_VECTOR_PATHS=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1"
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(build, cwd=COPY, env=env, capture_output=True).returncode == 0


def _is_caught(fault: Fault) -> bool:
    path = COPY / fault.file
    text = path.read_text()
    assert text.count(fault.right) == 1, f"{fault.file} has {text.count(fault.right)} times {fault.right!r}"
    path.write_text(text.replace(fault.right, fault.wrong))
    try:
        if fault.native and not _build():
            raise RuntimeError(f"{fault.file} does not compile with {fault.wrong!r}")
        return any(_run((name,)) != 0 for name in fault.tests)
    finally:
        path.write_text(text)


def _run(tests: tuple[str, ...]) -> int:
    """pytest's exit status on files of the copy, in a fork: torch is loaded, the package is not."""
    child = os.fork()
    if child == 0:
        os.chdir(COPY)
        sys.path[:] = [str(COPY), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
            del sys.modules[name]
        sys.dont_write_bytecode = True
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        chosen = [f"tests/{name}" for name in tests]
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *chosen])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
