"""Diffusion and reversed-time policies against loops written out with autograd in float64; the small examples run."""

from __future__ import annotations

import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering
from qpilots_fast.integrations import DiffusionVelocity, GaussianPath, ReversedTimeFlow, ddim_steered_sample, real_dims

EXAMPLES = Path(__file__).parent.parent / "examples" / "minimal"
S, A, B, K = 5, 4, 6, 7
STEPS = 1000
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64 against float64
DDPM = GaussianPath.from_alphas_cumprod(torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64), 0))


def networks() -> tuple[nn.Module, CriticEnsemble]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(S + A + 1, 32), nn.Tanh(), nn.Linear(32, A)).double()
    return net, CriticEnsemble(S, A, 3, (16, 16)).double()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, S, generator=generator).double(), torch.randn(B, A, generator=generator).double()


def noise_estimate(net: nn.Module, obs: Tensor, x: Tensor, step: float, alpha: float, sigma: float) -> Tensor:
    """The optimal e for x1 ~ N(0.2, 0.3^2), bent by a random network: estimates stay of the size of actions."""
    optimal = sigma * (x - alpha * 0.2) / (alpha**2 * 0.3**2 + sigma**2)
    times = torch.full((len(x), 1), step / STEPS, dtype=x.dtype)
    return optimal + 0.5 * alpha * net(torch.cat([obs, x, times], -1))


