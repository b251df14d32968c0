"""lerobot.steer on LeRobot's own policy classes, tiny and random, against their loops written out."""

from __future__ import annotations

import copy
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, Steering

pytest.importorskip("lerobot", reason="lerobot is not installed: make test-integrations")
import lerobot_policies as policies

policies.make_importable()

from qpilots_fast.integrations.lerobot import steer  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
REAL, STATE, CHUNK, PADDED = policies.REAL, policies.STATE, policies.CHUNK, policies.PADDED
B, ALPHA, RHO = 2, 0.4, 0.5
STEERING = Steering.qpilots_u(ALPHA, RHO)
EXPERTS = {"pi0": policies.pi0, "pi05": lambda: policies.pi0("pi05"), "smolvla": policies.smolvla}


@pytest.fixture(scope="module", params=EXPERTS)
def expert(request) -> nn.Module:
    torch.manual_seed(0)
    policy = EXPERTS[request.param]().eval()
    torch.nn.init.normal_(policy.model.action_out_proj.weight, std=0.3)
    return policy


class Q(nn.Module):
    """Reads the batch's state and the real dimensions of the chunk."""

    def __init__(self, steps: int = CHUNK) -> None:
        super().__init__()
        self.net = CriticEnsemble(STATE, steps * REAL, 3, (16, 16))

    def forward(self, batch: dict[str, Tensor], actions: Tensor) -> Tensor:
        assert actions.shape[-1] == REAL and actions.ndim == 3
        return self.net(batch["observation.state"], actions.flatten(1))


def noise() -> Tensor:
    return torch.randn(B, CHUNK, PADDED, generator=torch.Generator().manual_seed(3))


