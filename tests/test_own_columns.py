"""Columns that a user's module computes itself: from t, from obs, from the actions; live, frozen, and refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering, from_module, ops
from tests.marks import needs_cpu
from tests.zoo.own_inputs import CRITICS, Critic, Encoding, Everything, InUnits, Normalising
from tests.zoo.time_networks import TIMES, A, Flow, H, Map, PlainSinusoidal, S, SinusoidalMLP

DIMS = {"obs_dim": S, "action_dim": A}
K = 4
FLOAT32, BFLOAT16 = 2e-5, 3e-2  # of small networks' actions, a few steps
STEERINGS = {
    "U": Steering.qpilots_u(),
    "identity": Steering.qpilots_u(jacobian="identity"),
    "QGF": Steering.qgf(weight=0.3),
    "glass": Steering(estimate="glass", num_samples=2, glass_steps=2),
}
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns that a critic does not read
        yield


def change(*modules: nn.Module) -> None:
    """Every number of these, written past autograd."""
    for module in modules:
        plain = [v for part in module.modules() for v in vars(part).values() if isinstance(v, Tensor)]
        for tensor in (*module.parameters(), *module.buffers(), *plain):
            tensor.data.add_(0.1 * torch.randn_like(tensor))


def sampler_of(flow, critic, steering=STEERINGS["U"], backend="cpu", **settings) -> SteeredSampler:
    return SteeredSampler(
        flow, critic, steering, backend=backend, num_steps=K, action_low=-0.7, action_high=0.7, **settings
    )


def exact(flow: nn.Module, critic: nn.Module, steering: Steering, *inputs: Tensor | None, **networks) -> Tensor:
    """The users' modules in float64, called as they are."""
    double = {name: copy.deepcopy(module).double() for name, module in networks.items()}
    flow, critic = copy.deepcopy(flow).double(), copy.deepcopy(critic).double()
    called = {name: (lambda *args, module=module: module(*args)) for name, module in double.items()}
    reference = sampler_of(
        lambda *args: flow(*args), lambda *args: critic(*args), steering, "reference", precision="float64", **called
    )
    return reference(*(None if value is None else value.double() for value in inputs)).float()


def inputs(batch_size: int, steering: Steering) -> tuple[Tensor, Tensor, Tensor | None]:
    eps = torch.randn(K, batch_size, 2, A) if steering.estimate in ("glass", "mfm") else None
    return torch.randn(batch_size, S), torch.randn(batch_size, A), eps


