"""The pack kernel in the interpreter (test_triton_interpreter.py starts it): every parameter in its place."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: test_triton_interpreter.py starts it", allow_module_level=True)

from torch import Tensor

from qpilots_fast.backends.triton import Tile
from qpilots_fast.backends.triton.layouts import NetworkLayout
from qpilots_fast.backends.triton.packing import PackedBuffers, PackedNetwork
from qpilots_fast.spec import BoundNetwork, LayerParameters
from qpilots_fast.testing import make_case
from tests import triton_interpreter

triton_interpreter.install()

TILE = Tile(16, 16, 16, 1, 1)
TIMES = (0.0, 0.25, 0.9)
SUMS = dict(atol=1e-5, rtol=1e-5)  # of up to 70 products in float32


def expected(network: BoundNetwork, layout: NetworkLayout) -> tuple[Tensor, Tensor]:
    """Weights [E, L H_PAD + OUT_PAD, LD] and vectors [E, ...] as layers.py describes them, in float64."""
    spec, width = network.spec, layout.hidden_pad
    weights = torch.zeros(spec.num_members, layout.member_weights // layout.leading_dim, layout.leading_dim).double()
    vectors = torch.zeros(spec.num_members, layout.member_vectors).double()
    for member, (index, layer) in product(range(spec.num_members), enumerate(network.layers)):
        weight, bias = layer.weight[member].detach().double(), layer.bias and layer.bias[member].detach().double()
        first_row, own, step = index * width, layout.vector_start(index), layout.vector_step(index)
        rows = slice(first_row, first_row + len(weight))
        c = torch.zeros(len(weight)).double() if bias is None else bias
        if index == 0:
            for block, column in layout.columns:
                part = weight[:, spec.block_slices[block]]
                weights[member, rows, column : column + part.shape[1]] = part
        else:
            below = network.layers[index - 1]
            if spec.layer_norm[index - 1] == "post":
                gain = below.norm_weight[member].detach().double() if below.norm_weight else 1.0
                c = c + (weight @ below.norm_bias[member].detach().double() if below.norm_bias else 0.0)
                vectors[member, own + step : own + step + len(weight)] = (weight * gain).sum(1)
                weight = weight * gain if layout.norm(index - 1) == "fold" else weight
            weights[member, rows, : weight.shape[1]] = weight
        vectors[member, own : own + len(c)] = c
        if index < layout.depth:
            for offset, values in ((2, layer.norm_weight), (3, layer.norm_bias)):
                place = slice(own + offset * step, own + offset * step + len(weight))
                vectors[member, place] = values[member].detach().double() if values else float(offset == 2)
    return weights, vectors


def packed(network: BoundNetwork, times: tuple[float, ...], precision: str = "float32") -> PackedNetwork:
    layout = NetworkLayout(network.spec, TILE, TILE, times)
    buffers = PackedBuffers([layout], precision, torch.device("cpu"))
    buffers.pack([network])
    return buffers.networks[0]


def scattered(network: BoundNetwork, dtype: torch.dtype) -> BoundNetwork:
    """The same numbers in another dtype, with strides of 2 and more in every direction."""

    def spread(tensor: Tensor) -> Tensor:
        wide = torch.zeros([2 * size + 1 for size in reversed(tensor.shape)], dtype=dtype)
        view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.ndim)))
        return view.copy_(tensor.detach())

    def layer(one: LayerParameters) -> LayerParameters:
        groups = (one.weight, one.bias, one.norm_weight, one.norm_bias)
        return LayerParameters(*(group and tuple(spread(t) for t in group) for group in groups))  # type: ignore[arg-type]

    return BoundNetwork(network.spec, tuple(layer(one) for one in network.layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("hidden", [(1,), (32, 33), (70, 17, 64)])
@pytest.mark.parametrize("kind", ["flow", "critic", "posterior"])
def test_every_parameter_is_in_its_place(kind: str, hidden: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(
        batch_size=1, obs_dim=35, action_dim=3, hidden_dims=hidden, num_critics=2, layer_norm="post",
        time_embedding="fourier",
    )  # fmt: skip
    network = getattr(case, kind).bound()
    bare = replace(network, layers=tuple(replace(n, bias=None, norm_bias=None) for n in network.layers))
    for given in (network, scattered(network, dtype), bare):
        got = packed(given, ())
        weights, vectors = expected(given, got.layout)
        torch.testing.assert_close(got.weights.view(weights.shape).double(), weights, atol=0, rtol=1e-7)
        torch.testing.assert_close(got.vectors[: vectors.numel()].view(vectors.shape).double(), vectors, **SUMS)


def test_packing_again_changes_nothing() -> None:
    case = make_case(batch_size=1, hidden_dims=(40, 20))
    network = case.critic.bound()
    bare = replace(network, layers=tuple(replace(n, bias=None) for n in network.layers))
    buffers = PackedBuffers([NetworkLayout(network.spec, TILE, TILE)], "float32", torch.device("cpu"))
    buffers.pack([bare])
    before = buffers.vectors.clone()
    buffers.pack([bare])
    assert torch.equal(buffers.vectors, before)


@pytest.mark.parametrize("biased", [True, False])
def test_time_columns_are_folded_into_a_bias_for_each_time(biased: bool) -> None:
    case = make_case(batch_size=1, hidden_dims=(70, 9), time_embedding="fourier")
    network = case.flow.bound()
    if not biased:
        first = replace(network.layers[0], bias=None)
        network = replace(network, layers=(first, *network.layers[1:]))
    got = packed(network, TIMES)
    layer, width = network.layers[0], got.layout.hidden_pad
    columns = layer.weight[0].detach().double()[:, got.layout.time_columns()]
    expected = got.layout.time_features().double() @ columns.t()
    expected = expected if layer.bias is None else expected + layer.bias[0].detach().double()
    rows = got.time_bias[: len(TIMES) * width].view(len(TIMES), width)
    torch.testing.assert_close(rows[:, :70].double(), expected, atol=1e-5, rtol=1e-5)
    assert not rows[:, 70:].any()


def test_operands_are_rounded_and_vectors_are_not() -> None:
    network = make_case(batch_size=1, hidden_dims=(40,)).critic.bound()
    got = packed(network, (), "bfloat16")
    weights, _ = expected(network, got.layout)
    # the gain is multiplied in float32, which may round its product to the other side
    torch.testing.assert_close(got.weights.view(weights.shape).double(), weights, atol=0, rtol=2**-8)
    of_output = got.layout.vector_start(1)
    rounded = got.weights.view(weights.shape)[:, got.layout.hidden_pad].double().sum(1)
    u = got.vectors[: got.layout.spec.num_members * got.layout.member_vectors].view(len(weights), -1)
    torch.testing.assert_close(u[:, of_output + got.layout.out_pad].double(), rounded, **SUMS)
    assert got.vectors.dtype == torch.float32
