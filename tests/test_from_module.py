"""from_module: what is recognised, that it shares the user's parameters, and what is refused, with the reason."""

from __future__ import annotations

import copy
import io
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, SteeredSampler, Steering, as_flow, ops
from qpilots_fast.backends import unavailable_reason
from qpilots_fast.from_module import from_module
from qpilots_fast.objectives import td_loss
from qpilots_fast.times import time_features

S, A, H = 5, 3, 9  # obs, action and hidden widths
B = 4
DIMS = {"obs_dim": S, "action_dim": A}

# float32 against float64 over three small layers
FLOAT32_TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def mlp(width_in: int, width_out: int, *hidden: int, act=nn.ReLU, norm: str | None = None, **linear) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers.append(nn.Linear(width_in, width, **linear))
        if norm == "pre":
            layers += [nn.LayerNorm(width), act()]
        else:
            layers += [act(), *([nn.LayerNorm(width)] if norm == "post" else [])]
        width_in = width
    return nn.Sequential(*layers, nn.Linear(width_in, width_out, **linear))


class Flow(nn.Module):
    """A flow with its inputs in any order and any time features."""

    def __init__(self, order=("obs", "noisy_actions", "t"), embed=lambda t: t, width=1, net=None, times=None):
        super().__init__()
        self.order, self.embed, self.times = order, embed, times
        self.net = mlp(S + A + width, A, H, 2 * H, act=nn.SiLU) if net is None else net

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        named = {"obs": obs, "noisy_actions": x, "t": self.embed(t)}
        return self.net(torch.cat([named[name] for name in self.order], -1))


class Critic(nn.Module):
    def __init__(self, order=("obs", "actions"), squeeze=False, **kwargs):
        super().__init__()
        self.q = mlp(S + A, 1, H, H, **kwargs)
        self.order, self.squeeze = order, squeeze

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        named = {"obs": obs, "actions": actions}
        q = self.q(torch.cat([named[name] for name in self.order], -1))
        return q.squeeze(-1) if self.squeeze else q


class TwoCritics(nn.Module):
    """CleanRL and TD3 style: layers as attributes, activations as calls."""

    def __init__(self):
        super().__init__()
        for name in ("a", "b"):
            setattr(self, f"{name}1", nn.Linear(S + A, H))
            setattr(self, f"{name}2", nn.Linear(H, H))
            setattr(self, f"{name}3", nn.Linear(H, 1))

    def forward(self, obs, actions):
        x = torch.cat([actions, obs], 1)
        q1 = self.a3(F.relu(self.a2(F.relu(self.a1(x)))))
        q2 = self.b3(F.relu(self.b2(F.relu(self.b1(x)))))
        return q1, q2


def inputs(dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(B, S, generator=generator, dtype=dtype)
    return obs, torch.randn(B, A, generator=generator, dtype=dtype)


def assert_packed_runs_as(network, *blocks: Tensor) -> None:
    """The packed network, run from its parameters alone, agrees with the user's own forward and its gradient."""
    moving = blocks[1].clone().requires_grad_()
    blocks = (blocks[0], moving, *blocks[2:])
    packed = ops.critic_values if network.spec.kind == "critic" else ops.velocity
    with torch.no_grad():
        torch.testing.assert_close(packed(*blocks, network, backend="reference"), network(*blocks), **FLOAT32_TOLERANCE)
    theirs = network(*blocks)
    cotangent = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(7)).to(theirs.dtype)
    (want,) = torch.autograd.grad(theirs, moving, cotangent)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    (got,) = torch.autograd.grad(packed(*blocks, network, backend="reference"), moving, cotangent)
    torch.testing.assert_close(got, want, **FLOAT32_TOLERANCE)


# ---------------------------------------------------------------- recognised


@pytest.mark.parametrize("norm", [None, "pre", "post"])
@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("gelu", nn.GELU), ("gelu_tanh", lambda: nn.GELU(approximate="tanh")), ("relu", nn.ReLU),
        ("relu", lambda: nn.ReLU(inplace=True)), ("silu", nn.SiLU), ("mish", nn.Mish), ("tanh", nn.Tanh),
    ],
)  # fmt: skip
def test_sequential_flow(norm, name, act):
    module = mlp(S + A + 1, A, H, 7, act=act, norm=norm)
    network = from_module(module, "flow")  # widths are inferred
    spec = network.spec
    assert (spec.obs_dim, spec.action_dim, spec.hidden_dims, spec.activation) == (S, A, (H, 7), name)
    assert spec.layer_norm == (norm, norm) and (norm is None or spec.layer_norm_eps == 1e-5)
    obs, x = inputs()
    assert_packed_runs_as(network, obs, x, torch.full((B, 1), 0.3))


@pytest.mark.parametrize(
    "order",
    [("obs", "noisy_actions", "t"), ("noisy_actions", "obs", "t"), ("obs", "t", "noisy_actions"),
     ("t", "noisy_actions", "obs"), ("noisy_actions", "t", "obs"), ("t", "obs", "noisy_actions")],
)  # fmt: skip
def test_order_of_inputs(order):
    network = from_module(Flow(order), "flow")
    assert network.spec.input_order == order
    assert_packed_runs_as(network, *inputs(), torch.full((B, 1), 0.7))