def chunk(policy: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return policy.predict_action_chunk(dict(batch), noise=noise())


def written_out(policy: nn.Module, critic: Q, batch: dict[str, Tensor], steering: Steering, dims: list[int]) -> Tensor:
    """Their loop, x <- x - u / K at tau = 1 - k / K, by their own denoise_step, recorded; its steering by autograd."""
    recorded: dict[str, Any] = {}
    model, denoise = policy.model, policy.model.denoise_step

    def record(**named: Any) -> Tensor:
        recorded.update(named)
        return denoise(**named)

    model.denoise_step = record
    chunk(policy, batch)
    del model.denoise_step
    x, count = noise(), 5
    for k in range(count):
        tau = 1 - k / count
        at = x.clone().requires_grad_()
        u = denoise(**{**recorded, "x_t": at, "timestep": torch.full((B,), tau)})
        if k:
            a = (at - tau * (u if steering.jacobian == "full" else u.detach()))[..., :REAL]
            q = critic(batch, a)
            (g,) = torch.autograd.grad((q.mean(0) - RHO * q.std(0, unbiased=False)).sum(), at)
            mask = torch.zeros(PADDED)
            mask[dims] = 1
            moving, g = (u * mask).flatten(1), (g * mask).flatten(1)
            push = ALPHA * moving.norm(dim=1, keepdim=True) / (g.norm(dim=1, keepdim=True) + 1e-8) * g
            u = u - push.reshape(u.shape)
        x = (x - u / count).detach()
    return x[..., :REAL]


@pytest.mark.parametrize("jacobian", ["full", "identity"])
@pytest.mark.parametrize("dims", [None, (0, 2)])
def test_an_expert_s_chunk(expert, jacobian, dims):
    critic, batch = Q(), policies.batch(B)
    steering = replace(STEERING, jacobian=jacobian)
    plain = chunk(expert, batch)
    handle = steer(expert, critic, steering, steered_dims=dims)
    got = chunk(expert, batch)
    with torch.inference_mode():
        inside = chunk(expert, policies.batch(B))
    handle.remove()
    want = written_out(expert, critic, batch, steering, list(dims or range(REAL)))
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    assert (got - plain).abs().max() > 1e-2 and torch.equal(inside, got)
    info = handle.info
    assert info.gradient_norms.shape == (5, B) and (info.gradient_norms > 0).all(1).tolist() == [False] + [True] * 4


def test_unsteered_and_removed_it_is_the_policy_bitwise(expert):
    batch, before = policies.batch(B), (set(vars(expert)), set(vars(expert.model)))
    plain = chunk(expert, batch)
    for steering in (Steering.unsteered(), Steering.qpilots_u(0.0)):
        handle = steer(expert, None, steering)
        assert torch.equal(chunk(expert, batch), plain)
        handle.remove()
    handle = steer(expert, Q(), STEERING)
    assert not torch.equal(chunk(expert, batch), plain)
    handle.remove()
    handle.remove()
    assert (set(vars(expert)), set(vars(expert.model))) == before and torch.equal(chunk(expert, batch), plain)


def test_select_action_and_its_queue(expert):
    batch, critic = policies.batch(B), Q()
    expert.reset()
    handle = steer(expert, critic, STEERING)
    torch.manual_seed(5)
    first = [expert.select_action(dict(batch)) for _ in range(3)]
    torch.manual_seed(5)
    want = expert.predict_action_chunk(dict(batch))
    for k, action in enumerate(first):
        assert torch.equal(action, want[:, k])
    handle.remove()
    torch.manual_seed(5)
    expert.reset()
    assert not torch.equal(expert.select_action(dict(batch)), first[0])


def test_the_environment_s_units_bounds_and_windows(expert):
    batch, critic, scale = policies.batch(B), Q(), torch.tensor([2.0, 0.5, 1.0, 3.0])
    shift, seen = torch.ones(REAL), []

    def of_environment(b: dict[str, Tensor], a: Tensor) -> Tensor:
        seen.append(a.detach())
        return critic(b, (a - shift) / scale)

    handle = steer(expert, critic, STEERING)
    want = chunk(expert, batch)
    handle.remove()
    handle = steer(expert, of_environment, STEERING, units="environment", unnormalise=lambda a: a * scale + shift)
    torch.testing.assert_close(chunk(expert, batch), want, rtol=1e-4, atol=1e-4)
    handle.remove()
    seen.clear()
    handle = steer(expert, of_environment, replace(STEERING, window=(0.3, 0.7)), action_low=-0.1, action_high=0.1)
    chunk(expert, batch)
    handle.remove()
    assert (handle.info.gradient_norms > 0).all(1).tolist() == [False, False, True, True, False]
    assert len(seen) == 2 and max(a.abs().max() for a in seen) <= 0.1


# ---------------------------------------------------------------- the diffusion policy


@pytest.mark.parametrize("kind", ["DDIM", "DDPM"])
def test_the_diffusion_policy(kind):
    policy, critic = policies.diffusion(kind).eval(), Q(steps=8)
    batch = {"observation.state": torch.randn(B, STATE), "observation.environment_state": torch.randn(B, 3)}
    start = torch.randn(B, 8, REAL)

    def actions(steered: bool) -> list[Tensor]:
        torch.manual_seed(1)
        policy.reset()
        return [policy.select_action(dict(batch), noise=start) for _ in range(4)]

    plain, scheduler = actions(False), policy.diffusion.noise_scheduler
    handle = steer(policy, None, Steering.unsteered())
    assert all(map(torch.equal, actions(True), plain))
    handle.remove()
    with pytest.raises(ValueError, match="jacobian='full'"):
        steer(policy, critic, STEERING)
    handle = steer(
        policy, critic, replace(STEERING, jacobian="identity"), steered_dims=(0, 1), action_low=-1, action_high=1
    )
    got = actions(True)
    with torch.inference_mode():
        assert all(map(torch.equal, actions(True), got))
    handle.remove()
    assert policy.diffusion.noise_scheduler is scheduler and all(map(torch.equal, actions(False), plain))
    assert handle.info.gradient_norms.shape == (6, B) and (handle.info.gradient_norms[1:] > 0).all()

    # the policy's own scheduler, its model output changed
    step, dims = scheduler.step, [i for i in range(8 * REAL) if i % REAL < 2]

    def steered_step(output: Tensor, t: Tensor, x: Tensor, **named: Any) -> Any:
        if t != scheduler.timesteps[0]:
            abar = scheduler.alphas_cumprod[t]
            with torch.enable_grad():
                a = ((x - (1 - abar).sqrt() * output) / abar.sqrt()).detach().clamp(-1, 1).requires_grad_()
                q = critic(batch, a)
                (g,) = torch.autograd.grad((q.mean(0) - RHO * q.std(0, unbiased=False)).sum(), a)
            g, e = g.flatten(1)[:, dims], output.flatten(1).clone()
            e[:, dims] -= ALPHA * e[:, dims].norm(dim=1, keepdim=True) / (g.norm(dim=1, keepdim=True) + 1e-8) * g
            output = e.reshape(output.shape)
        return step(output, t, x, **named)

    scheduler.step = steered_step
    for one, other, unsteered in zip(got, actions(True), plain):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert (one[:, :2] - unsteered[:, :2]).abs().max() > 1e-3


def test_refusals(expert):
    critic = Q()
    with pytest.raises(TypeError, match="policy is Linear; expected PI0Policy"):
        steer(nn.Linear(2, 2), critic, STEERING)
    with pytest.raises(TypeError, match="critic is CriticEnsemble; expected a callable"):
        steer(expert, critic.net, STEERING)
    with pytest.raises(ValueError, match="indices below 4"):
        steer(expert, critic, STEERING, steered_dims=(0, 7))
    with pytest.raises(ValueError, match=r"Steering.steered_dims is \(0,\)"):
        steer(expert, critic, replace(STEERING, steered_dims=(0,)))
    with pytest.raises(ValueError, match="together with unnormalise"):
        steer(expert, critic, STEERING, units="environment")
    with pytest.raises(ValueError, match="units is 'metres'"):
        steer(expert, critic, STEERING, units="metres")
    with pytest.raises(ValueError, match="estimate='mfm'"):
        steer(expert, critic, Steering.qpilots_m())
    handle = steer(expert, critic, STEERING)
    with pytest.raises(ValueError, match="already steered"):
        steer(expert, critic, STEERING)
    handle.remove()
    assert copy.deepcopy(expert) is not expert


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart_lerobot.py"), run_name="__main__")
    assert "steered" in capsys.readouterr().out
