"""steer_scheduler on diffusers' own schedulers, against loops written out in float64."""

from __future__ import annotations

import copy
import pickle
import runpy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, Steering, ops

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: make test-integrations")
from qpilots_fast.integrations.diffusers import steer_scheduler  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
S, A, B, K = 5, 4, 6, 7
ALPHA, RHO = 0.3, 0.5
STEERING = Steering.qpilots_u(ALPHA, RHO, jacobian="identity")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Problem:
    """A critic, observations, noise, and a network that predicts whatever is asked, all in float64."""

    def __init__(self) -> None:
        self.critic = CriticEnsemble(S, A, 3, (16, 16)).double()
        self.net = nn.Sequential(nn.Linear(S + A + 1, 32), nn.Tanh(), nn.Linear(32, A)).double().requires_grad_(False)
        self.obs, self.noise = torch.randn(B, S).double(), torch.randn(B, A).double()

    def noise_estimate(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The optimal e for x1 ~ N(0.2, 0.3^2), bent by a network: estimates stay of the size of actions."""
        optimal = sigma * (x - alpha * 0.2) / (alpha**2 * 0.3**2 + sigma**2)
        times = torch.full((len(x), 1), sigma, dtype=x.dtype)
        return optimal + 0.5 * alpha * self.net(torch.cat([self.obs.to(x), x, times], -1))

    def predict(self, x: Tensor, alpha: float, sigma: float, prediction: str) -> Tensor:
        e = self.noise_estimate(x, alpha, sigma)
        clean = (x - sigma * e) / alpha
        return {"epsilon": e, "sample": clean, "v_prediction": alpha * e - sigma * clean}[prediction]

    def gradient(self, a: Tensor) -> Tensor:
        a = a.detach().clamp(-1, 1).requires_grad_()
        q = self.critic(self.obs, a)
        return torch.autograd.grad((q.mean(0) - RHO * q.std(0, unbiased=False)).sum(), a)[0]

    def push(self, u: Tensor, a: Tensor, alpha: float = ALPHA) -> Tensor:
        g = self.gradient(a)
        return u + alpha * u.norm(dim=1, keepdim=True) / (g.norm(dim=1, keepdim=True) + 1e-8) * g


def levels(scheduler: Any, timestep: Any) -> tuple[float, float]:
    abar = float(scheduler.alphas_cumprod[int(timestep)])
    return abar**0.5, (1 - abar) ** 0.5


def run(scheduler: Any, problem: Problem, noise: Tensor | None = None, **named: Any) -> Tensor:
    x = problem.noise if noise is None else noise
    for timestep in scheduler.timesteps:
        output = problem.predict(x.double(), *levels(scheduler, timestep), scheduler.config.prediction_type)
        x = scheduler.step(output.to(x.dtype), timestep, x, **named).prev_sample
    return x


def ddim(problem: Problem, scheduler: Any, eta: float, draws: list[Tensor], clip: float | None) -> Tensor:
    """The steered DDIM loop in e and x1, with diffusers' clip: of the clean estimate, before and after the push."""
    x, table, size = problem.noise, scheduler.alphas_cumprod.double(), scheduler.config.num_train_timesteps // K
    for k, timestep in enumerate(scheduler.timesteps.tolist()):
        abar = table[timestep]
        before = table[timestep - size] if timestep >= size else scheduler.final_alpha_cumprod.double()
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        e = problem.noise_estimate(x, float(alpha), float(sigma))
        clean = (x - sigma * e) / alpha
        if k:
            e = -problem.push(-e, clean if clip is None else clean.clamp(-clip, clip))
            clean = (x - sigma * e) / alpha
        if clip is not None:
            clean = clean.clamp(-clip, clip)
        std = eta * ((1 - before) / (1 - abar) * (1 - abar / before)).sqrt()
        x = before.sqrt() * clean + (1 - before - std**2).sqrt() * e + std * draws[k]
    return x


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clip", [1.0, 0.25, None])
def test_ddim(prediction, eta, clip):
    problem = Problem()
    config = {"clip_sample": False} if clip is None else {"clip_sample_range": clip}
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, **config)
    scheduler.set_timesteps(K)
    steered = steer_scheduler(scheduler, problem.critic, STEERING, obs=problem.obs)
    got = run(steered, problem, eta=eta, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(B, A, generator=generator, dtype=torch.float64) for _ in range(K)]
    want = ddim(problem, scheduler, eta, draws, clip)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)  # alphas_cumprod is float32
    plain = run(scheduler, problem, eta=eta, generator=torch.Generator().manual_seed(1))
    assert (plain - got).abs().max() > 1e-2
    info = steered.info
    assert info.gradient_norms.shape == (K, B) and (info.gradient_norms[0] == 0).all()
    assert (info.gradient_norms[1:] > 0).all() and info.nonfinite_count == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "unclipped"])
