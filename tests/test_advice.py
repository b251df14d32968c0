"""What errors advise, followed to the letter, gives right answers."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

import qpilots_fast
from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering, ops
from qpilots_fast.testing import assert_close
from tests.own_modules import A, Flow, H, S, mlp

B = 5


class Q(nn.Module):
    def __init__(self, act=nn.SiLU):
        super().__init__()
        self.q = mlp(S + A, 1, act)

    def forward(self, obs, actions):
        return self.q(torch.cat([obs, actions], -1))


class Odd(Q):
    """One that from_module refuses."""

    def forward(self, obs, actions):
        return torch.cos(super().forward(obs, actions))


Q_OPAQUE = Odd()


def inputs():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(B, width, generator=generator) for width in (S, A))


# ---------------------------------------------------------------- the operators

OTHERWISE = r"(?:call|ask) it yourself: (.*)"


def advised(call, pattern: str) -> re.Match:
    with pytest.raises(TypeError) as error:
        call()
    found = re.search(pattern, str(error.value))
    assert found, str(error.value)
    return found


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_operators_take_wrappers_off(wrap):
    obs, x = inputs()
    flow, critic = FlowMLP(S, A, (H,)), CriticEnsemble(S, A, 2, (H,))
    assert torch.equal(ops.velocity(obs, x, 0.3, wrap(flow)), ops.velocity(obs, x, 0.3, flow))
    assert torch.equal(ops.critic_values(obs, x, wrap(critic)), ops.critic_values(obs, x, critic))
    assert torch.equal(ops.pessimistic_q(obs, x, wrap(critic)), ops.pessimistic_q(obs, x, critic))
    step = ops.steer_step(x, x, 0.3, 0.1, obs=obs, critic=critic)
    assert torch.equal(ops.steer_step(x, x, 0.3, 0.1, obs=obs, critic=wrap(critic)), step)
    with pytest.raises(TypeError, match="velocity: flow is CriticEnsemble, a packed critic; expected a packed flow"):
        ops.velocity(obs, x, 0.3, critic)


@pytest.mark.parametrize("critics", [Q(), [Q(), Q()], nn.ModuleList([Q(), Q(), Q()])])
@pytest.mark.parametrize("aggregation", ["pessimistic", "mean", "min"])
def test_operators_say_how_to_pack(critics, aggregation):
    obs, x = inputs()
    flow, t = Flow(), torch.full((B, 1), 0.3)
    found = advised(lambda: ops.velocity(obs, x, 0.3, flow), r"flow = (qpilots_fast\.from_module\(.*?\))")
    packed = eval(found[1], {"qpilots_fast": qpilots_fast, "flow": flow})
    torch.testing.assert_close(ops.velocity(obs, x, 0.3, packed), flow(obs, x, t))

    found = advised(lambda: ops.critic_values(obs, x, critics), r"critic = (qpilots_fast\.from_module\(.*?\))")
    packed = eval(found[1], {"qpilots_fast": qpilots_fast, "critic": critics})
    members = list(critics) if isinstance(critics, (list, nn.ModuleList)) else [critics]
    q_values = torch.cat([q(obs, x) for q in members], -1).T
    torch.testing.assert_close(ops.critic_values(obs, x, packed), q_values)
    want = {"mean": q_values.mean(0), "min": q_values.amin(0)}
    want["pessimistic"] = q_values.mean(0) - 0.5 * q_values.std(0, unbiased=False)
    torch.testing.assert_close(ops.pessimistic_q(obs, x, packed, aggregation=aggregation), want[aggregation])


@pytest.mark.parametrize("critic", [Odd(), [Odd(), Odd()], nn.ModuleList([Odd()] * 3), lambda obs, a: Q_OPAQUE(obs, a)])
def test_operators_say_what_to_do_without(critic):
    obs, actions = inputs()
    flow, t = Flow(nn.Hardswish), torch.full((B, 1), 0.3)
    names = {"qpilots_fast": qpilots_fast, "obs": obs, "actions": actions, "noisy_actions": actions, "t": t}
    names |= {"flow": flow, "critic": critic}
    exec(advised(lambda: ops.velocity(obs, actions, t, flow), OTHERWISE)[1], names)
    assert torch.equal(names["velocity"], flow(obs, actions, t))
    exec(advised(lambda: ops.critic_values(obs, actions, critic), OTHERWISE)[1], names)
    members = critic if isinstance(critic, (list, nn.ModuleList)) else [critic]
    q_values = torch.cat([q(obs, actions) for q in members], -1).T
    assert torch.equal(names["q_values"], q_values)
    exec(advised(lambda: ops.pessimistic_q(obs, actions, critic, 0.7), OTHERWISE)[1], names)
    want = q_values.mean(0) - 0.7 * q_values.std(0, unbiased=False)
    torch.testing.assert_close(names["q_bar"], want)


@pytest.mark.parametrize("critics", [Q(), [Q(), Q(), Q()]])
@pytest.mark.parametrize("convention", ["noise_at_zero", "noise_at_one"])
@pytest.mark.parametrize(
    ("steering", "bounds"),
    [
        (Steering.qpilots_u(0.7, jacobian="identity", rho=0.9), {}),
        (Steering.qpilots_u(0.7, jacobian="identity"), {"action_low": None, "action_high": None}),
        (Steering.qpilots_u(0.7, jacobian="identity"), {"action_low": -0.5, "action_high": None}),
        (Steering(alpha=0.7, estimate="noisy", clip="none", aggregation="min"), {}),
        (Steering(alpha=0.7, jacobian="identity", aggregation="mean", steered_dims=(0, 2)), {}),
    ],
)
@pytest.mark.parametrize("op", [ops.steer_step, ops.steer_velocity])
def test_steps_say_how_to_take_the_gradient(op, critics, convention, steering, bounds):
    """With a critic that could be packed, the advice for one that cannot gives what the packed one gives."""
    obs, x = inputs()
    v, t = 2 * x.flip(0), 0.4
    keys = {"steering": steering, "convention": convention, **bounds}
    times = (t, 0.1 if convention == "noise_at_zero" else -0.1) if op is ops.steer_step else (t,)
    found = advised(
        lambda: op(x, v, *times, obs=obs, critic=critics, **keys),
        rf"call {op.__name__}\(\.\.\., q_grad=q_grad\) without obs and critic: (.*)",
    )
    names = {"qpilots_fast": qpilots_fast, "torch": torch, "obs": obs, "critic": critics, "x": x, "v": v, "t": t}
    exec(found[1], names)
    packed = qpilots_fast.from_module(critics, "critic", obs_dim=S, action_dim=A)
    want = op(x, v, *times, obs=obs, critic=packed, **keys)
    assert_close(op(x, v, *times, q_grad=names["q_grad"], **keys), want)
    assert (want - op(x, v, *times, q_grad=0 * x, **keys)).abs().max() > 1e-3


def test_steps_of_other_scales_say_that_there_is_no_way_around():
    obs, x = inputs()
    steering = Steering.qgf(0.3)
    advised(
        lambda: ops.steer_step(x, x, 0.3, 0.1, obs=obs, critic=Odd(), steering=steering), "SteeredSampler takes any"
    )
    sampler = qpilots_fast.SteeredSampler(lambda obs, x, t: x, Odd(), steering)
    assert sampler(obs, x).shape == (B, A)


# ---------------------------------------------------------------- from_module: how a sampler takes it all the same


class Changed(nn.Module):
    """A module whose inputs or output are changed on the way."""

    def __init__(self, inner, before=lambda *blocks: blocks, after=lambda output: output):
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, *blocks):
        return self.after(self.inner(*self.before(*blocks)))


class Joined(Changed):
    """One that takes one tensor of columns."""

    def forward(self, columns):
        return self.after(self.inner(columns))


class Map(nn.Module):
    def __init__(self, act=nn.SiLU):
        super().__init__()
        self.net = mlp(S + 2 * A + 3, A, act)

    def forward(self, obs, xbar, x, t, s, u):
        return xbar + (u - s) * self.net(torch.cat([obs, xbar, x, t, s, u], -1))


class Uncopied(Q):
    def __deepcopy__(self, memo):
        raise RuntimeError("not now")


class TwoNorms(Q):
    def __init__(self, *norms):
        super().__init__()
        self.q.insert(1, nn.Sequential(*norms))


class FlatTimes(Flow):
    def forward(self, obs, x, t):
        assert t.ndim == 1
        return torch.cos(super().forward(obs, x, t[:, None]))


class Swapped(Q):
    def forward(self, action, state, temperature=1.0):
        return super().forward(state, action)


class Chunked(Q):
    def forward(self, obs, actions):
        return torch.cos(super().forward(obs, actions.flatten(1)))


class OneTime(Flow):
    """Its time is one number for all rows, as a sampler gives it."""

    def forward(self, obs, x, t):
        assert (t == t[0]).all()
        return super().forward(obs, x, t) * t[0].item()


class DictObs(Q):
    def forward(self, obs, actions):
        return super().forward(obs["state"], actions)


def last_layer(width, net=None):
    return Changed(net or mlp(S + A, width), before=lambda obs, a: (torch.cat([obs, a], -1),))


def mean_of_heads(obs, a, module):
    return module(obs, a).softmax(-1) @ torch.linspace(-2.0, 2.0, 51)


# module, kind, reason, and the network as a function of what a sampler gives, where this is not the module itself
WAYS = {
    "another activation": (Q(nn.Hardswish), "critic", "no known activation", None),
    "a flow's": (Flow(nn.Hardswish), "flow", "no known activation", None),
    "a cosine after": (Changed(Q(), after=torch.cos), "critic", "outputs differ", None),
    "clipped": (Changed(Q(), before=lambda o, a: (o, a.clamp(-1, 1))), "critic", "none of the inputs", None),
    "no hidden layer": (last_layer(1, nn.Linear(S + A, 1)), "critic", "no hidden layer", None),
    "another norm": (TwoNorms(nn.GroupNorm(2, H)), "critic", "no known activation", None),
    "a head": (
        last_layer(51), "critic", "51 outputs, expected 1", lambda m: lambda o, a: mean_of_heads(o, a, m),
    ),
    "a dict": (Changed(Q(), after=lambda q: {"loss": 0, "q": q}), "critic", "it returns dict",
               lambda m: lambda o, a: m(o, a)["q"]),
    "a dict of two": (Changed(Q(), after=lambda q: {"q1": q, "v": 0, "q2": q + 1}), "critic", "it returns dict",
                      lambda m: lambda o, a: [m(o, a)["q1"], m(o, a)["q2"]]),
    "a tuple": (Changed(Flow(), after=lambda v: ("log", v)), "flow", "it returns tuple of str",
                lambda m: lambda *blocks: m(*blocks)[1]),
    "columns": (Joined(mlp(S + A, 1), after=torch.cos), "critic", "outputs differ",
                lambda m: lambda o, a: m(torch.cat([o, a], -1))),
    "a flow's columns": (Joined(mlp(S + A + 1, A), after=torch.cos), "flow", "outputs differ",
                         lambda m: lambda *blocks: m(torch.cat(blocks, -1))),
    "columns of a list": (nn.ModuleList([Joined(mlp(S + A, 1), after=torch.cos) for _ in range(2)]), "critic",
                          "outputs differ", lambda m: lambda o, a: [q(torch.cat([o, a], -1)) for q in m]),
    "a list": (nn.ModuleList([Odd(), Odd()]), "critic", "outputs differ", lambda m: lambda *b: [q(*b) for q in m]),
    "members that differ": (nn.ModuleList([Q(), Q(nn.ReLU)]), "critic", "differs within the network",
                            lambda m: lambda *b: [q(*b) for q in m]),
    "flat times": (FlatTimes(), "flow", "outputs differ", lambda m: lambda o, x, t: m(o, x, t[:, 0])),
    "a map": (Map(nn.Hardswish), "meta_flow_map", "no known activation",
              lambda m: lambda *b: m(*b, torch.zeros(len(b[0]), 1), torch.ones(len(b[0]), 1))),
    "swapped": (Swapped(), "critic", r"forward takes \(action, state, temperature\)", lambda m: lambda o, a: m(a, o)),
    "swapped in a list": (nn.ModuleList([Swapped(), Swapped()]), "critic", "forward takes",
                          lambda m: lambda o, a: [q(a, o) for q in m]),
    "one time": (OneTime(), "flow", "could not be called", None),
    "no copy": (Uncopied(), "critic", "cannot be copied", None),
}  # fmt: skip


def followed(message: str, kind: str, module, **names):
    """What the message says to give the sampler in place of the module."""
    name = {"flow": "flow", "critic": "critic", "meta_flow_map": "posterior"}[kind]
    code = re.search(rf"(qpilots_fast\.as_{name}\(module, call=lambda .*?\))(?:\.$| with |, which )", message)
    if code is None or ("give it to SteeredSampler as it is" in message and "head" not in names):
        assert re.search("[gG]ive it to SteeredSampler as it is", message), message
        return module
    if "head" in names:
        head = re.search(r"with head = (qpilots_fast\.heads\.\w+\(v_min, v_max, \d+\))", message)[1]
        names["head"] = eval(head, {"qpilots_fast": qpilots_fast, "v_min": -2.0, "v_max": 2.0})
        code = re.search(r"logits over atoms, give (.*) with head", message)
    return eval(code[1], {"qpilots_fast": qpilots_fast, "torch": torch, "module": module, **names})


@pytest.mark.parametrize("way", list(WAYS))
def test_what_cannot_be_packed_runs_as_advised(way):
    module, kind, reason, function = WAYS[way]
    with pytest.raises(ValueError, match=reason) as error:
        qpilots_fast.from_module(module, kind, obs_dim=S, action_dim=A)
    names = {"head": None} if way == "a head" else {}
    advised = followed(str(error.value), kind, module, **names)
    as_it_is = function is None or way.endswith("differ") or way == "a list" or "columns" in way
    assert (advised is module) is as_it_is
    assert_close(actions_of(kind, advised), actions_of(kind, function(module) if function else lambda *b: module(*b)))


def actions_of(kind, network):
    """Of a sampler with this network in its place."""
    torch.manual_seed(0)
    flow, critic, posterior = FlowMLP(S, A, (H,)), CriticEnsemble(S, A, 2, (H,)), None
    steering = Steering.qpilots_u(0.5)
    if kind == "meta_flow_map":
        posterior, steering = network, Steering.qpilots_m(0.5)
    flow, critic = (network if kind == "flow" else flow), (network if kind == "critic" else critic)
    sampler = SteeredSampler(flow, critic, steering, posterior=posterior, num_steps=3)
    eps = torch.randn(3, B, 4, A) if posterior is not None else None
    actions = sampler(*inputs(), eps)
    assert (actions - inputs()[1].clamp(-1, 1)).abs().max() > 1e-3
    return actions


def test_chunks_run_as_advised():
    module = Chunked()
    with pytest.raises(ValueError, match="outputs differ") as error:
        qpilots_fast.from_module(module, "critic", obs_dim=S, chunk_shape=(2, 2))
    assert followed(str(error.value), "critic", module) is module
    flow = lambda obs, x, t: x - obs[:, :4].unflatten(1, (2, 2))  # noqa: E731
    sampler, opaque = (
        SteeredSampler(flow, critic, Steering.qpilots_u(), chunk_shape=(2, 2))
        for critic in (module, lambda *b: module(*b))
    )
    assert_close(sampler(*inputs()), opaque(*inputs()))


def test_modules_of_other_obs_run_as_advised(caplog):
    module = DictObs()
    with pytest.raises(ValueError, match=r"could not be called.*Where its obs are no tensors, give it to") as error:
        qpilots_fast.from_module(module, "critic", **DIMS)
    assert followed(str(error.value), "critic", module) is module
    flow = lambda obs, x, t: x - obs["state"][:, :A]  # noqa: E731
    caplog.set_level("INFO", "qpilots_fast")
    got, want = (
        SteeredSampler(flow, critic, Steering.qpilots_u())({"state": inputs()[0]}, inputs()[1])
        for critic in (module, lambda *b: module(*b))
    )
    assert_close(got, want)
    assert "as_critic" not in caplog.text and "runs as a callable" in caplog.text


def test_the_call_given_as_a_hint_is_that_of_a_callable_too():
    module = Changed(Q(nn.Hardswish), after=lambda q: {"q": q})
    call = lambda module, obs, actions: module(obs, actions)["q"]  # noqa: E731
    with pytest.raises(ValueError, match="no known activation") as error:
        qpilots_fast.from_module(module, "critic", obs_dim=S, action_dim=A, call=call)
    code = re.search(r"(qpilots_fast\.as_critic\(module, call=call\))", str(error.value))[1]
    advised = eval(code, {"qpilots_fast": qpilots_fast, "module": module, "call": call})
    assert_close(actions_of("critic", advised), actions_of("critic", lambda *b: module(*b)["q"]))


@pytest.mark.parametrize("kind", ["flow", "critic"])
def test_what_has_no_gradient_says_so(kind):
    module = Changed({"flow": Flow, "critic": Q}[kind](), before=lambda o, a, *t: (o, a.detach(), *t))
    with pytest.raises(
        ValueError, match=r"gradient with respect to .* differ.*let autograd see how its output"
    ) as error:
        qpilots_fast.from_module(module, kind, obs_dim=S, action_dim=A)
    if kind == "flow":
        assert "With jacobian='identity' SteeredSampler runs it as it is" in str(error.value)
        identity = Steering.qpilots_u(0.5, jacobian="identity")
        critic = CriticEnsemble(S, A, 2, (H,))
        got, want = (SteeredSampler(f, critic, identity)(*inputs()) for f in (module, lambda *b: module.inner(*b)))
        assert_close(got, want)
    module.before = lambda *blocks: blocks  # the advice
    assert qpilots_fast.from_module(module, kind, obs_dim=S, action_dim=A).spec.kind == kind


# ---------------------------------------------------------------- from_module: what a hint or an edit cures


class Stacked(nn.Module):
    """Weights as plain tensors, whose names say nothing."""

    def __init__(self, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.z, self.a = nn.Parameter(torch.randn(2, S + A, H)), nn.Parameter(torch.randn(2, H, 1))
        self.n, self.m = nn.Parameter(torch.rand(2, 1, H)), nn.Parameter(torch.randn(2, 1, H))

    def forward(self, obs, actions):
        h = torch.cat([obs, actions], -1) @ self.z
        return torch.relu(nn.functional.layer_norm(h, (H,), eps=self.eps) * self.n + self.m) @ self.a


class SinusoidalFlow(Flow):
    """256 columns of time that follow from a width that nobody says."""

    def __init__(self):
        nn.Module.__init__(self)
        self.net = mlp(S + A + 10, A)

    def forward(self, obs, x, t):
        angles = t * torch.arange(5, dtype=t.dtype)
        return self.net(torch.cat([obs, x, angles.cos(), angles.sin()], -1))


def lazy():
    return last_layer(1, nn.Sequential(nn.LazyLinear(H), nn.ReLU(), nn.LazyLinear(1)))


DIMS = {"obs_dim": S, "action_dim": A}

# what is tried, with which hints, the reason, and what the message says to do: (module) -> (module, hints)
CURES = {
    "dims": (Q, "critic", {}, r"obs_dim and action_dim cannot be told .*; give the hint\(s\)", lambda m: (m, DIMS)),
    "one dim": (lambda: Stacked(), "critic", {"obs_dim": S}, r"action_dim cannot be told", lambda m: (m, DIMS)),
    "time's width": (
        SinusoidalFlow,
        "flow",
        {"obs_dim": S},
        "other than obs_dim=6 for obs; give the hints obs_dim and",
        lambda m: (m, DIMS),
    ),
    "dims that do not fit": (
        lambda: Joined(mlp(S + A, 1)),
        "critic",
        {"action_dim": 99},
        "give both hints, obs_dim and",
        lambda m: (m, DIMS),
    ),
    "dropout": (
        lambda: TwoNorms(nn.Dropout(0.5)),
        "critic",
        DIMS,
        r"call \.eval\(\) or set p=0 first",
        lambda m: (m.eval(), DIMS),
    ),
    "dropout at 0": (
        lambda: TwoNorms(nn.Dropout(0.5)),
        "critic",
        DIMS,
        r"call \.eval\(\) or set p=0 first",
        lambda m: (setattr(m.q[1][0], "p", 0.0), (m, DIMS))[1],
    ),
    "input_order": (
        Q,
        "critic",
        {**DIMS, "input_order": ("actions", "obs")},
        "Leave the hint out",
        lambda m: (m, DIMS),
    ),
    "arguments": (
        lambda: Changed(Q(), before=lambda both: (both["o"], both["a"])),
        "critic",
        DIMS,
        "give the hint call where it takes other arguments",
        lambda m: (m, {**DIMS, "call": lambda m, obs, a: m({"o": obs, "a": a})}),
    ),
    "a flow's output": (
        lambda: Changed(Flow(), after=lambda v: {"v": v}),
        "flow",
        DIMS,
        r"returns dict.*use the hint call",
        lambda m: (m, {**DIMS, "call": lambda m, *blocks: m(*blocks)["v"]}),
    ),
    "a critic's output": (
        lambda: Changed(Q(), after=lambda q: {"q": q}),
        "critic",
        DIMS,
        r"returns dict.*use the hint call",
        lambda m: (m, {**DIMS, "call": lambda m, *blocks: m(*blocks)["q"]}),
    ),
    "lazy": (
        lazy,
        "critic",
        DIMS,
        "has no shape yet. Call the module once on a batch",
        lambda m: (m(*inputs()), (m, DIMS))[1],
    ),
    "meta": (
        lambda: last_layer(1).to("meta"),
        "critic",
        DIMS,
        r"Give them values first: module\.to_empty\(device='cpu'\)",
        lambda m: (initialised(m.to_empty(device="cpu")), DIMS),
    ),
    "names": (
        Stacked,
        "critic",
        {**DIMS, "weights": ["w0", "a"]},
        r"names w0, which .* \(it has z, a, n, m\)",
        lambda m: (m, {**DIMS, "weights": ["z", "a"], "norm_weights": ["n"], "norm_biases": ["m"]}),
    ),
    "too many": (
        Stacked,
        "critic",
        {**DIMS, "weights": ["z", "a"], "norm_weights": ["n", "m"]},
        "has 2 entries, expected at",
        lambda m: (m, {**DIMS, "weights": ["z", "a"], "norm_weights": ["n"], "norm_biases": ["m"]}),
    ),
    "none": (
        Stacked,
        "critic",
        {**DIMS, "weights": ["z", None]},
        "the hint weights has an entry None",
        lambda m: (m, {**DIMS, "weights": ["z", "a"], "norm_weights": ["n"], "norm_biases": ["m"]}),
    ),
}


def initialised(module):
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return module


@pytest.mark.parametrize("cure", list(CURES))
def test_what_a_hint_or_an_edit_cures(cure):
    make, kind, hints, reason, follow = CURES[cure]
    module = make()
    with pytest.raises(ValueError, match=reason):
        qpilots_fast.from_module(module, kind, **hints)
    module, hints = follow(module)
    packed = qpilots_fast.from_module(module, kind, **hints)
    obs, actions = inputs()
    if kind == "flow":
        torch.testing.assert_close(
            ops.velocity(obs, actions, 0.3, packed), packed(obs, actions, 0.3), rtol=1e-4, atol=1e-4
        )
    else:
        torch.testing.assert_close(ops.critic_values(obs, actions, packed), packed(obs, actions), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_list", [False, True])
def test_the_call_of_swapped_arguments_cures(in_list):
    module = nn.ModuleList([Swapped(), Swapped()]) if in_list else Swapped()
    with pytest.raises(ValueError, match=r"Give the hint call=") as error:
        qpilots_fast.from_module(module, "critic", **DIMS)
    call = eval(re.search(r"Give the hint call=(lambda .*?); or,", str(error.value))[1])
    packed = qpilots_fast.from_module(module, "critic", **DIMS, call=call)
    obs, actions = inputs()
    members = module if in_list else [module]
    torch.testing.assert_close(
        ops.critic_values(obs, actions, packed), torch.cat([q(actions, obs) for q in members], -1).T
    )


class Turned(Flow):
    def forward(self, noisy_actions, obs, t):
        return super().forward(obs, noisy_actions, t)


class Denoiser(Flow):
    def forward(self, sample, timestep, obs, _guidance=None):
        return super().forward(obs, sample, timestep)


class Conditioned(Flow):
    def forward(self, x, t, cond):
        return super().forward(cond, x, t)


OTHER_ORDERS = {
    "flow": (Turned(), "flow"),
    "flow, time in the middle": (Denoiser(), "flow"),
    "critic": (Swapped(), "critic"),
    "critic, compiled": (torch.compile(Swapped(), backend="eager"), "critic"),
    "critics": ([Swapped(), Swapped()], "critic"),
    "critics, wrapped": (nn.ModuleList([nn.DataParallel(Swapped()), Swapped()]), "critic"),
}
BY_NAME = {
    Turned: lambda m: lambda o, x, t: m(x, o, t),
    Denoiser: lambda m: lambda o, x, t: m(x, t, o),
    Conditioned: lambda m: lambda o, x, t: m(x, t, o),
}


@pytest.mark.parametrize("which", list(OTHER_ORDERS))
def test_arguments_named_in_another_order_are_refused_and_run_as_advised(which):
    module, kind = OTHER_ORDERS[which]
    with pytest.raises(
        ValueError, match=r"its forward takes .* is called with \(obs, .*; expected that order"
    ) as error:
        actions_of(kind, module)
    cured = actions_of(kind, _cured(str(error.value), kind, module))
    if kind == "flow":
        meant = BY_NAME[type(module)](module)
    else:
        members = list(module) if isinstance(module, (list, nn.ModuleList)) else [module]
        meant = lambda o, a: [q(a, o) for q in members]  # noqa: E731
    assert_close(cured, actions_of(kind, meant))


def test_arguments_whose_names_say_little_are_warned_of_once():
    module = Conditioned()
    with pytest.warns(UserWarning, match=r"forward takes \(x, t, cond\)") as said:
        SteeredSampler(module, None, Steering.unsteered())
    assert len(said) == 1
    advised = _cured(str(said[0].message), "flow", module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SteeredSampler(advised, None, Steering.unsteered())
    assert_close(actions_of("flow", advised), actions_of("flow", BY_NAME[Conditioned](module)))


@pytest.mark.parametrize("names", ["o, a", "x, a", "input, other", "obs, action, state=None", "*blocks"])
def test_names_that_fit_are_not_warned_of(names):
    made: dict = {}
    exec(f"def forward(self, {names}): return self.q(torch.ones(5, self.width))", {"torch": torch}, made)
    module = type("Named", (Q,), made)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SteeredSampler(lambda o, x, t: -x, module, Steering.qpilots_u())


def _cured(message: str, kind: str, module):
    code = re.search(rf"qpilots_fast\.as_{kind}\(module, call=lambda [^:]*: \[?\w+\(.*?\).*?\)", message)[0]
    return eval(code, {"qpilots_fast": qpilots_fast, "module": module})


# ---------------------------------------------------------------- the sampler


def opaque(network):
    return lambda *blocks: network(*blocks)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return FlowMLP(S, A, (H,)), CriticEnsemble(S, A, 2, (H,))


@pytest.mark.parametrize("wrap", [lambda critic: critic, opaque])
@pytest.mark.parametrize(
    "as_dict",
    [
        lambda q: {"loss": 0.0, "q_values": q},
        lambda q: {"q1": q[0], "v": q.mean(0), "q2": q[1]},
    ],
    ids=["of all", "of each"],
)
def test_a_critics_dict_is_taken_apart_as_advised(wrap, as_dict, networks):
    flow, q = networks
    critic = wrap(Changed(q, after=as_dict))
    with pytest.raises(TypeError, match="critic returned dict") as error:
        SteeredSampler(flow, critic, Steering.qpilots_u())(*inputs())
    code = re.search(r"(qpilots_fast\.as_critic\(.*\))\.$", str(error.value))[1]
    advised = eval(code, {"qpilots_fast": qpilots_fast, "critic": critic})
    got, want = (SteeredSampler(flow, c, Steering.qpilots_u())(*inputs()) for c in (advised, opaque(q)))
    assert_close(got, want)


def test_a_flow_without_a_gradient_is_steered_as_advised(networks):
    flow, critic = networks
    detached = lambda obs, x, t: flow(obs, x, t).detach()  # noqa: E731
    with pytest.raises(RuntimeError, match=r"flow's output does not depend .* or use jacobian='identity'"):
        SteeredSampler(detached, critic, Steering.qpilots_u())(*inputs())
    identity = Steering.qpilots_u(jacobian="identity")
    got, want = (SteeredSampler(f, critic, identity)(*inputs()) for f in (detached, flow))
    assert_close(got, want)


def test_obs_that_packed_networks_do_not_read_are_given_as_advised(networks):
    flow, critic = networks
    obs, noise = inputs()
    sampler = SteeredSampler(flow, critic, Steering.qpilots_u())
    want = sampler(obs, noise)
    with pytest.raises(
        TypeError, match=r"obs is dict, .*: give the tensor itself \(obs\['state'\], say\), or give flow and"
    ):
        sampler({"state": obs}, noise)
    reads = SteeredSampler(
        lambda obs, x, t: flow(obs["state"], x, t), lambda obs, a: critic(obs["state"], a), Steering.qpilots_u()
    )
    assert_close(reads({"state": obs}, noise), want)
    with pytest.raises(TypeError, match=r"obs is list, .*: give torch\.as_tensor\(obs\)"):
        sampler(obs.tolist(), noise)
    assert_close(sampler(torch.as_tensor(obs.tolist()), noise), want)
    with pytest.raises(TypeError, match=r"obs\.float\(\) of a tensor, obs\.astype\('float32'\) of an array"):
        sampler(obs.long(), noise)
    want = sampler(obs.trunc(), noise)
    assert_close(sampler(obs.long().float(), noise), want)
    assert_close(sampler(obs.long().numpy().astype("float32"), noise), want)
    with pytest.raises(ValueError, match=r"give noise \[B, A\]"):
        reads({"state": obs})


def test_drawn_noise_of_callables_has_the_width_advised(networks):
    flow, critic = (opaque(network) for network in networks)
    advised = (
        r"give noise \[B, A\], or the sampler bounds of that width \(action_low=\[-1\.0\] \* A\), or, .* a chunk_shape"
    )
    with pytest.raises(ValueError, match=advised):
        SteeredSampler(flow, critic, Steering.qpilots_u())(inputs()[0])
    bounded = SteeredSampler(flow, critic, Steering.qpilots_u(), action_low=[-1.0] * A)
    assert bounded(inputs()[0]).shape == (B, A)
    by_rows = lambda network: lambda obs, x, *t: network(obs, x.flatten(1), *t)  # noqa: E731
    sampler = SteeredSampler(
        lambda *b: by_rows(flow)(*b).unflatten(1, (1, A)), by_rows(critic), Steering.qpilots_u(), chunk_shape=(1, A)
    )
    assert sampler(inputs()[0]).shape == (B, 1, A)


def test_modes_are_set_or_left_as_advised():
    torch.manual_seed(0)
    module = TwoNorms(nn.Dropout(0.5)).eval()
    flow, packed = FlowMLP(S, A, (H,)), qpilots_fast.from_module(module, "critic", **DIMS)
    sampler = SteeredSampler(flow, packed, Steering.qpilots_u())
    want = sampler(*inputs())
    module.train()
    with pytest.raises(
        ValueError, match=r"call \.eval\(\) on the module before sampling, or give the sampler the module"
    ):
        sampler(*inputs())
    itself = SteeredSampler(flow, module, Steering.qpilots_u())
    assert not torch.equal(itself(*inputs()), itself(*inputs()))  # dropout
    module.eval()
    assert torch.equal(sampler(*inputs()), want) and torch.equal(itself(*inputs()), want)


def test_an_edited_module_is_read_again_as_advised():
    torch.manual_seed(0)
    module, flow = Q(), FlowMLP(S, A, (H,))
    packed = qpilots_fast.from_module(module, "critic", **DIMS)
    sampler = SteeredSampler(flow, packed, Steering.qpilots_u())
    sampler(*inputs())
    module.q[1], module.q[3] = nn.ReLU(), nn.ReLU()
    with pytest.raises(ValueError, match="call from_module again"):
        sampler(*inputs())
    sampler.critic = qpilots_fast.from_module(module, "critic", **DIMS)
    assert_close(sampler(*inputs()), SteeredSampler(flow, opaque(module), Steering.qpilots_u())(*inputs()))


def test_what_the_log_says_of_a_sequential_holds(caplog):
    """It runs as it is, on the joined columns, and so does what from_module advises."""
    caplog.set_level("INFO", "qpilots_fast")
    torch.manual_seed(0)
    flow, critic = FlowMLP(S, A, (H,)), mlp(S + A, 1, nn.Hardswish)
    sampler = SteeredSampler(flow, critic, Steering.qpilots_u())
    (line,) = [record.getMessage() for record in caplog.records if "critic" in record.getMessage()]
    assert line.startswith("critic Sequential runs as a callable: ")
    with pytest.raises(ValueError, match="Give it to SteeredSampler as it is: it runs as a callable"):
        qpilots_fast.from_module(critic, "critic", **DIMS)
    want = SteeredSampler(flow, lambda obs, a: critic(torch.cat([obs, a], -1)), Steering.qpilots_u())(*inputs())
    assert torch.equal(sampler(*inputs()), want)


def test_a_critic_that_overwrites_what_its_gradient_needs_is_told_so():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(S + A, H), nn.Linear(H, 1)

        def forward(self, obs, actions):
            hidden = torch.relu(self.first(torch.cat([obs, actions], -1)))
            q = self.last(hidden)
            hidden.clamp_(max=1)
            return q.squeeze(-1)

    with pytest.raises(ValueError, match=r"modified by an inplace operation.*let autograd see .*no write in place"):
        qpilots_fast.from_module(Overwriting(), "critic", obs_dim=S, action_dim=A)
