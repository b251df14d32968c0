"""What `qpilots-fast bench --gpu` asks of a card: what ships at its own shape, and every kernel at small ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from qpilots_fast import BackendUnavailable, backends
from qpilots_fast.activations import ACTIVATIONS
from qpilots_fast.testing import PRESETS, Comparison, compare, make_case

from ..cases import CASES, make_workload
from ..measure import check_actions

# odd on purpose: each leaves a different remainder in every block shape
_CHECKED_BATCHES = (1, 3, 16, 17, 257)
_CHECKED_SHAPES: tuple[dict[str, Any], ...] = (
    dict(hidden_dims=(96, 72)),
    dict(hidden_dims=(512, 300), obs_dim=40, action_dim=25, num_critics=4),
)


@dataclass(frozen=True)
class ShippedCall:
    """One call at the shape of a workload of the benchmark.

    Args:
        repeats: calls more, whose bits must be those of the first: a race shows in some of them.
        case: of bench.cases.CASES.
    """

    backend: str
    method: str
    precision: str
    batch_size: int
    repeats: int
    case: str = "paper"


SHIPPED = (
    ShippedCall("cuda", "U", "bfloat16", 1, 300),
    ShippedCall("cuda", "U", "bfloat16", 16, 300),
    ShippedCall("cuda", "M", "bfloat16", 16, 100),
    ShippedCall("cuda", "U", "float32", 3, 50),
    # on Hopper a size of program each, 64 x 64 to 128 x 256; of the last more programs than multiprocessors
    ShippedCall("triton", "U", "bfloat16", 17, 100),
    ShippedCall("triton", "U", "bfloat16", 130, 100),
    ShippedCall("triton", "U", "bfloat16", 300, 100),
    ShippedCall("triton", "U", "bfloat16", 1000, 100),
    ShippedCall("triton", "U", "bfloat16", 4300, 50),  # in three chunks
    ShippedCall("triton", "M", "bfloat16", 300, 50),
    ShippedCall("triton", "U", "float32", 65, 20),
    ShippedCall("triton", "U", "tf32", 65, 20),
    ShippedCall("triton", "U", "float16", 65, 20),
    ShippedCall("triton", "U", "bfloat16", 65, 20, "residual"),
    ShippedCall("triton", "U", "float32", 17, 20, "c51"),
)


@dataclass(frozen=True)
class KernelCheck:
    """One comparison with the float64 reference on the CPU.

    Args:
        differing: repeats whose bits were others. mates: whether rows alone have other bits than in the batch.
    """

    backend: str
    what: str
    precision: str
    compared: Comparison
    differing: int = 0
    mates: bool = False

    @property
    def words(self) -> str:
        """What is wrong; empty where nothing is."""
        found = [] if self.compared.passed else [self.compared.words]
        found += [f"{self.differing} repeats have other bits"] if self.differing else []
        found += ["rows have other bits alone"] if self.mates else []
        return "; ".join(found)


def check_shipped(call: ShippedCall, device: str = "cuda") -> KernelCheck:
    """Some rows against the reference, all rows against further calls, three rows against a call of their own."""
    workload = make_workload(CASES[call.case], call.method, call.batch_size, device=device)
    sampler = workload.sampler(call.backend, call.precision)

    def actions() -> torch.Tensor:
        return sampler(workload.obs, workload.noise, workload.posterior_noise)

    first = actions()
    compared = check_actions(first, workload, call.precision, ours=True)
    differing = sum(not torch.equal(actions(), first) for _ in range(call.repeats))
    few = torch.tensor(sorted({0, call.batch_size // 2, call.batch_size - 1}), device=device)
    some = workload.rows(few)
    alone = sampler(some.obs, some.noise, some.posterior_noise)
    what = f"{call.method} B={call.batch_size} of {call.case}"
    return KernelCheck(call.backend, what, call.precision, compared, differing, not torch.equal(alone, first[few]))


def check_samplers(backend: str, precision: str, device: str = "cuda") -> Iterator[KernelCheck]:
    """Every preset at every checked shape and batch size."""
    for (name, steering), shape, batch in product(PRESETS.items(), _CHECKED_SHAPES, _CHECKED_BATCHES):
        case = make_case(steering, batch_size=batch, **shape)
        try:
            actions = case.to(device).run(backend, precision)
        except BackendUnavailable:  # the backend states that it does not run this setting
            continue
        what = f"sample {name} B={batch} {shape['hidden_dims']}"
        yield KernelCheck(backend, what, precision, compare(actions, case.expected(), precision))


def check_networks(backend: str, precision: str, device: str = "cuda") -> Iterator[KernelCheck]:
    """forward and vjp of the three kinds of network, over activations and LayerNorm placements."""
    engine, oracle = backends.get(backend), backends.get("reference")
    generator = torch.Generator().manual_seed(0)
    for activation, norm in product(ACTIVATIONS, (None, "pre", "post")):
        case = make_case(activation=activation, layer_norm=norm, critic_layer_norm=norm)
        for kind in ("flow", "critic", "posterior"):
            exact, bound = getattr(case.double(), kind).bound(), getattr(case.to(device), kind).bound()
            blocks = [torch.randn(33, exact.spec.block_dim(b), generator=generator) for b in exact.spec.input_order]
            wide, here = [block.double() for block in blocks], [block.to(device) for block in blocks]
            forward = oracle.forward(exact, wide, "float64")
            cotangent = torch.randn(forward.shape, generator=generator)
            handle = engine.prepare(bound, precision)
            pairs = {
                "forward": (engine.forward(handle, here, precision), forward),
                "vjp": (
                    engine.vjp(handle, here, cotangent.to(device), precision),
                    oracle.vjp(exact, wide, cotangent.double(), "float64"),
                ),
            }
            for what, (actual, expected) in pairs.items():
                scale = max(expected.abs().max().item(), 1.0) * 4  # outputs are not within [-1, 1]
                compared = compare(actual, expected, precision, scale)
                yield KernelCheck(backend, f"{what} {kind} {activation} {norm}", precision, compared)
