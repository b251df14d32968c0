"""The CUDA C++ kernels without a GPU: compiled by nvcc, then read from their machine code.

`python -m bench.gpu.static_cuda [--targets 80 90]` prints registers, spills and 16-byte loads of every kernel and exits
with 1 on a spill, on code that breaks a line of REQUIREMENTS, or on a kernel that no multiprocessor can hold.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.gpu import sass
from qpilots_fast.backends.cuda.build import ARCHITECTURES, compile_command, find_nvcc, find_sources
from qpilots_fast.files import write_text

TARGETS = ARCHITECTURES
THREADS = 256  # of every kernel
_REGISTERS = 65536  # of a multiprocessor
_KERNELS = ("sample", "pack", "steer_step")  # sources with kernels
_WORD_POLL = r"LDG\.E\.64\.STRONG\.GPU"  # load_word of csrc/cuda/platform.h


@dataclass(frozen=True)
class Requirement:
    """What the machine code of the kernels named so (by the beginning of KernelReport.name) must and must not have."""

    name: str
    contains: str = ""  # a pattern of an operation
    fence_free_polls: bool = False  # tagged words are awaited, and no loop around such a wait has a fence
    reason: str = ""

    def broken(self, name: str, code: Sequence[sass.Instruction]) -> str:
        """In words; "" where the code keeps to it, or it is about another kernel."""
        if not name.startswith(self.name):
            return ""
        if self.contains and not any(re.match(self.contains, i.operation) for i in code):
            return f"no {self.contains}: {self.reason}"
        if self.fence_free_polls:
            polling = [loop for loop in sass.loops(code) if _has(loop, _WORD_POLL)]
            fenced = [loop for loop in polling if any(sass.class_of(i.operation) == "fence" for i in loop.instructions)]
            if fenced or not polling:
                where = ", ".join(f"{loop.address:#x}" for loop in fenced)
                return (
                    f"a fence in the loop at {where}" if fenced else "no tagged word is awaited"
                ) + f": {self.reason}"
        return ""


def _has(loop: sass.Loop, pattern: str) -> bool:
    return any(re.match(pattern, i.operation) for i in loop.instructions)


REQUIREMENTS: tuple[Requirement, ...] = (
    Requirement("sample_kernel", r"LDGSTS\S*\.128", reason="weights come 16 bytes at a time, past the registers"),
    Requirement("sample_kernel", fence_free_polls=True, reason="words need no order"),
    Requirement("sample_kernel<bf16", r"HMMA\.16816\.F32\.BF16", reason="bfloat16 products run on tensor cores"),
)


@dataclass(frozen=True)
class KernelReport:
    """One kernel for one target; counts are of instructions in its code."""

    target: int
    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    local_accesses: int
    global_loads: dict[int, int]  # bits a thread -> count
    instructions: int
    broken: tuple[str, ...] = ()  # requirements

    @property
    def blocks_per_sm(self) -> int:
        """Resident blocks by registers, which warps get in units of 256."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return _REGISTERS // per_warp // (THREADS // 32)

    def failures(self) -> list[str]:
        found = []
        if self.spill_bytes or self.local_accesses:
            found.append(f"{self.spill_bytes} bytes spilled, {self.local_accesses} local accesses")
        found += self.broken
        if self.blocks_per_sm < 1:
            found.append("does not fit a multiprocessor")
        return found


def unavailable_reason() -> str | None:
    """What is missing to compile and read the kernels."""
    if find_nvcc() is None:
        return "nvcc is missing"
    if find_sources() is None:
        return "csrc/cuda is missing"
    return None if sass.cuobjdump() is not None else "cuobjdump is missing (CUDA toolkit or Triton wheel)"


def inspect(target: int, sources: tuple[str, ...] = _KERNELS) -> list[KernelReport]:
    """Compiles the sources for one compute capability and reads every kernel's code."""
    return [report for source in sources for report in _read(target, *compile_listing(target, source))]


