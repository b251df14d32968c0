"""openpi.steer on a stand-in with openpi's names and loop, against SteeredSampler with ReversedTimeFlow."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, SteeredSampler, Steering
from qpilots_fast.integrations import ReversedTimeFlow, real_dims
from qpilots_fast.integrations.openpi import steer

S, C, PADDED, REAL, B = 5, 3, 8, 4, 2
STEERING = Steering.qpilots_u(0.4)


class Model(nn.Module):
    """openpi's PI0Pytorch, its networks replaced by one MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(action_horizon=C, action_dim=PADDED)
        self.net = nn.Sequential(nn.Linear(S + C * PADDED + 1, 32), nn.Tanh(), nn.Linear(32, C * PADDED))
        self.sample_actions = lambda *_, **__: pytest.fail("the compiled loop sees no steering")

    @torch.no_grad()
    def sample_actions(self, device, observation, noise=None, num_steps=10) -> Tensor:
        dt = torch.tensor(-1.0 / num_steps)
        x_t, time, cache = noise, torch.tensor(1.0), observation.state * 1.0
        while time >= -dt / 2:
            v_t = self.denoise_step(observation.state, None, cache, x_t, time.expand(len(x_t)))
            x_t = x_t + dt * v_t
            time = time + dt
        return x_t

    def denoise_step(self, state, masks, past_key_values, x_t, timestep) -> Tensor:
        return self.net(torch.cat([past_key_values, x_t.flatten(1), timestep[:, None]], 1)).reshape(x_t.shape)


def parts() -> tuple[Model, CriticEnsemble, SimpleNamespace, Tensor]:
    observation = SimpleNamespace(state=torch.randn(B, S))
    return Model(), CriticEnsemble(S, C * REAL, 3, (16,)), observation, torch.randn(B, C, PADDED)


@pytest.mark.parametrize("jacobian", ["full", "identity"])
@pytest.mark.parametrize("steps", [{}, {"num_steps": 7}])
@pytest.mark.parametrize("with_policy", [False, True])
def test_its_loop_is_steered(jacobian, steps, with_policy):
    model, ensemble, observation, noise = parts()
    policy = type("Policy", (), {})() if with_policy else model
    if with_policy:
        policy._model, policy._sample_actions = model, model.sample_actions
    before = set(vars(model)), model.sample_actions
    steering = replace(STEERING, jacobian=jacobian)
    handle = steer(policy, lambda o, a: ensemble(o.state, a.flatten(1)), steering, action_dim=REAL)
    sample = policy._sample_actions if with_policy else model.sample_actions
    got = sample("cpu", observation, noise=noise, **steps)
    with torch.inference_mode():
        assert torch.equal(sample("cpu", observation, noise=noise, **steps), got)
    info = handle.info
    handle.remove()
    assert (set(vars(model)), model.sample_actions) == before

    dims = real_dims(C, PADDED, REAL)
    flow = ReversedTimeFlow(
        model, chunk_shape=(C, PADDED), call=lambda m, o, x, tau: m.denoise_step(o.state, None, o.state, x, tau)
    )
    sampler = SteeredSampler(
        flow, lambda o, a: ensemble(o.state, a[:, list(dims)]), replace(steering, steered_dims=dims),
        num_steps=steps.get("num_steps", 10), action_low=None, action_high=None,
    )  # fmt: skip
    want = sampler(observation, noise.flatten(1)).reshape(noise.shape)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got - Model.sample_actions(model, "cpu", observation, noise, **steps)).abs().max() > 1e-2
    assert (info.gradient_norms[1:] > 0).all() and (info.gradient_norms[0] == 0).all()


def test_at_alpha_0_it_is_the_model_bitwise():
    model, _, observation, noise = parts()
    handle = steer(model, None, Steering.unsteered(), action_dim=REAL)
    got = model.sample_actions("cpu", observation, noise)
    handle.remove()
    assert torch.equal(got, Model.sample_actions(model, "cpu", observation, noise))


def test_refusals():
    model, ensemble, *_ = parts()
    with pytest.raises(TypeError, match="policy is Linear; expected openpi's Policy"):
        steer(nn.Linear(2, 2), None, Steering.unsteered(), action_dim=REAL)
    with pytest.raises(ValueError, match="action_dim is 9; expected 1 to 8"):
        steer(model, None, Steering.unsteered(), action_dim=9)
    with pytest.raises(TypeError, match="critic is CriticEnsemble"):
        steer(model, ensemble, STEERING, action_dim=REAL)


def test_a_loop_of_the_other_direction_is_refused():
    class Forward(Model):
        def denoise_step(self, state, masks, past_key_values, x_t, timestep) -> Tensor:
            return -super().denoise_step(state, masks, past_key_values, x_t, 1 - timestep)

        def sample_actions(self, device, observation, noise=None, num_steps=10) -> Tensor:
            x = noise
            for k in range(num_steps):
                time = torch.full((len(x),), k / num_steps)
                x = x + self.denoise_step(observation.state, None, observation.state, x, time) / num_steps
            return x

    _, ensemble, observation, noise = parts()
    model = Forward()
    handle = steer(model, lambda o, a: ensemble(o.state, a.flatten(1)), STEERING, action_dim=REAL)
    with pytest.raises(ValueError, match=r"first step's timestep is 0; expected 1.*ops\.steer_step"):
        model.sample_actions("cpu", observation, noise)
    handle.remove()
