"""Structures beyond plain MLPs: residual blocks, heads, norms, modulation: each backend against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpilots_fast.activations import ACTIVATIONS
from qpilots_fast.networks import bind
from qpilots_fast.reference import ReferenceNetwork
from qpilots_fast.row_ops import ROW_OPS, RowOp, plain_layer
from qpilots_fast.spec import NetworkSpec, network_spec_from_json

S, A, B = 5, 3, 7

# name -> one chain a hidden layer of 6 units
CHAINS: dict[str, tuple[tuple[RowOp, ...], ...]] = {
    "an activation a layer": ((RowOp("tanh"),), (RowOp("mish"),)),
    "leaky_relu": ((RowOp("leaky_relu", (0.1,)),), (RowOp("leaky_relu", (0.2,)),)),
    "clamp": ((RowOp("clamp", (-0.5, 0.25)),),),
    "rms_norm": ((RowOp("rms_norm", (1e-6,), True), RowOp("relu")), (RowOp("silu"), RowOp("rms_norm", (1e-5,)))),
    "two norms": (
        (RowOp("layer_norm", (1e-5,), True, True), RowOp("tanh"), RowOp("layer_norm", (1e-6,), False, True)),
    ),
    "pre-norm blocks": (
        (RowOp("keep"), RowOp("layer_norm", (1e-5,), True, True)),
        (RowOp("relu"),),
        (RowOp("add"), RowOp("keep"), RowOp("layer_norm", (1e-5,), True, True)),
        (RowOp("gelu"),),
        (RowOp("add"), RowOp("layer_norm", (1e-6,), True, False)),
    ),
    "normed blocks": (
        (RowOp("layer_norm", (1e-5,), True, True), RowOp("relu"), RowOp("keep")),
        (RowOp("layer_norm", (1e-5,), True, True), RowOp("relu")),
        (RowOp("layer_norm", (1e-5,), True, True), RowOp("add"), RowOp("keep")),
        (RowOp("silu"), RowOp("add")),
    ),
    "activation before the block": (
        (RowOp("keep"), RowOp("mish")), (RowOp("mish"),), (RowOp("add"), RowOp("keep"), RowOp("mish")),
        (RowOp("add"), RowOp("tanh")),
    ),
    "softmax": ((RowOp("relu"),), (RowOp("softmax"),)),
    "lowest": ((RowOp("relu"),), (RowOp("lowest", (4,)),)),
    "no operation": ((), (RowOp("relu"),)),
}  # fmt: skip


def spec_of(chains: tuple[tuple[RowOp, ...], ...], kind: str = "critic", members: int = 2, **fields) -> NetworkSpec:
    time = {} if kind == "critic" else {"time_embedding": "raw"}
    return NetworkSpec(kind, S, A, (6,) * len(chains), num_members=members, chains=chains, **time, **fields)


def parameters_of(spec: NetworkSpec, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) / (shape[-1] ** 0.5 if len(shape) > 1 else 2)
        for shape in spec.parameter_shapes
    ]


def torch_chain(chain, z: Tensor, vectors, kept: Tensor | None, film) -> tuple[Tensor, Tensor | None]:
    """The chain in torch's own functions; vectors and film are iterators."""
    F = torch.nn.functional
    for op in chain:
        if op.name == "keep":
            kept = z
        elif op.name == "add":
            z = z + kept
        elif op.name == "film":
            scale, shift = next(film)
            z = z * scale + shift
        elif op.name in ("layer_norm", "rms_norm"):
            weight = next(vectors) if op.weight else None
            bias = next(vectors) if op.bias else None
            norm = F.layer_norm if op.name == "layer_norm" else F.rms_norm
            z = norm(z, (z.shape[-1],), eps=op.numbers[0])
            z = z if weight is None else z * weight
            z = z if bias is None else z + bias
        elif op.name == "softmax":
            z = z.softmax(-1)
        elif op.name == "lowest":
            kept_values = z.sort(-1).values[..., : int(op.numbers[0])]
            z = torch.where(z <= kept_values[..., -1:], z, torch.zeros_like(z))
        elif op.name == "leaky_relu":
            z = F.leaky_relu(z, op.numbers[0])
        elif op.name == "clamp":
            z = z.clamp(*op.numbers)
        else:
            z = ACTIVATIONS[op.name].function(z)
    return z, kept


