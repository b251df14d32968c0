"""Users' modules given to a sampler as they are: packed where from_module recognises them, callables where not."""

from __future__ import annotations

import copy
import io
import logging
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpilots_fast import (
    CriticEnsemble,
    FlowMLP,
    SteeredSampler,
    Steering,
    as_critic,
    as_flow,
    from_module,
    recognition,
)
from qpilots_fast.callables import name_of
from qpilots_fast.testing import assert_close
from tests.own_modules import A, Flow, H, S, mlp

B, K = 3, 4
U = Steering.qpilots_u(alpha=0.3)


class Q(nn.Module):
    def __init__(self, width=S + A):
        super().__init__()
        self.q = mlp(width, 1)

    def forward(self, obs, actions):
        return self.q(torch.cat([obs, actions], -1)).squeeze(-1)


class Map(nn.Module):
    """A meta flow map; what it returns for s = 0, u = 1 is the mapped point unless told otherwise."""

    def __init__(self, is_velocity=False):
        super().__init__()
        self.net, self.is_velocity = mlp(S + 2 * A + 3, A), is_velocity

    def forward(self, obs, xbar, x, t, s=None, u=None):
        s, u = torch.zeros_like(t) if s is None else s, torch.ones_like(t) if u is None else u
        vhat = self.net(torch.cat([obs, xbar, x, t, s, u], -1))
        return vhat if self.is_velocity else xbar + (u - s) * vhat


class Wave(Q):
    """Of an activation that no packed network has."""

    def forward(self, obs, actions):
        h = torch.cos(self.q[0](torch.cat([obs, actions], -1)))
        return self.q[4](torch.cos(self.q[2](h))).squeeze(-1)


def sampler_of(flow, critic, steering=U, **kwargs) -> SteeredSampler:
    return SteeredSampler(flow, critic, steering, num_steps=K, **kwargs)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(B, width, generator=generator, dtype=dtype) for width in (S, A))


def opaque(network):
    """The same as a callable that nothing can look into."""
    if network is None:
        return None
    return (lambda *blocks: [q(*blocks) for q in network]) if isinstance(network, list) else lambda *b: network(*b)


def assert_runs_as_given(sampler, flow, critic, posterior=None, packed=True, **kwargs) -> None:
    """The sampler's actions are those of the same modules as opaque callables, twice (the second call is quick)."""
    obs, noise = inputs()
    steering = sampler.steering
    draws = {}
    if steering.draws_posterior:
        generator = torch.Generator().manual_seed(2)
        draws = {"posterior_noise": torch.randn(K, B, steering.num_samples, A, generator=generator)}
    own = sampler_of(opaque(flow), opaque(critic), steering, posterior=opaque(posterior), **kwargs)
    expected = own(obs, noise, **draws)
    assert (expected - sampler_of(opaque(flow), None, Steering.unsteered())(obs, noise)).abs().max() > 1e-4
    for _ in range(2):
        assert_close(sampler(obs, noise, **draws), expected)
    assert is_packed(sampler) is packed


def is_packed(sampler) -> bool:
    return sampler.explain(1).footprint is not None


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "qpilots_fast")

    def take() -> list[str]:
        messages = [record.getMessage() for record in caplog.records if "runs" in record.getMessage()]
        caplog.clear()
        return messages

    return take


# ---------------------------------------------------------------- recognised


def test_modules_as_they_are(log):
    flow, critic = Flow(), Q()
    sampler = sampler_of(flow, critic)
    assert log() == [
        "flow Flow runs packed on native kernels (recognised by from_module)",
        "critic Q runs packed on native kernels (recognised by from_module)",
    ]
    assert_runs_as_given(sampler, flow, critic)
    assert sampler.flow is flow and sampler.critic is critic
    assert set(sampler.state_dict()) == {
        f"{n}.{k}" for n in ("flow", "critic") for k in sampler.__getattr__(n).state_dict()
    }
    assert {id(p) for p in sampler.parameters()} == {id(p) for m in (flow, critic) for p in m.parameters()}
    sampler.num_steps = K + 1
    sampler.double().float()
    assert not log()  # nothing new to say


