"""The CUDA emulator itself: right programs pass, each planted fault is caught with the threads that met."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import re
import shutil
from collections.abc import Sequence
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
    "out_of_bounds": (
        3,
        r"out of bounds: thread .* outside every allocation; 1024 bytes after the start of const_input",
    ),
    "misaligned": (4, r"thread .*: misaligned read of 16 bytes"),
    "uninitialised": (5, f"{EARLY}.* of result"),
    "writes_constant": (6, r"thread .* writes to read-only memory: .* of const_input"),
    "skipped_block_barrier": (7, r"deadlock: .*\d+ threads wait at __syncthreads line \d+"),
    "other_block_barrier": (8, r"divergent __syncthreads: thread .* at line \d+, other threads of its block at line"),
    "skipped_shuffle": (9, r"divergent warp operation|deadlock: .* threads wait at __shfl_xor_sync line"),
    "missing_warp_barrier": (10, RACE),
    "missing_grid_barrier": (11, f"{RACE}|{EARLY}.* of result"),
    "unordered_grid_barrier": (12, f"{RACE}|{EARLY}.* of result"),
    "missing_release": (14, f"{RACE}|{EARLY}.* of result"),
    "missing_acquire": (15, f"{RACE}|{EARLY}.* of result"),
    "written_constant": (16, r"thread .* reads as a constant: .* of result, which thread .* wrote in this launch"),
}


class FaultyKernel:
    def __init__(self) -> None:
        sources = [cuda_emulator.FOLDER / f"planted_{name}.cu" for name in ("faults", "exchange")]
        self.functions = ctypes.CDLL(str(cuda_emulator.compile_shared(sources, "planted_faults")))
        self.emulator = cuda_emulator.Emulator(self.functions)

    def launch(
        self, name: str, numbers: Sequence[int], memory: dict[str, torch.Tensor], blank: Sequence[str] = ()
    ) -> str:
        """The emulator's message, "" where the run passed. memory: the kernel's pointers in order; constants are named
        const_*; those in `blank` count as never written."""
        for label, tensor in memory.items():
            size, constant = tensor.numel() * tensor.element_size(), label.startswith("const_")
            written = label not in blank
            self.emulator.register(tensor.data_ptr(), size, label, read_only=constant, initialised=written)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in memory.values())
        code = getattr(self.functions, f"qpilots_{name}_launch")(*numbers, *pointers)
        self.emulator.forget_memory()
        assert (code != 0) == (self.emulator.error() != "")
        return self.emulator.error()

    def run(self, fault: int, grid: int, seed: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        """The message, the result [grid, THREADS] and the barrier's words."""
        self.emulator.configure(seed=seed)
        values = torch.arange(THREADS, dtype=torch.float32)
        result, sync = torch.zeros(grid, THREADS), torch.zeros(2, dtype=torch.int32)
        memory = {"const_input": values, "result": result, "sync": sync}
        return self.launch("faulty", (fault, grid), memory, blank=("result",)), result, sync


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


COPYING = r"thread .* (reads|writes): .*, which an asynchronous copy of thread \(block \d, thread \d+\) still"


# fault -> the message, or None where the fault shows in what the kernel computes, or in its giving up
WORD_FAULTS = {
    "torn_store": (1, r"torn word: thread .* as 8 bytes, which thread .* stored as 4"),
    "one_slot": (2, None),
    "tag_not_raised": (3, None),
    "not_polled": (4, None),
    "ordinary_load": (
        5,
        rf"{RACE}|thread .* reads as a constant: .* of slots|thread .* reads a word of relaxed accesses",
    ),
    "ordinary_payload": (6, f"{RACE}|{EARLY}.* of payload"),
}
BLOCKS, PHASES, WORDS = 4, 16, 32