def agrees(sampler: SteeredSampler, flow: nn.Module, critic: nn.Module, tolerance: float = FLOAT32, **networks) -> None:
    for batch_size in (1, 5):
        given = inputs(batch_size, sampler.steering)
        expected = exact(flow, critic, sampler.steering, *given, **networks)
        torch.testing.assert_close(sampler(*given), expected, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time", TIMES)
def test_time_features(time: str, backend: str) -> None:
    flow, critic = Flow(TIMES[time]()), Normalising()
    packed = from_module(flow, "flow", **DIMS)
    assert packed.spec.time_embedding == "module"
    assert packed.spec.input_order == ("noisy_actions", "t", "obs")
    sampler = sampler_of(packed, from_module(critic, "critic", **DIMS), backend=backend)
    for _ in range(3):
        agrees(sampler, flow, critic)
        change(flow)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steering", STEERINGS)
@pytest.mark.parametrize("kind", CRITICS)
def test_critics(kind: str, steering: str, backend: str) -> None:
    flow, critic = Flow(SinusoidalMLP()), CRITICS[kind]()
    packed = from_module(flow, "flow", **DIMS), from_module(critic, "critic", **DIMS)
    sampler = sampler_of(*packed, STEERINGS[steering], backend)
    for _ in range(3):
        agrees(sampler, flow, critic)
        change(flow, critic)


@needs_cpu
@pytest.mark.parametrize("steering", STEERINGS)
def test_bfloat16(steering: str) -> None:
    flow, critic = Flow(SinusoidalMLP()), Everything()
    packed = from_module(flow, "flow", **DIMS), from_module(critic, "critic", **DIMS)
    sampler = sampler_of(*packed, STEERINGS[steering], precision="bfloat16")
    for _ in range(2):
        agrees(sampler, flow, critic, BFLOAT16)
        change(flow, critic)


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_flow_map(backend: str) -> None:
    flow, critic, posterior = Flow(PlainSinusoidal()), InUnits(), Map()
    packed = from_module(flow, "flow", **DIMS), from_module(critic, "critic", **DIMS)
    steering = Steering.qpilots_m(num_samples=2)
    drawn = from_module(posterior, "meta_flow_map", **DIMS)
    sampler = sampler_of(*packed, steering, backend, posterior=drawn)

    class Draw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = posterior

        def forward(self, obs: Tensor, xbar: Tensor, x: Tensor, t: Tensor) -> Tensor:
            return self.map(obs, xbar, x, t, torch.zeros_like(t), torch.ones_like(t))

    for _ in range(2):
        agrees(sampler, flow, critic, posterior=Draw())
        change(flow, critic, posterior)


def test_what_is_known_stays_known() -> None:
    """Raw time and plain inputs are packed as they always were."""

    class Raw(PlainSinusoidal):
        width = 1

        def forward(self, t: Tensor) -> Tensor:
            return t

    assert from_module(Flow(Raw()), "flow", **DIMS).spec.own_columns is None
    assert from_module(Critic(), "critic", **DIMS).spec.own_columns is None


def test_a_normaliser_that_changes_nothing_yet_is_followed() -> None:
    critic, flow = Normalising(), Flow(PlainSinusoidal())
    critic.mean.zero_(), critic.std.fill_(1.0)
    packed = from_module(critic, "critic", **DIMS)
    assert packed.spec.obs_columns == S
    change(critic)
    agrees(sampler_of(from_module(flow, "flow", **DIMS), packed, backend="reference"), flow, critic)


# ---------------------------------------------------------------- live, frozen, copied


def _writes(flow: Flow, critic: Everything) -> dict[str, Callable[[], object]]:
    def step() -> None:
        optimiser = torch.optim.SGD([*flow.time.parameters(), critic.shift], lr=0.5)
        flow(torch.randn(3, S), torch.randn(3, A), torch.rand(3, 1)).sum().backward()
        critic.shift.grad = torch.ones_like(critic.shift)
        optimiser.step()

    def another() -> None:
        flow.time.net[2].bias = nn.Parameter(torch.randn(flow.time.width))
        critic.register_buffer("scale", torch.rand(A) + 0.5)

    return {
        "an optimiser's step": step,
        "past autograd": lambda: flow.time.net[0].weight.data.mul_(1.5),
        "another parameter in its place": another,
        "other memory": lambda: setattr(flow.time.net[0].weight, "data", torch.randn(16, 8)),
        "a buffer": lambda: critic.scale.mul_(1.5),
        "the encoder": lambda: critic.encoder[0].weight.data.mul_(1.5),
    }


@needs_cpu
@pytest.mark.parametrize("write", _writes(Flow(SinusoidalMLP()), Everything()))
def test_the_next_call_sees_it(write: str) -> None:
    flow, critic = Flow(SinusoidalMLP()), Everything()
    sampler = sampler_of(from_module(flow, "flow", **DIMS), from_module(critic, "critic", **DIMS))
    given = inputs(1, sampler.steering)
    before = [sampler(*given) for _ in range(3)][-1]  # the quick call, by now
    assert torch.equal(before, sampler(*given))
    _writes(flow, critic)[write]()
    now = sampler(*given)
    assert not torch.equal(now, before)
    torch.testing.assert_close(now, exact(flow, critic, sampler.steering, *given), rtol=0, atol=FLOAT32)
    agrees(sampler, flow, critic)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_keeps_them(backend: str) -> None:
    flow, critic = Flow(SinusoidalMLP()), Everything()
    sampler = sampler_of(from_module(flow, "flow", **DIMS), from_module(critic, "critic", **DIMS), backend=backend)
    sampler.freeze()
    given = inputs(1, sampler.steering)
    before = [sampler(*given) for _ in range(3)][-1]
    change(flow, critic)
    assert torch.equal(sampler(*given), before)
    torch.testing.assert_close(
        sampler.unfreeze()(*given), exact(flow, critic, sampler.steering, *given), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_go_their_own_way(backend: str) -> None:
    flow, critic = Flow(SinusoidalMLP()), Everything()
    sampler = sampler_of(from_module(flow, "flow", **DIMS), from_module(critic, "critic", **DIMS), backend=backend)
    given = inputs(2, sampler.steering)
    before = sampler(*given)
    copies = copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))
    change(flow, critic)
    for made in copies:
        torch.testing.assert_close(made(*given), before, rtol=0, atol=1e-6)