def test_ddpm(prediction, clip):
    problem = Problem()
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=clip)
    scheduler.set_timesteps(K)
    steered = steer_scheduler(scheduler, problem.critic, STEERING).set_obs(problem.obs)
    got = run(steered, problem, generator=torch.Generator().manual_seed(1))
    generator, table, x = torch.Generator().manual_seed(1), scheduler.alphas_cumprod.double(), problem.noise
    steps = scheduler.timesteps.tolist()
    for k, timestep in enumerate(steps):
        abar = table[timestep]
        before = table[steps[k + 1]] if k + 1 < K else torch.ones((), dtype=torch.float64)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        e = problem.noise_estimate(x, float(alpha), float(sigma))
        clean = (x - sigma * e) / alpha
        if k:
            e = -problem.push(-e, clean.clamp(-1, 1) if clip else clean)
            clean = (x - sigma * e) / alpha
        if clip:
            clean = clean.clamp(-1, 1)
        beta = 1 - abar / before
        mean = before.sqrt() * beta / (1 - abar) * clean + (abar / before).sqrt() * (1 - before) / (1 - abar) * x
        draw = torch.randn(B, A, generator=generator, dtype=torch.float64) if timestep else 0.0
        x = mean + ((1 - before) / (1 - abar) * beta).sqrt() * draw
    torch.testing.assert_close(got, x, rtol=2e-5, atol=2e-5)
    assert (run(scheduler, problem, generator=torch.Generator().manual_seed(1)) - got).abs().max() > 1e-2


GRIDS = [{}, {"shift": 3.0}, {"use_karras_sigmas": True, "shift": 2.0}, {"shift_terminal": 0.1}]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_flow_matching(grid):
    problem = Problem()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**grid)
    scheduler.set_timesteps(K)
    steered = steer_scheduler(scheduler, problem.critic.float(), STEERING, obs=problem.obs.float())
    outputs = lambda x, sigma: -problem.net(torch.cat([problem.obs, x, torch.full((B, 1), sigma)], -1).double())  # noqa: E731
    sigmas = scheduler.sigmas.double().tolist()

    def loop(made: Any) -> Tensor:
        x = problem.noise.float()
        for k, timestep in enumerate(made.timesteps):
            (x,) = made.step(outputs(x.double(), sigmas[k]).float(), timestep, x, return_dict=False)
        return x

    got, plain = loop(steered), loop(scheduler)
    problem.critic.double()
    x = problem.noise
    for k in range(K):
        v = -outputs(x, sigmas[k])
        v = problem.push(v, x + sigmas[k] * v) if k else v
        x = x + (sigmas[k] - sigmas[k + 1]) * v
    torch.testing.assert_close(got.double(), x, rtol=1e-5, atol=1e-5)
    assert (plain - got).abs().max() > 1e-2
    windowed = steer_scheduler(scheduler, problem.critic.float(), replace(STEERING, window=(0.3, 0.7)))
    windowed.set_timesteps(K)
    loop(windowed.set_obs(problem.obs.float()))
    inside = [0.3 <= 1 - sigma < 0.7 for sigma in sigmas[:K]]
    assert any(inside) and (windowed.info.gradient_norms > 0).all(1).tolist() == inside


def test_another_solver_by_its_velocity():
    """Heun's steps are diffusers', at steered velocities; the reference is Heun written out."""
    problem = Problem()
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(K)

    def velocity(x: Tensor, sigma: float) -> Tensor:  # noise - action
        return -problem.net(torch.cat([problem.obs, x, torch.full((B, 1), sigma, dtype=x.dtype)], -1))

    x = problem.noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist()):
        u = ops.steer_velocity(
            x, velocity(x, sigma), sigma, obs=problem.obs, critic=problem.critic, steering=STEERING,
            convention="noise_at_one",
        )  # fmt: skip
        x = scheduler.step(u, timestep, x).prev_sample

    def steered(x: Tensor, sigma: float) -> Tensor:
        v = -velocity(x, sigma)
        return -problem.push(v, x + sigma * v)

    want, grid = problem.noise, scheduler.sigmas.double().unique().flip(0).tolist()
    for sigma, after in pairwise(grid):
        first = steered(want, sigma)
        there = want + (after - sigma) * first
        want = want + (after - sigma) * ((first + steered(there, after)) / 2 if after else first)
    torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)


