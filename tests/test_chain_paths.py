"""Chains on every instruction-set path of the CPU backend: heads as they are packed, bits of a row, and bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpilots_fast import SteeredSampler, Steering, backends
from qpilots_fast.backends import native
from qpilots_fast.networks import bind
from qpilots_fast.reference import ReferenceNetwork
from qpilots_fast.row_ops import Chain, RowOp
from qpilots_fast.spec import NetworkSpec
from qpilots_fast.testing import BFLOAT16_ERROR_OVER_TORCH, TOLERANCES
from tests.test_chains import CHAINS, A, Packed, S, inputs

if native.import_failure() is not None:
    pytest.skip(native.import_failure(), allow_module_level=True)

PATHS = native.load_module().cpu_isa_paths()
NORM, RELU, SOFTMAX = RowOp("layer_norm", (1e-5,), True, True), RowOp("relu"), RowOp("softmax")
ATOMS, QUANTILES, LEFT = 51, 25, 23
# name -> (hidden widths, chains, the weights that are no free parameters, by their shape)
HEADS: dict[str, tuple[tuple[int, ...], tuple[Chain, ...], dict[tuple[int, int], Tensor]]] = {
    "categorical": (
        (37, 24, ATOMS), ((NORM, RELU), (NORM, RELU), (SOFTMAX,)),
        {(1, ATOMS): torch.linspace(-10, 10, ATOMS)[None]},
    ),
    "two-hot": (
        (40, ATOMS, 1), ((RowOp("silu"),), (SOFTMAX,), (RowOp("symexp"),)),
        {(1, ATOMS): torch.linspace(-3, 3, ATOMS)[None], (1, 1): torch.ones(1, 1)},
    ),
    "lowest quantiles": (
        (48, QUANTILES), ((RELU,), (RowOp("lowest", (LEFT,)),)), {(1, QUANTILES): torch.full((1, QUANTILES), 1 / LEFT)},
    ),
    "normalised input": ((S + A, 48), ((NORM,), (RELU,)), {(S + A, S + A): torch.eye(S + A)}),
    "blocks": ((34,) * 5, CHAINS["pre-norm blocks"], {}),
}  # fmt: skip


def critic_of(head: str) -> Packed:
    widths, chains, fixed = HEADS[head]
    critic = Packed(NetworkSpec("critic", S, A, widths, num_members=2, chains=chains), 5)
    for parameter in critic.flat:
        if (weight := fixed.get(tuple(parameter.shape))) is not None:
            parameter.copy_(weight)
    return critic


def flow() -> Packed:
    """Normed blocks whose rows differ in width, and an output between bounds."""
    chains = ((NORM, RELU, RowOp("keep")), (NORM, RowOp("softplus")), (NORM, RowOp("add")), (RowOp("tanh"),))
    return Packed(NetworkSpec("flow", S, A, (21, 50, 21, A), chains=chains, time_embedding="raw"), 1)


def sample(critic: Packed, backend: str, precision: str, obs: Tensor, noise: Tensor) -> Tensor:
    sampler = SteeredSampler(flow(), critic, Steering.qpilots_u(), num_steps=3, backend=backend, precision=precision)
    return sampler(obs, noise)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("head", HEADS)
def test_every_path_matches_float64(monkeypatch: pytest.MonkeyPatch, head: str, path: str) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, path)
    critic = critic_of(head)
    obs, noise = inputs(257)
    exact = sample(critic, "reference", "float64", obs.double(), noise.double())
    found = sample(critic, "cpu", "float32", obs, noise)
    assert (found - exact).abs().max() <= TOLERANCES["float32"].max_error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["categorical", "blocks"])
def test_a_row_has_the_same_bits_in_any_batch(
    monkeypatch: pytest.MonkeyPatch, head: str, precision: str, path: str
) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, path)
    critic = critic_of(head)
    obs, noise = inputs(257)
    whole = sample(critic, "cpu", precision, obs, noise)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for begin, end in ((0, 1), (4, 7), (240, 257), (31, 96), (0, 257)):
                found = sample(critic, "cpu", precision, obs[begin:end].clone(), noise[begin:end].clone())
                assert torch.equal(found, whole[begin:end]), (count, begin, end)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_is_as_accurate_as_torch(monkeypatch: pytest.MonkeyPatch, head: str, path: str) -> None:
    """Q and its gradient: what a head's support multiplies is rounded once, as any operand."""
    monkeypatch.setenv(native.ISA_VARIABLE, path)
    critic = critic_of(head)
    blocks = list(inputs(257))
    ones = torch.ones(2, 257, 1)

    def errors(q: Tensor, gradient: Tensor) -> Tensor:
        return torch.stack([(q.double() - exact_q).abs().mean(), (gradient.double() - exact_gradient).abs().mean()])

    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q, pull_back = ReferenceNetwork(bind(critic.spec, list(critic.flat)), dtype)([b.to(dtype) for b in blocks])
        return q, pull_back(ones.to(dtype)).sum(0)

    exact_q, exact_gradient = reference(torch.float64)
    cpu, bound = backends.get("cpu"), critic.bound()
    ours = errors(cpu.forward(bound, blocks, "bfloat16"), cpu.vjp(bound, blocks, ones, "bfloat16"))
    torchs = errors(*reference(torch.bfloat16))
    assert (ours <= BFLOAT16_ERROR_OVER_TORCH * torchs).all(), (head, ours, torchs)