@pytest.mark.parametrize(("embedding", "width"), [("sinusoidal", 16), ("fourier", 64), ("fourier", 8)])
@pytest.mark.parametrize("float32", [False, True])
def test_time_embedding(embedding, width, float32):
    def embed(t):  # float32: as users compute it, with angles up to 1e4
        if not float32:
            return time_features(t, embedding, width).to(t.dtype)
        index = torch.arange(width // 2)
        scale = 1e4 * torch.exp(-math.log(1e4) * index / (width // 2)) if embedding == "sinusoidal" else index
        angles = t.float() * scale
        return torch.cat([angles.cos(), angles.sin()], -1).to(t.dtype)

    network = from_module(Flow(embed=embed, width=width), "flow", obs_dim=S)
    assert (network.spec.time_embedding, network.spec.time_embedding_dim) == (embedding, width)
    if not float32:
        assert_packed_runs_as(network, *inputs(), torch.full((B, 1), 0.3))


def test_layers_without_bias_or_affine_norm():
    module = nn.Sequential(
        nn.Linear(S + A, H, bias=False), nn.LayerNorm(H, elementwise_affine=False, eps=1e-3), nn.Mish(),
        nn.Linear(H, H), nn.LayerNorm(H, elementwise_affine=False, eps=1e-3), nn.Mish(), nn.Linear(H, 1, bias=False),
    )  # fmt: skip
    network = from_module(module, "critic", **DIMS)
    spec = network.spec
    assert spec.biases == (False, True, False) and not spec.norm_weight and not spec.norm_bias
    assert spec.layer_norm_eps == 1e-3 and len(network.flat_parameters()) == 4
    assert_packed_runs_as(network, *inputs())


def test_norm_on_some_layers_and_idle_modules():
    module = nn.Sequential(
        nn.Identity(), nn.Linear(S + A, H), nn.LayerNorm(H), nn.GELU(), nn.Dropout(0.0), nn.Linear(H, H), nn.GELU(),
        nn.Dropout(0.3), nn.Linear(H, 1),
    ).eval()  # fmt: skip
    network = from_module(module, "critic", **DIMS)
    assert network.spec.layer_norm == ("pre", None)
    assert_packed_runs_as(network, *inputs())
    network.train()
    with pytest.raises(ValueError, match=r"Dropout.*training mode"):
        network.flat_parameters()


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList])
def test_list_of_critics(container, squeeze):
    members = [Critic(squeeze=squeeze, norm="post", act=nn.GELU) for _ in range(B)]  # as many members as rows
    network = from_module(container(members), "critic", **DIMS)
    assert network.spec.num_members == B and network.spec.layer_norm == ("post", "post")
    obs, actions = inputs()
    want = torch.stack([member(obs, actions).reshape(B) for member in members])
    torch.testing.assert_close(network(obs, actions), want)
    assert_packed_runs_as(network, obs, actions)


def test_list_of_sequential_critics_and_double_q_module():
    network = from_module([mlp(S + A, 1, H) for _ in range(3)], "critic", **DIMS)
    assert network.spec.num_members == 3
    assert_packed_runs_as(network, *inputs())
    double = from_module(TwoCritics(), "critic", **DIMS)
    assert double.spec.num_members == 2 and double.spec.input_order == ("actions", "obs")
    assert double.spec.activation == "relu"
    assert_packed_runs_as(double, *inputs())


@pytest.mark.parametrize("layout", ["EB", "EB1", "BE", "BE1"])
def test_critic_output_layouts(layout):
    class Ensemble(nn.Module):
        obs_dim, action_dim = S, A

        def __init__(self):
            super().__init__()
            self.members = nn.ModuleList(Critic() for _ in range(B))

        def forward(self, obs, actions):
            q = torch.stack([member(obs, actions) for member in self.members])  # [E, B, 1]
            q = q if layout.startswith("EB") else q.transpose(0, 1)
            return q if layout.endswith("1") else q.squeeze(-1)

    module = Ensemble()
    network = from_module(module, "critic")
    obs, actions = inputs()
    want = torch.stack([member(obs, actions).squeeze(-1) for member in module.members])
    torch.testing.assert_close(network(obs, actions), want)  # B == E: the layout was settled before
    assert_packed_runs_as(network, obs, actions)


def test_call_hint():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(S + A + 1, A, H)

        def forward(self, inputs, *, scale):
            return {"v": self.net(torch.cat([inputs["x"], scale * inputs["t"], inputs["o"]], -1))}

    network = from_module(
        Odd(), "flow", **DIMS, call=lambda m, obs, x, t: m({"o": obs, "x": x, "t": t}, scale=1.0)["v"]
    )
    assert network.spec.input_order == ("noisy_actions", "t", "obs")
    assert_packed_runs_as(network, *inputs(), torch.full((B, 1), 0.3))


def test_flat_time_argument():
    class FlatTime(Flow):
        def forward(self, obs, x, t):
            assert t.ndim == 1
            return super().forward(obs, x, t[:, None])

    assert_packed_runs_as(from_module(FlatTime(), "flow"), *inputs(), torch.full((B, 1), 0.3))


@pytest.mark.parametrize("is_velocity", [False, True])
def test_meta_flow_map(is_velocity):
    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(S + 2 * A + 3, A, H, H, act=nn.GELU)

        def forward(self, obs, xbar, x, t, s, u):
            vhat = self.net(torch.cat([xbar, x, obs, t, s, u], -1))
            return vhat if is_velocity else xbar + (u - s) * vhat

    module = Map()
    network = from_module(module, "meta_flow_map", obs_dim=S)
    assert network.spec.input_order == ("xbar", "noisy_actions", "obs", "t", "s", "u")
    obs, x = inputs()
    eps = torch.randn(B, A, generator=torch.Generator().manual_seed(3))
    vhat = module.net(torch.cat([eps, x, obs, torch.tensor([0.4, 0.0, 1.0]).expand(B, 3)], -1))
    torch.testing.assert_close(network(obs, eps, x, 0.4), eps + vhat)
    torch.testing.assert_close(network.average_velocity(obs, eps, x, 0.4, 0.0, 1.0), vhat)
    sampler = SteeredSampler(
        FlowMLP(S, A, (H,)), CriticEnsemble(S, A, 2, (H,)), Steering.qpilots_m(num_samples=2), posterior=network,
        num_steps=3, backend="reference",
    )  # fmt: skip
    own = SteeredSampler(
        sampler.flow, sampler.critic, sampler.steering, posterior=lambda *blocks: network(*blocks), num_steps=3,
        backend="reference",
    )  # fmt: skip
    noise = torch.randn(3, B, 2, A, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sampler(obs, x, noise), own(obs, x, noise), **FLOAT32_TOLERANCE)


# ---------------------------------------------------------------- plain tensors


class Stacked(nn.Module):
    """[E, in, out] or [E, out, in] weights in one of the layouts that people write."""

    def __init__(self, orientation="io", bias_shape="E1d", grouped=True, norm=None, members=3, act=F.silu):
        super().__init__()
        self.orientation, self.norm, self.act = orientation, norm, act
        widths = (S + A, H, H, 1)
        shapes = list(pairwise(widths))
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return nn.Parameter(0.5 * torch.randn(shape, generator=generator))

        def vector(width):
            return random(members, 1, width) if bias_shape == "E1d" else random(members, width)

        def matrix(i, o):
            return random(members, i, o) if orientation == "io" else random(members, o, i)

        if grouped:
            weights, biases = [matrix(*shape) for shape in shapes], [vector(o) for _, o in shapes]
            self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)
            if norm:
                self.scales = nn.ParameterList([vector(H), vector(H)])
                self.shifts = nn.ParameterList([vector(H), vector(H)])
        else:
            for index, shape in enumerate(shapes):
                setattr(self, f"w{index}", matrix(*shape))
                setattr(self, f"b{index}", vector(shape[1]))
                if norm and index < 2:
                    setattr(self, f"norm_weight{index}", vector(H))
                    setattr(self, f"norm_bias{index}", vector(H))
        self.grouped = grouped

    def layer(self, index):
        if self.grouped:
            norm = (self.scales[index], self.shifts[index]) if self.norm and index < 2 else ()
            return self.weights[index], self.biases[index], *norm
        names = ["w", "b", *(["norm_weight", "norm_bias"] if self.norm and index < 2 else [])]
        return tuple(getattr(self, f"{name}{index}") for name in names)

    def forward(self, obs, actions):
        h = torch.cat([obs, actions], -1)
        for index in range(3):
            weight, bias, *norm = self.layer(index)
            weight = weight if self.orientation == "io" else weight.transpose(1, 2)
            h = h @ weight + bias.reshape(len(bias), 1, -1)
            if index < 2:
                h = self.act(h) if self.norm != "pre" else h
                if norm:
                    h = F.layer_norm(h, (H,), eps=1e-6)
                    h = h * norm[0].reshape(len(bias), 1, -1) + norm[1].reshape(len(bias), 1, -1)
                h = self.act(h) if self.norm == "pre" else h
        return h


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("orientation", "bias_shape"), [("io", "E1d"), ("io", "Ed"), ("oi", "Ed")])
@pytest.mark.parametrize("norm", [None, "pre", "post"])
def test_stacked_parameters(grouped, orientation, bias_shape, norm):
    module = Stacked(orientation, bias_shape, grouped, norm)
    network = from_module(module, "critic", **DIMS)
    assert network.spec.stacked and network.spec.num_members == 3 and network.spec.activation == "silu"
    assert network.spec.layer_norm == (norm, norm)
    assert {p.data_ptr() for p in network.flat_parameters()} == {p.data_ptr() for p in module.parameters()}
    assert_packed_runs_as(network, *inputs())