def test_parameters_are_live():
    flow, critic = Flow(), Q()
    sampler = sampler_of(flow, critic)
    sampler(*inputs())
    for write in (
        lambda: [p.data.mul_(1.1) for p in flow.parameters()],
        lambda: critic.load_state_dict({name: value + 0.1 for name, value in critic.state_dict().items()}),
        lambda: setattr(flow.net[0], "weight", nn.Parameter(torch.randn(H, S + A + 1))),
        lambda: setattr(flow.net, "2", nn.Linear(H, H)),
        lambda: setattr(sampler, "critic", critic),
    ):
        write()
        assert_runs_as_given(sampler, flow, critic)
    sampler.double()
    assert sampler(*inputs(torch.float64)).dtype == torch.float64 and flow.net[0].weight.dtype == torch.float64


@pytest.mark.parametrize("preset", ["qpilots_m", "qgf", "best_of_n"])
def test_other_steering(preset):
    steering = {"qpilots_m": Steering.qpilots_m(), "qgf": Steering.qgf(0.5), "best_of_n": Steering.best_of_n(4)}[preset]
    flow, critics, posterior = Flow(), [Q(), Q()], Map()
    sampler = sampler_of(flow, critics, steering, posterior=posterior)
    assert_runs_as_given(sampler, flow, critics, posterior)
    info = sampler(*inputs(), return_info=True)[1]
    assert info.q_values.shape == (2, B)


@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList])
@pytest.mark.parametrize("wrap", [lambda q: q, nn.DataParallel, lambda q: torch.compile(q, backend="eager")])
def test_critics_in_a_list_are_an_ensemble(container, wrap, log):
    flow, critics = Flow(), [Q(), Q()]
    sampler = sampler_of(wrap(flow), container(map(wrap, critics)))
    assert log()[1].startswith("critic") and sampler.networks["critic"].spec.num_members == 2
    assert_runs_as_given(sampler, flow, critics)
    critics[1] = Q()
    sampler.critic[1] = wrap(critics[1])
    assert_runs_as_given(sampler, flow, critics)


@pytest.mark.parametrize("container", [list, nn.ModuleList])
def test_a_list_is_in_its_members_mode(container, log):
    critics = [nn.Sequential(nn.Linear(S + A, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, 1)) for _ in range(2)]
    flow, critic = Flow(), container(q.eval() for q in critics)
    sampler = sampler_of(flow, critic)
    assert_runs_as_given(sampler, flow, joined(critic))
    critics[1].train()
    sampler(*inputs())
    assert not is_packed(sampler) and "Sequential is in training mode" in sampler.explain(1).networks[1]
    critics[1].eval()
    assert_runs_as_given(sampler, flow, joined(critic))


@pytest.mark.parametrize("order", ["packed flow", "packed critic", "flow tells", "critic tells"])
def test_one_network_tells_the_widths_to_the_others(order):
    flow, critic = Flow(), Q()
    if order == "packed flow":
        flow = FlowMLP(S, A, (H,))
    elif order == "packed critic":
        critic = CriticEnsemble(S, A, 2, (H,))
    elif order == "critic tells":  # 7 columns of time: a flow whose obs_dim cannot be guessed
        flow = FourierFlow(6)
        critic.obs_dim, critic.action_dim = S, A
    assert_runs_as_given(sampler_of(flow, critic), flow, critic)


