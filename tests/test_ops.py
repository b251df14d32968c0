"""torch.ops.qpilots: gradients, fakes, torch.compile, and the drop-in step."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, SteeredSampler, Steering, ops, reference
from qpilots_fast.testing import make_case

S, A, B = 6, 4, 5


def networks(dtype=torch.float64):
    flow, critic = FlowMLP(S, A, (13, 9)).to(dtype), CriticEnsemble(S, A, 3, (11, 8)).to(dtype)
    for parameter in (*flow.parameters(), *critic.parameters()):
        parameter.requires_grad_(False)
    return flow, critic


def rows(*widths, dtype=torch.float64, grad=True):
    return [torch.randn(B, width, dtype=dtype, requires_grad=grad) for width in widths]


def test_gradcheck():
    flow, critic = networks()
    obs, x, v, g = rows(S, A, A, A)
    t = torch.rand(B, 1, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda o, a, s: ops.velocity(o, a, s, flow), (obs, x, t))
    assert check(lambda o, a: ops.critic_values(o, a, critic), (obs, x))
    for aggregation in ("pessimistic", "mean", "min"):
        assert check(lambda o, a, how=aggregation: ops.pessimistic_q(o, a, critic, aggregation=how), (obs, x))
    assert check(ops.clean_actions, (x, v, t))
    assert check(lambda a, b, c: ops.steer_update(a, b, c, 0.1, 0.5), (x, v, g))
    assert check(lambda a, b, c: ops.steer_update(a, b, c, 0.1, 0.5, steered_dims=[0, 2]), (x, v, g))
    assert check(lambda q: ops.posterior_weights(q, 2.0, 3.0), (g,))
    assert check(lambda o, a, b: ops.steer_step(a, b, 0.3, 0.1, obs=o, critic=critic), (obs, x, v))
    for parameter in (*flow.parameters(), *critic.parameters()):
        parameter.requires_grad_(False)
    sampler = SteeredSampler(flow, critic, Steering.qpilots_u(), num_steps=2)
    flat = flow.flat_parameters() + critic.flat_parameters()
    noise = (0.1 * torch.randn(B, A, dtype=torch.float64)).requires_grad_()
    assert check(lambda o, n: ops.sample(o, n, None, flat, sampler._run.spec)[0], (obs, noise))


def test_pessimistic_gradient_where_all_members_agree():
    critic = CriticEnsemble(S, A, 3, (8,)).double()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    obs, a = rows(S, A)
    (grad,) = torch.autograd.grad(ops.pessimistic_q(obs, a, critic).sum(), a)
    (expected,) = torch.autograd.grad(critic(obs, a)[0].sum(), a)
    assert (grad - expected).abs().max() < 1e-12


def test_parameters_get_their_gradients():
    flow, critic = FlowMLP(S, A, (13,)).double(), CriticEnsemble(S, A, 3, (11,)).double()
    obs, a = rows(S, A)
    t = torch.rand(B, 1, dtype=torch.float64)
    for actual, expected, network in (
        (ops.critic_values(obs, a, critic), critic(obs, a), critic),
        (ops.velocity(obs, a, t, flow), flow(obs, a, t), flow),
    ):
        d = torch.randn_like(expected)
        inputs = [obs, a, *network.parameters()]
        for got, want in zip(torch.autograd.grad(actual, inputs, d), torch.autograd.grad(expected, inputs, d)):
            assert (got - want).abs().max() < 1e-12


def test_every_backend_differentiates(backend):
    flow, critic = networks(torch.float32)
    obs, a = rows(S, A, dtype=torch.float32)
    t = torch.rand(B, 1)
    (grad,) = torch.autograd.grad(ops.pessimistic_q(obs, a, critic, backend=backend).sum(), a)
    q = critic(obs, a)
    (expected,) = torch.autograd.grad((q.mean(0) - 0.5 * q.std(0, unbiased=False)).sum(), a)
    assert (grad - expected).abs().max() < 1e-5
    d = torch.randn(B, A)
    got = torch.autograd.grad(ops.velocity(obs, a, t, flow, backend=backend), [obs, a], d)
    want = torch.autograd.grad(flow(obs, a, t), [obs, a], d)
    assert max((g - w).abs().max() for g, w in zip(got, want)) < 1e-5


def test_second_order_raises():
    _, critic = networks()
    obs, a = rows(S, A)
    (grad,) = torch.autograd.grad(ops.pessimistic_q(obs, a, critic).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order"):
        grad.sum().backward()
    x, v, g = rows(A, A, A)
    (grad,) = torch.autograd.grad(ops.steer_update(x, v, g, 0.1).sum(), g, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order"):
        grad.sum().backward()


def _opcheck_cases():
    flow, critic = FlowMLP(S, A, (13, 9)), CriticEnsemble(S, A, 3, (11,))
    posterior = MetaFlowMap(S, A, (7,))
    obs, x, v, g = rows(S, A, A, A, dtype=torch.float32)
    t = torch.rand(B, 1)
    fp, cp = flow.flat_parameters(), critic.flat_parameters()
    u = SteeredSampler(flow, critic, Steering.qpilots_u(), num_steps=2)._run.spec
    m = SteeredSampler(flow, critic, Steering.qpilots_m(num_samples=2), posterior=posterior, num_steps=2)._run.spec
    step = Steering.qpilots_u(jacobian="identity").json
    eps = torch.randn(2, B, 2, A)
    tail = ("float32", "reference")
    return {
        "velocity": (obs, x, t, fp, flow.spec.json, *tail),
        "critic_values": (obs, x, cp, critic.spec.json, *tail),
        "pessimistic_q": (obs, x, cp, critic.spec.json, 0.5, "pessimistic", *tail),
        "clean_actions": (x, v, t),
        "steer_update": (x, v, g, 0.1, 0.3, 1e-8, [0, 2]),
        "posterior_weights": (g, 2.0, 1.0),
        "steer_step": (obs, x, v, t, cp, 0.1, critic.spec.json, step, [-1.0], [1.0], *tail),
        "steer_velocity": (obs, x, v, t, cp, critic.spec.json, step, [-1.0], [1.0], *tail),
        "sample": (obs, x, None, fp + cp, u.json, "reference"),
        "sample_m": (obs, x, eps, fp + cp + posterior.flat_parameters(), m.json, "reference"),
    }


@pytest.mark.parametrize("name", list(_opcheck_cases()))
def test_opcheck(name):
    operator = getattr(torch.ops.qpilots, name.removesuffix("_m")).default
    results = opcheck(operator, _opcheck_cases()[name])
    assert set(results.values()) == {"SUCCESS"}


def test_compile_fullgraph_without_recompiles(backend):
    flow, critic = networks(torch.float32)
    sampler = SteeredSampler(flow, critic, Steering.qpilots_u(), num_steps=3, backend=backend)
    obs, noise = rows(S, A, dtype=torch.float32, grad=False)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda o, n: sampler(o, n) * 2, backend=counter, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(obs, noise), sampler(obs, noise) * 2)
        with torch.no_grad():
            flow.output.bias.add_(0.1)  # live weights without a new graph
    assert counter.frame_count == 1


def test_compile_with_gradient():
    _, critic = networks(torch.float32)
    obs, a = rows(S, A, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda o, x: ops.pessimistic_q(o, x, critic).square(), fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(obs, a).sum(), a)
    (expected,) = torch.autograd.grad(ops.pessimistic_q(obs, a, critic).square().sum(), a)
    assert torch.allclose(grad, expected, atol=1e-6)


def test_steer_step_equals_the_samplers_step():
    flow, critic = networks()
    obs, x = rows(S, A, grad=False)
    steering = Steering.qpilots_u(jacobian="identity", alpha=0.4)
    sampler = SteeredSampler(flow, critic, steering, num_steps=4)
    expected = sampler(obs, x)
    for k in range(4):
        v = flow(obs, x, torch.full((B, 1), k / 4, dtype=torch.float64))
        if k == 0:
            x = x + v / 4
        else:
            x = ops.steer_step(x, v, k / 4, 1 / 4, obs=obs, critic=critic, steering=steering)
    assert (x.clamp(-1, 1) - expected).abs().max() < 1e-12


def test_steer_step_with_the_callers_gradient():
    x, v, g = rows(A, A, A, grad=False)
    expected = x + 0.1 * reference.steer_velocity(v, g, Steering.qpilots_u())[0]
    assert torch.equal(ops.steer_step(x, v, 0.3, 0.1, q_grad=g), expected)


def test_errors_say_what_to_do():
    flow, critic = networks(torch.float32)
    obs, x = rows(S, A, dtype=torch.float32, grad=False)
    with pytest.raises(ValueError, match=r"actions have shape \[5, 3\]; expected \[5, 4\]"):
        ops.critic_values(obs, x[:, :3], critic)
    with pytest.raises(TypeError, match="critic is FlowMLP, a packed flow; expected a packed critic"):
        ops.critic_values(obs, x, flow)
    with pytest.raises(ValueError, match="either obs and critic, or q_grad"):
        ops.steer_step(x, x, 0.1, 0.1)
    with pytest.raises(ValueError, match="needs the flow network"):
        ops.steer_step(x, x, 0.1, 0.1, obs=obs, critic=critic, steering=Steering.qpilots_u())
    with pytest.raises(ValueError, match="rho"):
        ops.pessimistic_q(obs, x, critic, rho=-1.0)
    with pytest.raises(ValueError, match="q_grad has shape"):
        ops.steer_update(x, x, x[:, :2], 0.1)
    with pytest.raises(ValueError, match="steered_dims"):
        ops.steer_update(x, x, x, 0.1, steered_dims=[9])


def test_outputs_of_a_sample_share_no_memory(backend):
    """torch.library asks for it; a view among them is an error in a later torch."""
    case = make_case(batch_size=3, num_steps=2)
    spec = case.sampler(backend)._run.spec
    flat = [*case.flow.flat_parameters(), *case.critic.flat_parameters()]
    found = ops.sample(case.obs, case.noise, None, flat, spec, backend)
    assert len({value.untyped_storage().data_ptr() for value in (*found, case.obs, case.noise)}) == len(found) + 2