def test_stacked_hints():
    module = Stacked(
        "oi", "E1d", True, "post"
    )  # [E, 1, H] is a weight here and a bias there: its operations tell which
    assert_packed_runs_as(from_module(module, "critic", **DIMS), *inputs())
    network = from_module(
        module, "critic", **DIMS, weights=list(module.weights), biases=[f"biases.{i}" for i in range(3)],
        norm_weights=list(module.scales), norm_biases=list(module.shifts), activation="silu", layer_norm="post",
    )  # fmt: skip
    assert_packed_runs_as(network, *inputs())
    with pytest.raises(ValueError, match="which the module does not hold"):
        from_module(module, "critic", **DIMS, weights=["weights.0", "weights.9"])
    with pytest.raises(ValueError, match=r"closest .* is off by"):
        from_module(module, "critic", **DIMS, weights=list(module.weights), biases=list(module.biases))


@pytest.mark.parametrize("registered", [False, True])
def test_vmapped_ensemble(registered):
    """torch.func.stack_module_state, with the tensors in a plain dict or in a ParameterDict."""

    class Vmapped(nn.Module):
        def __init__(self):
            super().__init__()
            members = [Critic(norm="pre", act=nn.GELU) for _ in range(3)]
            params, _ = torch.func.stack_module_state(members)
            self.params = (
                nn.ParameterDict({name.replace(".", "/"): value for name, value in params.items()})
                if registered
                else {name: value.detach().requires_grad_() for name, value in params.items()}
            )
            self.skeleton = [copy.deepcopy(members[0]).to("meta")]

        def forward(self, obs, actions):
            params = {name.replace("/", "."): value for name, value in self.params.items()}
            return torch.vmap(lambda p: torch.func.functional_call(self.skeleton[0], p, (obs, actions)))(params)

    module = Vmapped()
    network = from_module(module, "critic", **DIMS)
    assert network.spec.layer_norm == ("pre", "pre") and network.spec.stacked
    obs, actions = inputs()
    before = ops.critic_values(obs, actions, network, backend="reference")
    torch.testing.assert_close(before, network(obs, actions), **FLOAT32_TOLERANCE)
    with torch.no_grad():
        next(iter(module.params.values()))[:, 0] += 0.5
    after = ops.critic_values(obs, actions, network, backend="reference")
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, network(obs, actions), **FLOAT32_TOLERANCE)


