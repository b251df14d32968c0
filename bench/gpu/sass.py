"""Machine code of a kernel: its loops, and what an iteration of each issues.

`python -m bench.gpu.sass FILE [--kernel TEXT] [--top 20]` lists the loops of an object, a cubin or a listing: nesting,
and instructions by class, for a model of issue slots (count x trips / (instructions a cycle x clock)).

A loop is a natural one of the flow graph, not any backward branch: ptxas moves rare code behind a kernel's end and
branches back from there. Both listings are read, `cuobjdump -sass` (addresses) and `nvdisasm -c` (labels).
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qpilots_fast.backends.cuda.build import find_nvcc

# The first pattern that fits an operation gives its class; uniform ones ("U..") count as those of a thread.
CLASSES: tuple[tuple[str, str], ...] = (
    ("tensor", r"U?(H|HG|QG|IG|I|D|Q|O|B)MMA|UTC\w*MMA"),
    ("mufu", r"MUFU"),
    ("async copy", r"LDGSTS|UBLKCP|UTMA\w*"),
    ("fence", r"MEMBAR|ERRBAR|CGAERRBAR|CCTL|FENCE"),
    ("barrier", r"BAR|B2R|DEPBAR|LDGDEPBAR|WARPGROUP|SYNCS|ARRIVES|UCGABAR\w*|NANOSLEEP"),
    ("local", r"LDL|STL"),
    ("shared", r"LDS|STS|LDSM|STSM|ATOMS|STAS"),
    ("global load", r"LDG|LD"),
    ("global store", r"STG|ST|RED|REDG|ATOM|ATOMG"),
    ("shuffle", r"SHFL|VOTE|VOTEU|MATCH|REDUX|CREDUX"),
    ("branch", r"BRA|BRX|BRXU|BSSY|BSYNC|BREAK|BMOV|CALL|RET|EXIT|JMP|JMX|WARPSYNC|ENDCOLLECTIVE|YIELD|BPT|NOP|KILL"),
    ("fp32", r"FFMA2?|FADD2?|FMUL2?|FMNMX3?|FSEL|FSETP|FSET|FCHK|FSWZADD|H\w+2|F2FP?|I2FP?|F2I|FRND"),
    ("integer", r"U?(V?I(MAD|ADD3?|MNMX3?|SETP|ABS|SCADD|MUL|DP)|VIADDMNMX|LEA|LOP3?|SHF|SHL|SHR|MOV|SEL|PRMT|POPC|FLO)"
                r"|U?(BREV|SGXT|BMSK|PLOP3|LDCU?|P2UR)|R2UR?|UR2R|P2R|R2P|CS2R|S2U?R|LEPC|ELECT|UR2UP"),
)  # fmt: skip
_CLASSES = tuple((name, re.compile(f"(?:{pattern})$")) for name, pattern in CLASSES)


def class_of(operation: str) -> str:
    """Of "FFMA" or "LDG.E.128"; "other" where no class has it."""
    stem = operation.split(".")[0]
    return next((name for name, pattern in _CLASSES if pattern.match(stem)), "other")


@dataclass(frozen=True)
class Instruction:
    address: int
    operation: str  # with its suffixes: "LDG.E.64.STRONG.GPU"
    conditional: bool
    targets: tuple[int, ...] = ()  # addresses that it may branch to


@dataclass
class Loop:
    """A natural loop. Counts leave out the loops inside it; `always` is what every iteration issues, `counts` adds what
    lies behind a branch."""

    address: int
    depth: int  # 0: in no other loop
    instructions: list[Instruction] = field(repr=False)  # all, those of inner loops too
    counts: Counter[str] = field(default_factory=Counter)
    always: Counter[str] = field(default_factory=Counter)
    innermost: bool = True


_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;/]*)")
_LABEL = re.compile(r"^\s*([.$_\w]+):\s*$")
_JUMPS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL", "BPT")


def parse(listing: str) -> dict[str, list[Instruction]]:
    """Kernels of a listing by symbol, "" where it names none."""
    kernels: dict[str, list[Instruction]] = {}
    parts = re.split(r"^\s*Function : (\S+)\s*$|^\.text\.(\S+):\s*$", listing, flags=re.M)
    texts = [("", parts[0]), *((a or b, text) for a, b, text in zip(parts[1::3], parts[2::3], parts[3::3]))]
    for symbol, text in texts:
        lines, labels = [], {}
        waiting: list[str] = []
        for line in text.splitlines():
            if (label := _LABEL.match(line)) is not None:
                waiting.append(label[1])
            elif (match := _LINE.match(line)) is not None:
                address = int(match[1], 16)
                labels.update(dict.fromkeys(waiting, address))
                waiting.clear()
                lines.append((address, match))
        if lines:
            kernels[symbol] = [_instruction(address, match, labels) for address, match in lines]
    return kernels


def _instruction(address: int, match: re.Match[str], labels: dict[str, int]) -> Instruction:
    operation, operands = match[3], match[4]
    stem = operation.split(".")[0]
    targets: tuple[int, ...] = ()
    if stem in ("BRA", "JMP"):
        absolute = re.search(r"0x([0-9a-f]+)\s*$", operands.strip())
        named = re.search(r"`\(([.$_\w]+)\)", operands)
        targets = (labels[named[1]],) if named else (int(absolute[1], 16),) if absolute else ()
    conditional = bool(match[2]) or (bool(targets) and "," in operands)  # @P0 BRA, or BRA.U !UP0, and BRA.DIV R4,
    return Instruction(address, operation, conditional, targets)


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The natural loops, outer ones before those inside them."""
    blocks, successors = _flow(instructions)
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}  # header -> blocks
    latches: dict[int, list[int]] = {}
    predecessors = _inverse(successors)
    for block, following in enumerate(successors):
        for header in following:
            if block in dominators and header in dominators[block]:
                latches.setdefault(header, []).append(block)
                body = bodies.setdefault(header, {header})
                queue = [block]
                while queue:
                    at = queue.pop()
                    if at not in body and at in dominators:
                        body.add(at)
                        queue += predecessors[at]
    found = []
    for header, body in sorted(bodies.items(), key=lambda item: (item[0], -len(item[1]))):
        inner = [other for other, inside in bodies.items() if other != header and other in body and inside < body]
        nested = set().union(*(bodies[other] for other in inner)) if inner else set()
        depth = sum(header in inside and other != header and body < inside for other, inside in bodies.items())
        loop = Loop(blocks[header][0].address, depth, [i for block in sorted(body) for i in blocks[block]])
        loop.innermost = not inner
        every = set.intersection(*(dominators[latch] for latch in latches[header]))
        for block in body - nested:
            counted = Counter(class_of(i.operation) for i in blocks[block])
            loop.counts += counted
            if block in every:
                loop.always += counted
        found.append(loop)
    return found


