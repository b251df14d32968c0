"""torch.ops.qpilots on networks with blocks, heads and norms: values and gradients against autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from qpilots_fast import SteeredSampler, Steering, ops, reference
from qpilots_fast.backends import unavailable_reason
from qpilots_fast.from_module import from_module
from qpilots_fast.networks import PackableNetwork
from tests.zoo.critics import Atoms, BroNet, Clipped, PerCritic, simba, twice
from tests.zoo.entries import A, H, S
from tests.zoo.flows import Actor, Cat, FilmFlow, TwoLayerPreActivation

B = 5
CRITICS: dict[str, Callable[[], nn.Module]] = {
    "BroNet": twice(BroNet),
    "SimBa": twice(simba),
    "categorical": twice(Atoms),
    "lowest quantiles": PerCritic,
    "normalised inputs": Clipped,
}


def residual() -> nn.Module:
    return Cat(nn.Sequential(nn.Linear(S + A + 1, H), TwoLayerPreActivation(norm=True), nn.Linear(H, A)))


FLOWS: dict[str, Callable[[], nn.Module]] = {"residual": residual, "bounded output": Actor}


def packed(build: Callable[[], nn.Module], kind: str, dtype: torch.dtype = torch.float64) -> PackableNetwork:
    torch.manual_seed(0)
    return from_module(build().to(dtype).eval(), kind, obs_dim=S, action_dim=A)


def rows(*widths: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, width, generator=generator, dtype=torch.float64).to(dtype) for width in widths]


def same_gradients(got: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values, and the gradients of a random combination of them; zero where autograd says that there is none."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=expected.dtype)
    ours, theirs = (torch.autograd.grad(value, inputs, cotangent, allow_unused=True) for value in (got, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(*(torch.zeros(()) if g is None else g for g in (a, b)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CRITICS)
def test_critics(name: str) -> None:
    critic = packed(CRITICS[name], "critic")
    obs, actions = (block.requires_grad_() for block in rows(S, A))
    inputs = [obs, actions, *critic.parameters()]
    same_gradients(ops.critic_values(obs, actions, critic), critic(obs, actions), inputs)
    q = critic(obs, actions)
    q_bar = q.mean(0) - 0.5 * q.std(0, unbiased=False) if len(q) > 1 else q[0]
    same_gradients(ops.pessimistic_q(obs, actions, critic), q_bar, inputs)


@pytest.mark.parametrize("name", FLOWS)
def test_flows(name: str) -> None:
    flow = packed(FLOWS[name], "flow")
    obs, x = (block.requires_grad_() for block in rows(S, A))
    t = torch.linspace(0, 0.9, B, dtype=torch.float64).unsqueeze(1)
    same_gradients(ops.velocity(obs, x, t, flow), flow(obs, x, t), [obs, x, *flow.parameters()])


@pytest.mark.parametrize("name", CRITICS)
def test_a_step(name: str) -> None:
    """Against the step written out, and its gradient."""
    critic = packed(CRITICS[name], "critic").requires_grad_(False)
    obs, x, v = (block.requires_grad_() for block in rows(S, A, A))
    t, dt = 0.3, 0.1
    clean = (x + (1 - t) * v).detach().clamp(-1, 1).requires_grad_()
    g = torch.autograd.grad(ops.pessimistic_q(obs, clean, critic).sum(), clean)[0]
    expected = x + dt * reference.steer_velocity(v, g, Steering.qpilots_u(jacobian="identity"))[0]
    step = lambda o, a, b: ops.steer_step(a, b, t, dt, obs=o, critic=critic)  # noqa: E731
    torch.testing.assert_close(step(obs, x, v), expected, rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradcheck(step, (obs, x, v))


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_whole_sample(flow: str, critic: str, backend: str) -> None:
    """`sample` is what a sampler calls."""
    networks = [packed(FLOWS[flow], "flow", torch.float32), packed(CRITICS[critic], "critic", torch.float32)]
    if unavailable_reason(backend):
        pytest.skip(unavailable_reason(backend))
    sampler = SteeredSampler(*networks, Steering.qpilots_u(), num_steps=3, backend=backend).requires_grad_(False)
    exact = copy.deepcopy(sampler).double()
    exact.backend = "reference"
    obs, noise = (block.requires_grad_() for block in rows(S, A, dtype=torch.float32))
    actions, expected = sampler(obs, noise), exact(obs.detach().double(), noise.detach().double())
    assert (actions - expected).abs().max() < 1e-4


def test_the_operator_s_registration() -> None:
    critic = packed(CRITICS["SimBa"], "critic", torch.float32).requires_grad_(False)
    obs, actions = (block.requires_grad_() for block in rows(S, A, dtype=torch.float32))
    arguments = (obs, actions, critic.flat_parameters(), critic.spec.json, "float32", "auto")
    opcheck(torch.ops.qpilots.critic_values.default, arguments)


def test_columns_of_the_module_s_own_are_refused() -> None:
    flow = packed(FilmFlow, "flow")
    obs, x = rows(S, A)
    with pytest.raises(TypeError, match="which operators do not read"):
        ops.velocity(obs, x, 0.5, flow)
    assert flow(obs, x, 0.5).shape == (B, A)  # as the message says
