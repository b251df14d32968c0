"""The CUDA emulator itself: right programs pass, each planted fault is caught with the threads that met."""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch

from qpilots_fast.backends import Call
from qpilots_fast.backends.cuda import CudaBackend
from qpilots_fast.backends.cuda.build import SOURCES
from qpilots_fast.spec import BoundNetworks, SamplerSpec
from qpilots_fast.testing import make_case

cuda_emulator = pytest.importorskip("cuda_emulator")
pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="g++ is missing")

THREADS = 256

# fault -> what the message must match; the numbers are those of `enum class Fault` in planted_faults.cu.
# Where a barrier is missing, a reader may also come first, and then meets memory that nothing has written.
RACE = r"race: thread \(block \d, thread \d+\) .* which thread \(block \d, thread \d+\) (wrote|read) with no barrier"
EARLY = r"thread \(block \d, thread \d+\) reads uninitialised memory"
FAULTS = {
    "missing_block_barrier": (1, f"{RACE}|{EARLY}.* of row"),
    "write_after_read": (2, RACE),
    "out_of_bounds": (3, r"out of bounds: thread .* outside every allocation; 1024 bytes after the start of input"),
    "misaligned": (4, r"thread .*: misaligned read of 16 bytes"),
    "uninitialised": (5, f"{EARLY}.* of result"),
    "writes_constant": (6, r"thread .* writes to read-only memory: .* of input"),
    "skipped_block_barrier": (7, r"deadlock: .*\d+ threads wait at __syncthreads line \d+"),
    "other_block_barrier": (8, r"divergent __syncthreads: thread .* at line \d+, other threads of its block at line"),
    "skipped_shuffle": (9, r"divergent warp operation|deadlock: .* threads wait at __shfl_xor_sync line"),
    "missing_warp_barrier": (10, RACE),
    "missing_grid_barrier": (11, f"{RACE}|{EARLY}.* of result"),
    "unordered_grid_barrier": (12, f"{RACE}|{EARLY}.* of result"),
}


class FaultyKernel:
    def __init__(self) -> None:
        source = cuda_emulator.FOLDER / "planted_faults.cu"
        self._functions = ctypes.CDLL(str(cuda_emulator.compile_shared([source], "planted_faults")))
        self.emulator = cuda_emulator.Emulator(self._functions)

    def run(self, fault: int, grid: int, seed: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        """The emulator's message ("" where the run passed), the result [grid, THREADS] and the barrier's words."""
        self.emulator.configure(seed=seed)
        values = torch.arange(THREADS, dtype=torch.float32)
        result, sync = torch.zeros(grid, THREADS), torch.zeros(2, dtype=torch.int32)
        for name, tensor, constant in (("input", values, True), ("result", result, False), ("sync", sync, False)):
            size = tensor.numel() * tensor.element_size()
            initialised = name != "result"
            self.emulator.register(tensor.data_ptr(), size, name, read_only=constant, initialised=initialised)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, result, sync))
        code = self._functions.qpilots_faulty_launch(fault, grid, *pointers)
        self.emulator.forget_memory()
        assert (code != 0) == (self.emulator.error() != "")
        return self.emulator.error(), result, sync


@pytest.fixture(scope="module")
def faulty() -> FaultyKernel:
    return FaultyKernel()


@pytest.mark.parametrize("grid", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_right_kernel_passes(faulty, grid, seed):
    error, result, sync = faulty.run(0, grid, seed)
    assert error == ""
    shifted = torch.arange(THREADS, dtype=torch.float32).roll(-33).view(-1, 32)
    expected = shifted.sum(1, keepdim=True).expand(-1, 32).reshape(-1)
    torch.testing.assert_close(result, expected.expand(grid, -1))
    assert sync.tolist() == [2 * grid, 0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(faulty, name, seed):
    fault, expected = FAULTS[name]
    error, _, _ = faulty.run(fault, 3, seed)
    assert error != "", f"{name} went unnoticed"
    assert re.match(expected, error), error


def test_barrier_gives_up_instead_of_hanging(faulty):
    error, _, sync = faulty.run(13, 3, 0)
    assert error == ""  # no access is wrong: the blocks that waited too long report it and end
    assert sync[1].item() == 1


# The real kernels with one line broken: what the checks above are for.
_STAGED = "      __syncthreads();\n"
_NEURONS = "      int n = neuron_begin;"
_GRID_BARRIER = "alive = grid_barrier(a.sync, arrivals, a.spin_limit, shared.barrier_flag);"
MUTATIONS = {
    "staging not awaited": ("sample.cu", _STAGED + _NEURONS, _NEURONS, "race|uninitialised"),
    "phases not separated": ("sample.cu", _GRID_BARRIER, "__syncthreads();", "race|uninitialised"),
    "one vector too many": ("products.h", "c < stride;", "c <= stride;", "out of bounds|uninitialised"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_kernel_is_caught(name, tmp_path):
    file, old, new, message = MUTATIONS[name]
    folder = tmp_path / "csrc" / "cuda"
    shutil.copytree(cuda_emulator.CSRC / "cuda", folder)
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{file} no longer has {old!r}"
    (folder / file).write_text(text.replace(old, new))
    path = compile_mutant(folder, tmp_path)
    library = cuda_emulator.EmulatedLibrary(path)
    case = make_case(batch_size=3, hidden_dims=(37, 24), num_steps=3)
    spec = SamplerSpec(case.flow.spec, case.critic.spec, None, case.steering, case.num_steps, "float32")
    networks = BoundNetworks(case.flow.bound(), case.critic.bound())
    with pytest.raises(RuntimeError, match=message):
        for seed in range(3):
            library.emulator.configure(seed=seed, num_sms=3)
            CudaBackend(library).sample(Call(spec, networks, case.obs, case.noise, None))


def compile_mutant(folder: Path, target: Path) -> Path:
    """sample.cu from `folder`, unoptimised; the other files do not matter here and are reused."""
    return cuda_emulator.compile_shared(
        [folder / f"{source}.cu" for source in SOURCES], "mutant", folder, ("-O0", "-w"), target
    )
