"""Compiles the shipped launch configurations for a GPU that need not be here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from qpilots_fast.backends.triton.launch_table import LaunchTable, Tile, dot_mode
from qpilots_fast.backends.triton.launcher import kernel_of
from qpilots_fast.backends.triton.packing import NetworkLayout, launch_constants, pack_options
from qpilots_fast.backends.triton.plan import SamplerPlan
from qpilots_fast.spec import NetworkSpec, SamplerSpec
from qpilots_fast.steering import Steering

_OPERAND = {"float32": "*fp32", "tf32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_POINTERS = {
    "layer_ptr": "*i32", "flow_layer_ptr": "*i32", "posterior_layer_ptr": "*i32", "item_ptr": "*i64",
    "block_ptr": "*i64", "nonfinite_ptr": "*i8", "gated_ptr": "*i8",
}  # fmt: skip
_OPERAND_POINTERS = {"w_ptr", "h_ptr", "z_ptr", "flow_w_ptr", "posterior_w_ptr", "weights_ptr"}
_INTEGERS = {"num_rows", "num_draws", "num_tiles", "rows_per_tile", "step", "flow_begin", "flow_end", "plain_end"}


@dataclass(frozen=True)
class KernelCase:
    """One launch configuration.

    Args:
        kernel: "pack", "critic", "step" or "network".
        label: what runs, for people.
        precision: of the operands.
        arguments: constexpr arguments with num_warps and num_stages.
        quick: whether CI compiles it.
        multiplies: whether it has matrix products.
    """

    kernel: str
    label: str
    precision: str
    arguments: dict[str, Any]
    quick: bool = False
    multiplies: bool = True

    @property
    def needs_tensor_cores(self) -> bool:
        return self.multiplies and self.precision != "float32"


def compile_case(case: KernelCase, sm: int) -> Any:
    """The compiled kernel of Triton for compute capability sm (as 10 major + minor); no GPU needed."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_of(case.kernel)
    options = {k: case.arguments[k] for k in ("num_warps", "num_stages", "maxnreg") if k in case.arguments}
    constants = {k: v for k, v in case.arguments.items() if k not in options}
    for key, value in constants.items():
        if isinstance(value, torch.dtype):
            constants[key] = getattr(tl, str(value).removeprefix("torch."))
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            operand = _OPERAND[case.precision] if name in _OPERAND_POINTERS else "*fp32"
            signature[name] = _POINTERS.get(name, operand)
            if not kernel.params[index].do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]  # the backend's own tensors are aligned
        else:
            signature[name] = "i32" if name in _INTEGERS else "fp32"
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


def cases(sm: int, precisions: tuple[str, ...] = ("bfloat16", "float16", "tf32", "float32")) -> Iterator[KernelCase]:
    """Every kernel with every shipped tile at the paper's sizes and beyond."""
    paper, wide = _networks(40, 25, 512, 10, "post"), _networks(40, 25, 1024, 10, "post")
    qgf = _networks(28, 5, 512, 2, "pre", ("pre", "pre", "pre", None))
    u, m = Steering.qpilots_u(), Steering.qpilots_m()
    glass, gaf = replace(m, estimate="glass"), Steering.gaf()
    samplers = [
        ("U, paper", paper, u, True),
        ("M, paper", paper, m, True),
        ("glass, paper", paper, glass, False),
        ("GAF, paper", paper, gaf, False),
        ("QGF, norms mixed", qgf, Steering.qgf(0.1), True),
        ("QGF-Jacobian", qgf, Steering.qgf(0.1, jacobian="full"), False),
        ("U, 4x1024", wide, u, False),
        ("M, 4x1024", wide, m, False),
        ("U, 32-step chunk", _networks(40, 224, 512, 10, "post"), u, False),
    ]
    for precision in precisions:
        half = precision == "bfloat16"
        yield KernelCase(
            "pack",
            "all parameters",
            precision,
            dict(SOURCE=torch.float32, **pack_options()),
            half,
            False,
        )
        for label, nets, steering, quick in samplers:
            posterior = nets["posterior"] if steering.estimate == "mfm" else None
            spec = SamplerSpec(nets["flow"], nets["critic"], posterior, steering, 10, precision)
            for case in _sampler_cases(spec, sm, label, quick):
                # the other precisions differ in operands and tiles, not in what surrounds the products
                if half or case.quick:
                    yield replace(case, quick=case.quick and half)
        for vjp in (False, True):
            yield _network_case(paper["critic"], sm, precision, vjp, half and vjp)


def _sampler_cases(spec: SamplerSpec, sm: int, label: str, quick: bool) -> Iterator[KernelCase]:
    plan = SamplerPlan(spec, torch.device("cpu"), LaunchTable(), sms=100, sm=sm)
    yield KernelCase("critic", label, spec.precision, plan.critic_arguments(), quick)
    pulls_back = spec.steering.estimate != "noisy" and spec.steering.jacobian == "full"
    one_estimate = not spec.steering.uses_posterior
    first, following, *_, last = plan.step_launches()
    step = {
        "first": (plan.step_arguments(first, False), quick and one_estimate and pulls_back, True),
        "next": (plan.step_arguments(following, False), quick, True),
        "last": (plan.step_arguments(last, False), False, pulls_back),
    }
    if pulls_back and spec.steering.estimate != "glass":
        step["next, many tiles"] = (plan.step_arguments(following, True), quick and one_estimate, True)
    for when, (arguments, in_ci, multiplies) in step.items():
        yield KernelCase("step", f"{label}: {when}", spec.precision, arguments, in_ci, multiplies)


def _network_case(spec: NetworkSpec, sm: int, precision: str, vjp: bool, quick: bool) -> KernelCase:
    tile: Tile = LaunchTable().tile("network", precision, sm, 16)
    layout = NetworkLayout(spec, tile, folded=False)
    arguments = dict(
        IN_DIM=spec.input_dim, OUT_DIM=spec.output_dim, OUT_PAD=layout.out_pad, VJP=vjp, LDH=layout.h_width,
        OUT_ROWS=layout.out_rows, DOT=dot_mode(precision, sm), **tile.options(), **launch_constants(layout),
    )  # fmt: skip
    return KernelCase("network", "vjp" if vjp else "forward", precision, arguments, quick)
