"""Compiles the shipped launches for a GPU that need not be here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from qpilots_fast.backends.triton.counts import programs
from qpilots_fast.backends.triton.evaluation import Evaluation, Given, Launch, Scratch, Tape
from qpilots_fast.backends.triton.launch_table import LaunchTable, dot_mode
from qpilots_fast.backends.triton.launcher import kernel_of
from qpilots_fast.backends.triton.layouts import network_layout
from qpilots_fast.backends.triton.packing import OPERAND_DTYPES, PackedBuffers, pack_options
from qpilots_fast.backends.triton.plan import SamplerPlan
from qpilots_fast.backends.triton.row_pieces import clean_actions_launch, steer_step_launch
from qpilots_fast.row_ops import RowOp
from qpilots_fast.spec import NetworkSpec, SamplerSpec
from qpilots_fast.steering import Steering

from ..cases import CASES, Case

_META = torch.device("meta")
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.int64: "*i64",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_PRODUCTS = ("layer", "output", "delta", "input_gradient")
# Batches of which networks of 1, 2 and 10 members take every size of program; CI compiles the first and the last.
_BATCHES = (64, 128, 160, 512, 1024, 1536, 4096)


@dataclass(frozen=True)
class KernelCase:
    """One launch to compile.

    Args:
        label: what runs, for people. precision: of the operands. quick: whether CI compiles it.
    """

    launch: Launch
    label: str
    precision: str
    quick: bool = False

    @property
    def kernel(self) -> str:
        return self.launch.name

    @property
    def needs_tensor_cores(self) -> bool:
        return self.kernel in _PRODUCTS and self.precision != "float32" and self.launch.arguments.get("TOP") != "ones"


def compile_launch(launch: Launch, sm: int) -> Any:
    """The compiled kernel of Triton for compute capability sm (as 10 major + minor); no GPU needed."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_of(launch.name)
    options = {name: launch.arguments[name] for name in _OPTIONS if name in launch.arguments}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = launch.given.get(name, launch.arguments.get(name))
        if parameter.is_constexpr:
            dtype = isinstance(value, torch.dtype)
            constants[name] = getattr(tl, str(value).removeprefix("torch.")) if dtype else value
            signature[name] = "constexpr"
        elif isinstance(value, (torch.Tensor, Given)) and name.endswith("_ptr"):
            signature[name] = "*fp32" if isinstance(value, Given) else _POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]  # the backend's own tensors are aligned
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", sm, 32), options=options
    )


def _networks(
    obs: int, action: int, hidden: int, members: int, norm: Any, flow_norm: Any = None
) -> dict[str, NetworkSpec]:
    dims = (hidden,) * 4
    flow_norms = flow_norm if isinstance(flow_norm, tuple) else (flow_norm,) * 4
    return {
        "flow": NetworkSpec("flow", obs, action, dims, layer_norm=flow_norms),
        "critic": NetworkSpec("critic", obs, action, dims, layer_norm=(norm,) * 4, num_members=members),
        "posterior": NetworkSpec("meta_flow_map", obs, action, dims),
    }


def _of_case(case: Case) -> dict[str, NetworkSpec]:
    return dict(zip(("flow", "critic"), (network.spec for network in case.networks())))


def _every_row_op() -> dict[str, NetworkSpec]:
    """Each row operation, and the widest row."""
    norm, film = RowOp("layer_norm", (1e-5,), True, True), RowOp("film")
    blocks = ((RowOp("silu"), RowOp("keep"), norm, film), (RowOp("leaky_relu", (0.1,)),), (RowOp("add"), norm, film))
    flow = NetworkSpec("flow", 40, 25, (256, 4096, 256), chains=blocks)
    clamped = (RowOp("rms_norm", (1e-6,), True), RowOp("clamp", (-1.0, 1.0)))
    head = (clamped, (RowOp("lowest", (23.0,)),), (RowOp("softmax"),), (RowOp("symexp"), RowOp("tanh")))
    return {"flow": flow, "critic": NetworkSpec("critic", 40, 25, (512, 25, 101, 1), num_members=2, chains=head)}