class FourierFlow(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net, self.frequencies = mlp(S + A + width, A), nn.Buffer(torch.arange(width / 2))

    def forward(self, obs, x, t):
        angles = t * self.frequencies
        return self.net(torch.cat([obs, x, angles.cos(), angles.sin()], -1))


def test_widths_that_nobody_tells(log):
    critic = Q()
    sampler = sampler_of(opaque(Flow()), critic)
    (line,) = log()
    assert "critic Q runs as a callable: obs_dim and action_dim cannot be told" in line
    assert "from_module(module, 'critic', ...)" in line and not is_packed(sampler)
    sampler.flow = FlowMLP(S, A, (H,))  # which tells them
    assert is_packed(sampler) and "packed" in log()[0]


def joined(network):
    """A module of one tensor, or a list of them, as a callable of the sampler's."""
    if isinstance(network, (list, nn.ModuleList)):
        return lambda *blocks: [q(torch.cat(blocks, -1)) for q in network]
    return lambda *blocks: network(torch.cat(blocks, -1))


def test_a_sequential_is_called_as_it_can_be():
    """Its one argument is the joined columns, packed or not."""
    flow, critic = mlp(S + A + 1, A), mlp(S + A, 1)
    sampler = sampler_of(flow, critic)
    assert_runs_as_given(sampler, joined(flow), joined(critic))
    critic[1] = nn.Softsign()
    assert_runs_as_given(sampler, joined(flow), joined(critic), packed=False)
    critic[1] = nn.ReLU()
    assert_runs_as_given(sampler, joined(flow), joined(critic))
    for module in (flow, critic):
        module.register_forward_hook(lambda *_: None)
    assert_runs_as_given(sampler, joined(flow), joined(critic), packed=False)
    with pytest.raises(TypeError, match=r"flow Sequential takes one tensor.*and obs is dict"):
        sampler({"state": inputs()[0]}, inputs()[1])


AT_TIME = replace(Steering.noisy(0.5), critic_time=True)
UNPACKED = {"PReLU": nn.PReLU, "GroupNorm": lambda: nn.GroupNorm(2, H)}


@pytest.mark.parametrize("layer", UNPACKED)
@pytest.mark.parametrize("container", [None, list, nn.ModuleList])
@pytest.mark.parametrize("packed_flow", [True, False])
def test_a_sequential_that_does_not_pack(layer, container, packed_flow):
    flow = Flow() if packed_flow else opaque(Flow())
    critics = [nn.Sequential(nn.Linear(S + A, H), UNPACKED[layer](), nn.Linear(H, 1)) for _ in range(2)]
    critic = critics[0] if container is None else container(critics)
    assert_runs_as_given(sampler_of(flow, critic), flow, joined(critic), packed=False)
    shown = {"chunk_shape": (2, A // 2)}
    chunked = sampler_of(flow if packed_flow else lambda o, x, t: x, critic, **shown)
    obs, noise = inputs()
    as_chunks = joined(critic)
    own = sampler_of(chunked.flow, lambda o, a: as_chunks(o, a.flatten(1)), **shown)
    assert torch.equal(chunked(obs, noise), own(obs, noise))
    timed = nn.Sequential(nn.Linear(S + A + 1, H), UNPACKED[layer](), nn.Linear(H, 1))
    assert_runs_as_given(sampler_of(flow, timed, AT_TIME), flow, joined(timed), packed=False)


def test_a_posterior_that_takes_columns_draws_at_0_and_1():
    flow, critic, posterior = Flow(), Q(), nn.Sequential(nn.Linear(S + 2 * A + 3, H), nn.PReLU(), nn.Linear(H, A))
    sampler = sampler_of(flow, critic, Steering.qpilots_m(), posterior=posterior)
    draw = lambda o, e, x, t: posterior(torch.cat([o, e, x, t, 0 * t, 0 * t + 1], -1))  # noqa: E731
    assert_runs_as_given(sampler, flow, critic, draw, packed=False)


def test_maps_that_return_the_velocity():
    """As a callable, what such a map returns is read as the mapped point: it must not be packed as something else."""
    flow, critic, posterior = Flow(), Q(), Map(is_velocity=True)
    sampler = sampler_of(flow, critic, Steering.qpilots_m(), posterior=posterior)
    assert_runs_as_given(sampler, flow, critic, posterior, packed=False)


# ---------------------------------------------------------------- life in a program


def pickled(sampler):
    buffer = io.BytesIO()
    torch.save(sampler, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_copies(clone):
    sampler = sampler_of(Flow(), [Q(), Q()])
    expected = sampler(*inputs())
    twin = clone(sampler)
    assert is_packed(twin) and torch.equal(twin(*inputs()), expected)
    twin.flow.net[0].bias.data.add_(1)
    assert torch.equal(sampler(*inputs()), expected) and not torch.equal(twin(*inputs()), expected)
    assert_runs_as_given(twin, twin.flow, list(twin.critic))
    twin.load_state_dict(sampler.state_dict())
    assert torch.equal(twin(*inputs()), expected)


def test_frozen():
    flow = Dropping(nn.Dropout(0.5))
    sampler = sampler_of(flow, Q()).eval().freeze()
    expected = sampler(*inputs())
    sampler.train()
    flow.a.weight.data.mul_(2)
    for _ in range(2):
        assert torch.equal(sampler(*inputs()), expected)
        sampler(*inputs(), return_info=True)
    assert is_packed(sampler) and not is_packed(sampler.unfreeze())


@pytest.fixture
def compiler():
    """A fresh one, that remembers nothing of these samplers."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled(compiler):
    sampler = sampler_of(Flow(), Q())
    compiled = torch.compile(sampler, backend="eager", fullgraph=True)
    assert_close(compiled(*inputs()), sampler(*inputs()))


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict, compiler):
    sampler = sampler_of(Flow(), Q())
    exported = torch.export.export(sampler, inputs(), strict=strict)
    assert_close(exported.module()(*inputs()), sampler(*inputs()))


def test_proved_once(monkeypatch):
    tried = []
    recognise = recognition.recognise
    monkeypatch.setattr(recognition, "recognise", lambda *a, **k: (tried.append(1), recognise(*a, **k))[1])
    flow, critics = Flow(), [Wave(), Wave()]
    for _ in range(3):
        sampler = sampler_of(flow, critics)
        sampler.steering = Steering.qgf(0.2)
        sampler(*inputs())
        sampler(*inputs(), return_info=True)
    assert len(tried) == 2
    with torch.no_grad():
        flow.net[0].weight.add_(1)
    sampler_of(flow, critics)
    sampler.half().float()
    assert len(tried) == 2
    critics[0].q[1] = nn.ReLU()
    sampler_of(flow, critics)
    assert len(tried) == 3


def test_a_critic_of_noised_actions_is_asked_with_the_time(log):
    class Timed(Q):
        def forward(self, obs, actions, t=None):
            q = super().forward(obs, actions)
            return q if t is None else q * (1 + t[:, 0])

    critic, flow = Timed(), Flow()
    sampler = sampler_of(flow, critic)
    assert_runs_as_given(sampler, flow, critic)
    sampler.steering = AT_TIME
    assert_runs_as_given(sampler, flow, critic, packed=False)
    sampler.steering = U
    assert_runs_as_given(sampler, flow, critic)


def test_a_module_edited_again_and_again_is_left_alone(monkeypatch, log):
    monkeypatch.setattr(recognition, "MOST_TRIALS", 3)
    flow, critic = Flow(), Q()
    sampler = sampler_of(flow, critic)
    for act in (nn.ReLU, nn.Tanh, nn.GELU):
        flow.net = mlp(S + A + 1, A, act)
        assert_runs_as_given(sampler, flow, critic, packed=act is not nn.GELU)
    assert "edited 3 times" in log()[-1]


def test_modules_are_not_kept_alive():
    import gc
    import weakref

    flow = Flow()
    ref = weakref.ref(flow)
    sampler = sampler_of(flow, Q())
    sampler(*inputs())
    del flow, sampler
    gc.collect()
    assert ref() is None


def test_recognition_leaves_no_trace():
    calls = []

    class Counted(Flow):
        def forward(self, obs, x, t):
            self.count = getattr(self, "count", 0) + 1
            return super().forward(obs, x, t)

    flow = Counted().train()
    flow.net[1].eval()
    flow.register_buffer("idle", torch.zeros(3))
    hooked = Q()
    hooked.register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    sampler = sampler_of(flow, hooked)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    assert not hasattr(flow, "count") and not calls
    assert flow.training and not flow.net[1].training and flow.net[0].weight.grad is None
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())
    sampler(*inputs())
    assert calls  # the hook is called by every call of the critic


# ---------------------------------------------------------------- what stays a callable


class Normalised(Q):
    """Reads obs - mean: at first, as if there were no normaliser."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, obs, actions):
        return super().forward(obs - (self.mean["now"] if isinstance(self.mean, dict) else self.mean), actions)


class Statistics:
    def __init__(self):
        self.mean = np.zeros(S, np.float32)


class WithStatistics(Q):
    def __init__(self):
        super().__init__()
        self.statistics = Statistics()

    def forward(self, obs, actions):
        return super().forward(obs - torch.as_tensor(self.statistics.mean), actions)


class Broken(Q):
    def __deepcopy__(self, memo):
        raise SystemError("no copies")


class WithTuple(Q):
    def forward(self, obs, actions):
        return super().forward(obs, actions), {"log": 0}


GLOBAL_MEAN = torch.zeros(S)


class WithGlobal(Q):
    def forward(self, obs, actions):
        return super().forward(obs - GLOBAL_MEAN, actions)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Wave, "no known activation"),
        (lambda: Normalised({"now": 0.0}), r"its output depends on its attribute mean \(dict\)"),
        (WithStatistics, r"its output depends on its attribute statistics \(Statistics\)"),
        (WithGlobal, "WithGlobal.forward reads GLOBAL_MEAN"),
        (Broken, "it cannot be copied for the proof|it could not be read"),
        (lambda: Q().to(torch.bfloat16), "it holds torch.bfloat16; expected float32"),
        (WithTuple, "it returns tuple of"),
        (
            lambda: as_critic(Q(), lambda q, obs, actions: q(obs - GLOBAL_MEAN, actions)),
            "its function call reads GLOBAL_MEAN",
        ),
        (nn.Identity, "it has no parameters"),
    ],
)
def test_what_stays_a_callable(make, reason, log):
    critic = make()
    sampler = sampler_of(FlowMLP(S, A, (H,)), critic)
    assert not is_packed(sampler)
    (line,) = log()
    assert re.match(rf"critic {re.escape(name_of(critic))} runs as a callable: .*({reason})", line)


def test_large_modules_are_not_copied(monkeypatch, log):
    monkeypatch.setattr(recognition, "LARGEST", 100)
    sampler_of(FlowMLP(S, A, (H,)), Q())
    assert "numbers, which are not copied for a proof" in log()[0]


def test_calls_through_as_flow_and_as_critic():
    flow, critics = Flow(), [Q(), Q()]
    sampler = sampler_of(
        as_flow(flow, call=lambda m, obs, x, t: m(obs, x, t)),
        as_critic(critics, call=lambda qs, obs, actions: {"q": torch.stack([q(obs, actions) for q in qs])}["q"]),
    )
    assert_runs_as_given(sampler, flow, critics)
    bound = torch.zeros(S)
    sampler.critic = as_critic(critics, call=lambda qs, obs, a: [q(obs - bound, a) for q in qs])
    assert not is_packed(sampler)


def test_explain_says_how_each_network_runs():
    class Object:
        def __call__(self, *blocks):
            raise NotImplementedError

    def my_flow(obs, x, t):
        raise NotImplementedError

    sampler = sampler_of(FlowMLP(S, A, (H,)), Wave(), Steering.qpilots_u())
    flow, critic = sampler.explain(1).networks
    assert flow == "flow FlowMLP runs packed on native kernels"
    assert critic.startswith("critic Wave runs as a callable: what lies between its Linears is no known activation")
    assert critic in str(sampler.explain(2))
    sampler.critic, sampler.flow = Q(), my_flow
    assert sampler.explain(1).networks[0] == "flow my_flow runs as a callable: it is a function"
    sampler.flow = Flow()
    assert [line.split(" runs packed")[0] for line in sampler.explain(1).networks] == ["flow Flow", "critic Q"]
    sampler.posterior = Object()
    line = "posterior Object runs as a callable: it is no nn.Module (this steering does not ask it)"
    assert sampler.explain(1).networks[2] == line and is_packed(sampler)
    sampler.steering = AT_TIME
    assert sampler.explain(1).networks[1] == "critic Q runs as a callable: Steering.critic_time asks Q(obs, a, t)"
    sampler.steering, sampler.flow = Steering.unsteered(), Dropping()
    assert "Dropping is in training mode" in sampler.explain(1).networks[0]
    sampler.eval()
    assert "packed" in sampler.explain(1).networks[0] and "does not ask it" in sampler.explain(1).networks[1]


# ---------------------------------------------------------------- what changes afterwards


class Dropping(nn.Module):
    """A flow with dropout, as a layer or as a function call."""

    def __init__(self, drop=None):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(S + A + 1, H), nn.Linear(H, A), drop

    def forward(self, obs, x, t):
        h = F.silu(self.a(torch.cat([obs, x, t], -1)))
        h = F.dropout(h, 0.5, self.training) if self.drop is None else self.drop(h)
        return self.b(h)


@pytest.mark.parametrize("drop", [None, nn.Dropout(0.5)])
def test_dropout_decides_at_every_call(drop, log):
    flow, critic = Dropping(drop), Q()
    sampler = sampler_of(flow, critic)
    assert "training mode" in log()[0] and not is_packed(sampler)
    assert not torch.equal(sampler(*inputs()), sampler(*inputs()))
    flow.eval()  # the advice
    assert_runs_as_given(sampler, flow, critic)
    sampler.train()
    assert not torch.equal(sampler(*inputs()), sampler(*inputs())) and not is_packed(sampler)
    flow.eval()
    assert_runs_as_given(sampler, flow, critic)


class FlatTimes(Dropping):
    """t is [B]; and it warns at every call."""

    def forward(self, obs, x, t):
        assert t.ndim == 1
        warnings.warn("slow", stacklevel=1)
        return super().forward(obs, x, t[:, None])


def test_a_module_of_flat_times_runs_in_any_mode():
    """Packed it is called as from_module found that it can be; as a callable likewise."""
    flow, critic = FlatTimes().eval(), Q()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "slow")  # of what happens to a copy nothing is heard
        sampler = sampler_of(flow, critic)
        sampler(*inputs())
    assert_runs_as_given(sampler, lambda obs, x, t: flow(obs, x, t[:, 0]), critic)
    flow.train()
    with pytest.warns(UserWarning, match="slow"):
        assert not torch.equal(sampler(*inputs()), sampler(*inputs()))