def _flow(instructions: Sequence[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks in order of address, and the blocks that may follow each."""
    starts = {instructions[0].address}
    for at, following in itertools.pairwise(instructions):
        starts.update(at.targets)
        if at.operation.split(".")[0] in (*_JUMPS, "BSYNC"):
            starts.add(following.address)
    blocks: list[list[Instruction]] = []
    for at in instructions:
        if at.address in starts:
            blocks.append([])
        blocks[-1].append(at)
    number = {block[0].address: index for index, block in enumerate(blocks)}
    successors: list[list[int]] = []
    indirect = []
    for index, block in enumerate(blocks):
        last = block[-1]
        stem = last.operation.split(".")[0]
        following = [number[target] for target in last.targets if target in number]
        if (stem not in _JUMPS or last.conditional) and index + 1 < len(blocks):
            following.append(index + 1)
        if stem in ("BRX", "JMX"):
            indirect.append(index)
        successors.append(following)
    # The table of an indirect branch is not in the listing: what nothing else reaches belongs to the last such branch.
    reached = {0}.union(*map(set, successors))
    for orphan in range(len(blocks)):
        before = [index for index in indirect if index < orphan]
        if orphan not in reached and before:
            successors[before[-1]].append(orphan)
    return blocks, successors


def _inverse(successors: Sequence[Iterable[int]]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for other in following:
            found[other].append(block)
    return found


def _dominators(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """Of each block that the entry reaches: the blocks that lie on every way to it, itself included."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:  # depth first; blocks in order of completion
        block, following = stack[-1]
        fresh = next((other for other in following if other not in seen), None)
        if fresh is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(fresh)
            stack.append((fresh, iter(successors[fresh])))
    order.reverse()
    predecessors = _inverse(successors)
    found: dict[int, set[int]] = {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [found[p] for p in predecessors[block] if p in found]
            dominating = set.intersection(*known) | {block}
            if found.get(block) != dominating:
                found[block] = dominating
                changed = True
    return found


def cuobjdump() -> str | None:
    """Of the CUDA toolkit, or of the Triton wheel."""
    nvcc = find_nvcc()
    beside = None if nvcc is None else Path(nvcc).resolve().parent / "cuobjdump"
    if beside is not None and beside.is_file():
        return str(beside)
    try:
        import triton
    except ImportError:
        return None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.is_file() else None


def table(symbol: str, instructions: Sequence[Instruction], top: int | None = None) -> list[str]:
    """Lines for reading: a loop each, indented by its depth."""
    lines = [f"{symbol}: {len(instructions)} instructions"]
    for loop in loops(instructions)[:top]:
        counts = ", ".join(
            f"{name} {number}" + (f" ({loop.always[name]} always)" if loop.always[name] != number else "")
            for name, number in loop.counts.most_common()
        )
        lines.append(f"{'  ' * (loop.depth + 1)}{loop.address:#06x}: {sum(loop.counts.values())}: {counts}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="an object or a cubin, or a listing as .sass or .txt")
    parser.add_argument("--kernel", default="", help="only symbols that contain this")
    parser.add_argument("--top", type=int, help="so many loops a kernel")
    options = parser.parse_args(argv)
    if options.file.suffix in (".sass", ".txt"):
        listing = options.file.read_text()
    else:
        dump = cuobjdump()
        if dump is None:
            print("cuobjdump is missing (CUDA toolkit or Triton wheel)")
            return 2
        listing = subprocess.run([dump, "-sass", options.file], capture_output=True, text=True, check=True).stdout
    for symbol, instructions in parse(listing).items():
        if options.kernel in symbol:
            print("\n".join(table(symbol, instructions, options.top)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