def in_torch(spec: NetworkSpec, flat: list[Tensor], columns: Tensor, film=()) -> Tensor:
    """[E, B, out] by torch's own functions, differentiable."""
    copies, films = spec.num_members, iter(film)
    outputs = []
    for member in range(copies):
        mine = iter(flat[member::copies])
        h, kept = columns, None
        films = iter(film)
        for chain in (*spec.row_chains, None):
            weight, bias = next(mine), next(mine)
            h = h @ weight.T + bias
            if chain is not None:
                h, kept = torch_chain(chain, h, mine, kept, films)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("name", CHAINS)
def test_reference_against_autograd(name: str) -> None:
    spec = spec_of(CHAINS[name])
    flat = parameters_of(spec)
    columns = torch.randn(B, S + A, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    theirs = in_torch(spec, flat, columns)
    cotangent = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (their_grad,) = torch.autograd.grad(theirs, columns, cotangent)
    output, pull_back = ReferenceNetwork(bind(spec, flat), torch.float64)([columns.detach()])
    torch.testing.assert_close(output, theirs.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pull_back(cotangent).sum(0), their_grad, rtol=1e-9, atol=1e-10)


def test_film_in_the_reference() -> None:
    chains = ((RowOp("film"), RowOp("silu"), RowOp("keep")), (RowOp("film"), RowOp("mish"), RowOp("add")))
    spec = spec_of(chains, members=1)
    assert spec.film_dim == 2 * 6 * 2
    flat = parameters_of(spec)
    film = torch.randn(B, spec.film_dim, dtype=torch.float64)
    columns = torch.randn(B, S + A, dtype=torch.float64, requires_grad=True)
    parts = film.split(6, 1)
    theirs = in_torch(spec, flat, columns, [(parts[0], parts[1]), (parts[2], parts[3])])
    (their_grad,) = torch.autograd.grad(theirs.sum(), columns)
    output, pull_back = ReferenceNetwork(bind(spec, flat), torch.float64)([columns.detach(), film])
    torch.testing.assert_close(output, theirs.detach())
    torch.testing.assert_close(pull_back(torch.ones_like(output)).sum(0), their_grad)


def test_what_activation_and_layer_norm_can_say_is_said_so() -> None:
    norm = RowOp("layer_norm", (1e-5,), True, False)
    spec = spec_of(((norm, RowOp("relu")), (RowOp("relu"), norm), (RowOp("relu"),)))
    assert not spec.chains and spec.activation == "relu" and spec.layer_norm == ("pre", "post", None)
    assert (spec.layer_norm_eps, spec.norm_weight, spec.norm_bias) == (1e-5, True, False)
    assert [plain_layer(chain) for chain in spec.row_chains] == [
        ("relu", "pre", norm), ("relu", "post", norm), ("relu", None, None),
    ]  # fmt: skip


def test_json_keeps_chains() -> None:
    spec = spec_of(CHAINS["pre-norm blocks"])
    again = network_spec_from_json(spec.json)
    assert again == spec and hash(again) == hash(spec) and again.row_chains == spec.row_chains


@pytest.mark.parametrize(
    "chains, message",
    [
        (((RowOp("sine"),),), "'sine'; expected one of leaky_relu"),
        (((RowOp("clamp", (1.0,)),),), "expected 2 numbers"),
        (((RowOp("add"),),), "none was kept"),
        (((RowOp("lowest", (9,)),),), "from 1 to the layer's width 6"),
    ],
)
def test_what_no_network_can_have_is_refused(chains, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_of(chains)


def test_kept_rows_must_be_as_wide() -> None:
    with pytest.raises(ValueError, match="the row kept last has 4 numbers"):
        NetworkSpec("critic", S, A, (4, 6), chains=((RowOp("keep"), RowOp("relu")), (RowOp("add"),)))


def test_the_table_of_chains_has_every_operation() -> None:
    used = {op.kind for chains in CHAINS.values() for chain in chains for op in chain}
    assert used == set(ROW_OPS) - {"film"}