class Scaled(Flow):
    """A plain number enters the output; others do not."""

    def __init__(self):
        super().__init__()
        self.scale, self.steps, self.name, self.shift, self.squash = 1.0, 0, "flow", 0, False

    def forward(self, obs, x, t):
        self.steps += 1
        v = self.scale * super().forward(obs, x, t) + self.shift
        return torch.tanh(v) if self.squash else v


@pytest.mark.parametrize(("attribute", "value"), [("scale", 0.5), ("shift", 0.25), ("squash", True)])
def test_plain_attributes_are_watched(attribute, value, log):
    flow, critic = Scaled(), Q()
    sampler = sampler_of(flow, critic)
    assert_runs_as_given(sampler, flow, critic)
    flow(*inputs(), torch.zeros(B, 1))  # counts
    log()
    assert_runs_as_given(sampler, flow, critic)
    assert not log()
    before = getattr(flow, attribute)
    setattr(flow, attribute, value)
    assert_runs_as_given(sampler, flow, critic)  # packed as what it is now
    setattr(flow, attribute, before)
    assert_runs_as_given(sampler, flow, critic)


def narrow(flow):
    flow.net[0], flow.net[2] = nn.Linear(S + A + 1, 8), nn.Linear(8, H)


def narrow_data(flow):
    flow.net[0].weight.data, flow.net[0].bias.data = torch.randn(8, S + A + 1), torch.randn(8)
    flow.net[2].weight.data = torch.randn(H, 8)


