"""Networks, layers and parameters that change after the first call: the new values, or an error; never old memory."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, SteeredSampler, Steering, from_module, ops
from qpilots_fast.testing import assert_close
from tests.marks import needs_cpu

OBS, ACTION, STEPS = 6, 3, 3
U, M = Steering.qpilots_u(), Steering.qpilots_m(num_samples=2)


class UserCritic(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(OBS + ACTION, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.body(torch.cat([obs, actions], -1)).T


def build(backend: str, steering: Steering = U, critic: nn.Module | None = None) -> SteeredSampler:
    torch.manual_seed(0)
    flow = FlowMLP(OBS, ACTION, (16, 16))
    critic = CriticEnsemble(OBS, ACTION, 3, (16, 16)) if critic is None else critic
    posterior = MetaFlowMap(OBS, ACTION, (16, 16)) if steering.estimate == "mfm" else None
    return SteeredSampler(flow, critic, steering, posterior=posterior, num_steps=STEPS, backend=backend)


def arguments(steering: Steering = U) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, OBS), (4, ACTION), *([(STEPS, 4, steering.num_samples, ACTION)] if steering is M else [])]
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


def _narrowed(parameter: Tensor, *sizes: slice) -> None:
    parameter.data = parameter.data[sizes]  # the same address, and often the same strides


REFUSED: dict[str, Callable[[SteeredSampler], None]] = {
    "a smaller layer": lambda s: s.flow.hidden.__setitem__(1, nn.Linear(8, 8)),
    "a layer without bias": lambda s: setattr(s.flow.hidden[1], "bias", None),
    "smaller memory": lambda s: setattr(s.flow.hidden[1].weight, "data", torch.randn(8, 8)),
    "fewer rows, same address": lambda s: _narrowed(s.flow.hidden[1].weight, slice(0, 8)),
    "fewer entries, same address": lambda s: _narrowed(s.flow.hidden[0].bias, slice(0, 8)),
    "fewer members, same address": lambda s: _narrowed(s.critic.weights[1], slice(0, 2)),
    "one critic layer less": lambda s: setattr(s.critic, "weights", nn.ParameterList(list(s.critic.weights)[:-1])),
    "no memory": lambda s: s.flow.hidden[1].weight.untyped_storage().resize_(0),
    "less memory": lambda s: s.flow.hidden[1].weight.untyped_storage().resize_(64),
}


@pytest.mark.parametrize("edit", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_at_every_call(edit, backend):
    sampler = build(backend)
    for _ in range(3):
        sampler(*arguments())
    edit(sampler)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected"):
            sampler(*arguments())


@pytest.mark.parametrize("steering", [U, M], ids=["U", "M"])
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("direct", [False, True], ids=["assigned", "in _modules"])
def test_a_replaced_network_is_the_one_that_runs(steering, frozen, direct, backend):
    if frozen and direct:
        pytest.skip("a frozen sampler looks at no module: it sees assignments alone")
    sampler, inputs = build(backend, steering), arguments(steering)
    if frozen:
        sampler.freeze()
    for _ in range(2):
        sampler(*inputs)
    replaced = {"flow": FlowMLP(OBS, ACTION, (8,)), "critic": CriticEnsemble(OBS, ACTION, 2, (8, 24), "silu")}
    for name, network in replaced.items():
        if direct:
            sampler._modules[name] = network
        else:
            setattr(sampler, name, network)
    expected = SteeredSampler(
        **replaced, steering=steering, posterior=sampler.posterior, num_steps=STEPS, backend=backend
    )(*inputs)
    for _ in range(2):
        assert torch.equal(sampler(*inputs), expected)


def test_a_replaced_setting_counts(backend):
    sampler, inputs = build(backend), arguments()
    for _ in range(2):
        sampler(*inputs)
    sampler.steering, sampler.num_steps, sampler.action_high = Steering.qpilots_u(1.0), 2, 0.25
    fresh = SteeredSampler(
        sampler.flow, sampler.critic, Steering.qpilots_u(1.0), num_steps=2, backend=backend, action_high=0.25
    )
    assert torch.equal(sampler(*inputs), fresh(*inputs))
    with pytest.raises(ValueError, match="num_steps is 0"):
        sampler.num_steps = 0
    assert sampler.num_steps == 2 and torch.equal(sampler(*inputs), fresh(*inputs))


def test_weights_computed_at_every_call_stay_live(backend):
    sampler, inputs = build(backend), arguments()
    nn.utils.parametrizations.weight_norm(sampler.flow.hidden[1])
    for _ in range(3):
        before = sampler(*inputs)
    sampler.flow.hidden[1].parametrizations.weight.original0.data.mul_(3)
    after = sampler(*inputs)
    assert not torch.equal(after, before)
    assert_close(after, build_like(sampler, "reference")(*inputs), "float32")


def build_like(sampler: SteeredSampler, backend: str) -> SteeredSampler:
    return SteeredSampler(sampler.flow, sampler.critic, sampler.steering, num_steps=STEPS, backend=backend)


def test_an_edited_user_module_is_refused(backend):
    module = UserCritic().eval()
    sampler = build(backend, critic=from_module(module, "critic", obs_dim=OBS, action_dim=ACTION))
    for _ in range(2):
        sampler(*arguments())
    module.body[1] = nn.ReLU()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"body\.1 was GELU .* is ReLU now; call from_module again"):
            sampler(*arguments())


def test_operators_check_sizes_too(backend):
    flow = FlowMLP(OBS, ACTION, (16, 16))
    obs, noise = arguments()
    ops.velocity(obs, noise, 0.5, flow, backend=backend)
    flow.hidden[1] = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="expected"):
        ops.velocity(obs, noise, 0.5, flow, backend=backend)


@needs_cpu
class OwnCritic(UserCritic):
    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return torch.cos(super().forward(obs, actions))


LISTED: dict[str, Callable[[], nn.Module]] = {
    "packed": lambda: CriticEnsemble(OBS, ACTION, 2, (16, 16)),
    "recognised": UserCritic,
    "callable": OwnCritic,
}
RESETS: dict[str, Callable[[nn.ModuleList, nn.Module], object]] = {
    "replaced": lambda critics, new: critics.__setitem__(1, new),
    "appended": lambda critics, new: critics.append(new),
    "extended": lambda critics, new: critics.extend([new]),
    "inserted": lambda critics, new: critics.insert(0, new),
    "removed": lambda critics, new: critics.__delitem__(0),
    "popped and replaced": lambda critics, new: (critics.pop(2), critics.append(new)),
    "swapped": lambda critics, new: (critics.__setitem__(0, critics[1]), critics.__setitem__(1, new)),
}


@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS)
@pytest.mark.parametrize("kind", list(LISTED))
def test_critics_replaced_in_a_list_are_those_that_are_asked(kind, reset, backend):
    torch.manual_seed(0)
    critics = nn.ModuleList(LISTED[kind]() for _ in range(3))
    sampler = build(backend, critic=critics)
    for _ in range(3):
        before = sampler(*arguments())
    reset(critics, LISTED[kind]())
    for _ in range(3):
        got = sampler(*arguments())
        fresh = SteeredSampler(sampler.flow, list(critics), U, num_steps=STEPS, backend=backend)
        assert_close(got, fresh(*arguments()))
        assert (got - before).abs().max() > 1e-4
    assert [id(p) for p in sampler.critic.parameters()] == [id(p) for p in critics.parameters()]
    assert {name.removeprefix("critic.") for name in sampler.state_dict() if "critic" in name} == set(
        critics.state_dict()
    )


def test_a_list_is_followed_by_copies_and_moved_before_the_next_call():
    torch.manual_seed(0)
    critics = nn.ModuleList(UserCritic() for _ in range(2))
    sampler = build("auto", critic=critics)
    sampler(*arguments())
    flow, twin, both = copy.deepcopy((sampler.flow, sampler, critics))
    both[1] = UserCritic()
    assert_close(twin(*arguments()), SteeredSampler(flow, list(both), U, num_steps=STEPS)(*arguments()))
    assert (twin(*arguments()) - sampler(*arguments())).abs().max() > 1e-4
    critics.append(UserCritic())
    sampler.double()
    assert next(critics[2].parameters()).dtype == torch.float64
    assert sampler(*(x.double() for x in arguments())).dtype == torch.float64


def test_what_does_not_fit_in_a_list_is_refused_until_it_is_replaced():
    critics = nn.ModuleList(CriticEnsemble(OBS, ACTION, 2, (16, 16)) for _ in range(2))
    sampler = build("auto", critic=critics)
    before = sampler(*arguments())
    fits, critics[1] = critics[1], FlowMLP(OBS, ACTION, (16, 16))
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            sampler(*arguments())
    critics[1] = fits
    assert_close(sampler(*arguments()), before)


def test_new_storage_from_another_thread():
    """Each call reads old or new weights, which are equal here: memory given back would show, or end the process."""
    torch.manual_seed(0)
    flow, critic = FlowMLP(OBS, ACTION, (32,)), CriticEnsemble(OBS, ACTION, 4, (512, 512))
    sampler = SteeredSampler(flow, critic, U, num_steps=2, backend="cpu")
    inputs = arguments()
    expected, end, wrong = sampler(*inputs), time.monotonic() + 2, []

    def sampling() -> None:
        while time.monotonic() < end:
            if not torch.equal(sampler(*inputs), expected):
                wrong.append("other actions")

    def swapping() -> None:
        while time.monotonic() < end:
            for parameter in critic.parameters():
                parameter.data = parameter.data.clone()
            torch.empty(4, 512, 512).fill_(torch.nan)  # takes the memory that was given back
            sampler(*inputs)

    _together(sampling, swapping)
    assert not wrong


@needs_cpu
def test_freezing_in_another_thread():
    sampler, inputs = build("cpu"), arguments()
    expected, end, wrong = sampler(*inputs), time.monotonic() + 1, []

    def sampling() -> None:
        while time.monotonic() < end:
            if not torch.equal(sampler(*inputs), expected):
                wrong.append("other actions")

    def freezing() -> None:
        while time.monotonic() < end:
            sampler.freeze()
            sampler.unfreeze()

    _together(sampling, sampling, freezing)
    assert not wrong


def _together(*functions: Callable[[], None]) -> None:
    errors: list[Exception] = []

    def caught(function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
