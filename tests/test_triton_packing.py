"""The pack kernel in the interpreter (test_triton_interpreter.py starts it): every parameter in its place."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: test_triton_interpreter.py starts it", allow_module_level=True)

from torch import Tensor

from qpilots_fast.backends.triton import Tile
from qpilots_fast.backends.triton.packing import NetworkLayout, PackedBuffers, PackedNetwork
from qpilots_fast.spec import BoundNetwork, LayerParameters
from qpilots_fast.testing import make_case
from tests import triton_interpreter

triton_interpreter.install()

TILE = Tile(16, 16, 16, 1, 1)
TIMES = (0.0, 0.25, 0.9)


def expected_vectors(network: BoundNetwork, layout: NetworkLayout) -> Tensor:
    """[E, L 3 H_PAD + OUT_ROWS]: bias, LayerNorm weight (1 where there is none) and bias of each layer."""
    spec, width = network.spec, layout.hidden_pad
    out = torch.zeros(spec.num_members, layout.member_vectors)
    for index, layer in enumerate(network.layers):
        for offset, values in enumerate((layer.bias, layer.norm_weight, layer.norm_bias)):
            start = (3 * index + offset) * width
            size = spec.layer_dims[index][1]
            if index < len(spec.hidden_dims) and offset == 1:
                out[:, start : start + size] = 1
            for member, value in enumerate(values or ()):
                out[member, start : start + size] = value.detach().float()
    return out


def expected_weights(network: BoundNetwork, layout: NetworkLayout) -> Tensor:
    """[E, L H_PAD + OUT_ROWS, LD]."""
    spec = network.spec
    out = torch.zeros(spec.num_members, layout.depth * layout.hidden_pad + layout.out_rows, layout.leading_dim)
    for member in range(spec.num_members):
        for index, layer in enumerate(network.layers):
            weight, start = layer.weight[member].detach().float(), index * layout.hidden_pad
            rows = slice(start, start + weight.shape[0])
            if index > 0:
                out[member, rows, : weight.shape[1]] = weight
                continue
            for block, column in layout.columns:
                part = weight[:, spec.block_slices[block]]
                out[member, rows, column : column + part.shape[1]] = part
    return out


def packed(network: BoundNetwork, times: tuple[float, ...], precision: str = "float32") -> PackedNetwork:
    buffers = PackedBuffers([NetworkLayout(network.spec, TILE, times)], precision, torch.device("cpu"))
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
    for given in (network, scattered(network, dtype)):
        got = packed(given, ())
        layout = got.layout
        assert torch.equal(got.weights.view(expected_weights(given, layout).shape), expected_weights(given, layout))
        vectors = expected_vectors(given, layout)
        assert torch.equal(got.vectors[: vectors.numel()].view(vectors.shape), vectors)


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
    expected = expected_weights(network, got.layout)
    assert torch.equal(got.weights.view(expected.shape), expected.bfloat16())
    assert got.vectors.dtype == torch.float32
