"""The CUDA kernels compile for every supported GPU without a spill, and read weights 16 bytes at a time."""

from __future__ import annotations

import os

import pytest

from bench.gpu import sass, static_cuda
from qpilots_fast.backends.cuda import build as cuda_build

REASON = static_cuda.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"CUDA kernels not compiled: {REASON}")

# one each of the oldest, the common and the newest; QPILOTS_TEST_ARCHS=all takes every one (minutes)
QUICK = (80, 90, 120)
TARGETS = static_cuda.TARGETS if os.environ.get("QPILOTS_TEST_ARCHS") == "all" else QUICK


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target):
    reports = static_cuda.inspect(target)
    names = [report.name for report in reports]
    for weight in ("float32", "bf16"):
        for rows in (8, 16):
            assert f"sample_kernel<{weight}, {rows} rows>" in names
    assert {"pack_kernel", "clean_actions_kernel", "steer_step_kernel"} <= set(names)
    wrong = {report.name: report.failures() for report in reports if report.failures()}
    assert not wrong, wrong


# Beside csrc/cuda: the small kernels in which the emulator's tests plant faults, here for the words of platform.h.
PLANTED = "../../tests/cuda_emulator/planted_exchange"


@pytest.mark.parametrize("target", TARGETS)
def test_primitives_compile_to_their_instructions(target):
    kernels = {
        static_cuda.short_name(s): code
        for s, code in sass.parse(static_cuda.compile_listing(target, PLANTED)[1]).items()
    }
    assert set(kernels) == {"exchange_kernel", "copy_kernel", "matrix_kernel"}
    requirement = static_cuda.Requirement
    for wanted in (
        requirement("exchange_kernel", r"STG?\.E\.64\.STRONG\.GPU", reason="a word is stored whole"),
        requirement("exchange_kernel", fence_free_polls=True, reason="words need no order"),
        requirement("copy_kernel", r"LDGSTS\.E\.BYPASS.*\.128", reason="copies pass by the registers and L1"),
        *(
            requirement("matrix_kernel", name)
            for name in (r"HMMA\.16816\.F32\.BF16", r"LDSM\S*\.4", r"LDSM\S*\.2", r"LDSM\S*MT88")
        ),
    ):
        broken = [wanted.broken(name, code) for name, code in kernels.items()]
        assert broken == [""] * len(kernels)


def test_loops_of_a_real_kernel():
    """The exchange: phases around the words of a thread, around the polls of one."""
    kernels = sass.parse(static_cuda.compile_listing(90, PLANTED)[1])
    found = sass.loops(next(code for symbol, code in kernels.items() if "exchange_kernel" in symbol))
    assert [loop.depth for loop in found] == [0, 1, 2]
    assert [loop.always["barrier"] > 0 for loop in found] == [True, False, False]
    assert found[2].innermost and found[2].always["global load"] == 1 and not found[2].counts["global store"]
    assert all(loop.counts["other"] == 0 == loop.counts["fence"] for loop in found)


def test_shared_library_loads_with_matching_structures(tmp_path):
    """Linked for one GPU and loaded: without a GPU the runtime says so, in an exception's words."""
    from qpilots_fast.backends.cuda import CudaBackend
    from qpilots_fast.backends.cuda.library import Library

    said = []
    path = cuda_build.build([90], say=said.append, target=tmp_path / cuda_build.LIBRARY_NAME)
    assert path.is_file() and any("sm_90" in line for line in said)
    library = Library(path)
    reason = library.unavailable_reason()
    assert reason is None or "CUDA" in reason or "driver" in reason
    assert CudaBackend(library).name == "cuda"


def test_summary_has_a_line_for_each_kernel_and_a_column_for_each_target():
    def report(target: int, name: str, registers: int, wide: int) -> static_cuda.KernelReport:
        return static_cuda.KernelReport(target, name, registers, 0, 0, 0, {128: wide} if wide else {}, 100)

    reports = [report(80, "a", 32, 9), report(80, "b", 40, 0), report(90, "a", 48, 11), report(90, "b", 16, 0)]
    assert static_cuda.summary(reports) == [
        ("kernel", "sm_80", "sm_90", "16-byte loads"),
        ("`a`", "32", "48", "9 to 11"),
        ("`b`", "40", "16", "-"),
    ]


def test_orin_gets_code_of_its_own():
    nvcc = cuda_build.find_nvcc()
    assert nvcc is not None
    assert "-gencode=arch=compute_87,code=sm_87" in cuda_build._code_flags(cuda_build.supported_architectures(nvcc))


def test_architectures_are_checked():
    with pytest.raises(ValueError, match="expected compute capabilities from 80 on"):
        cuda_build.build(["sm_75"])