def test_functional_flow_without_modules():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            for index, (i, o) in enumerate([(S + A + 1, H), (H, H), (H, A)]):
                setattr(self, f"weight{index}", nn.Parameter(torch.randn(o, i, generator=generator) * 0.4))
                setattr(self, f"bias{index}", nn.Parameter(torch.randn(o, generator=generator)))

        def forward(self, obs, x, t):
            h = torch.cat([x, t, obs], -1)
            h = F.mish(F.linear(h, self.weight0, self.bias0))
            h = F.mish(F.linear(h, self.weight1, self.bias1))
            return F.linear(h, self.weight2, self.bias2)

    network = from_module(Functional(), "flow", **DIMS)
    assert network.spec.input_order == ("noisy_actions", "t", "obs") and network.spec.activation == "mish"
    assert_packed_runs_as(network, *inputs(), torch.full((B, 1), 0.3))


def test_mapping_of_tensors():
    """A module that is itself a mapping of tensors (as TensorDictParams is), nested."""

    class Tensors(nn.Module):
        def __init__(self, tree):
            super().__init__()
            self.__dict__["tree"] = tree

        def keys(self):
            return self.tree.keys()

        def items(self):
            return self.tree.items()

        def __getitem__(self, key):
            return self.tree[key]

        def __setitem__(self, key, value):
            self.tree[key] = value

    generator = torch.Generator().manual_seed(0)
    widths = [(S + A, H), (H, H), (H, 1)]
    tree = {
        f"layer{i}": {
            "weight": torch.randn(2, a, b, generator=generator, requires_grad=True),
            "bias": torch.randn(2, 1, b, generator=generator, requires_grad=True),
        }
        for i, (a, b) in enumerate(widths)
    }

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.params = Tensors(tree)

        def forward(self, obs, actions):
            h = torch.cat([obs, actions], -1).expand(2, -1, -1)
            for index in range(3):
                layer = self.params[f"layer{index}"]
                h = torch.baddbmm(layer["bias"], h, layer["weight"])
                h = F.relu(h) if index < 2 else h
            return h

    network = from_module(Owner(), "critic", **DIMS)
    obs, actions = inputs()
    got = ops.critic_values(obs, actions, network, backend="reference")
    torch.testing.assert_close(got, network(obs, actions), **FLOAT32_TOLERANCE)


