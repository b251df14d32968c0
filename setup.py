"""Drives CMake + ninja, and ships the CUDA sources for `qpilots-fast build-cuda`.

Everything about the package itself is in pyproject.toml.

Environment variables:
    QPILOTS_NATIVE   0: pure Python only. 1: a failing build fails the install. Unset: build, and where that fails
                     install as pure Python and record the reason (`qpilots-fast info` shows it).
    QPILOTS_CUDA     1: also build the CUDA backend (needs nvcc), for the visible GPU or for every supported one.
    QPILOTS_CMAKE_ARGS   further arguments for CMake, separated by spaces.
    QPILOTS_BUILD_JOBS   parallel compile jobs (default: all processors).
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
INFO = "_build_info.json"


class CMakeBuild(build_ext):
    """Builds qpilots_fast._C with CMake, or records why it could not."""

    def run(self) -> None:
        target = Path(self.get_ext_fullpath("qpilots_fast._C")).resolve()
        if self.inplace:
            target = ROOT / "qpilots_fast" / target.name
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("QPILOTS_NATIVE", "auto")
        reason = None
        if mode == "0":
            reason = "built with QPILOTS_NATIVE=0"
        else:
            try:
                self._build(target)
                if os.environ.get("QPILOTS_CUDA") == "1":
                    self._build_cuda(target.parent)
            except (OSError, RuntimeError, subprocess.CalledProcessError, ImportError) as error:
                if mode == "1":
                    raise
                output = getattr(error, "output", None) or str(error)
                reason = f"the native build failed: {output.strip()[-1500:]}"
                print(
                    f"warning: {reason}\nwarning: installing qpilots_fast without its native backend", file=sys.stderr
                )
        if reason is not None:
            target.unlink(missing_ok=True)  # never leave a module of an older build behind
        if not self.inplace:  # a checkout has them beside the package
            for folder in ("cuda", "include"):
                shutil.copytree(ROOT / "csrc" / folder, target.parent / "csrc" / folder, dirs_exist_ok=True)
        info = {"native": reason is None, "reason": reason, "cuda": os.environ.get("QPILOTS_CUDA") == "1"}
        (target.parent / INFO).write_text(json.dumps(info, indent=2) + "\n")

    @staticmethod
    def _build_cuda(folder: Path) -> None:
        """As `qpilots-fast build-cuda` does, from the same file."""
        recipe = runpy.run_path(str(ROOT / "qpilots_fast" / "backends" / "cuda" / "build.py"))
        jobs = int(os.environ.get("QPILOTS_BUILD_JOBS", str(os.cpu_count() or 1)))
        recipe["build"](jobs=jobs, target=folder / recipe["LIBRARY_NAME"])

    def _build(self, target: Path) -> None:
        import pybind11

        cmake = shutil.which("cmake")
        if cmake is None:
            raise OSError("cmake was not found")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # a cache of an earlier isolated build names tools in a folder that is gone; object files stay
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("QPILOTS_CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        if shutil.which("ninja") is not None:
            configure += ["-G", "Ninja"]
        self._call(configure)
        jobs = os.environ.get("QPILOTS_BUILD_JOBS", str(os.cpu_count() or 1))
        self._call([cmake, "--build", str(build), "--parallel", jobs])
        staging = build / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        self._call([cmake, "--install", str(build), "--prefix", str(staging)])
        # at once: a process that has the old module loaded keeps it
        for built in staging.iterdir():
            os.replace(shutil.copy2(built, target.parent / f".{built.name}.new"), target.parent / built.name)

    @staticmethod
    def _call(command: list[str]) -> None:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        sys.stdout.write(done.stdout)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, output=done.stdout)


setup(ext_modules=[Extension("qpilots_fast._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
