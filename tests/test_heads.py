"""Distributional critics: what they are read as, and what they are trained towards."""

from __future__ import annotations

import pytest
import torch

from qpilots_fast import FlowMLP, SteeredSampler, Steering, as_critic, objectives
from qpilots_fast.heads import C51, HLGauss
from qpilots_fast.reference import aggregate

B, E, M = 16, 3, 21
HEADS = [C51(-2.0, 3.0, M), HLGauss(-2.0, 3.0, M), HLGauss(-2.0, 3.0, M, sigma=0.5)]
OBS, ACTIONS = torch.randn(B, 4), torch.randn(B, 2)
REWARDS, DISCOUNTS = 0.1 * torch.randn(B), torch.full((B,), 0.9)


class Logits(torch.nn.Module):
    """[E, B, M] of a linear map."""

    def __init__(self, members: int = E) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(members, 6, M))

    def forward(self, obs, actions):
        return torch.cat([obs, actions], -1) @ self.weight


@pytest.mark.parametrize("head", HEADS)
def test_targets_are_distributions_whose_mean_is_the_return(head):
    returns = torch.linspace(-1.0, 2.0, 200).double()  # a Gaussian near an end loses its tail there
    p = head.target(returns)
    torch.testing.assert_close(p.sum(-1), torch.ones(200).double())
    assert (p >= 0).all()
    torch.testing.assert_close(p @ head.atoms(p), returns, rtol=0, atol=1e-6 if isinstance(head, C51) else 0.06)
    outside = head.target(torch.tensor([-99.0, 99.0]))
    assert outside[0].argmax() == 0 and outside[1].argmax() == M - 1


@pytest.mark.parametrize("aggregation", ["pessimistic", "mean", "min"])
@pytest.mark.parametrize("head", HEADS)
def test_the_bellman_target_has_the_mean_of_the_scalar_one(head, aggregation):
    logits = 3 * torch.randn(E, B, M).double()
    rewards, discounts = REWARDS.double(), 0.3 * DISCOUNTS.double()  # inside the atoms
    p = head.bootstrapped(logits, rewards, discounts, aggregation, 0.5)
    expected = rewards + discounts * aggregate(head.values(logits), aggregation, 0.5)
    torch.testing.assert_close(p @ head.atoms(p), expected, rtol=0, atol=1e-6 if isinstance(head, C51) else 0.02)


def test_c51_moves_the_whole_distribution():
    """Against the projection written as in the paper, atom by atom."""
    head, logits = HEADS[0], torch.randn(1, B, M)
    p = torch.softmax(logits[0], -1)
    expected = torch.zeros(B, M)
    for b in range(B):
        for j, z in enumerate(head.atoms(p).tolist()):
            place = (min(max(float(REWARDS[b] + DISCOUNTS[b] * z), -2.0), 3.0) + 2.0) / head.spacing
            low = min(int(place), M - 2)
            expected[b, low] += p[b, j] * (low + 1 - place)
            expected[b, low + 1] += p[b, j] * (place - low)
    torch.testing.assert_close(head.bootstrapped(logits, REWARDS, DISCOUNTS, "mean", 0.0), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", HEADS)
def test_outputs_of_every_layout(head):
    logits = torch.randn(E, B, M)
    for output in (logits, logits.transpose(0, 1), list(logits), tuple(logits)):
        assert torch.equal(head.read(output, B), logits)
    assert torch.equal(head.read(logits[0], B), logits[:1])
    for bad in (logits[..., 1:], logits[:, 1:], [logits], torch.randn(B), None, torch.randn(B, B, M)):
        with pytest.raises(ValueError, match="critic returned"):
            head.read(bad, B)


@pytest.mark.parametrize("head", HEADS)
def test_td_and_iql_are_cross_entropies(head):
    critic, target = Logits(), Logits()
    loss = objectives.td_loss(
        critic, target, OBS, ACTIONS, REWARDS, DISCOUNTS, OBS, next_actions=ACTIONS, rho=0.3, head=head
    )
    wanted = head.bootstrapped(target(OBS, ACTIONS).detach(), REWARDS, DISCOUNTS, "pessimistic", 0.3)
    expected = sum(torch.nn.functional.cross_entropy(member, wanted) for member in critic(OBS, ACTIONS)) / E
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert critic.weight.grad.abs().sum() > 0 and target.weight.grad is None
    iql = objectives.iql_loss(critic, target, lambda obs: obs[:, 0], OBS, ACTIONS, REWARDS, DISCOUNTS, OBS, head=head)
    wanted = head.target(REWARDS + DISCOUNTS * OBS[:, 0])
    expected = sum(torch.nn.functional.cross_entropy(member, wanted) for member in critic(OBS, ACTIONS)) / E
    torch.testing.assert_close(iql.critic, expected)
    with pytest.raises(TypeError, match="dones"):
        objectives.td_loss(critic, target, OBS, ACTIONS, REWARDS, DISCOUNTS > 0, OBS, next_actions=ACTIONS, head=head)


@pytest.mark.parametrize("head", HEADS)
def test_training_finds_the_value_and_the_sampler_climbs_it(head):
    critic = Logits(2)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.1)
    for _ in range(150):
        actions = torch.rand(B, 2) * 2 - 1
        loss = objectives.td_loss(
            critic, critic, OBS, actions, actions[:, 0], torch.zeros(B), OBS, next_actions=actions, head=head
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = as_critic(critic, call=lambda module, obs, a: head.values(module(obs, a)))
    sampler = SteeredSampler(FlowMLP(4, 2, (8,)), values, Steering.qgf(1.0), action_low=-1.0, action_high=1.0)
    plain = SteeredSampler(sampler.flow, None, Steering.unsteered(), action_low=-1.0, action_high=1.0)
    noise = torch.randn(B, 2)
    assert (sampler(OBS, noise) - plain(OBS, noise))[:, 0].mean() > 0.1


@pytest.mark.parametrize(
    "settings", [dict(v_min=3.0), dict(num_atoms=1), dict(num_atoms=2.5), dict(v_max=float("nan"))]
)
def test_bad_heads(settings):
    with pytest.raises(ValueError, match=r"C51\.|expected"):
        C51(**{"v_min": -1.0, "v_max": 1.0, "num_atoms": 5, **settings})