def test_tensordict_parameters():
    """torchrl's ensembles: TensorDictParams of stacked members, run by vmap."""
    tensordict = pytest.importorskip("tensordict")

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            members = [mlp(S + A, 1, H, H, act=nn.GELU, norm="pre") for _ in range(3)]
            self.params = tensordict.TensorDict.from_modules(*members, as_module=True)
            self.__dict__["skeleton"] = copy.deepcopy(members[0]).to("meta")

        def one(self, params, x):
            with params.to_module(self.skeleton):
                return self.skeleton(x)

        def forward(self, obs, actions):
            return torch.vmap(self.one, (0, None))(self.params, torch.cat([obs, actions], -1))

    module = Ensemble()
    network = from_module(module, "critic", **DIMS)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    obs, actions = inputs()
    network(obs, actions).sum().backward()
    optimiser.step()
    assert_packed_runs_as(network, obs, actions)


# ---------------------------------------------------------------- every backend


class Odd(nn.Module):
    """No first bias, affine-free norm on one layer, columns in another order, [E, in, out] weights beside modules."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(S + A + 16, 17, bias=False)
        self.second, self.norm = nn.Linear(17, 8), nn.LayerNorm(8, elementwise_affine=False)
        self.last = nn.Linear(8, A)

    def forward(self, obs, x, t):
        h = F.mish(self.first(torch.cat([x, time_features(t, "sinusoidal", 16).to(x.dtype), obs], -1)))
        return self.last(F.mish(self.norm(self.second(h))))


@pytest.mark.parametrize("backend", [name for name in ("cpu", "triton", "cuda") if not unavailable_reason(name)])
@pytest.mark.parametrize("jacobian", ["full", "identity"])
@pytest.mark.parametrize(
    "critic", [TwoCritics, lambda: Stacked("io", "E1d", True, "post"), lambda: Stacked("oi", "Ed")]
)
def test_backends_run_unusual_structures(backend, jacobian, critic):
    flow, critic = from_module(Odd(), "flow", **DIMS), from_module(critic(), "critic", **DIMS)
    assert flow.spec.input_order == ("noisy_actions", "t", "obs") and flow.spec.layer_norm == (None, "pre")
    device = "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    obs, noise = (x.to(device) for x in inputs())
    steering = Steering.qpilots_u(alpha=0.3, jacobian=jacobian)
    got = SteeredSampler(flow, critic, steering, num_steps=4, backend=backend).to(device)(obs, noise)
    want = SteeredSampler(flow, critic, steering, num_steps=4, backend="reference").double()(
        obs.double(), noise.double()
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- sharing


def _sampler(flow, critic, **kwargs):
    return SteeredSampler(flow, critic, Steering.qpilots_u(), num_steps=4, backend="reference", **kwargs)


def test_follows_the_users_parameters():
    flow, critic = Flow(), TwoCritics()
    packed = from_module(critic, "critic", **DIMS)
    network = from_module(flow, "flow")
    sampler = _sampler(network, packed)
    assert {id(p) for p in network.parameters()} == {id(p) for p in flow.parameters()}
    obs, noise = inputs()
    actions = [sampler(obs, noise)]

    def changed() -> Tensor:
        actions.append(sampler(obs, noise))
        plain = _sampler(lambda *blocks: network(*blocks), lambda *blocks: packed(*blocks))
        torch.testing.assert_close(actions[-1], plain(obs, noise), **FLOAT32_TOLERANCE)
        assert (actions[-1] - actions[-2]).abs().max() > 1e-4
        return actions[-1]

    optimiser = torch.optim.SGD([*flow.parameters(), *critic.parameters()], lr=0.5)
    loss = td_loss(packed, packed, obs, noise, torch.ones(B), torch.full((B,), 0.9), obs, sampler=sampler)
    loss = loss + network(obs, noise, torch.rand(B, 1)).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in flow.parameters()) and all(p.grad is not None for p in critic.parameters())
    optimiser.step()
    changed()
    flow.net[0].weight.data += 0.3
    changed()
    critic.load_state_dict({name: value + 0.1 for name, value in critic.state_dict().items()})
    flow.load_state_dict({name: value * 1.1 for name, value in flow.state_dict().items()})
    changed()
    flow.net[0] = nn.Linear(S + A + 1, H)  # a layer replaced by one of the same shape
    changed()
    sampler.double()
    assert sampler(obs.double(), noise.double()).dtype == torch.float64
    assert network.flat_parameters()[0].data_ptr() == flow.net[0].weight.data_ptr()


def test_recognition_leaves_the_module_and_the_random_state_alone():
    module = Flow()
    module.net[1].eval()  # one part in another mode than the rest
    state = copy.deepcopy(module.state_dict())
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    network = from_module(module, "flow")
    torch.testing.assert_close(torch.rand(3), want)
    assert network.training and module.training and not module.net[1].training
    assert not any(m._forward_hooks for m in module.modules())
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])


def test_copies_and_pickles():
    network = from_module(mlp(S + A + 1, A, H), "flow")
    clone = copy.deepcopy(network)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    obs, x = inputs()
    for other in (clone, loaded):
        assert not {p.data_ptr() for p in other.flat_parameters()} & {p.data_ptr() for p in network.flat_parameters()}
        assert other.flat_parameters()[0] is other.module[0].weight
        torch.testing.assert_close(other(obs, x, 0.3), network(obs, x, 0.3))


def test_zero_weights_are_no_excuse():
    module = mlp(S + A, 1, H, H, act=nn.Mish, norm="post")
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    network = from_module(module, "critic", **DIMS)
    assert network.spec.activation == "mish" and network.spec.layer_norm == ("post", "post")
    assert not any(p.any() for p in module.parameters())


def test_compiled_sampling():
    network, critic = from_module(Flow(), "flow"), from_module(TwoCritics(), "critic", **DIMS)
    sampler = _sampler(network, critic)
    obs, noise = inputs()
    compiled = torch.compile(sampler, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(obs, noise), sampler(obs, noise))


def test_already_packed():
    flow = FlowMLP(S, A, (H,))
    assert from_module(flow, "flow") is flow
    with pytest.raises(ValueError, match="a packed flow"):
        from_module(flow, "critic")


# ---------------------------------------------------------------- fuzz

_activations = {
    "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "relu": nn.ReLU, "silu": nn.SiLU,
    "mish": nn.Mish, "tanh": nn.Tanh,
}  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    act=st.sampled_from(sorted(_activations)),
    norms=st.lists(st.sampled_from([None, "pre", "post"]), min_size=4, max_size=4),
    biases=st.lists(st.booleans(), min_size=5, max_size=5),
    members=st.integers(1, 7),
    eps=st.sampled_from([1e-6, 1e-5, 1e-3]),
    dims=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    first=st.booleans(),
)
def test_random_critics(widths, act, norms, biases, members, eps, dims, first):
    def member():
        layers, width_in = [], sum(dims)
        for width, norm, bias in zip(widths, norms, biases):
            layer_norm = [nn.LayerNorm(width, eps=eps)] if norm else []
            inner = [*layer_norm, _activations[act]()] if norm == "pre" else [_activations[act](), *layer_norm]
            layers += [nn.Linear(width_in, width, bias=bias), *inner]
            width_in = width
        return nn.Sequential(*layers, nn.Linear(width_in, 1, bias=biases[4]))

    order = ("obs", "actions") if first else ("actions", "obs")
    module = nn.ModuleList(member() for _ in range(members))
    network = from_module(module, "critic", obs_dim=dims[0], action_dim=dims[1], input_order=order)
    spec = network.spec
    assert spec.hidden_dims == tuple(widths) and spec.num_members == members
    generator = torch.Generator().manual_seed(0)
    obs, actions = (torch.randn(B, d, generator=generator) for d in dims)
    got = ops.critic_values(obs, actions, network, backend="reference")
    torch.testing.assert_close(got, network(obs, actions), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- refused


class Wrapped(nn.Module):
    """A critic (or flow) whose inputs or output are changed on the way."""

    def __init__(self, inner, before=lambda *blocks: blocks, after=lambda out: out):
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, *blocks):
        return self.after(self.inner(*self.before(*blocks)))


class LearnedTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.net = nn.Linear(1, 8), mlp(S + A + 8, A, H)

    def forward(self, obs, x, t):
        return self.net(torch.cat([obs, x, self.time(t)], -1))


@pytest.mark.parametrize(
    ("module", "kind", "reason"),
    [
        (mlp(S + A, 51, H), "critic", "51 outputs, expected 1"),
        (mlp(S + A, 1, H, act=nn.Hardswish), "critic", r"no known activation.*off by"),
        (mlp(S + A, 1), "critic", "no hidden layer"),
        (nn.Sequential(nn.Linear(S + A, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, 1)), "critic", "BatchNorm1d"),
        (nn.Sequential(nn.Linear(S + A, H), nn.ReLU(), nn.Dropout(0.1), nn.Linear(H, 1)), "critic", "training mode"),
        (Wrapped(Critic(), before=lambda o, a: (o, a.clamp(-1, 1))), "critic", r"actions: off by"),
        (Wrapped(Critic(), after=torch.sin), "critic", r"outputs differ .* by .*float64"),
        (Wrapped(Critic(), before=lambda o, a: (o, a.detach())), "critic", "gradient with respect to actions differ"),
        (Wrapped(Critic(), after=lambda q: {"q": q}), "critic", r"returns dict"),
        (Wrapped(Critic(), after=torch.no_grad()(lambda q: q.detach())), "critic", "no gradient"),
        (Wrapped(Flow(), after=torch.sin), "flow", r"outputs differ"),
        (nn.GRUCell(S + A, H), "critic", "none of its tensors look like"),
        (nn.Sequential(nn.Conv1d(1, 2, 3)), "critic", "could not be called"),
    ],
)  # fmt: skip
def test_refused(module, kind, reason):
    with pytest.raises(ValueError, match=reason) as error:
        from_module(module, kind, **DIMS)
    assert type(module).__name__ in str(error.value)  # what it advises: test_advice.py


@pytest.mark.parametrize(
    ("module", "kind", "columns"),
    [
        (Wrapped(Critic(), before=lambda o, a: (o.clamp(-10, 10), a)), "critic", "obs"),
        (Wrapped(Critic(), before=lambda o, a: ((o - 1) / 2, a)), "critic", "obs"),
        (Wrapped(Flow(), before=lambda o, x, t: (o, x, 1 - t)), "flow", "times"),
        (LearnedTime(), "flow", "times"),
        (Flow(embed=lambda t: torch.cat([(t * 3).sin(), (t * 3).cos()], -1), width=2), "flow", "times"),
    ],
)
def test_columns_that_the_module_computes(module, kind, columns):
    found = from_module(module, kind, **DIMS).spec.own_columns
    assert found == f"the {kind}'s own module computes its columns of {columns}"


def test_argument_order_is_read_from_names():
    class Swapped(Critic):
        def forward(self, action, state):
            return super().forward(state, action)

    with pytest.raises(ValueError, match=r"forward takes \(action, state\).*Give the hint call=lambda"):
        from_module([Swapped(), Swapped()], "critic", **DIMS)
    module = nn.ModuleList([Swapped(), Swapped()])
    network = from_module(module, "critic", **DIMS, call=lambda m, obs, actions: [q(actions, obs) for q in m])
    assert network.spec.input_order == ("obs", "actions")
    assert_packed_runs_as(network, *inputs())


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_recognised_in_any_context(context):
    module = TwoCritics()
    with context():
        network = from_module(module, "critic", **DIMS)
    assert_packed_runs_as(network, *inputs())


def test_modules_that_cast_to_float32():
    """Tianshou's Net makes float32 tensors of whatever it is given: the proof is in float32 then."""
    module = Wrapped(Critic(act=nn.GELU, norm="pre"), before=lambda o, a: (o.float(), a.float()))
    network = from_module(module, "critic", **DIMS)
    assert network.spec.activation == "gelu" and set(network.spec.layer_norm) == {"pre"}
    assert_packed_runs_as(network, *inputs())
    off = Wrapped(Critic(), before=lambda o, a: (o.float(), a.float()), after=lambda q: q + 1e-3 * q.sin())
    with pytest.raises(ValueError, match=r"outputs differ .* \(relative, float32"):
        from_module(off, "critic", **DIMS)


