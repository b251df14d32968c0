"""The quick way of making the plainest calls: equal to the general way, and out of its way elsewhere."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, SteeredSampler, Steering, from_module
from qpilots_fast.backends import native

if native.import_failure() is not None:
    pytest.skip(native.import_failure(), allow_module_level=True)

OBS, ACTION, STEPS, BATCH = 6, 3, 3, 5
STEERINGS = {
    "U": Steering.qpilots_u(),
    "M": Steering.qpilots_m(num_samples=2),
    "glass": Steering(estimate="glass", num_samples=2, glass_steps=2),
    "unsteered": Steering.unsteered(),
}


def build(steering: Steering = STEERINGS["U"], activation: str = "gelu_tanh") -> SteeredSampler:
    torch.manual_seed(0)
    flow = FlowMLP(OBS, ACTION, (16, 16), activation)
    critic = CriticEnsemble(OBS, ACTION, 3, (16, 16), activation)
    posterior = MetaFlowMap(OBS, ACTION, (16, 16)) if steering.estimate == "mfm" else None
    return SteeredSampler(flow, critic, steering, posterior=posterior, num_steps=STEPS, backend="cpu")


def inputs(steering: Steering = STEERINGS["U"]) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    obs, noise = (torch.randn(BATCH, dim, generator=generator) for dim in (OBS, ACTION))
    eps = torch.randn(STEPS, BATCH, steering.num_samples, ACTION, generator=generator)
    return obs, noise, eps if steering.uses_posterior else None


def general(sampler: SteeredSampler, *arguments: Tensor | None) -> Tensor:
    """The call without the quick way."""
    run = sampler._run
    sampler._run = sampler._make_run()
    sampler._run._packs = run._packs
    try:
        return sampler(*arguments)
    finally:
        sampler._run = run


class Spy:
    """Counts how often the quick way gave the actions."""

    def __init__(self, sampler: SteeredSampler) -> None:
        name, made_for, self.quick = sampler._run._quick
        assert self.quick is not None
        self.taken = 0
        sampler._run._quick = (name, made_for, self)

    def __call__(self, *arguments: Tensor | None) -> Tensor | None:
        actions = self.quick(*arguments)
        self.taken += actions is not None
        return actions


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("steering", STEERINGS.values(), ids=STEERINGS)
def test_it_gives_the_general_way_s_bits(steering, frozen):
    sampler, arguments = build(steering), inputs(steering)
    if frozen:
        sampler.freeze()
    first = sampler(*arguments)
    spy = Spy(sampler)
    assert torch.equal(sampler(*arguments), first)
    torch.manual_seed(3)
    drawn = sampler(arguments[0])
    assert spy.taken == 2
    torch.manual_seed(3)
    assert torch.equal(drawn, general(sampler, arguments[0]))
    assert drawn.grad_fn is None and not drawn.requires_grad


@pytest.mark.parametrize("steering", [STEERINGS["U"], STEERINGS["M"]], ids=["U", "M"])
def test_a_strength_for_each_row_goes_the_quick_way(steering):
    sampler, arguments = build(steering), inputs(steering)
    alpha = torch.linspace(0, 0.8, BATCH)
    first = sampler(*arguments, alpha=alpha)
    spy = Spy(sampler)
    assert torch.equal(sampler(*arguments, alpha=alpha), first)
    assert torch.equal(sampler(*arguments, alpha=alpha.double().numpy()), first)  # cast on its way
    assert spy.taken == 2
    assert not torch.equal(sampler(*arguments), first)


STRENGTHS = {
    "negative": lambda: torch.tensor([0.1, -0.1, 0.1, 0.1, 0.1]),
    "not finite": lambda: torch.tensor([0.1, 0.1, float("nan"), 0.1, 0.1]),
    "too few": lambda: torch.full((BATCH - 1,), 0.1),
    "a column": lambda: torch.full((BATCH, 1), 0.1),
}


@pytest.mark.parametrize("strengths", STRENGTHS.values(), ids=STRENGTHS)
def test_the_quick_way_leaves_bad_strengths_to_the_general_way(strengths):
    sampler, arguments = build(), inputs()
    sampler(*arguments)
    spy = Spy(sampler)
    with pytest.raises(ValueError, match="alpha"):
        sampler(*arguments, alpha=strengths())
    unsteered = build(STEERINGS["unsteered"])
    unsteered(*arguments)
    with pytest.raises(ValueError, match="asks no critic"):
        unsteered(*arguments, alpha=torch.full((BATCH,), 0.1))
    assert spy.taken == 0


REPLACEMENTS: dict[str, Callable[[SteeredSampler], object]] = {
    "in place": lambda s: s.critic.weights[1].data.neg_(),
    "data": lambda s: setattr(s.critic.weights[1], "data", s.critic.weights[1].data.neg()),
    "transposed data": lambda s: setattr(s.flow.hidden[1].weight, "data", s.flow.hidden[1].weight.data.t()),
    "parameter": lambda s: setattr(s.flow.hidden[1], "weight", nn.Parameter(-s.flow.hidden[1].weight.detach())),
    "submodule": lambda s: s.flow.hidden.__setitem__(1, nn.Linear(16, 16)),
    "network": lambda s: setattr(s, "critic", CriticEnsemble(OBS, ACTION, 3, (16, 16))),
    "parametrization": lambda s: torch.nn.utils.parametrizations.weight_norm(s.flow.output),
    "dtype": lambda s: s.flow.double(),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_replaced_parameters_are_seen(replace):
    sampler, arguments = build(), inputs()
    before = sampler(*arguments)
    assert torch.equal(sampler(*arguments), before)
    replace(sampler)
    after = sampler(*arguments)
    flow, critic = copy.deepcopy((sampler.flow, sampler.critic))  # without what the networks remember of their views
    fresh = SteeredSampler(flow, critic, sampler.steering, num_steps=STEPS, backend="cpu")
    assert torch.equal(after, fresh(*arguments))


@pytest.mark.parametrize("plain", [True, False], ids=["Linear layers", "stacked views"])
def test_networks_of_the_user_s_own(plain):
    torch.manual_seed(0)
    flow = FlowMLP(OBS, ACTION, (16,))
    layers = [nn.Linear(OBS + ACTION, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1)]

    class Concatenated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*layers)

        def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
            return self.net(torch.cat([obs, actions], -1)).squeeze(-1)

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.b1 = nn.Parameter(torch.randn(2, OBS + ACTION, 16)), nn.Parameter(torch.zeros(2, 16))
            self.w2, self.b2 = nn.Parameter(torch.randn(2, 16, 1)), nn.Parameter(torch.zeros(2, 1))

        def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
            x = torch.cat([obs, actions], -1).expand(2, -1, -1)
            h = torch.tanh(torch.baddbmm(self.b1[:, None], x, self.w1))
            return torch.baddbmm(self.b2[:, None], h, self.w2).squeeze(-1)

    module = (Concatenated() if plain else Stacked()).eval()
    critic = from_module(module, kind="critic", obs_dim=OBS, action_dim=ACTION)
    sampler, arguments = SteeredSampler(flow, critic, Steering.qpilots_u(), num_steps=STEPS, backend="cpu"), inputs()
    before = sampler(*arguments)
    next(module.parameters()).data.neg_()
    assert not torch.equal(sampler(*arguments), before)
    assert torch.equal(sampler(*arguments), general(sampler, *arguments))
    assert sampler._run.quick("cpu") is not None
    if plain:
        module.train()
        with pytest.raises(ValueError, match="training mode"):
            sampler(*arguments)


class Categorical(nn.Module):
    """Its support is the middle of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(OBS + ACTION, 16), nn.ReLU(), nn.Linear(16, 5))
        self.register_buffer("edges", torch.linspace(-3, 3, 7))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat([obs, actions], -1)).softmax(-1) @ self.edges[1:-1]