MAKERS = {
    "flow": lambda **config: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **config),
    "ddim": lambda **config: diffusers.DDIMScheduler(**config),
    "ddpm": lambda **config: diffusers.DDPMScheduler(**config),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_at_alpha_0_it_is_the_scheduler_bitwise(name, dtype):
    """At the first timestep too; and a call costs no critic."""
    scheduler = MAKERS[name]()
    scheduler.set_timesteps(K)
    unsteered = steer_scheduler(scheduler, None, Steering.unsteered())
    steered = steer_scheduler(scheduler, lambda obs, a: a.sum(1), STEERING, obs=0)
    generator = torch.Generator().manual_seed(0)
    own, other, third = copy.deepcopy(scheduler), copy.deepcopy(unsteered), copy.deepcopy(steered)
    x = torch.randn(B, A, generator=generator).to(dtype)
    for k, timestep in enumerate(scheduler.timesteps):
        output = torch.randn(B, A, generator=generator).to(dtype)
        named = lambda: {"generator": torch.Generator().manual_seed(k)} if name != "flow" else {}  # noqa: B023, E731
        want = own.step(output, timestep, x, **named()).prev_sample
        assert torch.equal(other.step(output, timestep, x, **named()).prev_sample, want)
        third_x = third.step(output, timestep, x, **named()).prev_sample
        assert third_x.dtype == want.dtype and torch.equal(third_x, want) == (k == 0)
        x = want


def test_the_rest_is_the_scheduler_s():
    scheduler = diffusers.DDIMScheduler(prediction_type="sample")
    steered = steer_scheduler(scheduler, lambda obs, a: a.sum(1), STEERING, obs=0)
    steered.set_timesteps(5)
    assert isinstance(steered, diffusers.DDIMScheduler) and steered.config == scheduler.config
    assert scheduler.num_inference_steps is None and len(steered.timesteps) == 5
    x = torch.randn(B, A)
    want = steered.step(x, steered.timesteps[2], x).prev_sample
    scheduler.set_timesteps(5)
    assert not torch.equal(want, scheduler.step(x, scheduler.timesteps[2], x).prev_sample)
    assert torch.equal(steered.add_noise(x, x, torch.tensor([3])), scheduler.add_noise(x, x, torch.tensor([3])))
    packed = steer_scheduler(scheduler, CriticEnsemble(S, A, 2, (8,)), STEERING, obs=torch.zeros(B, S))
    again = pickle.loads(pickle.dumps(packed))
    assert type(again) is type(packed)
    assert torch.equal(again.step(x, 400, x).prev_sample, packed.step(x, 400, x).prev_sample)


def test_chunks_masks_windows_and_weights():
    """Callable critics see [B, C, D]; steered_dims index the flattened sample; weights go by the grid."""
    problem = Problem()
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(K)
    seen: list[tuple[int, ...]] = []

    def critic(obs: dict, a: Tensor) -> Tensor:
        seen.append(tuple(a.shape))
        return problem.critic(obs["state"], a.flatten(1))

    obs = {"state": problem.obs}
    steering = replace(STEERING, steered_dims=(0, 3), step_weights=(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.5))
    steered = steer_scheduler(scheduler, critic, steering, obs=obs)
    x = problem.noise
    with torch.inference_mode():
        for k, timestep in enumerate(scheduler.timesteps):
            alpha, sigma = levels(scheduler, timestep)
            e = problem.noise_estimate(x, alpha, sigma)
            got = steered.step(e.reshape(B, 2, 2), timestep, x.reshape(B, 2, 2)).prev_sample.reshape(B, A)
            if k in (2, 6):
                with torch.inference_mode(False), torch.enable_grad():
                    g = problem.gradient(((x - sigma * e) / alpha).clone())
                g[:, [1, 2]] = 0
                u = -e
                norm = u[:, [0, 3]].norm(dim=1, keepdim=True)
                e = -(u + (ALPHA if k == 2 else ALPHA / 2) * norm / (g.norm(dim=1, keepdim=True) + 1e-8) * g)
            want = scheduler.step(e, timestep, x).prev_sample
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            x = want
    assert seen == [(B, 2, 2)] * 2
    windowed = steer_scheduler(scheduler, critic, replace(STEERING, window=(0.4, 0.8)), obs=obs)
    run_chunks = run(windowed, problem)  # rows: the shape of the samples is the loop's
    assert run_chunks.shape == (B, A)
    times = [alpha / (alpha + sigma) for alpha, sigma in (levels(scheduler, t) for t in scheduler.timesteps)]
    assert (windowed.info.gradient_norms > 0).all(1).tolist() == [0.4 <= t < 0.8 for t in times]


