"""from_module: what else a module's output depends on, beside its inputs and layers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpilots_fast import from_module, ops
from qpilots_fast.reference import ReferenceNetwork
from qpilots_fast.times import time_features

S, A, H, B = 5, 4, 9, 4
DIMS = {"obs_dim": S, "action_dim": A}


def mlp(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, width_out))


class Critic(nn.Module):
    """Reads obs - mean, whatever mean is at first."""

    def __init__(self, mean, scale=1.0):
        super().__init__()
        self.q = mlp(S + A, 1)
        self.mean, self.scale = mean, scale
        self.register_buffer("idle", torch.zeros(3))

    def forward(self, obs, actions):
        return self.scale * self.q(torch.cat([obs - self.mean, actions], -1))


class Stacked(nn.Module):
    """Weights as plain tensors."""

    def __init__(self, mean):
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(2, S + A, H)), nn.Parameter(torch.randn(2, H, 1))
        self.mean = mean

    def forward(self, obs, actions):
        return torch.tanh(torch.cat([obs - self.mean, actions], -1) @ self.first) @ self.last


@pytest.mark.parametrize("kind", [nn.Buffer, nn.Parameter, lambda t: nn.Parameter(t, False), lambda t: t])
@pytest.mark.parametrize("module", [Critic, Stacked])
def test_a_normaliser_at_its_start_is_found(module, kind):
    normaliser = module(kind(torch.zeros(S)))
    if module is Critic:
        assert from_module(normaliser, "critic", **DIMS).spec.obs_columns == S
    else:
        with pytest.raises(ValueError, match="its output depends on mean beside"):
            from_module(normaliser, "critic", **DIMS)
    assert from_module(module(0.0), "critic", **DIMS).spec.obs_dim == S  # what cannot be written in place


def test_a_scale_of_the_output_is_live():
    critic = Critic(0.0, nn.Buffer(torch.ones(())))
    network = from_module(critic, "critic", **DIMS)
    columns = [torch.randn(4, S, dtype=torch.float64), torch.randn(4, A, dtype=torch.float64)]
    before = ReferenceNetwork(network.bound(), torch.float64)(columns)[0]
    critic.scale.fill_(2.0)
    torch.testing.assert_close(ReferenceNetwork(network.bound(), torch.float64)(columns)[0], 2 * before)


@pytest.mark.parametrize(
    ("kind", "embedding"),
    [(nn.Buffer, "fourier"), (lambda t: nn.Parameter(t, False), "fourier"), (nn.Parameter, "module")],
)
def test_frequencies_may_be_constants_of_the_module(kind, embedding):
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.frequencies = mlp(S + A + 8, A), kind(torch.arange(4.0))

        def forward(self, obs, x, t):
            angles = t * self.frequencies
            return self.net(torch.cat([obs, x, angles.cos(), angles.sin()], -1))

    assert from_module(Flow(), "flow", obs_dim=S).spec.time_embedding == embedding


class Dropping(nn.Module):
    """Dropout as a function call."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(S + A, H), nn.Linear(H, 1)

    def forward(self, obs, actions):
        h = F.dropout(F.relu(self.a(torch.cat([obs, actions], -1))), 0.5, self.training)
        return self.b(h)


def test_dropout_as_a_function_call():
    module = Dropping()
    with pytest.raises(ValueError, match=r"its output is random: two calls .* call \.eval\(\) first"):
        from_module(module, "critic", **DIMS)
    network = from_module(module.eval(), "critic", **DIMS)  # the advice
    obs, actions = torch.randn(B, S), torch.randn(B, A)
    want = ops.critic_values(obs, actions, network)
    torch.testing.assert_close(want, network(obs, actions))
    module.train()
    with pytest.raises(ValueError, match=r"Dropping is in training mode, .* call \.eval\(\)"):
        ops.critic_values(obs, actions, network)
    module.eval()
    assert torch.equal(ops.critic_values(obs, actions, network), want)


def test_modules_that_ignore_their_mode_may_be_in_any():
    module = Critic(0.0)
    network = from_module(module, "critic", **DIMS)
    obs, actions = torch.randn(B, S), torch.randn(B, A)
    want = ops.critic_values(obs, actions, network)
    module.eval()
    module.q.train()
    assert torch.equal(ops.critic_values(obs, actions, network), want)
    assert not module.training and module.q.training


def test_no_random_state_is_changed():
    class Drawing(Critic):
        def forward(self, obs, actions):
            np.random.rand(), random.random(), torch.rand(1)
            return super().forward(obs, actions)

    def draw():
        return np.random.rand(), random.random(), torch.rand(1).item()

    def seed():
        np.random.seed(3), random.seed(3), torch.manual_seed(3)

    module = Drawing(0.0)
    seed()
    want = draw()
    seed()
    from_module(module, "critic", **DIMS)
    assert draw() == want


@pytest.mark.parametrize("embedding", [None, "fourier"])
def test_chunks(embedding):
    """A module that takes and returns [B, C, D] is packed as one of flat actions."""

    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(S + A + (1 if embedding is None else 64), A)

        def forward(self, obs, x, t):
            assert x.shape[1:] == (2, 2)
            t = t if embedding is None else time_features(t, embedding, 64).to(x.dtype)
            return self.net(torch.cat([obs, x.flatten(1), t], -1)).unflatten(1, (2, 2))

    network = from_module(Chunked(), "flow", chunk_shape=(2, np.int64(2)))
    assert (network.spec.obs_dim, network.spec.action_dim) == (S, A)
    obs, x, t = torch.randn(B, S), torch.randn(B, A), torch.full((B, 1), 0.25)
    want = network.module(obs, x.unflatten(1, (2, 2)), t).flatten(1)
    torch.testing.assert_close(ops.velocity(obs, x, t, network), want)
    torch.testing.assert_close(network(obs, x, t), ops.velocity(obs, x, t, network))
    with pytest.raises(ValueError, match=r"action_dim is 3, chunk_shape \(2, 2\)"):
        from_module(Chunked(), "flow", chunk_shape=(2, 2), action_dim=3)
    with pytest.raises(ValueError, match=r"expected \(C, D\)"):
        from_module(Chunked(), "flow", chunk_shape=(2, 0))