# and whether the module is recognised as it is then
EDITS = {
    "another activation": (lambda flow: setattr(flow.net, "1", nn.Mish()), True),
    "another width": (narrow, True),
    "other data": (narrow_data, False),  # its Linears still say the old widths
    "weight norm": (lambda flow: nn.utils.parametrizations.weight_norm(flow.net[2]), True),
    "a layer more": (lambda flow: flow.net.append(nn.Tanh()), True),
    "an unknown layer": (lambda flow: flow.net.append(nn.Softsign()), False),
    "all layers": (lambda flow: setattr(flow, "net", mlp(S + A + 1, A, nn.ReLU)), True),
    "a hook": (lambda flow: flow.register_forward_hook(lambda module, args, output: 0.5 * output), False),
}


@pytest.mark.parametrize("edit", list(EDITS))
@pytest.mark.parametrize("called", [False, True])
def test_edits_are_seen(edit, called):
    flow, critic = Flow(), Q()
    sampler = sampler_of(flow, critic)
    if called:
        sampler(*inputs())
    EDITS[edit][0](flow)
    assert_runs_as_given(sampler, flow, critic, packed=EDITS[edit][1])


# ---------------------------------------------------------------- what obs is decides too


class Either(Flow):
    """Reads a tensor, or a dict of one."""

    def forward(self, obs, *rest):
        return super().forward(obs["state"] if isinstance(obs, dict) else obs, *rest)


