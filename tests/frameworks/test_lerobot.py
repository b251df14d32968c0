"""lerobot.steer on LeRobot's own policy classes, tiny and random, against their loops written out."""

from __future__ import annotations

import copy
import runpy
from dataclasses import replace
from functools import partial
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


def written_out(
    policy: nn.Module, critic: Q, batch: dict[str, Tensor], steering: Steering, dims: list[int], guide: Any = None
) -> Tensor:
    """Their loop, x <- x - u / K at tau = 1 - k / K, by their own denoise_step, recorded; its steering by autograd.

    guide(x, tau, steered) makes the velocity out of the steered one of x, where there is more to it.
    """
    recorded: dict[str, Any] = {}
    model, denoise = policy.model, policy.model.denoise_step

    def record(**named: Any) -> Tensor:
        recorded.update(named)
        return denoise(**named)

    model.denoise_step = record
    chunk(policy, batch)
    del model.denoise_step

    def steered(x: Tensor, tau: float, first: bool) -> Tensor:
        at = x.detach().clone().requires_grad_()
        u = denoise(**{**recorded, "x_t": at, "timestep": torch.full((B,), tau)})
        if not first:
            a = (at - tau * (u if steering.jacobian == "full" else u.detach()))[..., :REAL]
            q = critic(batch, a)
            (g,) = torch.autograd.grad((q.mean(0) - RHO * q.std(0, unbiased=False)).sum(), at)
            mask = torch.zeros(PADDED)
            mask[dims] = 1
            moving, g = (u * mask).flatten(1), (g * mask).flatten(1)
            push = ALPHA * moving.norm(dim=1, keepdim=True) / (g.norm(dim=1, keepdim=True) + 1e-8) * g
            u = u - push.reshape(u.shape)
        return u.detach()

    x, count = noise(), 5
    for k in range(count):
        tau = 1 - k / count
        velocity = partial(steered, tau=tau, first=k == 0)
        x = (x - (velocity(x) if guide is None else guide(x, tau, velocity)) / count).detach()
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


@pytest.mark.parametrize("jacobian", ["full", "identity"])
def test_real_time_chunking(expert, jacobian, monkeypatch):
    """LeRobot's own processor guides the steered velocity: what it gives for that velocity written out."""
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.policies.rtc.modeling_rtc import RTCProcessor

    batch, critic, steering = policies.batch(B), Q(), replace(STEERING, jacobian=jacobian)
    of_chunk = {"prev_chunk_left_over": torch.randn(B, 4, REAL), "inference_delay": 1, "execution_horizon": 3}
    processor = RTCProcessor(RTCConfig(enabled=True, debug=True))
    monkeypatch.setattr(expert.config, "rtc_config", processor.rtc_config)
    monkeypatch.setattr(expert.model, "rtc_processor", processor)

    def guided() -> Tensor:
        return expert.predict_action_chunk(dict(batch), noise=noise(), **of_chunk)

    plain = guided()
    handle = steer(expert, critic, steering)
    processor.reset_tracker()
    got = guided()
    tracked = [step for step in processor.get_all_debug_steps() if step.v_t is not None]
    handle.remove()
    assert torch.equal(guided(), plain) and len(tracked) == 5

    def guide(x: Tensor, tau: float, steered: Any) -> Tensor:
        return processor.denoise_step(x_t=x, time=tau, original_denoise_step_partial=steered, **of_chunk)

    want = written_out(expert, critic, batch, steering, list(range(REAL)), guide)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    unguided = written_out(expert, critic, batch, steering, list(range(REAL)))
    assert (got - plain).abs().max() > 1e-2 and (got - unguided).abs().max() > 1e-2

    handle = steer(expert, critic, replace(steering, num_candidates=2))
    starts = torch.stack([noise(), noise()], 1)  # of one start: either candidate is the chunk above
    assert torch.equal(expert.predict_action_chunk(dict(batch), noise=starts, **of_chunk), got)
    handle.remove()


def test_a_compiled_loop_runs_uncompiled_while_steered(expert):
    batch, critic = policies.batch(B), Q()
    handle = steer(expert, critic, STEERING)
    want = chunk(expert, batch)
    handle.remove()
    calls: list[str] = []
    compiled = torch.compile(expert.model.sample_actions, backend="eager")
    expert.model.sample_actions = lambda *a, **k: (calls.append("compiled"), compiled(*a, **k))[1]
    try:
        handle = steer(expert, critic, STEERING)
        assert torch.equal(chunk(expert, batch), want) and not calls
        handle.remove()
        plain = chunk(expert, batch)
        assert calls == ["compiled"] and (plain - want).abs().max() > 1e-2
    finally:
        del expert.model.sample_actions


def test_candidates_share_a_prefix(expert):
    """Each row's best of four chunks; images and language are read once."""
    batch, critic, starts = policies.batch(B), Q(), torch.randn(B, 4, CHUNK, PADDED)
    handle = steer(expert, critic, STEERING)
    each = [expert.predict_action_chunk(dict(batch), noise=starts[:, n]) for n in range(4)]
    handle.remove()
    q = torch.stack([critic(batch, one).mean(0) - RHO * critic(batch, one).std(0, unbiased=False) for one in each], 1)
    want = torch.stack(each, 1)[torch.arange(B), q.argmax(1)]
    assert len(set(q.argmax(1).tolist())) > 0 and q.argmax(1).any()

    embedded: list[int] = []
    embed = expert.model.embed_prefix
    expert.model.embed_prefix = lambda *a, **k: (embedded.append(1), embed(*a, **k))[1]
    try:
        several = replace(STEERING, num_candidates=4, candidate_aggregation="pessimistic")
        handle = steer(expert, critic, several)
        got = expert.predict_action_chunk(dict(batch), noise=starts)
        assert torch.equal(got, want) and embedded == [1]
        assert handle.info.gradient_norms.shape == (5, B)
        values = handle.info.q_values
        torch.testing.assert_close(values.mean(0) - RHO * values.std(0, unbiased=False), q.max(1).values)
        with torch.inference_mode():
            drawn = expert.predict_action_chunk(dict(batch))
        assert drawn.shape == got.shape and len(embedded) == 2
        with pytest.raises(ValueError, match=r"noise has shape \[2, 6, 32\].*expected noise \[B, 4, C, D\]"):
            chunk(expert, batch)
        handle.remove()
        handle = steer(expert, critic, Steering.best_of_n(4, aggregation="pessimistic"))  # an unsteered loop
        expert.predict_action_chunk(dict(batch), noise=starts)
        assert (handle.info.gradient_norms == 0).all()
        handle.remove()
    finally:
        del expert.model.embed_prefix


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

    def refusal(critic: Any, error: type[Exception], match: str) -> None:
        handle = steer(expert, critic, STEERING)
        with pytest.raises(error, match=match):
            chunk(expert, policies.batch(B))
        handle.remove()

    def missing(batch: dict[str, Tensor], actions: Tensor) -> Tensor:
        return critic({"observation.state": batch["observation.goal"]}, actions)

    refusal(missing, KeyError, r"asks for 'observation.goal', and the batch .* has \['observation.state', ")
    wide = CriticEnsemble(STATE, 7, 2, (8,))
    one_step = lambda batch, actions: wide(batch["observation.state"], actions[:, 0])  # noqa: E731
    refusal(one_step, ValueError, r"could not read actions \[2, 6, 4\]: .* a\[:, :5\]")


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart_lerobot.py"), run_name="__main__")
    assert "steered" in capsys.readouterr().out