OF_BUFFERS: dict[str, Callable[[Categorical], object]] = {
    "in place": lambda m: m.edges.mul_(-2),
    "data": lambda m: setattr(m.edges, "data", m.edges.data * -2),
    "another tensor": lambda m: setattr(m, "edges", -2 * m.edges),
    "a slice of a longer one": lambda m: setattr(m, "edges", torch.linspace(9, -4, 20)[3:10]),
    "one row of a matrix": lambda m: setattr(m, "edges", torch.linspace(9, -4, 14).view(2, 7)[1]),
}


@pytest.mark.parametrize("change", OF_BUFFERS.values(), ids=OF_BUFFERS)
def test_views_of_buffers_are_seen(change):
    torch.manual_seed(0)
    module, flow, arguments = Categorical(), FlowMLP(OBS, ACTION, (16,)), inputs()

    def sampler() -> SteeredSampler:
        critic = from_module(module, kind="critic", obs_dim=OBS, action_dim=ACTION)
        return SteeredSampler(flow, critic, Steering.qpilots_u(), num_steps=STEPS, backend="cpu")

    ours = sampler()
    before = ours(*arguments)
    for _ in range(2):  # then what took its place, in place
        spy = Spy(ours)
        ours(*arguments)
        assert spy.taken == 1
        change(module)
        after = ours(*arguments)
        assert not torch.equal(after, before)
        assert torch.equal(after, sampler()(*arguments))
        change, before = OF_BUFFERS["in place"], after


