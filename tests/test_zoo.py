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
from tests.zoo.critics import CRITICS
from tests.zoo.entries import A, Entry, S, mlp
from tests.zoo.flows import FLOWS
from tests.zoo.table import BEGIN, END, TABLE, row

B, K = 3, 3
ENTRIES = (*CRITICS, *FLOWS)
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
    text = TABLE.read_text().split(BEGIN)[1].split(END)[0]
    written = [line.rsplit("|", 3)[0] for line in text.splitlines()[3:] if line]
    assert written == [row(entry).rsplit("|", 3)[0] for entry in ENTRIES]


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


def sampler_of(network: nn.Module, kind: str, steering: Steering, **settings) -> SteeredSampler:
    flow, critic = (network, other_of(kind)) if kind == "flow" else (other_of(kind), network)
    torch.manual_seed(3)
    posterior = MetaFlowMap(S, A, (8,)) if steering.draws_posterior else None
    return SteeredSampler(flow, critic, steering, posterior=posterior, num_steps=K, **settings)


def draws(steering: Steering, rows: int = B) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(4)
    obs, noise = torch.randn(rows, S, generator=generator), torch.randn(rows, A, generator=generator)
    more = torch.randn(K, rows, 2, A, generator=generator) if steering.draws_posterior else None
    return obs, noise, more


def exact(module: nn.Module, kind: str, steering: Steering, rows: int = B) -> torch.Tensor:
    """The sampler's actions where the network is the user's own module, in float64."""
    sampler = sampler_of(copy.deepcopy(module), kind, steering, backend="reference").double()
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
            assert (got - exact(module, entry.kind, STEERINGS[name])).abs().max() < 1e-4, (backend, name)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.mul_(1.25)
        before, got = got, samplers["U"](*draws(STEERINGS["U"]))
        assert (got - exact(module, entry.kind, STEERINGS["U"])).abs().max() < 1e-4, (backend, "other weights")
        assert not torch.equal(before, got)


@pytest.mark.parametrize("entry", PACKED, ids=lambda entry: entry.title)
def test_bfloat16(entry: Entry) -> None:
    """A mean error of at most 5e-3."""
    module, network = packed_of(entry)
    for backend in BACKENDS:
        if unavailable_reason(backend):
            continue
        sampler = sampler_of(network, entry.kind, STEERINGS["U"], backend=backend, precision="bfloat16")
        got = sampler(*draws(STEERINGS["U"], rows=32))
        assert (got - exact(module, entry.kind, STEERINGS["U"], rows=32)).abs().mean() < 5e-3, backend
