"""Compiles csrc/cuda into one shared library with a C ABI, apart from the Python build: no install waits for nvcc.

setup.py loads this file by its path, where neither the package nor torch is installed: it imports neither at the top.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY_NAME = "libqpilots_cuda.so"
# sm_87 is Orin, which runs no code of sm_86; the first one also as PTX, for every other GPU
ARCHITECTURES: tuple[int, ...] = (80, 86, 87, 89, 90, 100, 120)
SOURCES = ("device", "pack", "sample", "steer_step")
# -fmad=false: the maths says where it fuses, so that a row has the same bits in every variant of a kernel
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden")


def find_nvcc() -> str | None:
    """nvcc from $CUDACXX, $CUDA_HOME, the PATH or /usr/local/cuda."""
    candidates = [os.environ.get("CUDACXX")]
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            candidates.append(str(Path(os.environ[name]) / "bin" / "nvcc"))
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and Path(c).is_file() and os.access(c, os.X_OK)), None)


def find_sources() -> Path | None:
    """The folder csrc, in the package or beside it (a checkout)."""
    package = Path(__file__).resolve().parents[2]
    return next((c for c in (package / "csrc", package.parent / "csrc") if (c / "cuda" / "sample.cu").is_file()), None)


def library_paths() -> tuple[Path, ...]:
    """Where the built library may lie, in order of preference: in the package, or in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(__file__).resolve().parents[2] / LIBRARY_NAME, cache / "qpilots_fast" / LIBRARY_NAME


def visible_architectures() -> tuple[int, ...]:
    """Compute capabilities of the GPUs that torch sees, such as (90,); () where there is none, or no torch."""
    try:
        import torch
    except ImportError:  # an isolated build
        return ()
    if not torch.cuda.is_available():
        return ()
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(sorted(10 * major + minor for major, minor in found))


def _code_flags(architectures: Sequence[int]) -> list[str]:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    return [*flags, f"-gencode=arch=compute_{architectures[0]},code=compute_{architectures[0]}"]


def supported_architectures(nvcc: str) -> tuple[int, ...]:
    """Those of ARCHITECTURES that this nvcc knows: sm_100 and sm_120 need CUDA 12.8."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    return tuple(a for a in ARCHITECTURES if f"compute_{a}" in listed) or ARCHITECTURES


def compile_command(nvcc: str, csrc: Path, source: str, target: Path, extra: Sequence[str]) -> list[str]:
    """nvcc on one csrc/cuda/<source>.cu; extra says which targets."""
    includes = (f"-I{csrc / 'include'}", f"-I{csrc / 'cuda'}")
    return [nvcc, *NVCC_FLAGS, *includes, *extra, "-c", str(csrc / "cuda" / f"{source}.cu"), "-o", str(target)]


def build(
    archs: Sequence[int | str] | None = None,
    jobs: int = 2,
    say: Callable[[str], object] = print,
    target: Path | None = None,
) -> Path:
    """Compiles the CUDA kernels; the backend "cuda" finds the result in the next process.

    Args:
        archs: compute capabilities (90, "9.0" or "sm_90"). None: those of the visible GPUs, else all of ARCHITECTURES.
        jobs: compilers at a time.
        say: told about progress, a line at a time.
        target: the library to write. None: in the package, or in the user's cache where that is read-only.

    Returns:
        The library's path.

    Raises:
        RuntimeError: without nvcc or the sources, or with nvcc's message where it fails.
    """
    wanted = tuple(sorted(_capability(a) for a in archs)) if archs else visible_architectures()
    nvcc, csrc = find_nvcc(), find_sources()
    if nvcc is None:
        raise RuntimeError(
            "nvcc was not found in $CUDACXX, $CUDA_HOME, the PATH or /usr/local/cuda; install the CUDA toolkit (12.8 "
            "or later for GPUs of sm_100 and sm_120) or point CUDA_HOME at it."
        )
    if csrc is None:
        raise RuntimeError("the folder csrc/cuda was not found in or beside the package; build from a checkout.")
    chosen = wanted or supported_architectures(nvcc)
    path = target or _writable_path()
    say(f"compiling {len(SOURCES)} files for {', '.join(f'sm_{a}' for a in chosen)} with {nvcc} (minutes)")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source}.o" for source in SOURCES]
        extra = [*_code_flags(chosen), f"--threads={jobs}"]

        def compile_one(index: int) -> None:
            begun = time.monotonic()
            _run(compile_command(nvcc, csrc, SOURCES[index], objects[index], extra))
            say(f"  {SOURCES[index]}.cu {time.monotonic() - begun:.0f} s")

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compile_one, range(len(SOURCES))))
        linked = Path(folder) / LIBRARY_NAME
        _run([nvcc, "-shared", "-cudart=static", *map(str, objects), "-o", str(linked)])
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".tmp")
        shutil.copyfile(linked, staged)
        staged.replace(path)  # at once: a process that has the old library open keeps it
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB) in {time.monotonic() - started:.0f} s")
    return path


def _capability(value: int | str) -> int:
    text = str(value).removeprefix("sm_").replace(".", "")
    if not text.isdigit() or int(text) < 80:
        raise ValueError(
            f"archs has {value!r}; expected compute capabilities from 80 on, such as 90, '9.0' or 'sm_90'."
        )
    return int(text)


def _writable_path() -> Path:
    package, cache = library_paths()
    return package if os.access(package.parent, os.W_OK) else cache


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\nfailed:\n{(result.stdout + result.stderr).strip()[-4000:]}")
