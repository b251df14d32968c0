"""ClassifierFreeGuidance steered as any flow, against a loop written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering, from_module
from qpilots_fast.integrations import ClassifierFreeGuidance

S, A, B, K = 5, 4, 6, 5
NULL = torch.linspace(-1, 1, S)
WEIGHT = 1.7


def networks() -> tuple[FlowMLP, CriticEnsemble, Tensor, Tensor]:
    flow, critic = FlowMLP(S, A, (16, 16)).double(), CriticEnsemble(S, A, 3, (16, 16)).double()
    return flow, critic, torch.randn(B, S).double(), torch.randn(B, A).double()


def written_out(flow: FlowMLP, critic: CriticEnsemble, obs: Tensor, noise: Tensor, steering: Steering) -> Tensor:
    x, null = noise, NULL.double().expand(B, S)
    for k in range(K):
        t = torch.full((B, 1), k / K).double()
        leaf = x.detach().requires_grad_()
        without, given = flow(null, leaf, t), flow(obs, leaf, t)
        v = without + WEIGHT * (given - without)
        if k:
            a = leaf + (1 - k / K) * (v if steering.jacobian == "full" else v.detach())
            q = critic(obs, a + (a.clamp(-1, 1) - a).detach())
            (g,) = torch.autograd.grad((q.mean(0) - 0.5 * q.std(0, unbiased=False)).sum(), leaf)
            v = v + steering.alpha * v.norm(dim=1, keepdim=True) / (g.norm(dim=1, keepdim=True) + 1e-8) * g
        x = (leaf + v / K).detach()
    return x.clamp(-1, 1)


@pytest.mark.parametrize("jacobian", ["full", "identity"])
@pytest.mark.parametrize("null_obs", [NULL, NULL[None], nn.Parameter(NULL)], ids=["row", "one row", "parameter"])
def test_the_guided_flow_is_steered(jacobian, null_obs):
    flow, critic, obs, noise = networks()
    steering = Steering.qpilots_u(0.3, jacobian=jacobian)
    guided = ClassifierFreeGuidance(flow, null_obs, WEIGHT)
    sampler = SteeredSampler(guided, critic, steering, num_steps=K)
    want = written_out(flow, critic, obs, noise, steering)
    torch.testing.assert_close(sampler(obs, noise), want, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        flow.flat_parameters()[0].mul_(1.1)  # weights are live
    changed = written_out(flow, critic, obs, noise, steering)
    assert (changed - want).abs().max() > 1e-4
    torch.testing.assert_close(sampler(obs, noise), changed, rtol=1e-9, atol=1e-9)


def test_one_forward_for_tensors_and_two_for_other_obs():
    flow, critic, obs, noise = networks()
    rows: list[int] = []

    def asked(given, x: Tensor, t: Tensor) -> Tensor:
        state = given["state"] if isinstance(given, dict) else given
        rows.append(len(x))
        return flow(state.expand(len(x), S), x, t)

    steering = Steering.qpilots_u(0.3)
    want = written_out(flow, critic, obs, noise, steering)
    of_tensors = SteeredSampler(ClassifierFreeGuidance(asked, NULL, WEIGHT), critic, steering, num_steps=K)
    torch.testing.assert_close(of_tensors(obs, noise), want, rtol=1e-9, atol=1e-9)
    assert rows == [2 * B] * K
    rows.clear()
    guided = ClassifierFreeGuidance(asked, {"state": NULL.double()}, WEIGHT)
    of_dicts = SteeredSampler(guided, lambda o, a: critic(o["state"], a), steering, num_steps=K)
    torch.testing.assert_close(of_dicts({"state": obs}, noise), want, rtol=1e-9, atol=1e-9)
    assert rows == [B] * (2 * K)


def test_chunks_of_actions():
    flow, critic, obs, noise = networks()
    steering = Steering.qpilots_u(0.3)
    chunked = ClassifierFreeGuidance(lambda o, x, t: flow(o, x.flatten(1), t).reshape(x.shape), NULL, WEIGHT)
    sampler = SteeredSampler(chunked, critic, steering, num_steps=K)
    got = sampler(obs, noise.reshape(B, 2, A // 2))
    want = written_out(flow, critic, obs, noise, steering).reshape(B, 2, A // 2)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_it_moves_and_is_saved():
    guided = ClassifierFreeGuidance(FlowMLP(S, A, (8,)), NULL, 2)
    assert "null_obs" in guided.state_dict() and guided.double().null_obs.dtype == torch.float64


def test_refusals():
    flow, _, obs, noise = networks()
    for null in (torch.zeros(S + 1), torch.zeros(2, S)):
        with pytest.raises(ValueError, match=r"expected null_obs \[5\] or \[1, 5\]"):
            ClassifierFreeGuidance(flow, null, 1.0)(obs, noise, torch.zeros(B, 1))
    with pytest.raises(ValueError, match="null_obs is not finite"):
        ClassifierFreeGuidance(flow, torch.full((S,), torch.nan), 1.0)
    with pytest.raises(ValueError, match="weight is nan"):
        ClassifierFreeGuidance(flow, NULL, float("nan"))
    with pytest.raises(TypeError, match="flow is int"):
        ClassifierFreeGuidance(3, NULL, 1.0)


def test_guidance_says_that_it_stays_a_callable():
    guided = ClassifierFreeGuidance(FlowMLP(S, A, (16,)), NULL.numpy(), WEIGHT)
    sampler = SteeredSampler(guided, CriticEnsemble(S, A, 2, (16,)), Steering.qpilots_u(), num_steps=3)
    assert sampler(torch.randn(B, S)).shape == (B, A)
    assert "guidance asks its flow twice" in str(sampler.explain().networks[0])
    with pytest.raises(ValueError, match="guidance asks its flow twice"):
        from_module(guided, "flow")
    with pytest.raises(TypeError, match="null_obs is int64"):
        ClassifierFreeGuidance(FlowMLP(S, A, (16,)), NULL.long().numpy(), WEIGHT)
