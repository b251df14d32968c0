"""What can be proved about the GPU kernels without a GPU: they compile, do not spill, and use the tensor cores.

`python -m bench.gpu_static` compiles every kernel and every shipped launch configuration for five targets, reads the
machine code with the tools of the Triton wheel, prints a table and exits with 1 on a spill, on a matrix kernel
without tensor-core instructions, or on more shared memory than a block may have.

    --quick           bfloat16 and the main configurations only (CI)
    --targets 90 100  compute capabilities; --precisions ...; --match TEXT in the label
    --markdown FILE   writes the table; --summary FILE what docs/gpu.md shows of it

A family of kernels is a function from a target to (name, build) pairs, see FAMILIES.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import static_cuda

TARGETS = (80, 86, 90, 100, 120)


@dataclass(frozen=True)
class DeviceLimits:
    """Of one compute capability, from the CUDA programming guide: bytes, warps and blocks a multiprocessor."""

    shared_per_block: int
    shared_per_sm: int
    warps: int
    blocks: int
    registers: int = 65536


LIMITS = {
    80: DeviceLimits(163 << 10, 164 << 10, 64, 32),
    86: DeviceLimits(99 << 10, 100 << 10, 48, 16),
    90: DeviceLimits(227 << 10, 228 << 10, 64, 32),
    100: DeviceLimits(227 << 10, 228 << 10, 64, 32),
    120: DeviceLimits(99 << 10, 100 << 10, 48, 24),
}


@dataclass(frozen=True)
class Machine:
    """What one compiled kernel asks of a multiprocessor, read from its machine code."""

    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    num_warps: int
    tensor_core: dict[str, int]  # instruction -> count
    loads: dict[int, int]  # bits of one thread's global load -> count
    instructions: int

    def blocks_per_sm(self, limits: DeviceLimits) -> int:
        """Resident blocks; registers are handed out to warps in units of 256."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = limits.registers // per_warp // self.num_warps
        by_shared = limits.shared_per_sm // (self.shared_bytes + 1024)  # 1 KiB a block is the system's
        return min(limits.blocks, limits.warps // self.num_warps, by_registers, by_shared)


@dataclass(frozen=True)
class Kernel:
    """One kernel to check."""

    name: str
    label: str
    needs_tensor_cores: bool
    build: Callable[[], tuple[bytes, int, int]]  # -> cubin, shared bytes, warps


# ---------------------------------------------------------------- reading machine code


def tool(name: str) -> str:
    """Path of a CUDA binary utility in the Triton wheel."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


_TENSOR_CORE = re.compile(r"\b(UTC\w*MMA|HGMMA|QGMMA|IGMMA|HMMA|QMMA|OMMA|IMMA)\b")
_LOAD = re.compile(r"\b(LDG|LDGSTS)(\.\S+)?\s")


def read_machine_code(cubin: bytes, shared_bytes: int, num_warps: int) -> Machine:
    """Registers and stack from cubin's resource table, the rest from its disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    tensor_core: dict[str, int] = {}
    for name in _TENSOR_CORE.findall(code):
        tensor_core[name] = tensor_core.get(name, 0) + 1
    loads: dict[int, int] = {}
    for match in _LOAD.finditer(code):
        bits = next((int(b) for b in re.findall(r"\.[US]?(128|64|16|8)\b", match[2] or "")), 32)
        loads[bits] = loads.get(bits, 0) + 1
    return Machine(
        registers, stack, len(re.findall(r"\b(?:STL|LDL)\b", code)), shared_bytes, num_warps, tensor_core, loads,
        len(re.findall(r"^\s+/\*[0-9a-f]+\*/", code, re.M)),
    )  # fmt: skip


def failures(machine: Machine, kernel: Kernel, limits: DeviceLimits) -> list[str]:
    """Why this kernel must not ship; empty where it may."""
    found = []
    if machine.spill_instructions:
        found.append(f"{machine.spill_instructions} spill instructions, {machine.stack_bytes} bytes of stack")
    if kernel.needs_tensor_cores and not machine.tensor_core:
        found.append("no tensor-core instruction")
    if machine.shared_bytes > limits.shared_per_block:
        found.append(f"{machine.shared_bytes} bytes of shared memory, a block may have {limits.shared_per_block}")
    if not found and machine.blocks_per_sm(limits) < 1:
        found.append("does not fit a multiprocessor")
    return found


# ---------------------------------------------------------------- families


def triton_kernels(sm: int, quick: bool, precisions: tuple[str, ...]) -> Iterator[Kernel]:
    """The Triton backend's kernels."""
    from .aot import KernelCase, cases, compile_launch

    def builder(case: KernelCase) -> Callable[[], tuple[bytes, int, int]]:
        def build() -> tuple[bytes, int, int]:
            compiled = compile_launch(case.launch, sm)
            return compiled.asm["cubin"], compiled.metadata.shared, compiled.metadata.num_warps

        return build

    for case in cases(sm, precisions):
        if case.quick or not quick:
            label = f"{case.label} ({case.precision})"
            yield Kernel(f"triton {case.kernel}", label, case.needs_tensor_cores, builder(case))


FAMILIES: dict[str, Callable[[int, bool, tuple[str, ...]], Iterator[Kernel]]] = {"triton": triton_kernels}


# ---------------------------------------------------------------- the table

HEADER = ("target", "kernel", "case", "regs", "spills", "shared KiB", "blocks/SM", "tensor core", "load widths", "ok")


def row(sm: int, kernel: Kernel, machine: Machine, wrong: list[str]) -> tuple[str, ...]:
    widths = " ".join(f"{bits}:{count}" for bits, count in sorted(machine.loads.items(), reverse=True))
    tensor_core = " ".join(f"{name} {count}" for name, count in machine.tensor_core.items()) or "-"
    return (
        f"sm_{sm}", kernel.name, kernel.label, str(machine.registers), str(machine.spill_instructions),
        f"{machine.shared_bytes / 1024:.0f}", str(machine.blocks_per_sm(LIMITS[sm])), tensor_core, widths,
        "; ".join(wrong) or "yes",
    )  # fmt: skip


SUMMARY = (
    "operands", "target", "kernel", "configurations", "registers", "spills", "shared KiB, most", "blocks/SM, least",
    "tensor-core instructions", "128-bit loads",
)  # fmt: skip


def summary(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """One line for each precision, target and kernel, of the rows of the whole table."""
    groups: dict[tuple[str, str, str], list[tuple[str, ...]]] = {}
    for line in rows:
        groups.setdefault((line[2].rpartition("(")[2].rstrip(")"), line[0], line[1].split()[-1]), []).append(line)
    found = []
    for key, lines in groups.items():
        registers, spills, shared, blocks = ([int(line[i]) for line in lines] for i in (3, 4, 5, 6))
        span = f"{min(registers)} to {max(registers)}" if len(set(registers)) > 1 else str(registers[0])
        names = sorted({name for line in lines for name in line[7].split() if not name.isdigit()} - {"-"})
        loads = [pair.split(":") for line in lines for pair in line[8].split()]
        wide = sum(int(count) for bits, count in loads if bits == "128") / sum(int(count) for _, count in loads)
        counts = (str(len(lines)), span, str(max(spills)), str(max(shared)), str(min(blocks)))
        found.append((*key, *counts, ", ".join(names) or "-", f"{100 * wide:.0f} %"))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="bfloat16, main configurations")
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), choices=TARGETS)
    families = [*FAMILIES, "cuda"]  # cuda: bench.gpu.static_cuda, where nvcc is installed and nothing is matched
    parser.add_argument("--families", nargs="+", default=families, choices=families)
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float16", "tf32", "float32"])
    parser.add_argument("--match", default="", help="only labels that contain this")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--summary", type=Path, help="write the table of docs/gpu.md here")
    args = parser.parse_args(argv)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.pop("TRITON_INTERPRET", None)
    rows, bad, start = [], 0, time.perf_counter()
    for sm in args.targets:
        for family in set(args.families) & set(FAMILIES):
            for kernel in FAMILIES[family](sm, args.quick, tuple(args.precisions)):
                if args.match not in f"{kernel.name} {kernel.label}":
                    continue
                machine = read_machine_code(*kernel.build())
                wrong = failures(machine, kernel, LIMITS[sm])
                bad += bool(wrong)
                rows.append(row(sm, kernel, machine, wrong))
                print("  ".join(rows[-1]), flush=True)
    if args.markdown:
        static_cuda.write_table(args.markdown, HEADER, rows)
    if args.summary:
        static_cuda.write_table(args.summary, SUMMARY, summary(rows))
    print(f"{len(rows)} kernels, {bad} refused, {time.perf_counter() - start:.0f} s")
    failed = bool(bad) or (not rows and args.families != ["cuda"])
    if "cuda" in args.families and not args.match:
        targets = static_cuda.TARGETS if args.targets == list(TARGETS) else args.targets
        failed |= static_cuda.main(["--targets", *map(str, targets)]) == 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
