"""torch.func through the operators: against the networks' own forward under the same transforms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering, ops

S, A, B = 7, 5, 6


@pytest.fixture
def case():
    torch.manual_seed(0)
    flow, critic = FlowMLP(S, A, (9,)).double(), CriticEnsemble(S, A, 3, (8, 8)).double()
    return flow, critic, torch.randn(B, S).double(), torch.randn(B, A).double()


def _pair(critic):
    """One row through the operator and through plain PyTorch."""

    def plain(o, a):
        q = critic(o[None], a[None])
        return (q.mean(0) - 0.5 * q.std(0, unbiased=False))[0]

    return lambda o, a: ops.pessimistic_q(o[None], a[None], critic)[0], plain


def _close(transform, pair, *arguments):
    torch.testing.assert_close(transform(pair[0])(*arguments), transform(pair[1])(*arguments))


def test_vmap_over_any_argument(case):
    _, critic, obs, a = case
    pair = _pair(critic)
    _close(vmap, pair, obs, a)
    _close(lambda f: vmap(f, (0, None)), pair, obs, a[0])
    _close(lambda f: vmap(f, (None, 0)), pair, obs[0], a)
    _close(lambda f: vmap(f, (1, 1)), pair, obs.T, a.T)
    _close(lambda f: vmap(vmap(f, (None, 0)), (0, None)), pair, obs, a)


def test_grad_jacrev_and_their_nesting(case):
    _, critic, obs, a = case
    pair = _pair(critic)
    _close(lambda f: grad(lambda x: vmap(f)(obs, x).sum()), pair, a)
    _close(lambda f: vmap(grad(f, (0, 1))), pair, obs, a)
    _close(lambda f: jacrev(lambda x: vmap(f)(obs, x)), pair, a)
    values = (
        lambda o, x: ops.critic_values(o[None], x[None], critic)[:, 0],
        lambda o, x: critic(o[None], x[None])[:, 0],
    )
    _close(lambda f: vmap(jacrev(f, (0, 1))), values, obs, a)
    batch = (lambda x: ops.critic_values(obs, x, critic), lambda x: critic(obs, x))
    _close(jacrev, batch, a)


def test_velocity_with_its_time(case):
    flow, _, obs, a = case
    pair = (
        lambda o, x, t: ops.velocity(o[None], x[None], t, flow).square().sum(),
        lambda o, x, t: flow(o[None], x[None], t.reshape(1, 1)).square().sum(),
    )
    _close(lambda f: vmap(grad(f, (0, 1, 2))), pair, obs, a, torch.rand(B).double())
    one_time = torch.vmap(lambda o, x: ops.velocity(o[None], x[None], 0.3, flow)[0])(obs, a)
    torch.testing.assert_close(one_time, flow(obs, a, torch.full((B, 1), 0.3).double()))


def test_per_sample_gradients_of_parameters(case):
    _, critic, obs, a = case

    class Loss(torch.nn.Module):
        def __init__(self, q):
            super().__init__()
            self.critic, self.q = critic, q

        def forward(self, o, x):
            return self.q(o[None], x[None], self.critic).square().sum()

    losses = Loss(ops.critic_values), Loss(lambda o, x, critic: critic(o, x))
    parameters = {name: p.detach() for name, p in losses[0].named_parameters()}
    pair = [lambda p, o, x, m=module: functional_call(m, p, (o, x)) for module in losses]
    _close(lambda f: vmap(grad(f), (None, 0, 0)), pair, parameters, obs, a)
    stacked = {name: torch.stack([p, 1.5 * p]) for name, p in parameters.items()}
    _close(lambda f: vmap(f, (0, None, None)), pair, stacked, obs[0], a[0])


def test_steps_and_weights(case):
    _, critic, obs, x = case
    v, g = torch.randn_like(x), torch.randn_like(x)
    step = {"obs": obs, "critic": critic}
    rows = vmap(lambda o, a, b: ops.steer_step(a[None], b[None], 0.3, 0.1, obs=o[None], critic=critic)[0])(obs, x, v)
    torch.testing.assert_close(rows, ops.steer_step(x, v, 0.3, 0.1, **step))
    t = torch.rand(B).double()
    rows = vmap(lambda o, a, b, s: ops.steer_velocity(a[None], b[None], s, obs=o[None], critic=critic)[0])(obs, x, v, t)
    torch.testing.assert_close(rows, ops.steer_velocity(x, v, t, **step))
    rows = vmap(lambda a, b, c: ops.steer_update(a[None], b[None], c[None], 0.1, steered_dims=[0, 2])[0])(x, v, g)
    torch.testing.assert_close(rows, ops.steer_update(x, v, g, 0.1, steered_dims=[0, 2]))
    rows = vmap(lambda a, b, s: ops.clean_actions(a[None], b[None], s)[0])(x, v, t)
    torch.testing.assert_close(rows, ops.clean_actions(x, v, t))
    jacobian = jacrev(lambda b: ops.steer_step(x, b, 0.3, 0.1, **step))(v)
    torch.testing.assert_close(
        jacobian, torch.autograd.functional.jacobian(lambda b: ops.steer_step(x, b, 0.3, 0.1, **step), v)
    )
    _close(jacrev, (ops.posterior_weights, lambda q: torch.softmax(q, 0)), g)
    torch.testing.assert_close(
        vmap(ops.posterior_weights, 1, 1)(torch.stack([g, 2 * g], 1))[:, 1], torch.softmax(2 * g, 0)
    )


@pytest.mark.parametrize("q_scale", [None, "batch_std"])
def test_sample_and_rows_that_read_the_batch(case, q_scale):
    flow, critic, obs, x = case
    steering = replace(Steering.qpilots_u(0.5), q_scale=q_scale, scale="absolute")
    sampler = SteeredSampler(flow, critic, steering, num_steps=2)
    flat, spec = flow.flat_parameters() + critic.flat_parameters(), sampler._run.spec
    pairs = obs.reshape(3, 2, S), x.reshape(3, 2, A)
    rows = vmap(lambda o, n: ops.sample(o, n, None, flat, spec)[0])(*pairs)
    torch.testing.assert_close(rows, torch.stack([sampler(o, n) for o, n in zip(*pairs)]))


def test_what_is_not_first_order_reverse_mode_says_so(case):
    _, critic, obs, a = case

    def q(x):
        return ops.pessimistic_q(obs, x, critic).sum()

    with pytest.raises(RuntimeError, match=r"no forward mode.*Use torch\.func\.vjp or jacrev"):
        jvp(q, (a,), (a,))
    with pytest.raises(RuntimeError, match="no forward mode"):
        hessian(q)(a)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grad(lambda x: grad(q)(x).sum())(a)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        vmap(grad(lambda x: grad(lambda y: ops.pessimistic_q(obs[:1], y[None], critic).sum())(x).sum()))(a)