def _state_of(members):
    return torch.func.stack_module_state(members)[0]


def _tensordict_of(members):
    tensordict = pytest.importorskip("tensordict", reason="tensordict is not installed")
    return tensordict.from_modules(*members, as_module=True)


@pytest.mark.parametrize("stack", [_state_of, _tensordict_of])
@pytest.mark.parametrize("on_meta", [False, True])
def test_a_template_and_stacked_parameters(stack, on_meta):
    members = [mlp(S + A, 1, H, H, norm="post") for _ in range(3)]
    params = stack(members)
    template = copy.deepcopy(members[0])
    network = from_module((template.to("meta") if on_meta else template, params), "critic", **DIMS)
    assert network.spec.num_members == 3
    for _ in range(2):
        assert_packed_runs_as(network, *inputs())
        with torch.no_grad():
            for tensor in network.flat_parameters():
                tensor.add_(0.1)
    flow = FlowMLP(S, A, (H,))
    sampler = SteeredSampler(flow, network, Steering.qpilots_u())
    obs, noise = torch.randn(B, S), torch.randn(B, A)
    eager = SteeredSampler(flow, lambda o, a: network(o, a), Steering.qpilots_u())
    torch.testing.assert_close(sampler(obs, noise), eager(obs, noise), **FLOAT32_TOLERANCE)


