"""Users' own networks as they are: under inference mode, as lists, with another signature."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import qpilots_fast as qf
from qpilots_fast import SteeredSampler, Steering
from qpilots_fast.testing import PRESETS, assert_close, make_case


@dataclass(frozen=True)
class Observation:
    parts: Any


WRAPS = {
    "tensor": (lambda state: state, lambda obs: obs),
    "dict": (lambda state: {"a": [{"s": state}]}, lambda obs: obs["a"][0]["s"]),
    "dataclass": (lambda state: Observation((state, "text")), lambda obs: obs.parts[0]),
}


@pytest.mark.parametrize("wrap", list(WRAPS))
@pytest.mark.parametrize("preset", ["qpilots_u", "qpilots_m", "qgf"])
def test_inference_mode_gives_the_same_bits(preset, wrap):
    make, read = WRAPS[wrap]
    case = make_case(PRESETS[preset])
    sampler = SteeredSampler(
        lambda obs, x, t: case.flow(read(obs), x, t),
        lambda obs, a: case.critic(read(obs), a),
        case.steering,
        posterior=lambda obs, e, x, t: case.posterior(read(obs), e, x, t),
    )
    expected = sampler(make(case.obs), case.noise, case.posterior_noise)
    with torch.inference_mode():
        eps = None if case.posterior_noise is None else case.posterior_noise.clone()
        obs, noise = make(case.obs.clone()), case.noise.clone()
        inside = sampler(obs, noise, eps)
        assert read(obs).is_inference()  # the caller's own is left alone
    assert torch.equal(inside, expected) and not inside.requires_grad
    assert torch.equal(sampler(obs, noise, eps), expected)  # made in there, read out here


def test_a_cached_inference_tensor_is_named():
    class Normalised(nn.Module):
        def __init__(self, critic):
            super().__init__()
            self.critic = critic
            with torch.inference_mode():
                self.register_buffer("scale", torch.ones(1))

        def forward(self, obs, actions):
            return self.critic(obs, actions * self.scale)

    case = make_case()
    critic = Normalised(case.critic)
    sampler = SteeredSampler(case.flow, critic, case.steering)
    with pytest.raises(RuntimeError, match=r"critic \(Normalised\).*inference_mode\(\): its scale\..*\.clone\(\)"):
        sampler(case.obs, case.noise)
    critic.scale = critic.scale.clone()  # the advice
    assert_close(sampler(case.obs, case.noise), case.expected())


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList])
def test_critics_in_a_list(kind):
    case = make_case(num_critics=1)
    other = make_case(seed=1, num_critics=1).critic
    both = SteeredSampler(case.flow, lambda o, a: torch.cat([case.critic(o, a), other(o, a)]), case.steering)
    sampler = SteeredSampler(case.flow, kind([case.critic, other]), case.steering)
    assert_close(sampler(case.obs, case.noise), both(case.obs, case.noise))
    assert {"critic.0.weights.0", "critic.1.weights.0"} <= set(sampler.state_dict())
    assert sampler.double().critic[1].weights[0].dtype == torch.float64


def test_another_signature():
    case = make_case(replace(Steering.qpilots_u(), jacobian="identity"))
    sampler = SteeredSampler(
        qf.as_flow(case.flow, call=lambda flow, obs, x, t: flow(obs, x, t)),
        qf.as_critic(case.critic, call=lambda critic, obs, actions: {"q": critic(obs, actions)}["q"].T),
        case.steering,
    )
    assert_close(sampler(case.obs, case.noise), case.expected())
    assert len(list(sampler.parameters())) == len([*case.flow.parameters(), *case.critic.parameters()])
    with pytest.raises(TypeError, match="as_critic: call is NoneType"):
        qf.as_critic(case.critic, call=None)


def test_several_modules_in_any_place():
    case = make_case(Steering.qpilots_m(), num_critics=1)
    other = make_case(Steering.qpilots_m(), seed=1, num_critics=1)
    flows, critics = [case.flow, other.flow], {"a": case.critic, "b": other.critic}

    def mean(first, second):
        return lambda *blocks: (first(*blocks) + second(*blocks)) / 2

    want = SteeredSampler(
        mean(case.flow, other.flow),
        lambda o, a: torch.cat([case.critic(o, a), other.critic(o, a)]),
        case.steering,
        posterior=mean(case.posterior, other.posterior),
    )(case.obs, case.noise, case.posterior_noise)
    sampler = SteeredSampler(
        qf.as_flow(flows, call=lambda ms, obs, x, t: (ms[0](obs, x, t) + ms[1](obs, x, t)) / 2),
        qf.as_critic(critics, call=lambda qs, obs, actions: [q(obs, actions) for q in qs.values()]),
        case.steering,
        posterior=qf.as_posterior(
            (case.posterior, other.posterior),
            call=lambda ms, obs, xbar, x, t: sum(m(obs, xbar, x, t) for m in ms) / len(ms),
        ),
    )
    assert_close(sampler(case.obs, case.noise, case.posterior_noise), want)
    keys = set(sampler.state_dict())
    assert {"flow.module.1.output.bias", "critic.module.b.biases.0", "posterior.module.0.output.bias"} <= keys
    assert sampler.double().flow.module[1].output.bias.dtype == torch.float64
    for make in (qf.as_flow, qf.as_posterior):
        with pytest.raises(TypeError, match=f"{make.__name__}: call is NoneType"):
            make(case.flow, call=None)


@pytest.mark.parametrize("name", ["flow", "critic", "posterior"])
@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList, lambda ms: nn.ModuleDict(zip("ab", ms)), "functions"])
def test_several_modules_without_a_call_say_the_cure(name, kind):
    case = make_case(Steering.qpilots_m(), num_critics=2)
    given = {"flow": case.flow, "critic": case.critic, "posterior": case.posterior}
    several = [given[name], copy.deepcopy(given[name])]
    if kind == "functions":
        several = [lambda *blocks, m=module: m(*blocks) for module in several]
    else:
        several = kind(several)

    def build(**replaced):
        networks = {**given, **replaced}
        return SteeredSampler(
            networks["flow"], networks["critic"], case.steering, posterior=networks["posterior"]
        )(case.obs, case.noise, case.posterior_noise)  # fmt: skip

    if name == "critic" and kind in (list, tuple, nn.ModuleList):
        return  # an ensemble
    with pytest.raises(TypeError, match=f"{name} is .*; expected a network or a callable.*as_{name}") as error:
        build(**{name: several})
    code = re.search(r": (qpilots_fast\.as_\w+\(.*\)), for one", str(error.value))[1]
    cured = eval(code, {"qpilots_fast": qf, name: several})
    assert_close(build(**{name: cured}), build(), scale=10)  # equal members: the same once more


def test_no_critic_in_a_list():
    case = make_case()
    with pytest.raises(ValueError, match="critic is an empty list; expected at least one critic"):
        SteeredSampler(case.flow, [], case.steering)


def test_a_list_with_a_forward_of_its_own_is_a_module():
    class Least(nn.ModuleList):
        def forward(self, obs, actions):
            return torch.stack([q(obs, actions).amin(0) for q in self]).amin(0)

    case = make_case(Steering.qgf(0.3), num_critics=1)
    critics = Least([case.critic, make_case(seed=1, num_critics=1).critic])
    sampler = SteeredSampler(case.flow, critics, case.steering)
    assert sampler.critic is critics
    assert_close(
        sampler(case.obs, case.noise), SteeredSampler(case.flow, critics.forward, case.steering)(case.obs, case.noise)
    )
    with pytest.raises(ValueError, match="Least cannot run as a packed critic"):
        qf.from_module(critics, "critic", obs_dim=7, action_dim=5)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: nn.DataParallel(torch.compile(m))]
)
def test_wrappers_of_packed_networks_are_taken_off(wrap):
    case = make_case()
    sampler = SteeredSampler(wrap(case.flow), wrap(case.critic), case.steering)
    assert sampler.explain(1).footprint is not None
    assert_close(sampler(case.obs, case.noise), case.expected())
    assert qf.from_module(wrap(case.flow), "flow") is case.flow
    critics = nn.ModuleList(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(2))
    assert qf.from_module([wrap(q) for q in critics], "critic", obs_dim=7, action_dim=5).spec.num_members == 2


def as_functions(case, wrap=lambda function: function):
    """The case's networks behind functions of which nothing is known."""

    def function_of(network):
        return wrap(lambda *inputs: network(*inputs))

    return {name: function_of(getattr(case, name)) for name in ("flow", "critic", "posterior")}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("preset", ["qpilots_u", "qpilots_u_identity", "qpilots_m", "glass", "gaf", "best_of_n"])