def as_prediction(net: nn.Module, prediction: str, path: GaussianPath):
    """A network of each kind that makes the same estimate: e = net(obs, x, s)."""

    def predict(obs: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        index = path.timesteps.index(float(timestep[0]))
        alpha, sigma = path.alphas[index], path.sigmas[index]
        e = noise_estimate(net, obs, x, float(timestep[0]), alpha, sigma)
        clean = (x - sigma * e) / alpha
        return {"epsilon": e, "clean": clean, "v": alpha * e - sigma * clean}[prediction]

    return predict


def plain_ddim(net, critic, obs, noise, timesteps, steering: Steering | None, clip=None) -> Tensor:
    """DDIM in xbar = x / alpha, lambda = sigma / alpha, its steering written with autograd alone."""
    levels = [(DDPM.timesteps[i], DDPM.alphas[i], DDPM.sigmas[i]) for i in timesteps]
    xbar = noise / levels[0][1]
    for k, (step, alpha, sigma) in enumerate(levels):
        lam = sigma / alpha
        following = levels[k + 1][2] / levels[k + 1][1] if k + 1 < len(levels) else 0.0
        leaf = xbar.detach().requires_grad_()
        x = alpha * leaf
        e = noise_estimate(net, obs, x, step, alpha, sigma)
        if clip is not None:
            e = (x - alpha * ((x - sigma * e) / alpha).clamp(-clip, clip)) / sigma
        u = -e
        if steering is not None and k > 0:
            clean = leaf + lam * (u if steering.jacobian == "full" else u.detach())
            clean = clean + (clean.clamp(-1, 1) - clean).detach()  # straight through
            q = critic(obs, clean)
            objective = (q.mean(0) - steering.rho * q.std(0, unbiased=False)).sum()
            (g,) = torch.autograd.grad(objective, leaf)
            u = u + steering.alpha * u.norm(dim=-1, keepdim=True) / (g.norm(dim=-1, keepdim=True) + steering.eps) * g
        xbar = (leaf + (lam - following) * u).detach()
    return xbar.clamp(-1, 1)


TIMESTEPS = tuple(round((STEPS - 1) * (1 - k / K)) for k in range(K))


@pytest.mark.parametrize("prediction", ["epsilon", "clean", "v"])
@pytest.mark.parametrize("jacobian", ["full", "identity"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_steered_ddim(prediction, jacobian, clip):
    net, critic = networks()
    obs, noise = inputs()
    steering = Steering.qpilots_u(alpha=0.3, jacobian=jacobian)
    got, info = ddim_steered_sample(
        as_prediction(net, prediction, DDPM), critic, steering, DDPM, obs, noise, num_steps=K, prediction=prediction,
        clip=clip,
    )  # fmt: skip
    want = plain_ddim(net, critic, obs, noise, TIMESTEPS, steering, clip)
    torch.testing.assert_close(got, want, **EXACT)
    plain = plain_ddim(net, critic, obs, noise, TIMESTEPS, None, clip)
    assert (want - plain).abs().max() > 1e-3
    assert (info.gradient_norms[0] == 0).all() and (info.gradient_norms[1:] > 0).all() and info.nonfinite_count == 0


def test_ddim_takes_any_critic_and_any_timesteps():
    net, critic = networks()
    obs, noise = inputs()
    steering, steps = Steering.qpilots_u(alpha=0.3), (900, 700, 300, 20)
    own = ddim_steered_sample(
        lambda o, x, s: as_prediction(net, "epsilon", DDPM)(o["state"], x, s), lambda o, a: critic(o["state"], a),
        steering, DDPM, {"state": obs}, noise, timesteps=steps,
    )  # fmt: skip
    torch.testing.assert_close(own[0], plain_ddim(net, critic, obs, noise, steps, steering), **EXACT)
    plain, _ = ddim_steered_sample(
        as_prediction(net, "epsilon", DDPM), None, Steering.unsteered(), DDPM, obs, noise, timesteps=steps
    )
    torch.testing.assert_close(plain, plain_ddim(net, critic, obs, noise, steps, None), **EXACT)


def test_ddim_at_every_timestep_and_in_diffusers_words():
    net, critic = networks()
    obs, noise = inputs()
    short = GaussianPath(DDPM.timesteps[::20], DDPM.alphas[::20], DDPM.sigmas[::20])
    count = len(short.timesteps)
    steering = Steering.qpilots_u(alpha=0.3)

    def sampled(known_as: str, prediction: str, **named) -> Tensor:
        predict = as_prediction(net, prediction, short)
        return ddim_steered_sample(predict, critic, steering, short, obs, noise, prediction=known_as, **named)[0]

    whole = sampled("epsilon", "epsilon", num_steps=count)
    assert torch.equal(whole, sampled("epsilon", "epsilon", timesteps=range(count - 1, -1, -1)))
    for known_as, prediction in (("sample", "clean"), ("v_prediction", "v")):
        torch.testing.assert_close(sampled(known_as, prediction, num_steps=count), whole, **EXACT)
        assert DiffusionVelocity(net, short, known_as).prediction == prediction
    for bad in (0, count + 1):
        with pytest.raises(ValueError, match=f"num_steps is {bad}; expected 1 to {count}"):
            sampled("epsilon", "epsilon", num_steps=bad)


def test_ddim_in_float32_uses_the_packed_critic():
    net, critic = networks()
    obs, noise = inputs()
    steering = Steering.qpilots_u(alpha=0.3)
    want = plain_ddim(net, critic, obs, noise, TIMESTEPS, steering, 1.0)
    got, _ = ddim_steered_sample(
        as_prediction(net.float(), "epsilon", DDPM), critic.float(), steering, DDPM, obs.float(), noise.float(),
        num_steps=K, clip=1.0,
    )  # fmt: skip
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)  # xbar = x / 0.006 magnifies float32


def test_ddim_refuses():
    net, critic = networks()
    obs, noise = inputs()
    predict = as_prediction(net, "epsilon", DDPM)
    for steering in (Steering.noisy(1.0), replace(Steering.qpilots_u(), num_candidates=2)):
        with pytest.raises(ValueError, match="expected 'tweedie' and 1"):
            ddim_steered_sample(predict, critic, steering, DDPM, obs, noise)
    with pytest.raises(ValueError, match="from noise to clean"):
        ddim_steered_sample(predict, critic, Steering(), DDPM, obs, noise, timesteps=(10, 500))
    with pytest.raises(ValueError, match="prediction is 'score'"):
        ddim_steered_sample(predict, critic, Steering(), DDPM, obs, noise, prediction="score")
    silent = GaussianPath((0.0, 1.0), (1.0, 0.0), (0.1, 1.0))
    with pytest.raises(ValueError, match="alpha is 0"):
        ddim_steered_sample(predict, critic, Steering(), silent, obs, noise, num_steps=2)


# ---------------------------------------------------------------- a diffusion network as a flow


@pytest.mark.parametrize("prediction", ["epsilon", "clean", "v"])
def test_euler_of_the_velocity_is_ddim(prediction):
    """Both step from (x1, e) estimates along straight lines, so at the same levels they are the same numbers."""
    net, _ = networks()
    obs, noise = inputs()
    # a path whose levels lie at t = k / K, so that SteeredSampler's grid is DDIM's
    start = 1e-3
    ts = [1 - 1e-6, *[k / K for k in range(K - 1, 0, -1)], start]
    path = GaussianPath(
        tuple(float(i) for i in range(K + 1)),
        tuple(t / (t * t + (1 - t) ** 2) ** 0.5 for t in ts),
        tuple((1 - t) / (t * t + (1 - t) ** 2) ** 0.5 for t in ts),
    )
    predict = as_prediction(net, prediction, path)
    x, levels = noise, list(zip(path.timesteps, path.alphas, path.sigmas))[:0:-1]
    for k, (step, alpha, sigma) in enumerate(levels):
        e = as_prediction(net, "epsilon", path)(obs, x, torch.full((B,), step, dtype=x.dtype))
        clean = (x - sigma * e) / alpha
        following = levels[k + 1][1:] if k + 1 < len(levels) else (1.0, 0.0)
        x = following[0] * clean + following[1] * e

    flow = DiffusionVelocity(nearest(predict), path, prediction)
    z = noise / (path.alphas[-1] + path.sigmas[-1])
    for k in range(K):  # by hand: the path begins at t = start, where SteeredSampler's first step is at 0
        t = max(k / K, start)
        z = z + ((k + 1) / K - t) * flow(obs, z, torch.full((B, 1), t, dtype=z.dtype))
    torch.testing.assert_close(z, x.detach(), rtol=1e-6, atol=1e-6)


def nearest(predict):
    """Undoes the rounding of an interpolated timestep, for tests that look it up."""
    return lambda obs, x, timestep: predict(obs, x, timestep.round())


def test_velocity_of_gaussian_data_is_exact():
    """x1 ~ N(mu, std^2): the optimal e, x1 and velocity are known on both paths."""
    mu, std = 0.3, 0.5
    path = GaussianPath.tabulate(
        lambda s: 2 * math.cos(s * math.pi / 2),
        lambda s: 2 * math.sin(s * math.pi / 2) + s,
        [i / 500 for i in range(501)],
    )

    def optimal(prediction: str):
        def predict(obs: Tensor, x: Tensor, s: Tensor) -> Tensor:
            alpha, sigma = 2 * torch.cos(s[0] * math.pi / 2), 2 * torch.sin(s[0] * math.pi / 2) + s[0]
            variance = alpha**2 * std**2 + sigma**2
            clean = mu + alpha * std**2 / variance * (x - alpha * mu)
            e = sigma / variance * (x - alpha * mu)
            return {"epsilon": e, "clean": clean, "v": alpha * e - sigma * clean}[prediction]

        return predict

    obs, z = inputs()
    for prediction in ("epsilon", "clean", "v"):
        flow = DiffusionVelocity(optimal(prediction), path, prediction)
        for t in (0.05, 0.31, 0.5, 0.77, 0.95):
            variance = t**2 * std**2 + (1 - t) ** 2
            residual = (z - t * mu) / variance
            want = mu + (t * std**2 - (1 - t)) * residual
            got = flow(obs, z, torch.full((B, 1), t, dtype=z.dtype))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # the table is interpolated


def test_diffusion_velocity_in_the_sampler():
    """Steered by SteeredSampler as any flow is: the estimate is the clean prediction itself."""
    net, critic = networks()
    obs, noise = inputs()
    flow = DiffusionVelocity(lambda o, x, s: net(torch.cat([o, x, s[:, None] / STEPS], -1)), DDPM, "epsilon", clip=1.0)
    sampler = SteeredSampler(flow, critic, Steering.qpilots_u(alpha=0.3), num_steps=K, backend="reference")
    z = noise
    for k in range(K):
        t = k / K
        leaf = z.detach().requires_grad_()
        v = flow(obs, leaf, torch.full((B, 1), t, dtype=z.dtype))
        if k:
            clean = leaf + (1 - t) * v
            q = critic(obs, clean + (clean.clamp(-1, 1) - clean).detach())
            (g,) = torch.autograd.grad((q.mean(0) - 0.5 * q.std(0, unbiased=False)).sum(), leaf)
            v = v + 0.3 * v.norm(dim=-1, keepdim=True) / (g.norm(dim=-1, keepdim=True) + 1e-8) * g
        z = (leaf + v / K).detach()
    torch.testing.assert_close(sampler(obs, noise), z.clamp(-1, 1), **EXACT)
    with pytest.raises(ValueError, match="t differs between rows"):
        flow(obs, noise, torch.rand(B, 1))


def test_path_lookup():
    for index in (0, 17, 500, STEPS - 1):
        alpha, sigma = DDPM.alphas[index], DDPM.sigmas[index]
        got = DDPM.at_time(alpha / (alpha + sigma))
        assert got == pytest.approx((float(index), alpha, sigma), abs=1e-9)
    assert DDPM.at_time(0.0)[0] == STEPS - 1 and DDPM.at_time(1.0)[0] == 0
    timestep, alpha, sigma = DDPM.at_time(0.4321)
    assert alpha / (alpha + sigma) == pytest.approx(0.4321) and alpha**2 + sigma**2 == pytest.approx(1)
    assert DDPM.alphas[int(timestep) + 1] < alpha < DDPM.alphas[int(timestep)]
    with pytest.raises(ValueError, match="equally many"):
        GaussianPath((0.0, 1.0), (1.0,), (0.0, 1.0))
    with pytest.raises(ValueError, match="from clean to noise"):
        GaussianPath((0.0, 1.0), (0.1, 1.0), (1.0, 0.1))


# ---------------------------------------------------------------- reversed time


class Expert(nn.Module):
    """openpi's convention: denoise_step(obs, x [B, C, D], tau [B]) -> e - a."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(S + width + 1, 16), nn.Tanh(), nn.Linear(16, width))

    def forward(self, obs: Tensor, x: Tensor, tau: Tensor) -> Tensor:
        assert x.ndim == 3 and tau.shape == (len(x),)
        rows = torch.cat([obs, tau[:, None]], -1).unsqueeze(1).expand(-1, x.shape[1], -1)
        return self.net(torch.cat([rows, x], -1))


@pytest.mark.parametrize("jacobian", ["full", "identity"])
def test_reversed_time_with_padding(jacobian):
    """Their loop, tau from 1 to 0 with a = x - tau v, steered on the real dimensions alone."""
    chunk, padded, real = 3, 6, 4
    torch.manual_seed(0)
    expert, critic = Expert(padded).double(), CriticEnsemble(S, chunk * real, 3, (16,)).double()
    dims = list(real_dims(chunk, padded, real))
    obs, _ = inputs()
    noise = torch.randn(B, chunk, padded, generator=torch.Generator().manual_seed(2)).double()
    alpha = 0.4

    x = noise
    for k in range(K):
        tau = 1 - k / K
        leaf = x.detach().requires_grad_()
        v = expert(obs, leaf, torch.full((B,), tau, dtype=x.dtype))
        if k:
            estimate = (leaf - tau * (v if jacobian == "full" else v.detach()))[..., :real].flatten(1)
            q = critic(obs, estimate + (estimate.clamp(-1, 1) - estimate).detach())
            (g,) = torch.autograd.grad((q.mean(0) - 0.5 * q.std(0, unbiased=False)).sum(), leaf)
            g, moving = g[..., :real], v[..., :real]
            ratio = moving.flatten(1).norm(dim=-1) / (g.flatten(1).norm(dim=-1) + 1e-8)
            steered = moving - alpha * ratio[:, None, None] * g  # -dtau steps: v_here = -v
            v = torch.cat([steered, v[..., real:]], -1)
        x = (leaf - v / K).detach()

    sampler = SteeredSampler(
        ReversedTimeFlow(expert, chunk_shape=(chunk, padded)),
        lambda o, a: critic(o, a[:, dims]),
        replace(Steering.qpilots_u(alpha=alpha, jacobian=jacobian), steered_dims=tuple(dims)),
        num_steps=K,
        backend="reference",
    )
    got = sampler(obs, noise.flatten(1)).unflatten(1, (chunk, padded))
    torch.testing.assert_close(got, x.clamp(-1, 1), **EXACT)
    plain = SteeredSampler(sampler.flow, None, Steering.unsteered(), num_steps=K)(obs, noise.flatten(1))
    assert (plain.unflatten(1, (chunk, padded)) - got)[..., :real].abs().max() > 1e-3


def test_reversed_time_undoes_itself():
    """A flow of ours, told in their convention and brought back."""
    flow = FlowMLP(S, A, (8,)).double()
    obs, x = inputs()
    back = ReversedTimeFlow(nn.Identity(), call=lambda m, o, y, tau: -flow(o, m(y), (1 - tau)[:, None]))
    t = torch.rand(B, 1, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(back(obs, x, t), flow(obs, x, t), **EXACT)


def test_reversed_time_refuses():
    flow = ReversedTimeFlow(Expert(6), chunk_shape=(3, 6))
    with pytest.raises(ValueError, match=r"expected \[B, 18\]"):
        flow(torch.zeros(2, S), torch.zeros(2, 17), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="chunk_shape is"):
        ReversedTimeFlow(Expert(6), chunk_shape=(3,))
    with pytest.raises(TypeError, match="expected a callable"):
        ReversedTimeFlow(3)
    assert real_dims(2, 4, 3) == (0, 1, 2, 4, 5, 6)
    with pytest.raises(ValueError, match="real_width=5"):
        real_dims(2, 4, 5)


# ---------------------------------------------------------------- examples


@pytest.mark.parametrize("name", ["quickstart", "own_loop", "reversed_time_expert"])
def test_example(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


def test_td_training_example_learns():
    main = runpy.run_path(str(EXAMPLES / "td_training.py"))["main"]
    assert main(40) > 0.03  # steered actions are nearer the goal
