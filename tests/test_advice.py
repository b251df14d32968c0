"""What errors advise, followed to the letter, gives right answers."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import qpilots_fast
from qpilots_fast import CriticEnsemble, FlowMLP, Steering, ops
from qpilots_fast.testing import assert_close

S, A, H, B = 6, 4, 16, 5


def mlp(width_in: int, width_out: int, act=nn.SiLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, H), act(), nn.Linear(H, H), act(), nn.Linear(H, width_out))


class Flow(nn.Module):
    def __init__(self, act=nn.SiLU):
        super().__init__()
        self.net = mlp(S + A + 1, A, act)

    def forward(self, obs, x, t):
        return self.net(torch.cat([obs, x, t], -1))


class Q(nn.Module):
    def __init__(self, act=nn.SiLU):
        super().__init__()
        self.q = mlp(S + A, 1, act)

    def forward(self, obs, actions):
        return self.q(torch.cat([obs, actions], -1))


class Odd(Q):
    """One that from_module refuses."""

    def forward(self, obs, actions):
        return torch.tanh(super().forward(obs, actions))


Q_OPAQUE = Odd()


def inputs():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(B, width, generator=generator) for width in (S, A))


# ---------------------------------------------------------------- the operators

OTHERWISE = r"(?:call|ask) it yourself: (.*)"


def advised(call, pattern: str) -> re.Match:
    with pytest.raises(TypeError) as error:
        call()
    found = re.search(pattern, str(error.value))
    assert found, str(error.value)
    return found


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_operators_take_wrappers_off(wrap):
    obs, x = inputs()
    flow, critic = FlowMLP(S, A, (H,)), CriticEnsemble(S, A, 2, (H,))
    assert torch.equal(ops.velocity(obs, x, 0.3, wrap(flow)), ops.velocity(obs, x, 0.3, flow))
    assert torch.equal(ops.critic_values(obs, x, wrap(critic)), ops.critic_values(obs, x, critic))
    assert torch.equal(ops.pessimistic_q(obs, x, wrap(critic)), ops.pessimistic_q(obs, x, critic))
    step = ops.steer_step(x, x, 0.3, 0.1, obs=obs, critic=critic)
    assert torch.equal(ops.steer_step(x, x, 0.3, 0.1, obs=obs, critic=wrap(critic)), step)
    with pytest.raises(TypeError, match="velocity: flow is CriticEnsemble, a packed critic; expected a packed flow"):
        ops.velocity(obs, x, 0.3, critic)


@pytest.mark.parametrize("critics", [Q(), [Q(), Q()], nn.ModuleList([Q(), Q(), Q()])])
@pytest.mark.parametrize("aggregation", ["pessimistic", "mean", "min"])
def test_operators_say_how_to_pack(critics, aggregation):
    obs, x = inputs()
    flow, t = Flow(), torch.full((B, 1), 0.3)
    found = advised(lambda: ops.velocity(obs, x, 0.3, flow), r"flow = (qpilots_fast\.from_module\(.*?\))")
    packed = eval(found[1], {"qpilots_fast": qpilots_fast, "flow": flow})
    torch.testing.assert_close(ops.velocity(obs, x, 0.3, packed), flow(obs, x, t))

    found = advised(lambda: ops.critic_values(obs, x, critics), r"critic = (qpilots_fast\.from_module\(.*?\))")
    packed = eval(found[1], {"qpilots_fast": qpilots_fast, "critic": critics})
    members = list(critics) if isinstance(critics, (list, nn.ModuleList)) else [critics]
    q_values = torch.cat([q(obs, x) for q in members], -1).T
    torch.testing.assert_close(ops.critic_values(obs, x, packed), q_values)
    want = {"mean": q_values.mean(0), "min": q_values.amin(0)}
    want["pessimistic"] = q_values.mean(0) - 0.5 * q_values.std(0, unbiased=False)
    torch.testing.assert_close(ops.pessimistic_q(obs, x, packed, aggregation=aggregation), want[aggregation])


@pytest.mark.parametrize("critic", [Odd(), [Odd(), Odd()], nn.ModuleList([Odd()] * 3), lambda obs, a: Q_OPAQUE(obs, a)])
def test_operators_say_what_to_do_without(critic):
    obs, actions = inputs()
    flow, t = Flow(nn.Hardswish), torch.full((B, 1), 0.3)
    names = {"qpilots_fast": qpilots_fast, "obs": obs, "actions": actions, "noisy_actions": actions, "t": t}
    names |= {"flow": flow, "critic": critic}
    exec(advised(lambda: ops.velocity(obs, actions, t, flow), OTHERWISE)[1], names)
    assert torch.equal(names["velocity"], flow(obs, actions, t))
    exec(advised(lambda: ops.critic_values(obs, actions, critic), OTHERWISE)[1], names)
    members = critic if isinstance(critic, (list, nn.ModuleList)) else [critic]
    q_values = torch.cat([q(obs, actions) for q in members], -1).T
    assert torch.equal(names["q_values"], q_values)
    exec(advised(lambda: ops.pessimistic_q(obs, actions, critic, 0.7), OTHERWISE)[1], names)
    want = q_values.mean(0) - 0.7 * q_values.std(0, unbiased=False)
    torch.testing.assert_close(names["q_bar"], want)


@pytest.mark.parametrize("critics", [Q(), [Q(), Q(), Q()]])
@pytest.mark.parametrize("convention", ["noise_at_zero", "noise_at_one"])
@pytest.mark.parametrize(
    ("steering", "bounds"),
    [
        (Steering.qpilots_u(0.7, jacobian="identity", rho=0.9), {}),
        (Steering.qpilots_u(0.7, jacobian="identity"), {"action_low": None, "action_high": None}),
        (Steering.qpilots_u(0.7, jacobian="identity"), {"action_low": -0.5, "action_high": None}),
        (Steering(alpha=0.7, estimate="noisy", clip="none", aggregation="min"), {}),
        (Steering(alpha=0.7, jacobian="identity", aggregation="mean", steered_dims=(0, 2)), {}),
    ],
)
@pytest.mark.parametrize("op", [ops.steer_step, ops.steer_velocity])
def test_steps_say_how_to_take_the_gradient(op, critics, convention, steering, bounds):
    """With a critic that could be packed, the advice for one that cannot gives what the packed one gives."""
    obs, x = inputs()
    v, t = 2 * x.flip(0), 0.4
    keys = {"steering": steering, "convention": convention, **bounds}
    times = (t, 0.1 if convention == "noise_at_zero" else -0.1) if op is ops.steer_step else (t,)
    found = advised(
        lambda: op(x, v, *times, obs=obs, critic=critics, **keys),
        rf"call {op.__name__}\(\.\.\., q_grad=q_grad\) without obs and critic: (.*)",
    )
    names = {"qpilots_fast": qpilots_fast, "torch": torch, "obs": obs, "critic": critics, "x": x, "v": v, "t": t}
    exec(found[1], names)
    packed = qpilots_fast.from_module(critics, "critic", obs_dim=S, action_dim=A)
    want = op(x, v, *times, obs=obs, critic=packed, **keys)
    assert_close(op(x, v, *times, q_grad=names["q_grad"], **keys), want)
    assert (want - op(x, v, *times, q_grad=0 * x, **keys)).abs().max() > 1e-3


def test_steps_of_other_scales_say_that_there_is_no_way_around():
    obs, x = inputs()
    steering = Steering.qgf(0.3)
    advised(
        lambda: ops.steer_step(x, x, 0.3, 0.1, obs=obs, critic=Odd(), steering=steering), "SteeredSampler takes any"
    )
    sampler = qpilots_fast.SteeredSampler(lambda obs, x, t: x, Odd(), steering)
    assert sampler(obs, x).shape == (B, A)