def test_a_learned_variance_is_left_alone():
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(K)
    steered = steer_scheduler(scheduler, lambda obs, a: a.flatten(1).sum(1), STEERING, obs=0)
    x, output = torch.randn(B, A, 3), torch.randn(B, 2 * A, 3)
    named = lambda: {"generator": torch.Generator().manual_seed(0)}  # noqa: E731
    got = steered.step(output, scheduler.timesteps[3], x, **named()).prev_sample
    g, e = torch.ones(B, A * 3), output[:, :A].flatten(1)
    push = ALPHA * e.norm(dim=1, keepdim=True) / g.norm(dim=1, keepdim=True) * g
    clean = (x.flatten(1) - levels(scheduler, scheduler.timesteps[3])[1] * e) / levels(
        scheduler, scheduler.timesteps[3]
    )[0]
    assert clean.abs().max() > 1  # straight through the clip
    moved = torch.cat([(e - push).reshape(B, A, 3), output[:, A:]], 1)
    want = scheduler.step(moved, scheduler.timesteps[3], x, **named()).prev_sample
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_row_without_a_finite_gradient_follows_the_scheduler():
    scheduler = MAKERS["ddim"]()
    scheduler.set_timesteps(K)
    blown = torch.zeros(B)
    blown[2] = torch.nan
    steered = steer_scheduler(scheduler, lambda obs, a: a.sum(1) + blown, STEERING, obs=0)
    x, output = torch.randn(B, A), torch.randn(B, A)
    got = steered.step(output, scheduler.timesteps[3], x).prev_sample
    want = scheduler.step(output, scheduler.timesteps[3], x).prev_sample
    assert torch.equal(got[2], want[2]) and not torch.equal(got[1], want[1])
    assert steered.info.nonfinite.tolist() == [[row == 2 for row in range(B)]]


def test_refusals():
    critic, x = CriticEnsemble(S, A, 2, (8,)), torch.zeros(B, A)
    scheduler = MAKERS["ddim"]()
    with pytest.raises(ValueError, match=r"expected jacobian='identity', as in Steering.qpilots_u\(jacobian"):
        steer_scheduler(scheduler, critic, Steering.qpilots_u())
    with pytest.raises(ValueError, match="estimate='mfm'"):
        steer_scheduler(scheduler, critic, Steering.qpilots_m())
    with pytest.raises(ValueError, match="num_candidates is 4"):
        steer_scheduler(scheduler, critic, replace(STEERING, num_candidates=4))
    with pytest.raises(ValueError, match="critic is None"):
        steer_scheduler(scheduler, None, STEERING)
    with pytest.raises(TypeError, match=r"EulerDiscreteScheduler; expected FlowMatch.*ops\.steer_velocity"):
        steer_scheduler(diffusers.EulerDiscreteScheduler(), critic, STEERING)
    steered = steer_scheduler(scheduler, critic, STEERING)
    with pytest.raises(TypeError, match="already steered"):
        steer_scheduler(steered, critic, STEERING)
    steered.set_timesteps(K)
    with pytest.raises(ValueError, match="no obs is given"):
        steered.step(x, steered.timesteps[1], x)
    steered.set_obs(torch.zeros(B - 1, S))
    with pytest.raises(ValueError, match=r"obs has shape \[5, 5\]; expected a tensor \[6, 5\]"):
        steered.step(x, steered.timesteps[1], x)
    with pytest.raises(ValueError, match=r"timestep is 3; expected one of scheduler\.timesteps"):
        steered.step(x, 3, x)
    with pytest.raises(ValueError, match="reads 4 action dimensions, and the loop's actions have 5"):
        steered.step(torch.zeros(B, 5), steered.timesteps[1], torch.zeros(B, 5))
    with pytest.raises(ValueError, match="step_weights has 2 entries"):
        weighted = steer_scheduler(scheduler, critic, replace(STEERING, step_weights=(1.0, 1.0)), obs=0)
        weighted.step(x, weighted.timesteps[0], x)
    flow = steer_scheduler(MAKERS["flow"](), critic, STEERING, obs=torch.zeros(B, S))
    flow.set_timesteps(K)
    flow.step(x, flow.timesteps[0], x)
    with pytest.raises(ValueError, match="per_token_timesteps"):
        flow.step(x, flow.timesteps[1], x, per_token_timesteps=torch.ones(B, 1))
    with pytest.raises(ValueError, match="invert_sigmas"):
        steer_scheduler(MAKERS["flow"](invert_sigmas=True), critic, STEERING)
    pure = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    pure = steer_scheduler(pure, critic, replace(STEERING, steer_first_step=True), obs=torch.zeros(B, S))
    pure.set_timesteps(K)
    with pytest.raises(ValueError, match="pure noise"):
        pure.step(x, pure.timesteps[0], x)


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart_diffusers.py"), run_name="__main__")
    assert "steered Q" in capsys.readouterr().out