@needs_cpu
def test_a_sampler_takes_such_modules_as_they_are() -> None:
    flow, critic = Flow(SinusoidalMLP()), Encoding()
    sampler = sampler_of(flow, critic)
    sampler = sampler_of(from_module(flow, "flow", **DIMS), critic)
    assert "critic Encoding runs packed" in str(sampler.explain())
    agrees(sampler, flow, critic)
    change(flow, critic)
    agrees(sampler, flow, critic)
    info = sampler(*inputs(3, sampler.steering), return_info=True)[1]
    assert info.q_values.shape == (2, 3)


def test_mixed_with_callables() -> None:
    flow, critic = Flow(SinusoidalMLP()), Everything()
    packed = from_module(flow, "flow", **DIMS), from_module(critic, "critic", **DIMS)
    for pair in ((packed[0], lambda *args: critic(*args)), (lambda *args: flow(*args), packed[1])):
        agrees(sampler_of(*pair, backend="auto"), flow, critic)


def test_the_modules_own_forward_is_what_trains() -> None:
    critic = Everything()
    packed = from_module(critic, "critic", **DIMS)
    packed(torch.randn(3, S), torch.randn(3, A)).sum().backward()
    assert critic.encoder[0].weight.grad is not None and critic.shift.grad is not None


# ---------------------------------------------------------------- refused


class Added(Flow):
    """The time features are added to encoded observations."""

    def __init__(self) -> None:
        super().__init__(SinusoidalMLP())
        self.encode = nn.Linear(S, self.time.width)
        self.net = nn.Sequential(nn.Linear(A + self.time.width, H), nn.Mish(), nn.Linear(H, A))

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([actions, self.time(t) + self.encode(obs)], -1))


class Clipping(Critic):
    def act(self, actions: Tensor) -> Tensor:
        return actions.clamp(-2, 2)


class ScaledByObs(Critic):
    def act(self, actions: Tensor) -> Tensor:
        return actions * self.mean.norm()

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(obs, actions * obs[:, :1])


class TrainedVariance(Critic):
    def __init__(self) -> None:
        super().__init__()
        self.var = nn.Parameter(torch.ones(S))

    def observe(self, obs: Tensor) -> Tensor:
        return obs / self.var.sqrt()


class TrainedScale(TrainedVariance):
    """Of the outputs."""

    def observe(self, obs: Tensor) -> Tensor:
        return obs

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        q1, q2 = super().forward(obs, actions)
        return q1 * self.var.log().mean(), q2 * self.var.log().mean()