def exchange(faulty: FaultyKernel, fault: int, seed: int, first_tag: int = 1, max_delay: int = 4) -> tuple[str, bool]:
    """The emulator's message, and whether every block ended with the right sum and none gave up."""
    faulty.emulator.configure(seed=seed, max_delay=max_delay, preempt_every=(0, 16, 256)[seed % 3])
    slots = torch.zeros(2, BLOCKS * WORDS, dtype=torch.int64)
    result, failed = torch.zeros(BLOCKS, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    memory = {"slots": slots, "payload": torch.zeros(BLOCKS * WORDS), "result": result, "failed": failed}
    message = faulty.launch("exchange", (fault, BLOCKS, PHASES, first_tag), memory, blank=("payload",))
    total = 0
    for _ in range(PHASES):
        total = sum(total * 3 + own for own in range(BLOCKS * WORDS)) % 2**32
    right = [value % 2**32 for value in result.tolist()] == [total] * BLOCKS
    return message, right and failed.item() == 0


@pytest.mark.parametrize("max_delay", [0, 1, 4, 16])
@pytest.mark.parametrize("seed", range(6))
def test_tagged_words_pass(faulty, seed, max_delay):
    assert exchange(faulty, 0, seed, max_delay=max_delay) == ("", True)
    assert exchange(faulty, 0, seed, first_tag=2**32 - 1 - PHASES, max_delay=max_delay) == ("", True)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", WORD_FAULTS)
def test_faulty_exchange_is_caught(faulty, name, seed):
    fault, expected = WORD_FAULTS[name]
    message, right = exchange(faulty, fault, seed)
    assert not right, f"{name} went unnoticed"
    assert (message == "") if expected is None else re.match(expected, message), message


COPY_FAULTS = {
    "no_wait": (1, COPYING),
    "one_group_too_many": (2, COPYING),
    "not_committed": (3, COPYING),
    "no_block_barrier": (4, f"{RACE}|{COPYING}|{EARLY}.* of buffers"),
    "target_still_read": (5, f"{RACE}|{COPYING}"),
    "target_overwritten": (6, COPYING),
    "source_overwritten": (7, f"{RACE}|{COPYING}"),
}


def copy(faulty: FaultyKernel, fault: int, seed: int) -> tuple[str, bool]:
    faulty.emulator.configure(seed=seed, preempt_every=(0, 16, 256)[seed % 3])
    slices, grid = 5, 2
    source = torch.randint(-50, 50, (slices, THREADS, 4)).float()
    result = torch.zeros(grid, THREADS)
    message = faulty.launch("copy", (fault, grid, slices), {"source": source, "result": result})
    return message, torch.equal(result, source.sum((0, 2)).roll(-33).expand(grid, -1))


@pytest.mark.parametrize("seed", range(6))
def test_asynchronous_copies_pass(faulty, seed):
    assert copy(faulty, 0, seed) == ("", True)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", COPY_FAULTS)
def test_faulty_copy_is_caught(faulty, name, seed):
    fault, expected = COPY_FAULTS[name]
    message, _ = copy(faulty, fault, seed)
    assert re.match(expected, message), f"{name}: {message or 'went unnoticed'}"


MATRIX_FAULTS = {
    "transposed": (2, None),
    "wrong_row": (3, None),
    "missing_lane": (4, r"deadlock: .*31 threads wait at mma line"),
    "other_operation": (5, r"divergent warp operation: .* (in|lanes in) mma"),
    "missing_load_lane": (6, r"divergent warp operation: .* ldmatrix_x4 at line"),
    "swapped_fragments": (7, None),
    "global_row": (8, r"thread .*: ldmatrix_x4 reads shared memory only"),
    "no_wait": (9, COPYING),
}


def product(faulty: FaultyKernel, fault: int, seed: int, transposed: bool = False) -> tuple[str, bool]:
    faulty.emulator.configure(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-99, 100, (16, 16), generator=generator).bfloat16()
    b = torch.randint(-99, 100, (16, 8), generator=generator).bfloat16()
    c = torch.zeros(16, 8)
    operands = (a.T, b) if transposed else (a, b.T)
    memory = {"const_a": operands[0].contiguous(), "const_b": operands[1].contiguous(), "c": c}
    return faulty.launch("matrix", (fault,), memory), torch.equal(c, a.float() @ b.float())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_product_of_fragments_is_exact(faulty, seed, transposed):
    assert product(faulty, int(transposed), seed, transposed) == ("", True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MATRIX_FAULTS)
def test_faulty_product_is_caught(faulty, name, seed):
    fault, expected = MATRIX_FAULTS[name]
    message, right = product(faulty, fault, seed)
    assert not right, f"{name} went unnoticed"
    assert (message == "") if expected is None else re.match(expected, message), message


# CuTe's (thread, value) layouts, each a list of (size, stride): what a thread's index and an element's index add to the
# element's place in the matrix, as NVIDIA/cutlass 4.2 has them. Matrices a, b and c lie by columns; b counts as [n, k].
CUTE = {
    "ldmatrix": ([(32, 2)], [(2, 1)], 8),  # SM75_U32x2_LDSM_N, in units of 16 bits; lies by rows
    "ldmatrix_trans": ([(4, 16), (8, 1)], [(2, 8)], 8),  # SM75_U16x2_LDSM_T
    "a": ([(4, 32), (8, 1)], [(2, 16), (2, 8), (2, 128)], 16),  # SM80_16x8x16_F32BF16BF16F32_TN, ALayout
    "b": ([(4, 16), (8, 1)], [(2, 8), (2, 64)], 8),  # its BLayout
    "c": ([(4, 32), (8, 1)], [(2, 16), (2, 8)], 16),  # its CLayout, SM80_16x8_Row
}


def cute_position(name: str, lane: int, element: int) -> tuple[int, int]:
    """(row, column) of an element of a lane."""
    *modes, leading = CUTE[name]
    place = 0
    for index, mode in zip((lane, element), modes):
        for size, stride in mode:
            place += index % size * stride
            index //= size
    slow, fast = divmod(place, leading)
    return (slow, fast) if name in ("ldmatrix", "ldmatrix_trans", "b") else (fast, slow)


def emulated_position(faulty: FaultyKernel, name: str, lane: int, element: int) -> tuple[int, int]:
    return divmod(faulty.functions.cuda_emulator_fragment(list(CUTE).index(name), lane, element), 256)


@pytest.mark.parametrize("name", CUTE)
def test_fragments_are_those_of_cute(faulty, name):
    elements = math.prod(size for size, _ in CUTE[name][1])
    for lane, element in itertools.product(range(32), range(elements)):
        assert emulated_position(faulty, name, lane, element) == cute_position(name, lane, element)


@pytest.mark.parametrize("name, shape", [("a", (16, 16)), ("b", (16, 8)), ("c", (16, 8))])
def test_fragments_are_those_of_triton(faulty, name, shape):
    layout = pytest.importorskip("triton.experimental.gluon.language", reason="Gluon shows Triton's layouts")
    from triton._C.libtriton import gluon_ir, ir

    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    product = layout.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    fragment = product if name == "c" else layout.DotOperandLayout("ab".index(name), product, 2)
    linear = builder.to_linear_layout(fragment._to_ir(builder), list(shape))
    for lane, element in itertools.product(range(32), range(math.prod(shape) // 32)):
        bases = [
            *(base for bit, base in enumerate(linear.lane_bases) if lane >> bit & 1),
            *(base for bit, base in enumerate(linear.reg_bases) if element >> bit & 1),
        ]
        expected = functools.reduce(lambda at, base: (at[0] ^ base[0], at[1] ^ base[1]), bases, (0, 0))
        assert emulated_position(faulty, name, lane, element) == expected


# The real kernels with one line broken: what the checks above are for.
MUTATIONS = {
    "weights not awaited": ("sample.cu", "block.stream.await(a);", ";", "asynchronous copy|uninitialised"),
    "sums not awaited": ("block.h", "    __syncthreads();\n", "", "race|uninitialised"),
    "one vector too many": (
        "stream.h",
        "v < vectors;",
        "v <= vectors;",
        "asynchronous copy|bounds|race",
    ),
    "buffer copied over": ("stream.h", "(copied & 1) * buffer_bytes", "0 * buffer_bytes", "asynchronous copy"),
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