def test_stacked_parameters_alone_are_refused_with_the_advice():
    params = _tensordict_of([mlp(S + A, 1, H) for _ in range(2)])
    with pytest.raises(ValueError, match=r"holds parameters .* Give \(template, params\)"):
        from_module(params, "critic", **DIMS)


@pytest.mark.parametrize("shared", [False, True])
def test_critics_of_stable_baselines3(shared):
    policies = pytest.importorskip("stable_baselines3.common.policies", reason="stable-baselines3 is not installed")
    from gymnasium.spaces import Box
    from stable_baselines3.common.torch_layers import FlattenExtractor

    spaces = Box(-1, 1, (S,)), Box(-1, 1, (A,))
    extractor = FlattenExtractor(spaces[0])
    critic = policies.ContinuousCritic(*spaces, [H, H], extractor, S, share_features_extractor=shared)
    network = from_module(critic, "critic", observation_space=spaces[0], action_space=spaces[1])
    assert network.spec.num_members == 2 and network.spec.own_columns is None
    assert_packed_runs_as(network, *inputs())


def test_refused_members_that_differ():
    members = [mlp(S + A, 1, H), mlp(S + A, 1, H + 1)]
    with pytest.raises(ValueError, match="the shape differs"):
        from_module(members, "critic", **DIMS)
    with pytest.raises(ValueError, match=r"the activation or .* differs .*gelu, relu"):
        from_module([mlp(S + A, 1, H), mlp(S + A, 1, H, act=nn.GELU)], "critic", **DIMS)