@pytest.mark.parametrize(
    ("module", "kind", "reason"),
    [
        (TrainedVariance(), "critic", "its first Linear reads is not finite where its tensors hold random numbers"),
        (TrainedScale(), "critic", "its outputs are not finite where its tensors hold random numbers"),
        (Added(), "flow", "follows obs and t together"),
        (Clipping(), "critic", "no scaled and shifted action: off by"),
        (ScaledByObs(), "critic", "follows obs and actions together"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refused(module: nn.Module, kind: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_module(module, kind, **DIMS)


def test_a_flow_that_scales_its_actions_is_refused() -> None:
    class Scaled(Flow):
        def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
            return super().forward(obs, 2 * actions, t)

    with pytest.raises(ValueError, match="reads noisy_actions changed"):
        from_module(Scaled(PlainSinusoidal()), "flow", **DIMS)


def test_operators_say_so() -> None:
    packed = from_module(Encoding(), "critic", **DIMS)
    with pytest.raises(TypeError, match="own module computes its columns of obs"):
        ops.critic_values(torch.randn(2, S), torch.randn(2, A), packed)


def test_a_spec_says_so() -> None:
    from qpilots_fast.spec import SamplerSpec

    flow = from_module(Flow(SinusoidalMLP()), "flow", **DIMS).spec
    spec = SamplerSpec(flow, CriticEnsemble(S, A, 2, (8,)).spec, None)
    assert spec.own_columns == "the flow's own module computes its columns of times"
    assert SamplerSpec.from_json(spec.json) == spec
    assert SamplerSpec(FlowMLP(S, A, (8,)).spec, CriticEnsemble(S, A, 2, (8,)).spec, None).own_columns is None


# ---------------------------------------------------------------- hints


class Plain(nn.Module):
    """TD3's critic on what it is shown."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Sequential(nn.Linear(width, H), nn.ReLU(), nn.Linear(H, 1))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.q(torch.cat([obs, actions], -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_critic_is_shown(backend: str) -> None:
    """obs= with an encoder outside of the module, dims= and a live affine map."""
    encoder = nn.Sequential(nn.Linear(S, 5), nn.Tanh())
    scale, shift = torch.rand(2) + 0.5, torch.randn(2)
    flow, critic = Flow(SinusoidalMLP()), Plain(5 + 2)
    packed_flow = from_module(flow, "flow", **DIMS)
    packed = from_module(
        critic, "critic", like=packed_flow, obs=lambda obs: encoder(obs), dims=[3, 1], action_scale=scale,
        action_shift=shift,
    )  # fmt: skip
    assert packed.spec.action_columns == (3, 1) and packed.spec.obs_columns == 5

    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.critic, self.encoder = critic, encoder
            self.scale, self.shift = nn.Buffer(scale), nn.Buffer(shift)

        def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
            return self.critic(self.encoder(obs), actions[:, [3, 1]] * self.scale + self.shift)

    sampler = sampler_of(packed_flow, packed, backend=backend)
    given = inputs(1, sampler.steering)
    for _ in range(4):
        torch.testing.assert_close(
            sampler(*given), exact(flow, Shown(), sampler.steering, *given), rtol=0, atol=FLOAT32
        )
        agrees(sampler, flow, Shown())
        scale.mul_(1.2), shift.add_(0.3)
        change(encoder)
    torch.testing.assert_close(packed(given[0], given[1]), Shown()(given[0], given[1]).T)


class Box:
    def __init__(self, *shape: int) -> None:
        self.shape, self.low = shape, 0.0


@pytest.mark.parametrize(
    ("hints", "error", "reason"),
    [
        ({"dims": [0, 4]}, ValueError, "dims is .* below action_dim=4"),
        ({"dims": [0, 0]}, ValueError, "expected different indices"),
        ({"dims": [0], "action_dim": None}, ValueError, "dims needs action_dim"),
        ({"dims": [0], "action_scale": torch.ones(2)}, ValueError, "action_scale has 2 numbers; expected 1"),
        ({"action_scale": "2"}, TypeError, "expected a number, or a floating tensor"),
        ({"obs": 3}, TypeError, "expected a function of the call's obs"),
        ({"like": nn.Linear(1, 1)}, TypeError, "like is Linear; expected a packed network"),
        ({"observation_space": Box(S + 1)}, ValueError, "obs_dim is 7, but the network or space says 8"),
        ({"action_space": object()}, TypeError, "object does not tell action_dim"),
    ],
)
def test_hints_that_cannot_be(hints: dict, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        from_module(Plain(S + A), "critic", **{**DIMS, **hints})


def test_widths_from_spaces_and_networks() -> None:
    critic = Plain(S + A)
    for hints in (
        {"like": FlowMLP(S, A, (8,))},
        {"observation_space": Box(S), "action_space": Box(2, A // 2)},
    ):
        spec = from_module(critic, "critic", **hints).spec
        assert (spec.obs_dim, spec.action_dim) == (S, A)
    with pytest.raises(ValueError, match="is for critics"):
        from_module(Flow(PlainSinusoidal()), "flow", **DIMS, action_scale=2.0)


# ---------------------------------------------------------------- wrappers inside, layers that come late


@needs_cpu
@pytest.mark.parametrize("in_place", [False, True])
def test_parts_that_torch_compiles(in_place: bool) -> None:
    flow, critic = Flow(SinusoidalMLP()), Everything()
    for owner, name in ((flow, "net"), (flow, "time"), (critic, "q1"), (critic, "encoder")):
        part = getattr(owner, name)
        width = part.width if name == "time" else None
        if in_place:
            part.compile(backend="eager")
        else:
            setattr(owner, name, torch.compile(part, backend="eager"))
        if width is not None:
            getattr(owner, name).width = width
    sampler = sampler_of(from_module(flow, "flow", **DIMS), from_module(critic, "critic", **DIMS))
    for _ in range(2):
        agrees(sampler, flow, critic)
        change(flow, critic)


def test_layers_that_the_first_call_builds() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q: nn.Module | None = None

        def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
            columns = torch.cat([obs, actions], -1)
            if self.q is None:
                self.q = nn.Sequential(nn.Linear(S + A, H), nn.ReLU(), nn.Linear(H, 1)).to(columns.dtype)
            return self.q(columns)

    critic = Late()
    with pytest.raises(ValueError, match=r"no q\.0\.weight before its first call.* Call the module once on a batch"):
        from_module(critic, "critic", **DIMS)
    critic(torch.randn(2, S), torch.randn(2, A))
    assert from_module(critic, "critic", **DIMS).spec.hidden_dims == (H,)


@needs_cpu
@pytest.mark.parametrize("time", TIMES)
def test_widths_that_only_the_flow_tells(time: str) -> None:
    """The first Linear may be the time network's; its features are as wide as it makes them."""
    flow, critic = Flow(TIMES[time]()), Everything()
    sampler = sampler_of(flow, critic)
    packed = [" runs packed" in line for line in sampler.explain().networks[:2]]
    assert packed == [time in ("SinusoidalMLP", "GaussianFourier", "StepTable", "PlainSinusoidal")] * 2
    agrees(sampler, flow, critic)


@needs_cpu
def test_a_followed_tensor_without_its_memory_is_refused() -> None:
    flow = Flow(SinusoidalMLP())
    sampler = sampler_of(from_module(flow, "flow", **DIMS), from_module(Critic(), "critic", **DIMS))
    given = inputs(1, sampler.steering)
    for _ in range(3):
        sampler(*given)
    flow.time.net[0].weight.data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="expected one on the CPU that has its memory"):
        sampler(*given)


@needs_cpu
@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_contexts_change_nothing(context: Callable) -> None:
    sampler = sampler_of(
        from_module(Flow(SinusoidalMLP()), "flow", **DIMS), from_module(Everything(), "critic", **DIMS)
    )
    given = inputs(2, sampler.steering)
    expected = sampler(*given)
    for made in (sampler, copy.deepcopy(sampler)):  # the quick way, and the first call
        with context():
            assert torch.equal(made(*given), expected)
    with context():
        packed = from_module(Everything(), "critic", **DIMS)
    assert packed.spec.obs_columns == 9
