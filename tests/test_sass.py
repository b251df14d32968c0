"""Loops of machine code: read from a small listing in both forms, where each of them is known."""

from __future__ import annotations

import pytest

from bench.gpu import sass

# An outer loop (0010 to 00b0) around an inner one (0040 to 0060), rare code that ptxas moved behind the end (00d0 to
# 00e0, which belongs to the outer loop but is no loop), a table of an indirect branch, and the trap behind it all.
INSTRUCTIONS = (
    (0x00, "", "S2R", "R0, SR_TID.X"),
    (0x10, "", "LDG.E.64.STRONG.GPU", "R2, [R2.64]"),
    (0x20, "@!P0", "BRA", 0xD0),
    (0x30, "", "BAR.SYNC.DEFER_BLOCKING", "0x0"),
    (0x40, "", "LDSM.16.M88.4", "R4, [R4]"),
    (0x50, "", "HMMA.16816.F32.BF16", "R4, R4, R8, R4"),
    (0x60, "", "BRA.U !UP1,", 0x40),
    (0x70, "", "MUFU.TANH", "R4, R4"),
    (0x80, "@P3", "BRX", "R2 -0x90"),
    (0x90, "", "FFMA", "R4, R4, R4, R4"),
    (0xA0, "", "ST.E.64.STRONG.GPU", "[R2.64], R4"),
    (0xB0, "@P2", "BRA", 0x10),
    (0xC0, "", "EXIT", ""),
    (0xD0, "", "MEMBAR.SC.GPU", ""),
    (0xE0, "", "BRA", 0x30),
    (0xF0, "", "IMAD.MOV.U32", "R4, RZ, RZ, R4"),  # of the table
    (0x100, "", "BRA", 0x90),
    (0x110, "", "BRA", 0x110),
)


def listing(labels: bool, without: str = "-") -> str:
    """As nvdisasm (labels) or cuobjdump (addresses) prints it; without the operation that begins so."""
    lines = [".text.small_kernel:" if labels else "\t\tFunction : small_kernel"]
    for address, predicate, operation, operands in INSTRUCTIONS:
        if labels:
            lines.append(f".L_x_{address}:")
        if isinstance(operands, int):
            operands = f"`(.L_x_{operands})" if labels else f"{operands:#x}"
        if operation.startswith(without):
            operation, operands = "NOP", ""
        encoding = "" if labels else "   /* 0x000fe400078e00ff */"
        lines.append(f"        /*{address:04x}*/ {predicate:>14} {operation} {operands} ;{encoding}")
        if not labels:
            lines.append("                                                          /* 0x000fe400078e00ff */")
    return "\n".join(lines)


@pytest.mark.parametrize("labels", [False, True])
def test_loops_of_a_listing(labels):
    kernels = sass.parse(listing(labels))
    assert list(kernels) == ["small_kernel"]
    assert len(kernels["small_kernel"]) == len(INSTRUCTIONS)
    outer, inner = sass.loops(kernels["small_kernel"])
    assert (outer.address, outer.depth, outer.innermost) == (0x10, 0, False)
    assert (inner.address, inner.depth, inner.innermost) == (0x40, 1, True)
    assert dict(inner.counts) == {"shared": 1, "tensor": 1, "branch": 1} == dict(inner.always)
    always = {"global load": 1, "branch": 3, "barrier": 1, "mufu": 1, "fp32": 1, "global store": 1}
    assert dict(outer.always) == always
    assert outer.counts - outer.always == {"fence": 1, "branch": 2, "integer": 1}
    assert sum(i.operation.startswith("HMMA") for i in outer.instructions) == 1


@pytest.mark.parametrize(
    "operation, name",
    [
        ("HGMMA.64x128x16.F32.BF16", "tensor"), ("UTCHMMA", "tensor"), ("FFMA.FTZ", "fp32"), ("FMNMX3", "fp32"),
        ("F2FP.BF16.F32.PACK_AB", "fp32"), ("HFMA2.MMA.BF16_V2", "fp32"), ("MUFU.RCP", "mufu"), ("STL", "local"),
        ("LDGSTS.E.128", "async copy"), ("LDG.E.128.CONSTANT", "global load"), ("RED.E.ADD.STRONG.GPU", "global store"),
        ("STS.128", "shared"), ("IMAD.WIDE.U32", "integer"), ("UIADD3", "integer"), ("VIADDMNMX", "integer"),
        ("ULDC.64", "integer"), ("S2UR", "integer"), ("LDGDEPBAR", "barrier"), ("CCTL.IVALL", "fence"),
        ("BSSY", "branch"), ("SHFL.BFLY", "shuffle"), ("SOMETHING.NEW", "other"),
    ],
)  # fmt: skip
def test_classes(operation, name):
    assert sass.class_of(operation) == name


def test_requirements_on_the_code():
    static_cuda = pytest.importorskip("bench.gpu.static_cuda")
    code = sass.parse(listing(False))["small_kernel"]
    multiplies = static_cuda.Requirement("small", contains="HMMA", reason="products run on tensor cores")
    assert multiplies.broken("small_kernel", code) == "" == multiplies.broken("other_kernel", code[:2])
    without = sass.parse(listing(False, without="HMMA"))["small_kernel"]
    assert multiplies.broken("small_kernel", without) == "no HMMA: products run on tensor cores"

    polls = static_cuda.Requirement("small", fence_free_polls=True, reason="a fence costs as much as a phase")
    assert polls.broken("small_kernel", code) == "a fence in the loop at 0x10: a fence costs as much as a phase"
    assert polls.broken("small_kernel", sass.parse(listing(False, without="MEMBAR"))["small_kernel"]) == ""
    silent = sass.parse(listing(False, without="LDG"))["small_kernel"]
    assert polls.broken("small_kernel", silent).startswith("no tagged word is awaited")


def test_table_is_indented_by_depth():
    lines = sass.table("small_kernel", sass.parse(listing(True))["small_kernel"])
    assert lines[0] == f"small_kernel: {len(INSTRUCTIONS)} instructions"
    assert lines[1].startswith("  0x0010: 12: ") and "branch 5 (3 always)" in lines[1]
    assert lines[2].startswith("    0x0040: 3: ")
