"""ops.steer_step and ops.steer_velocity in other people's loops: direction of time, shapes, dtypes, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qpilots_fast import CriticEnsemble, Steering, ops

S, A, B = 7, 6, 8
STEERING = Steering.qpilots_u(0.7, jacobian="identity")


@pytest.fixture
def step():
    torch.manual_seed(3)
    critic = CriticEnsemble(S, A, 3, (16, 16))
    for parameter in critic.parameters():
        parameter.requires_grad_(False)
    return torch.randn(B, A), torch.randn(B, A), {"obs": torch.randn(B, S), "critic": critic, "steering": STEERING}


@pytest.mark.parametrize("given", ["critic", "q_grad"])
def test_a_loop_from_one_to_zero_takes_the_same_steps(step, given):
    x, v, keys = step
    keys = keys if given == "critic" else {"q_grad": torch.randn(B, A), "steering": STEERING}
    want = ops.steer_step(x, v, 0.25, 0.125, **keys)
    got = ops.steer_step(x, -v, 0.75, -0.125, convention="noise_at_one", **keys)
    assert torch.equal(got, want)
    velocity = ops.steer_velocity(x, v, 0.25, **keys)
    assert (velocity - v).norm(dim=1).sub(0.7 * v.norm(dim=1)).abs().max() < 1e-4  # alpha is the ratio of the push
    assert torch.allclose(x + 0.125 * velocity, want, atol=1e-6)
    mirrored = ops.steer_velocity(x, -v, 0.75, convention="noise_at_one", **keys)
    assert torch.equal(mirrored, -velocity)
    assert torch.allclose(x - 0.125 * mirrored, want, atol=1e-6)


def test_refusals_carry_the_conversion(step):
    x, v, keys = step
    want = ops.steer_step(x, v, 0.25, 0.1, **keys)
    u, tau, dt = -v, 0.75, -0.1  # a loop from 1 to 0
    with pytest.raises(
        ValueError, match=r"ops\.steer_step\(x, -v, 1 - t, -dt, \.\.\.\), or add convention='noise_at_one'"
    ):
        ops.steer_step(x, u, tau, dt, **keys)
    assert torch.equal(ops.steer_step(x, -u, 1 - tau, -dt, **keys), want)
    assert torch.equal(ops.steer_step(x, u, tau, dt, convention="noise_at_one", **keys), want)
    with pytest.raises(ValueError, match="leave convention out"):
        ops.steer_step(x, v, 0.25, 0.1, convention="noise_at_one", **keys)
    g = torch.randn(B, A)
    with pytest.raises(ValueError, match=r"ops\.steer_update\(x, -v, q_grad, -dt"):
        ops.steer_update(x, u, g, dt)
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="dt is"):
            ops.steer_step(x, v, 0.5, bad, **keys)
    for bad_t in (-0.1, 500, float("nan"), torch.tensor(1.5), torch.full((B, 1), -1.0)):
        for call in (
            lambda t: ops.steer_step(x, v, t, 0.1, **keys),
            lambda t: ops.steer_velocity(x, v, t, **keys),
            lambda t: ops.steer_velocity(x, v, t, convention="noise_at_one", **keys),
            lambda t: ops.clean_actions(x, v, t),
        ):
            with pytest.raises(ValueError, match=r"expected times in \[0, 1\]"):
                call(bad_t)
    with pytest.raises(ValueError, match="convention"):
        ops.steer_velocity(x, v, 0.5, convention="reversed", **keys)


def test_time_of_every_shape(step):
    x, v, keys = step
    t = torch.rand(B)
    one_row = {**keys, "obs": keys["obs"][:1].expand(B, S)}
    want = torch.cat([ops.steer_step(x, v, time, 0.1, **one_row)[i : i + 1] for i, time in enumerate(t.tolist())])
    for times in (t, t.unsqueeze(1)):
        assert torch.allclose(ops.steer_step(x, v, times, 0.1, **one_row), want, atol=1e-6)
    chunks, chunk_v = x.reshape(B, 3, 2), v.reshape(B, 3, 2)
    per_token = torch.rand(B, 3)
    a = ops.clean_actions(chunks, chunk_v, per_token)
    assert torch.allclose(a, chunks + (1 - per_token.unsqueeze(-1)) * chunk_v)
    # the estimate is per token, the norms are the whole row's
    q_grad = _gradient_at(keys, a.reshape(B, A))
    got = ops.steer_step(chunks, chunk_v, per_token, 0.1, **keys)
    assert got.shape == chunks.shape
    assert torch.allclose(
        got.reshape(B, A), ops.steer_step(x, v, 0.0, 0.1, q_grad=q_grad, steering=STEERING), atol=1e-5
    )
    with pytest.raises(
        ValueError, match=r"t has shape \[8, 2\]; expected a number, \[8\] or \[8, 1\], or one per token"
    ):
        ops.clean_actions(chunks, chunk_v, per_token[:, :2])
    with pytest.raises(ValueError, match=r"expected \[8, 3, 2\]"):
        ops.clean_actions(chunks, v, 0.5)


def _gradient_at(keys, a):
    a = a.clamp(-1, 1).requires_grad_()
    return torch.autograd.grad(ops.pessimistic_q(keys["obs"], a, keys["critic"], STEERING.rho).sum(), a)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(step, dtype):
    x, v, keys = step
    x, v = x.to(dtype), v.to(dtype)
    for op, arguments in ((ops.steer_step, (0.3, 0.1)), (ops.steer_velocity, (0.3,))):
        want = op(x.float(), v.float(), *arguments, **keys).to(dtype)
        got = op(x, v, *arguments, **keys)
        assert got.dtype == dtype and torch.equal(got, want)
    assert torch.equal(ops.clean_actions(x, v, 0.3), ops.clean_actions(x.float(), v.float(), 0.3).to(dtype))
    got = ops.steer_update(x, v, 300 * v, 0.1)  # squares past float16's largest number
    assert got.dtype == dtype and torch.allclose(got.float(), (x.float() + 0.12 * v.float()), atol=0.02)


def test_the_critics_parameters_get_their_gradients(step):
    x, v, keys = step
    critic = keys["critic"].requires_grad_(True)
    d = torch.randn(B, A)
    for dt, op in (
        (1.0, lambda: ops.steer_step(x, v, 0.3, 1.0, **keys)),
        (1.0, lambda: ops.steer_velocity(x, v, 0.3, **keys)),
    ):
        grads = torch.autograd.grad(op(), list(critic.parameters()), d)
        weight = critic.flat_parameters()[0]
        h = 1e-2
        direction = torch.randn_like(weight) / weight.numel() ** 0.5
        with torch.no_grad():
            weight.add_(h * direction)
            up = (op() * d).sum()
            weight.sub_(2 * h * direction)
            down = (op() * d).sum()
            weight.add_(h * direction)
        index = next(i for i, p in enumerate(critic.parameters()) if p is weight)
        slope = (grads[index] * direction).sum() * dt
        assert slope.abs() > 1e-3 and abs((up - down) / (2 * h) - slope) < 0.05 * slope.abs() + 1e-3


def test_a_step_that_asks_no_critic_is_plain():
    x, v, obs = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2)
    critic = CriticEnsemble(2, 3, 2, (8,))
    for steering in (Steering.unsteered(), Steering.qpilots_u(0.0)):
        assert torch.equal(ops.steer_step(x, v, 0.3, 0.1, obs=obs, critic=critic, steering=steering), x + 0.1 * v)
        assert torch.equal(ops.steer_velocity(x, v, 0.3, obs=obs, critic=critic, steering=steering), v)
        backwards = dict(steering=steering, convention="noise_at_one")
        assert torch.equal(ops.steer_step(x, v, 0.3, -0.1, obs=obs, critic=critic, **backwards), x - 0.1 * v)


@pytest.mark.parametrize(
    "setting", [dict(window=(0.5, 1.0)), dict(step_weights=(1.0,)), dict(num_candidates=2), dict(final_steps=1)]
)
def test_settings_of_a_whole_call_are_refused(setting):
    x, v, g = (torch.randn(4, 3) for _ in range(3))
    steering = Steering.qpilots_u(jacobian="identity")
    with pytest.raises(ValueError, match=f"Steering.{next(iter(setting))} .* whole call"):
        ops.steer_step(x, v, 0.3, 0.1, q_grad=g, steering=replace(steering, **setting))
    with pytest.raises(ValueError, match="max_disagreement"):
        ops.steer_step(x, v, 0.3, 0.1, q_grad=g, steering=replace(steering, max_disagreement=1.0))


def test_numbers_of_numpy_and_dtypes():
    x, v, g, q = (torch.randn(4, 3) for _ in range(4))
    half = np.float32(0.5)
    assert torch.equal(ops.steer_update(x, v, g, 0.1, half), ops.steer_update(x, v, g, 0.1, 0.5))
    assert torch.equal(ops.posterior_weights(q, half, np.int64(2)), ops.posterior_weights(q, 0.5, 2.0))
    critic, obs = CriticEnsemble(2, 3, 2, (8,)), torch.randn(4, 2)
    assert torch.equal(ops.pessimistic_q(obs, x, critic, half), ops.pessimistic_q(obs, x, critic, 0.5))
    assert ops.steer_step(x, v.double(), 0.3, 0.1, q_grad=g).dtype == torch.float32


def test_actions_that_are_no_floating_tensors_are_refused():
    x, v = torch.ones(2, 3), torch.ones(2, 3)
    for wrong, words in ((x.long(), "noisy_actions is torch.int64"), (x.numpy(), "noisy_actions is float32")):
        with pytest.raises(TypeError, match=words):
            ops.clean_actions(wrong, v, 0.5)
    with pytest.raises(TypeError, match=r"velocity is torch\.int32"):
        ops.steer_update(x, v.int(), v, 0.1)