def test_autocast_is_for_the_networks_alone(preset, mode):
    """Its result is that of networks which cast by themselves; the loop's own numbers stay float32."""
    case = make_case(PRESETS[preset], hidden_dims=(64, 48), num_steps=4)
    given = case.obs, case.noise, case.posterior_noise

    def casting(function):
        return lambda *inputs: torch.autocast("cpu", dtype=torch.bfloat16)(function)(*inputs)

    inside, plain = (
        SteeredSampler(**as_functions(case, wrap), steering=case.steering, num_steps=4)
        for wrap in (casting, lambda function: function)
    )
    expected, known = inside(*given, return_info=True)
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        actions, info = plain(*given, return_info=True)
    assert torch.equal(actions, expected) and torch.equal(info.gradient_norms, known.gradient_norms)
    assert actions.dtype == info.gradient_norms.dtype == torch.float32
    assert_close(actions, case.expected(), "bfloat16")
    assert not torch.equal(actions, plain(*given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("preset", ["qpilots_u", "qpilots_m", "noisy"])
def test_outputs_of_another_dtype(preset, dtype):
    case = make_case(PRESETS[preset], num_steps=4)
    sampler = SteeredSampler(
        **as_functions(case, lambda function: lambda *inputs: function(*inputs).to(dtype)), steering=case.steering,
        num_steps=4,
    )  # fmt: skip
    actions, info = sampler(case.obs, case.noise, case.posterior_noise, return_info=True)
    assert actions.dtype == info.q_values.dtype == torch.float32
    assert_close(actions, case.expected(), "bfloat16" if dtype == torch.bfloat16 else "float32")


@pytest.mark.parametrize("called", ["flow", "critic", "posterior"])
def test_packed_networks_in_float64_beside_a_callable_in_float32(called):
    case = make_case(PRESETS["qpilots_m"], num_steps=4)
    networks = {"flow": case.flow, "critic": case.critic, "posterior": case.posterior}
    function = networks[called]
    networks[called] = lambda *inputs: function(*inputs)
    sampler = SteeredSampler(**networks, steering=case.steering, num_steps=4, precision="float64")
    assert_close(sampler(case.obs, case.noise, case.posterior_noise), case.expected())


def test_compiled_networks_are_not_compiled_at_every_step():
    case = make_case(hidden_dims=(8,))
    frames = CompileCounter()
    compiled = as_functions(case, lambda function: torch.compile(function, backend=frames, dynamic=False))
    sampler = SteeredSampler(**compiled, steering=case.steering)
    for _ in range(2):
        assert_close(sampler(case.obs, case.noise), case.expected())
    assert frames.frame_count == 3  # the flow with and without a gradient, the critic


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_members_under_vmap(mode):
    case = make_case()
    members = [nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1)) for _ in range(3)]
    stacked = torch.func.stack_module_state(members)

    def critic(obs, actions):
        inputs = (torch.cat([obs, actions], -1),)
        return torch.vmap(lambda *state: torch.func.functional_call(members[0], state, inputs))(*stacked)

    one_by_one = SteeredSampler(case.flow, lambda o, a: [q(torch.cat([o, a], -1)) for q in members], case.steering)
    expected = one_by_one(case.obs, case.noise)
    functions = as_functions(case)
    with mode():
        assert_close(SteeredSampler(functions["flow"], critic, case.steering)(case.obs, case.noise), expected)


def test_noise_that_requires_a_gradient_is_taken_as_numbers():
    """A call is not tracked by autograd; a callable flow must not be taken to have lost this gradient."""
    case = make_case()
    sampler = SteeredSampler(lambda obs, x, t: case.flow(obs, x, t), case.critic, case.steering)
    expected = sampler(case.obs, case.noise)
    actions = sampler(case.obs, case.noise.clone().requires_grad_())
    assert torch.equal(actions, expected) and not actions.requires_grad
