"""The training objectives against their formulas, and on problems whose answer is known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qpilots_fast import SteeredSampler, Steering
from qpilots_fast.networks import CriticEnsemble, FlowMLP
from qpilots_fast.objectives import flow_matching_loss, iql_loss, polyak_update, td_loss, td_target

B, S, A, E = 17, 5, 3, 4


@pytest.fixture
def batch():
    torch.manual_seed(0)
    obs, next_obs = torch.randn(B, S), torch.randn(B, S)
    actions, next_actions = torch.rand(B, A) * 2 - 1, torch.rand(B, A) * 2 - 1
    rewards, discounts = torch.randn(B), torch.where(torch.arange(B) % 3 == 0, 0.0, 0.95)
    return {
        "obs": obs, "actions": actions, "rewards": rewards, "discounts": discounts,
        "next_obs": next_obs, "next_actions": next_actions,
    }  # fmt: skip


@pytest.fixture
def critics():
    torch.manual_seed(1)
    return CriticEnsemble(S, A, E, (16, 16)), CriticEnsemble(S, A, E, (16, 16))


def test_flow_matching_loss_is_its_formula(batch):
    flow = FlowMLP(S, A, (16,))
    noise, t = torch.randn(B, A), torch.rand(B, 1)
    x = t * batch["actions"] + (1 - t) * noise
    expected = ((flow(batch["obs"], x, t) - (batch["actions"] - noise)) ** 2).mean()
    torch.testing.assert_close(flow_matching_loss(flow, batch["obs"], batch["actions"], noise=noise, t=t), expected)


def test_flow_matching_loss_vanishes_at_the_true_velocity():
    # all data at one point c: x_t = t c + (1 - t) e, so E[x1 - e | x_t] = (c - x_t) / (1 - t)
    c = torch.tensor([[0.3, -0.7]])
    loss = flow_matching_loss(
        lambda obs, x, t: (c - x) / (1 - t), torch.zeros(64, 1), c.expand(64, 2), t=torch.rand(64, 1) * 0.9
    )
    assert loss < 1e-9


def test_flow_matching_loss_follows_its_generator(batch):
    flow = FlowMLP(S, A, (16,))
    first, second = (
        flow_matching_loss(flow, batch["obs"], batch["actions"], generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("aggregation", ["pessimistic", "mean", "min"])
def test_td_target_aggregates_the_target_ensemble(batch, critics, aggregation):
    _, target = critics
    q = target(batch["next_obs"], batch["next_actions"]).detach()
    qbar = {"pessimistic": q.mean(0) - 0.7 * q.std(0, correction=0), "mean": q.mean(0), "min": q.amin(0)}[aggregation]
    got = td_target(
        target, batch["rewards"], batch["discounts"], batch["next_obs"], batch["next_actions"],
        aggregation=aggregation, rho=0.7,
    )  # fmt: skip
    torch.testing.assert_close(got, batch["rewards"] + batch["discounts"] * qbar)
    ended = batch["discounts"] == 0
    torch.testing.assert_close(got[ended], batch["rewards"][ended])


def test_td_loss_with_a_sampler_is_sarsa_at_its_actions(batch, critics):
    critic, target = critics
    next_actions = batch.pop("next_actions")
    seen = []

    def sampler(obs):
        assert not torch.is_grad_enabled()
        seen.append(obs)
        return next_actions

    steered = td_loss(critic, target, **batch, sampler=sampler)
    sarsa = td_loss(critic, target, **batch, next_actions=next_actions)
    assert seen[0] is batch["next_obs"] and steered == sarsa
    y = td_target(target, batch["rewards"], batch["discounts"], batch["next_obs"], next_actions)
    torch.testing.assert_close(sarsa, ((critic(batch["obs"], batch["actions"]) - y) ** 2).mean())


def test_td_loss_leaves_the_target_network_alone(batch, critics):
    critic, target = critics
    td_loss(critic, target, **batch).backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters())


def test_iql_loss_is_its_formulas(batch, critics):
    critic, target = critics
    value = nn.Linear(S, 1)
    batch.pop("next_actions")
    losses = iql_loss(critic, target, value, **batch, expectile=0.8, rho=0.3)
    q = target(batch["obs"], batch["actions"]).detach()
    u = q.mean(0) - 0.3 * q.std(0, correction=0) - value(batch["obs"]).squeeze(-1)
    torch.testing.assert_close(losses.value, (torch.where(u < 0, 0.2, 0.8) * u**2).mean())
    y = batch["rewards"] + batch["discounts"] * value(batch["next_obs"]).squeeze(-1).detach()
    torch.testing.assert_close(losses.critic, ((critic(batch["obs"], batch["actions"]) - y) ** 2).mean())


def test_iql_losses_share_no_gradient(batch, critics):
    critic, target = critics
    value = nn.Linear(S, 1)
    batch.pop("next_actions")
    losses = iql_loss(critic, target, value, **batch)
    losses.critic.backward(retain_graph=True)
    assert all(p.grad is None for p in value.parameters())
    grads = [p.grad.clone() for p in critic.parameters()]
    losses.value.backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, critic.parameters()))
    assert all(p.grad is None for p in target.parameters())


def test_iql_value_tends_to_the_expectile():
    # Q of the data's actions is uniform on [0, 1]: its 0.9 expectile solves 0.9 E(q - m)+ = 0.1 E(m - q)+: m = 0.75
    torch.manual_seed(2)
    m = torch.zeros(1, requires_grad=True)
    q = torch.linspace(0, 1, 2001)
    optimizer = torch.optim.SGD([m], lr=1.0)
    zeros = torch.zeros(len(q))
    for _ in range(300):
        losses = iql_loss(
            lambda o, a: q[None], lambda o, a: q[None], lambda o: m.expand(len(q)), torch.zeros(len(q), 1),
            torch.zeros(len(q), 1), zeros, zeros, torch.zeros(len(q), 1), expectile=0.9,
        )  # fmt: skip
        optimizer.zero_grad()
        losses.value.backward()
        optimizer.step()
    assert abs(float(m.detach()) - 0.75) < 1e-3


def test_sarsa_learns_the_value_of_a_chain():
    # states 0..4 in a row, reward -1 a step, absorbed after state 4: Q = -(1 - g^(5-i)) / (1 - g)
    torch.manual_seed(0)
    gamma = 0.9
    obs, next_obs = torch.eye(5), torch.eye(5).roll(-1, 0)
    discounts = torch.tensor([gamma] * 4 + [0.0])
    critic = CriticEnsemble(5, 1, 3, (32,))
    target = copy.deepcopy(critic)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(800):
        loss = td_loss(
            critic, target, obs, torch.zeros(5, 1), -torch.ones(5), discounts, next_obs,
            next_actions=torch.zeros(5, 1), rho=0.0,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        polyak_update(target, critic, 0.1)
    expected = torch.tensor([-(1 - gamma ** (5 - i)) / (1 - gamma) for i in range(5)])
    torch.testing.assert_close(critic(obs, torch.zeros(5, 1)).detach(), expected.expand(3, 5), atol=0.05, rtol=0)


def test_polyak_update_moves_by_its_rate(critics):
    critic, target = critics
    before = [p.detach().clone() for p in target.parameters()]
    polyak_update(target, critic, 0.25)
    for old, new, source in zip(before, target.parameters(), critic.parameters()):
        torch.testing.assert_close(new.detach(), 0.75 * old + 0.25 * source.detach())


def test_wrong_arguments_are_named(batch, critics):
    critic, target = critics
    next_actions = batch.pop("next_actions")
    with pytest.raises(ValueError, match="neither of sampler and next_actions"):
        td_loss(critic, target, **batch)
    with pytest.raises(ValueError, match="both of sampler and next_actions"):
        td_loss(critic, target, **batch, sampler=lambda o: next_actions, next_actions=next_actions)
    with pytest.raises(ValueError, match="rewards has shape"):
        td_loss(critic, target, **{**batch, "rewards": batch["rewards"][None]}, next_actions=next_actions)
    with pytest.raises(ValueError, match="aggregation is 'max'"):
        td_loss(critic, target, **batch, next_actions=next_actions, aggregation="max")
    with pytest.raises(ValueError, match=r"expectile is 1\.0"):
        iql_loss(critic, target, nn.Linear(S, 1), **batch, expectile=1.0)
    with pytest.raises(ValueError, match="actions has shape"):
        flow_matching_loss(FlowMLP(S, A, (8,)), batch["obs"], batch["actions"][:3])


def test_flow_matching_of_chunks_and_misfits():
    flow = FlowMLP(4, 6, (8,))
    chunked = lambda obs, x, t: flow(obs, x.flatten(1), t).view_as(x)  # noqa: E731
    obs, actions, noise, t = torch.randn(3, 4), torch.randn(3, 6), torch.randn(3, 6), torch.rand(3, 1)
    flat = flow_matching_loss(flow, obs, actions, noise=noise, t=t)
    as_chunk = dict(noise=noise.view(3, 3, 2), t=t)  # as many tokens as rows
    torch.testing.assert_close(flow_matching_loss(chunked, obs, actions.view(3, 3, 2), **as_chunk), flat)
    assert torch.equal(flow_matching_loss(flow, obs, actions, noise=noise, t=t.flatten()), flat)
    for wrong, words in [
        (dict(noise=noise[:1]), "noise has shape"),
        (dict(t=t + 5), "expected times in"),
        (dict(t=t[:2]), "t has shape"),
    ]:
        with pytest.raises(ValueError, match=words):
            flow_matching_loss(flow, obs, actions, **{"noise": noise, "t": t, **wrong})
    with pytest.raises(ValueError, match="velocity has shape"):
        flow_matching_loss(lambda o, x, t: flow(o, x, t)[:1], obs, actions)
    nested = flow_matching_loss(lambda o, x, t: flow(o["s"], x, t), {"s": obs}, actions, noise=noise, t=t)
    assert torch.equal(nested, flat)


def test_lists_of_critics_and_chunks_beside_packed_ones():
    flow, critic = FlowMLP(4, 6, (8,)), CriticEnsemble(4, 6, 2, (8,))
    obs, actions, rewards, discounts = torch.randn(5, 4), torch.randn(5, 6), torch.randn(5), torch.full((5,), 0.9)
    sampler = SteeredSampler(flow, critic, Steering.unsteered(), chunk_shape=(3, 2), action_low=None, action_high=None)
    rest = (rewards, discounts, obs)
    torch.manual_seed(0)
    chunks = td_loss(critic, critic, obs, actions.view(5, 3, 2), *rest, sampler=sampler)
    torch.manual_seed(0)
    torch.testing.assert_close(
        chunks, td_loss(critic, critic, obs, actions, *rest, next_actions=sampler(obs).flatten(1))
    )
    each = [CriticEnsemble(4, 6, 1, (8,)) for _ in range(2)]
    alone = lambda o, a: torch.cat([one(o, a) for one in each])  # noqa: E731
    expected = td_loss(alone, alone, obs, actions, *rest, next_actions=actions)
    for several in (each, tuple(each), nn.ModuleList(each)):
        torch.testing.assert_close(td_loss(several, several, obs, actions, *rest, next_actions=actions), expected)
    none = (rewards[:0], discounts[:0], obs[:0])
    with pytest.raises(ValueError, match="no rows"):
        td_loss(critic, critic, obs[:0], actions[:0], *none, next_actions=actions[:0])