def cases(sm: int, precisions: tuple[str, ...] = ("bfloat16", "float16", "tf32", "float32")) -> Iterator[KernelCase]:
    """Every kernel that the paper's sizes and some beyond launch, for few rows to many, each compiled once."""
    paper, wide = _networks(40, 25, 512, 10, "post"), _networks(40, 25, 1024, 10, "post")
    qgf = _networks(28, 5, 512, 2, "pre", ("pre", "pre", "pre", None))
    mixed = _networks(28, 5, 512, 2, "post", ("post", "pre", "post", None))
    u, m = Steering.qpilots_u(), Steering.qpilots_m()
    glass, gaf = replace(m, estimate="glass"), Steering.gaf()
    residual, c51 = (_of_case(CASES[name]) for name in ("residual", "c51"))
    samplers = [
        ("U", paper, u, True),
        ("M", paper, m, True),
        ("residual", residual, u, True),
        ("C51", c51, u, True),
        ("row operations", _every_row_op(), u, False),
        ("glass", paper, glass, False),
        ("GAF", paper, gaf, False),
        ("QGF", qgf, Steering.qgf(0.1), True),
        ("QGF-Jacobian", qgf, Steering.qgf(0.1, jacobian="full"), False),
        ("norms mixed", mixed, u, False),
        ("U, 4x1024", wide, u, False),
        ("U, 32-step chunk", _networks(40, 224, 512, 10, "post"), u, False),
    ]
    for precision in precisions:
        half = precision == "bfloat16"
        for kernel, scale in (("pack", False), ("fold", True), ("fold", False)):
            yield KernelCase(_pack_launch(kernel, precision, scale), "all parameters", precision, half)
        seen: set[Any] = set()
        for label, nets, steering, quick in samplers:
            if not (half or quick):
                continue  # the other precisions differ in operands and tiles, not in what surrounds the products
            posterior = nets["posterior"] if steering.estimate == "mfm" else None
            spec = SamplerSpec(nets["flow"], nets["critic"], posterior, steering, 3, precision)
            for rows in _BATCHES:
                plan = SamplerPlan(spec, _META, LaunchTable(), sm=sm)
                launches = [launch for _, program in programs(plan, rows) for launch in program]
                ends = rows in (_BATCHES[0], _BATCHES[-1])
                yield from _new(launches, f"{label}, B = {rows}", precision, quick and half and ends, seen)
        if half:
            yield from _new(list(_row_pieces()), "row pieces", precision, False, seen)
        for pull in (False, True):
            launches = _single(paper["critic"], sm, precision, pull)
            yield from _new(launches, "one network", precision, False, seen)


def compile_key(launch: Launch) -> tuple[Any, ...]:
    """The same for launches that are compiled to the same code, of one precision."""
    names = [parameter.name for parameter in kernel_of(launch.name).params if parameter.is_constexpr]
    return (launch.name, *(launch.arguments.get(name) for name in (*names, *_OPTIONS)))


def _new(launches: list[Launch], label: str, precision: str, quick: bool, seen: set[Any]) -> Iterator[KernelCase]:
    """Those that are compiled anew."""
    for launch in launches:
        key = compile_key(launch)
        if key not in seen:
            seen.add(key)
            yield KernelCase(launch, f"{label}: {_what(launch)}", precision, quick)


def _what(launch: Launch) -> str:
    args = launch.arguments
    words = {
        "layer": ("first " * args.get("FIRST", False), args.get("BELOW_NORM"), " to ", args.get("NORM")),
        "chain": (f"chain of {args.get('WIDTH')}", " back" * args.get("PULL", False)),
        "delta": (args.get("ABOVE_NORM"), " to ", args.get("NORM"), ", top " * (args.get("TOP") != "none")),
    }.get(launch.name, ("",))
    return f"{''.join(map(str, words))} {args.get('BLOCK_B')} rows".strip()


def _pack_launch(kernel: str, precision: str, scale: bool) -> Launch:
    table, vectors = torch.empty(1, dtype=torch.int64, device=_META), torch.empty(1, device=_META)
    weights = torch.empty(1, dtype=OPERAND_DTYPES[precision], device=_META)
    pointers = dict(item_ptr=table, block_ptr=table, weights_ptr=weights, vectors_ptr=vectors)
    return Launch.of(kernel, (1,), **pointers, **pack_options(kernel, torch.float32, scale))


def _row_pieces() -> Iterator[Launch]:
    rows, row, wide = (torch.empty(shape, device=_META) for shape in ((64, 25), (64,), (64, 1600)))
    flags = torch.empty(64, dtype=torch.int8, device=_META)
    yield clean_actions_launch(rows, rows, rows, rows)
    for steering, std, x in ((Steering.qpilots_u(), None, rows), (Steering.gaf(), row, rows), (Steering(), None, wide)):
        yield steer_step_launch(x, x, x, std, x[0], 0.1, steering, x, row, flags)


def _single(spec: NetworkSpec, sm: int, precision: str, pull: bool) -> list[Launch]:
    """Launches of `forward` or `vjp` of one network on 64 rows."""
    layout = network_layout(spec, precision, LaunchTable(), sm, split=False)
    operand = OPERAND_DTYPES[precision]
    packed = PackedBuffers([layout], precision, _META).networks[0]

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=_META)

    out = make(spec.num_members, 64, spec.output_dim)
    tape, scratch = Tape(layout, 64, operand, make), Scratch([layout], [64], operand, make)
    run = Evaluation(packed, tape, scratch, out, 64, 1, dot_mode(precision, sm))
    if not pull:
        return list(run.forward(make(64, spec.input_dim)))
    return list(run.pull_back(out, make(spec.num_members, 64, spec.input_dim), 0, spec.input_dim, 64))