def _set(name: str, value: object) -> Callable[[list], None]:
    return lambda arguments: arguments.__setitem__({"obs": 0, "noise": 1}[name], value)


BAD_INPUTS: dict[str, tuple[Callable[[list], None], type[Exception], str]] = {
    "obs nan": (_set("obs", torch.full((BATCH, OBS), float("nan"))), ValueError, "obs has 30 non-finite"),
    "obs inf": (_set("obs", torch.tensor([[float("inf")] + [0.0] * (OBS - 1)] * BATCH)), ValueError, "obs has 5 non-f"),
    "noise inf": (_set("noise", torch.full((BATCH, ACTION), float("inf"))), ValueError, "noise has 15 non-finite"),
    "obs width": (_set("obs", torch.zeros(BATCH, OBS + 1)), ValueError, "obs has shape"),
    "obs rank": (_set("obs", torch.zeros(OBS)), ValueError, "noise has shape"),
    "noise rows": (_set("noise", torch.zeros(BATCH + 1, ACTION)), ValueError, "rows"),
    "noise width": (_set("noise", torch.zeros(BATCH, ACTION + 1)), ValueError, "noise has shape"),
    "obs type": (_set("obs", torch.zeros(BATCH, OBS, dtype=torch.int64)), TypeError, "floating"),
    "noise type": (_set("noise", "noise"), TypeError, "noise is"),
}


@pytest.mark.parametrize("change, error, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_get_the_general_way_s_errors(change, error, message):
    sampler, arguments = build(activation="tanh"), list(inputs())  # tanh: of infinite inputs it makes finite actions
    sampler(*arguments)
    change(arguments)
    with pytest.raises(error, match=message):
        sampler(*arguments)


def test_a_flow_that_is_not_finite_raises():
    sampler, arguments = build(), inputs()
    sampler(*arguments)
    sampler.flow.output.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="velocity is not finite"):
        sampler(*arguments)