class EitherQ(Q):
    def forward(self, obs, *rest):
        return super().forward(obs["state"] if isinstance(obs, dict) else obs, *rest)


def test_obs_that_packed_networks_do_not_read():
    sampler = sampler_of(Either(), EitherQ())
    obs, noise = inputs()
    expected = sampler(obs, noise)
    for _ in range(2):
        assert_close(sampler({"state": obs}, noise), expected)
        assert torch.equal(sampler(obs, noise), expected)
    assert_close(torch.as_tensor(sampler.act(obs.numpy(), seeds=range(B))), sampler(obs, seeds=range(B)))
    assert sampler({"state": obs}).shape == (B, A)  # the packed networks tell its width


def test_obs_that_nothing_reads_are_refused_as_by_packed_networks():
    for flow, critic in ((Flow(), Q()), (mlp(S + A + 1, A), mlp(S + A, 1)), (Flow(), lambda o, a: a.sum(-1))):
        sampler, name = sampler_of(flow, critic), name_of(flow)
        obs, noise = inputs()
        wide = torch.zeros(B, S + 1)
        for given in ((wide,), (wide, noise)):
            with pytest.raises(ValueError, match=rf"obs has shape \[{B}, {S + 1}\]; expected \[B, {S}\]"):
                sampler(*given)
        with pytest.raises(ValueError, match=rf"obs has shape \[{S + 2}\]; expected"):
            sampler.act(np.zeros(S + 2, np.float32))
        for given in ({"state": obs}, noise), ({"state": obs},):
            with pytest.raises(TypeError, match=f"obs is dict, but {name} reads a Tensor"):
                sampler(*given)
        with pytest.raises(TypeError, match=r"obs is torch.int64; expected a floating dtype"):
            sampler.act(np.zeros(S, int))
        assert_close(sampler(obs.round().long(), noise), sampler(obs.round(), noise))  # joining them makes floats


