"""Networks in the shapes of public codebases: each packs and samples as in float64, or is refused for its reason."""

from __future__ import annotations

import copy
import warnings
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import nn

from qpilots_fast import FlowMLP, MetaFlowMap, SteeredSampler, Steering, ops
from qpilots_fast.backends import unavailable_reason
from qpilots_fast.from_module import from_module
from qpilots_fast.testing import BFLOAT16_ERROR_OVER_TORCH, TOLERANCES
from tests.zoo.entries import A, Entry, S, mlp
from tests.zoo.table import ENTRIES, row, written

B, K = 3, 3
ROWS = 96  # over which errors of bfloat16 are averaged
PACKED = [entry for entry in ENTRIES if not entry.refused]
STEERINGS = {
    "U": Steering.qpilots_u(),
    "identity": Steering.qpilots_u(jacobian="identity"),
    "M": Steering.qpilots_m(num_samples=2),
    "QGF": Steering.qgf(0.5),
}
BACKENDS = ("reference", "cpu")


def test_the_table_has_every_network() -> None:
    """docs/networks.md, which `python -m tests.zoo` writes."""
    assert list(written()) == [row(entry).rsplit(" | ", 2)[0] for entry in ENTRIES]


class Outputs(nn.Module):
    """Returns more than its value."""

    def __init__(self, make) -> None:
        super().__init__()
        self.net, self.make = mlp(S + A, 1), make

    def forward(self, obs, actions):
        return self.make(self.net(torch.cat([obs, actions], -1)))


class Two(NamedTuple):
    log: str
    q: torch.Tensor


@pytest.mark.parametrize(
    ("make", "output"),
    [
        (lambda q: {"values": q, "aux": 1}, "values"),  # a key that is the name of a method too
        (lambda q: (0, q), 1),
        (lambda q: Two("", q), "q"),
        (lambda q: {"a": {"b": q}}, lambda out: out["a"]["b"]),
    ],
)
def test_output_names_the_part(make, output) -> None:
    module = Outputs(make)
    packed = from_module(module, "critic", obs_dim=S, action_dim=A, output=output)
    obs, actions = torch.randn(B, S), torch.randn(B, A)
    expected = module.net(torch.cat([obs, actions], -1)).T
    torch.testing.assert_close(ops.critic_values(obs, actions, packed), expected)
    with pytest.raises(ValueError, match="has no part 'other'"):
        from_module(module, "critic", obs_dim=S, action_dim=A, output="other")


def module_of(entry: Entry) -> nn.Module:
    torch.manual_seed(1)
    return entry.build()


@lru_cache(maxsize=1)
def packed_of(entry: Entry) -> tuple[nn.Module, nn.Module]:
    module = module_of(entry)
    return module, from_module(module, entry.kind, obs_dim=S, action_dim=A, **entry.hints)


def other_of(kind: str) -> nn.Module:
    """The other network of a sampler, of plain PyTorch."""
    torch.manual_seed(2)
    if kind == "flow":
        return from_module(_Plain(), "critic", obs_dim=S, action_dim=A)
    return FlowMLP(S, A, (16,))


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(S + A, 1)

    def forward(self, obs, actions):
        return self.net(torch.cat([obs, actions], -1))


def sampler_of(network, kind: str, steering: Steering, **settings) -> SteeredSampler:
    flow, critic = (network, other_of(kind)) if kind == "flow" else (other_of(kind), network)
    torch.manual_seed(3)
    posterior = MetaFlowMap(S, A, (8,)) if steering.draws_posterior else None
    return SteeredSampler(flow, critic, steering, posterior=posterior, num_steps=K, **settings)


def draws(steering: Steering, rows: int = B) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(4)
    obs, noise = torch.randn(rows, S, generator=generator), torch.randn(rows, A, generator=generator)
    more = torch.randn(K, rows, 2, A, generator=generator) if steering.draws_posterior else None
    return obs, noise, more


def called(module: nn.Module, entry: Entry, dtype: torch.dtype):
    """A copy of the user's module in a dtype, as a function, which stays PyTorch."""
    copied = copy.deepcopy(module).to(dtype)

    def ask(*blocks):
        output = copied(*(block.to(dtype) for block in blocks))
        output = entry.hints["output"](output) if "output" in entry.hints else output
        return tuple(part.to(blocks[1]) for part in output) if isinstance(output, tuple) else output.to(blocks[1])

    return ask


def exact(module: nn.Module, entry: Entry, steering: Steering, rows: int = B) -> torch.Tensor:
    """The sampler's actions where the network is the user's own module, called in float64."""
    ask = called(module, entry, torch.float64)
    sampler = sampler_of(ask, entry.kind, steering, backend="reference").double()
    blocks = [None if block is None else block.double() for block in draws(steering, rows)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sampler(*blocks)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.refused], ids=lambda entry: entry.title)
def test_refused(entry: Entry) -> None:
    with pytest.raises(ValueError, match=entry.refused):
        from_module(module_of(entry), entry.kind, obs_dim=S, action_dim=A, **entry.hints)


@pytest.mark.parametrize("entry", PACKED, ids=lambda entry: entry.title)
def test_packed(entry: Entry) -> None:
    """Every steering on every backend, then with other weights."""
    module, network = packed_of(entry)
    for backend in BACKENDS:
        if unavailable_reason(backend):
            continue
        samplers = {name: sampler_of(network, entry.kind, rule, backend=backend) for name, rule in STEERINGS.items()}
        for name, sampler in samplers.items():
            got = sampler(*draws(STEERINGS[name]))
            assert (got - exact(module, entry, STEERINGS[name])).abs().max() < 1e-4, (backend, name)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.25)
        before, got = got, samplers["U"](*draws(STEERINGS["U"]))
        assert (got - exact(module, entry, STEERINGS["U"])).abs().max() < 1e-4, (backend, "other weights")
        assert not torch.equal(before, got)


@pytest.mark.parametrize("entry", PACKED, ids=lambda entry: entry.title)
def test_bfloat16(entry: Entry) -> None:
    """A mean error of at most 5e-3, and of 1.5 times that of the same sampler in torch's own bfloat16."""
    module, network = packed_of(entry)
    rule = STEERINGS["U"]
    expected = exact(module, entry, rule, rows=ROWS)
    torchs = (torch_bfloat16(module, entry, rule)(*draws(rule, ROWS)) - expected).abs().mean()
    for backend in BACKENDS:
        if unavailable_reason(backend):
            continue
        sampler = sampler_of(network, entry.kind, rule, backend=backend, precision="bfloat16")
        error = (sampler(*draws(rule, ROWS)) - expected).abs().mean()
        assert error < TOLERANCES["bfloat16"].mean_error, backend
        assert error < BFLOAT16_ERROR_OVER_TORCH * torchs, (backend, error / torchs)


def torch_bfloat16(module: nn.Module, entry: Entry, rule: Steering) -> SteeredSampler:
    """The sampler with both networks' modules in bfloat16, called by PyTorch; its own state is float32."""
    other = Entry("", "", "", lambda: module)
    both = [called(module, entry, torch.bfloat16), called(other_of(entry.kind), other, torch.bfloat16)]
    return SteeredSampler(*(both if entry.kind == "flow" else both[::-1]), rule, num_steps=K, backend="reference")