def test_unusual_inputs_give_the_same_bits():
    sampler, (obs, noise, _) = build(), inputs()
    expected = sampler(obs, noise)
    assert torch.equal(sampler(obs.t().contiguous().t(), noise), expected)
    assert torch.equal(sampler(nn.Parameter(obs), noise), expected)
    assert sampler(obs[:0], noise[:0]).shape == (0, ACTION)
    assert torch.equal(sampler(obs, noise, return_info=True)[0], expected)
    a, b = (sampler(obs, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)


def test_nothing_is_drawn_for_a_call_that_is_left_to_the_general_way():
    sampler, (obs, _, eps) = build(STEERINGS["M"]), inputs(STEERINGS["M"])
    sampler(obs)
    spy = Spy(sampler)
    strided = eps.transpose(0, 1).contiguous().transpose(0, 1)
    torch.manual_seed(7)
    got = sampler(obs, None, strided)
    assert spy.taken == 1, "it is made plain first"
    torch.manual_seed(7)
    assert torch.equal(got, general(sampler, obs, None, eps))


@pytest.mark.parametrize("quick", [True, False])
def test_default_dtype_and_device_do_not_matter(quick):
    sampler, arguments = build(), inputs()
    expected = sampler(*arguments)
    if not quick:
        sampler._run._make_quick = lambda *_: None
        sampler._run._quick = None
    torch.set_default_dtype(torch.float64)
    try:
        got = sampler(*arguments)
        drawn = sampler(arguments[0])
        with torch.device("meta"):
            elsewhere = sampler(*arguments)
            info = sampler(*arguments, return_info=True)[1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected) and torch.equal(elsewhere, expected)
    assert got.dtype == elsewhere.dtype == drawn.dtype == info.gradient_norms.dtype == torch.float32
    assert not info.nonfinite.any()


def test_another_backend_is_taken_at_once():
    sampler, arguments = build(), inputs()
    native = sampler(*arguments)
    spy = Spy(sampler)
    sampler.backend = "reference"
    torch.testing.assert_close(sampler(*arguments), native, rtol=0, atol=1e-5)
    assert spy.taken == 0


def test_copies_make_their_own():
    sampler, arguments = build(), inputs()
    expected = sampler(*arguments)
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert other._run.quick("cpu") is None
        other.critic.weights[1].data.neg_()
        other(*arguments)
        changed = other(*arguments)
        assert not torch.equal(changed, expected)
    assert torch.equal(sampler(*arguments), expected)


def test_freezing_and_back():
    sampler, arguments = build(), inputs()
    live = sampler(*arguments)
    sampler.freeze()
    sampler(*arguments)
    sampler.critic.weights[1].data.neg_()
    assert torch.equal(sampler(*arguments), live)
    sampler.unfreeze()
    assert torch.equal(sampler(*arguments), general(sampler, *arguments))
    assert not torch.equal(sampler(*arguments), live)


def test_a_sampler_is_freed():
    sampler, arguments = build(), inputs()
    sampler(*arguments)
    sampler(*arguments)
    gone = weakref.ref(sampler)
    del sampler
    gc.collect()
    assert gone() is None


def test_one_more_call_of_a_compiled_program_is_the_same():
    sampler, arguments = build(), inputs()
    expected = sampler(*arguments)
    compiled = torch.compile(lambda *a: sampler(*a), backend="eager")
    assert torch.equal(compiled(*arguments), expected)
    assert torch.equal(compiled(*arguments), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "steering", [*STEERINGS.values(), Steering.best_of_n(3), Steering.gaf()], ids=[*STEERINGS, "best of n", "gaf"]
)
def test_a_first_call_under_another_default_device(steering, backend):
    """set_default_device("cuda") is common where the policy runs on the CPU; meta stands for it."""
    sampler = build(steering)
    sampler = SteeredSampler(
        sampler.flow, sampler.critic, steering, posterior=sampler.posterior, num_steps=STEPS + 1, backend=backend
    )
    generator = torch.Generator().manual_seed(0)
    obs, noise = torch.randn(BATCH, OBS, generator=generator), torch.randn(BATCH, ACTION, generator=generator)
    eps = torch.randn(STEPS + 1, BATCH, steering.num_samples, ACTION) if steering.uses_posterior else None
    with torch.device("meta"):
        actions, info = sampler(obs, noise, eps, return_info=True)
    assert actions.device.type == "cpu" and info.nonfinite.device.type == "cpu"
    assert torch.equal(actions, sampler(obs, noise, eps))