def test_an_error_of_a_module_that_reads_obs_is_its_own():
    flow = Flow()
    sampler = sampler_of(flow, lambda obs, actions: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        sampler(*inputs())


class Flattening(Flow):
    """Reads a history [B, T, S / T] too."""

    def forward(self, obs, *rest):
        return super().forward(obs.flatten(1).to(rest[0].dtype), *rest)


def test_obs_of_other_shapes_and_dtypes():
    critic = Q()
    sampler = sampler_of(Flattening(), as_critic(critic, lambda q, obs, a: q(obs.flatten(1).to(a.dtype), a)))
    obs, noise = inputs()
    assert_close(sampler(obs.reshape(B, 2, S // 2), noise), sampler(obs, noise))
    assert_close(sampler(obs.round().long(), noise), sampler(obs.round(), noise))
    assert is_packed(sampler)
    assert sampler(obs.expand(2, B, S)).shape == (2, B, A)
    assert sampler(obs[0]).shape == (A,)


# ---------------------------------------------------------------- chunks


class ChunkFlow(Flow):
    def forward(self, obs, x, t):
        assert x.shape[1:] == (2, 2)
        return super().forward(obs, x.flatten(1), t).unflatten(1, (2, 2))


class ChunkQ(Q):
    def forward(self, obs, actions):
        assert actions.shape[1:] == (2, 2)
        return super().forward(obs, actions.flip(1).flatten(1))


@pytest.mark.parametrize("flow", [ChunkFlow, Flow])
def test_chunks(flow):
    flow, critic = flow(), Q()
    sampler = sampler_of(flow, critic, chunk_shape=(2, 2))
    flat = sampler_of(lambda obs, x, t: Flow.forward(flow, obs, x, t), opaque(critic))
    obs, noise = inputs()
    assert is_packed(sampler)
    assert_close(sampler(obs, noise), flat(obs, noise))
    assert_close(sampler(obs, noise.unflatten(1, (2, 2))), flat(obs, noise).unflatten(1, (2, 2)))


def test_a_critic_that_turns_chunks_is_packed_as_one_that_does():
    critic = ChunkQ()
    sampler = sampler_of(ChunkFlow(), critic, chunk_shape=(2, 2))
    assert is_packed(sampler) and sampler.networks["critic"].spec.action_columns == (2, 3, 0, 1)
    own = sampler_of(opaque(sampler.flow), opaque(critic), chunk_shape=(2, 2))
    assert_close(sampler(*inputs()), own(*inputs()))


def test_steered_dims_and_rows_of_alpha():
    flow, critic = Flow(), Q()
    steering = replace(U, steered_dims=(0, 2))
    assert_runs_as_given(sampler_of(flow, critic, steering), flow, critic)
    alpha = torch.tensor([0.0, 0.2, 0.9])
    own = sampler_of(opaque(flow), opaque(critic))
    assert_close(sampler_of(flow, critic)(*inputs(), alpha=alpha), own(*inputs(), alpha=alpha))


# ---------------------------------------------------------------- what a forward runs through

SETTINGS = {"scale": 1.0}


class Config:
    scale = 1.0


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


def surrounded() -> nn.Module:
    """A flow whose class has a number and a helper that its forward uses."""

    class Surrounded(nn.Module):
        scale = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(S + A + 1, 16), nn.Linear(16, A)

        def helper(self, h):
            return h

        def forward(self, obs, x, t):
            return self.helper(self.last(torch.relu(self.first(torch.cat([obs, x, t], -1))))) * self.scale

    return Surrounded()


def patched(part: nn.Module) -> None:
    before = part.forward
    part.forward = lambda x: 2 * before(x)


AROUND = {
    "a number of its class": lambda m: setattr(type(m), "scale", 3.0),
    "a part's own forward": lambda m: patched(m.first),
    "a method of its class": lambda m: setattr(type(m), "helper", lambda self, h: 2 * h),
    "its class's forward": lambda m: setattr(type(m), "forward", lambda self, obs, x, t: 2 * x),
    "a method given to the instance": lambda m: setattr(m, "helper", lambda h: 2 * h),
}


@pytest.mark.parametrize("edit", AROUND.values(), ids=AROUND)
def test_edits_around_a_module_are_seen(edit):
    module = surrounded()
    critic, steering = CriticEnsemble(S, A, 2, (16,)), Steering.qpilots_u()
    sampler = SteeredSampler(module, critic, steering, num_steps=3)
    obs, noise = torch.randn(4, S), torch.randn(4, A)
    before = sampler(obs, noise)
    assert torch.equal(sampler(obs, noise), before) and "packed" in str(sampler.explain().networks[0])
    edit(module)
    plain = SteeredSampler(lambda *blocks: module(*blocks), critic, steering, num_steps=3)
    for _ in range(2):
        after = sampler(obs, noise)
        assert (after - plain(obs, noise)).abs().max() < 1e-5 and not torch.equal(after, before)


def test_a_hook_of_all_modules_is_seen():
    module = surrounded()
    critic = CriticEnsemble(S, A, 2, (16,))
    sampler = SteeredSampler(module, critic, Steering.unsteered(), num_steps=3)
    obs, noise = torch.randn(4, S), torch.randn(4, A)
    sampler(obs, noise)
    handle = nn.modules.module.register_module_forward_hook(
        lambda part, args, out: 2 * out if part is module.last else None
    )
    try:
        plain = SteeredSampler(lambda *blocks: module(*blocks), critic, Steering.unsteered(), num_steps=3)
        assert (sampler(obs, noise) - plain(obs, noise)).abs().max() < 1e-5
    finally:
        handle.remove()


class ByProperty(nn.Module):
    """Reads a number of a module-level dict by a property."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(S + A + 1, 16), nn.Linear(16, A)

    @property
    def scale(self) -> float:
        return SETTINGS["scale"]

    def forward(self, obs, x, t):
        return self.last(torch.relu(self.first(torch.cat([obs, x, t], -1)))) * self.scale


class ByConfig(nn.Module):
    """Reads a number of an object that it holds."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.first, self.last, self.config = nn.Linear(S + A + 1, 16), nn.Linear(16, A), config

    def forward(self, obs, x, t):
        return self.last(torch.relu(self.first(torch.cat([obs, x, t], -1)))) * self.config.scale


@pytest.mark.parametrize("make", [ByProperty, lambda: ByConfig(Config()), lambda: ByConfig(Slotted())])
def test_numbers_in_other_places_keep_a_module_a_callable(make):
    critic = CriticEnsemble(S, A, 2, (16,))
    sampler = SteeredSampler(make(), critic, Steering.unsteered(), num_steps=3)
    sampler(torch.randn(4, S), torch.randn(4, A))
    assert "runs as a callable" in str(sampler.explain().networks[0])


@pytest.mark.parametrize("counts", [(2, 3), (1, 1, 1)])
def test_packed_critics_in_a_list_are_one_ensemble(counts):
    flow = FlowMLP(S, A, (16,))
    critics = [CriticEnsemble(S, A, count, (16, 8)) for count in counts]
    obs, noise = torch.randn(5, S), torch.randn(5, A)
    sampler = SteeredSampler(flow, critics, Steering.qpilots_u(), num_steps=3)
    assert "packed" in str(sampler.explain().networks[1]) and sampler.critic.spec.num_members == sum(counts)
    plain = SteeredSampler(flow, lambda o, a: torch.cat([c(o, a) for c in critics]), Steering.qpilots_u(), num_steps=3)
    for _ in range(3):
        assert_close(sampler(obs, noise), plain(obs, noise).double(), "float32")
        with torch.no_grad():
            critics[-1].weights[0].neg_()
    joined = from_module(critics, "critic")
    assert torch.equal(joined(obs, noise), torch.cat([c(obs, noise) for c in critics]))
    others = [CriticEnsemble(S, A, 2, widths) for widths in ((16, 8), (16, 9))]  # asked one after the other
    assert SteeredSampler(flow, others, Steering.qpilots_u(), num_steps=3)(obs, noise).shape == (5, A)