def compile_listing(target: int, source: str) -> tuple[str, str]:
    """What the compiler says of csrc/cuda/<source>.cu, and its machine code."""
    nvcc, csrc, dump = find_nvcc(), find_sources(), sass.cuobjdump()
    assert nvcc is not None and csrc is not None and dump is not None
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "built.o"
        flags = (f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas=-v")
        command = compile_command(nvcc, csrc, source, built, flags)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed for sm_{target}:\n{done.stdout}{done.stderr}")
        code = subprocess.run([dump, "-sass", str(built)], capture_output=True, text=True, check=True).stdout
    return done.stdout + done.stderr, code


_USAGE = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


def _read(target: int, log: str, listing: str) -> list[KernelReport]:
    kernels = sass.parse(listing)
    reports = []
    for symbol, stack, stores, loads, registers in _USAGE.findall(log):
        code, name = kernels[symbol], short_name(symbol)
        operations = [i.operation for i in code]
        widths: dict[int, int] = {}
        for operation in operations:
            if operation.startswith("LDG"):
                bits = int((re.search(r"\.[SU]?(128|64|16|8)\b", operation) or [0, 32])[1])
                widths[bits] = widths.get(bits, 0) + 1
        broken = filter(None, (requirement.broken(name, code) for requirement in REQUIREMENTS))
        local = sum(operation.startswith(("STL", "LDL")) for operation in operations)
        reports.append(
            KernelReport(
                target,
                name,
                int(registers),
                int(stack),
                int(stores) + int(loads),
                local,
                widths,
                len(operations),
                tuple(broken),
            )
        )
    return reports


def short_name(symbol: str) -> str:
    """sample_kernel<bf16, 16> and the like, from the mangled name."""
    match = re.search(r"\d+([a-z_]+_kernel)(?:I(f|\S*?Bf16)(?:E)?Li(\d+)E)?", symbol)
    if match is None:
        return symbol
    name, weight, rows = match.groups()
    return name if rows is None else f"{name}<{'float32' if weight == 'f' else 'bf16'}, {rows} rows>"


def write_table(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """A table of markdown."""
    write_text(path, "".join(f"| {' | '.join(line)} |\n" for line in (header, ("---",) * len(header), *rows)))


def table_row(report: KernelReport) -> tuple[str, ...]:
    widths = " ".join(f"{bits}:{count}" for bits, count in sorted(report.global_loads.items(), reverse=True))
    return (
        f"sm_{report.target}", report.name, str(report.registers), str(report.spill_bytes), str(report.blocks_per_sm),
        widths, str(report.instructions), "; ".join(report.failures()) or "yes",
    )  # fmt: skip


HEADER = ("target", "kernel", "regs", "spill bytes", "blocks/SM", "load widths", "instructions", "ok")


def summary(reports: Sequence[KernelReport]) -> list[tuple[str, ...]]:
    """Registers of every kernel (lines, below a heading) on every target, and its 16-byte loads."""
    targets = list(dict.fromkeys(report.target for report in reports))
    found = [("kernel", *(f"sm_{target}" for target in targets), "16-byte loads")]
    for name in dict.fromkeys(report.name for report in reports):
        of_target = {report.target: report for report in reports if report.name == name}
        loads = sorted({report.global_loads.get(128, 0) for report in of_target.values()})
        registers = (str(of_target[target].registers) if target in of_target else "-" for target in targets)
        found.append((f"`{name}`", *registers, " to ".join(map(str, loads)) if loads != [0] else "-"))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--summary", type=Path, help="write the table of docs/gpu_cuda.md here")
    options = parser.parse_args(argv)
    reason = unavailable_reason()
    if reason is not None:
        print(f"CUDA kernels not checked: {reason}")
        return 2
    started, rows, bad, every = time.perf_counter(), [], 0, []
    with ThreadPoolExecutor(2) as pool:
        for reports in pool.map(inspect, options.targets):
            every += reports
            for report in reports:
                rows.append(table_row(report))
                bad += bool(report.failures())
                print("  ".join(rows[-1]), flush=True)
    for path, (header, *lines) in ((options.markdown, [HEADER, *rows]), (options.summary, summary(every))):
        if path is not None:
            write_table(path, header, lines)
    print(f"{len(rows)} kernels, {bad} refused, {time.perf_counter() - started:.0f} s")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