def test_an_encoder_tells_the_width_of_obs():
    """Its first Linear reads obs alone; and where no width fits, the error asks for them."""

    class Encoded(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(11, 24), nn.ReLU(), nn.LayerNorm(24))
            self.net = nn.Sequential(nn.Linear(24 + 3 + 1, 16), nn.Tanh(), nn.Linear(16, 3))

        def forward(self, obs, noisy_actions, t):
            return self.net(torch.cat([self.encoder(obs), noisy_actions, t], -1))

    assert (spec := from_module(Encoded(), "flow").spec).obs_dim == 11 and spec.action_dim == 3
    with pytest.raises(ValueError, match="give the hints obs_dim and action_dim where it has other widths"):
        from_module(as_flow(Encoded(), call=lambda module, obs, x, t: module(obs[:, :9], x, t)), "flow")


def test_wrong_arguments():
    module = mlp(S + A, 1, H)
    with pytest.raises(ValueError, match="obs_dim and action_dim cannot be told"):
        from_module(module, "critic")
    with pytest.raises(ValueError, match="kind is 'policy'"):
        from_module(module, "policy")
    with pytest.raises(TypeError, match="unknown hint 'hidden'"):
        from_module(module, "critic", hidden=3)
    with pytest.raises(TypeError, match="module is function"):
        from_module(lambda obs, actions: obs, "critic")
    with pytest.raises(ValueError, match="activation is 'hardswish'"):
        from_module(module, "critic", activation="hardswish")
    with pytest.raises(ValueError, match="input_order is"):
        from_module(module, "critic", input_order=("obs",))
    with pytest.raises(ValueError, match="obs_dim is -1"):
        from_module(module, "critic", obs_dim=-1, action_dim=2)
    with pytest.raises(ValueError, match=r"hint input_order is .* but its columns are"):
        from_module(Critic(), "critic", **DIMS, input_order=("actions", "obs"))


@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor])
def test_integers_of_other_types(integer):
    s, a, h, one = map(integer, (S, A, H, 1))
    assert from_module(mlp(S + A, 1, H), "critic", obs_dim=s, action_dim=a).spec.action_dim == A
    module = mlp(S + A, 1, H)
    module.obs_dim, module.action_dim = s, a
    assert from_module(module, "critic").spec.obs_dim == S
    flow, critic = FlowMLP(s, a, (h, h)), CriticEnsemble(s, a, one, (h,))
    posterior = MetaFlowMap(s, a, (h,), time_embedding="fourier", time_embedding_dim=integer(8))
    for network in (flow, critic, posterior):
        assert json.loads(network.spec.json)["obs_dim"] == S and type(network.spec.hidden_dims[0]) is int
        with pytest.raises(ValueError, match="action_dim is "):
            type(network)(s, integer(0))
    with pytest.raises(ValueError, match=r"obs_dim is .*2\.5"):
        from_module(mlp(S + A, 1, H), "critic", obs_dim=np.float64(2.5), action_dim=A)
    with pytest.raises(ValueError, match=r"action_dim is .*True"):
        FlowMLP(S, np.bool_(True))


class Held(nn.Module):
    """Its activation is a function, its LayerNorm a layer, its output's scale and shift numbers, one of NumPy's."""

    SHIFT = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(S + A, H), nn.LayerNorm(H), nn.Linear(H, 1)
        self.act, self.scale, self.sign, self.bound = torch.relu, 2.0, np.float32(1), None

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        q = self.sign * self.scale * self.last(self.act(self.norm(self.first(torch.cat([obs, actions], -1)))))
        return (q if self.bound is None else self.bound * torch.tanh(q)) + self.SHIFT


EDITS_OF_HELD = {
    "scale was 2.0": lambda m: setattr(m, "scale", 3.0),
    "sign was np.float32": lambda m: setattr(m, "sign", np.float32(-1)),
    "bound was None": lambda m: setattr(m, "bound", 0.5),
    "SHIFT was 0.5": lambda m: setattr(m, "SHIFT", 1.5),
    "act was relu .* is tanh now": lambda m: setattr(m, "act", torch.tanh),
    "norm.eps was 1e-05": lambda m: setattr(m.norm, "eps", 0.5),
    "first was Linear when .* Linear with 1 hooks": lambda m: m.first.register_forward_hook(lambda *a: a[-1] / 2),
    "last was Linear when .* a forward of its own": lambda m: setattr(m.last, "forward", lambda x: x[:, :1]),
}


@pytest.mark.parametrize("edit", EDITS_OF_HELD)
def test_what_the_module_holds_is_not_assumed_to_stay(edit):
    """Also on the quick way, which asks less."""
    module = Held()
    critic, flow = from_module(module, "critic", obs_dim=S, action_dim=A), FlowMLP(S, A, (8,))
    rule, inputs = Steering.qgf(0.5), (torch.randn(2, S), torch.randn(2, A))
    packed, given = (SteeredSampler(flow, q, rule, num_steps=2) for q in (critic, module))
    for _ in range(3):
        assert torch.equal(packed(*inputs), given(*inputs))
    EDITS_OF_HELD[edit](module)
    with pytest.raises(ValueError, match=edit):
        packed(*inputs)
    assert torch.equal(given(*inputs), SteeredSampler(flow, module, rule, num_steps=2)(*inputs))
