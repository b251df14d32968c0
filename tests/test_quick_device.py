"""The quick way of a GPU backend, here of the CUDA kernels in the emulator: as the general way, and out of its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, SteeredSampler, Steering, backends
from qpilots_fast.backends import native, quick
from qpilots_fast.backends.caches import Cache
from qpilots_fast.backends.cuda import CudaBackend

cuda_emulator = pytest.importorskip("cuda_emulator")
pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="g++ is missing")

OBS, ACTION, STEPS, BATCH = 4, 2, 2, 2
U, M = Steering.qpilots_u(), Steering.qpilots_m(num_samples=2)


class Counted(CudaBackend):
    """Counts which way calls take."""

    general = 0

    def sample(self, call: Any) -> Any:
        self.general += 1
        return super().sample(call)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Counted:
    library = cuda_emulator.emulated_kernels()
    library.emulator.configure()
    made = Counted(library)
    monkeypatch.setattr(backends, "choose", lambda request: backends.Choice(made, {}))
    return made


@pytest.fixture(params=["compiled", "python"])
def watch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both watches of the parameters."""
    if request.param == "python":
        monkeypatch.setattr(quick, "import_failure", lambda: "not built")
    elif native.import_failure() is not None:
        pytest.skip(native.import_failure())


def build(steering: Steering = U) -> SteeredSampler:
    torch.manual_seed(0)
    flow, critic = FlowMLP(OBS, ACTION, (8,)), CriticEnsemble(OBS, ACTION, 2, (8,))
    posterior = MetaFlowMap(OBS, ACTION, (8,)) if steering.estimate == "mfm" else None
    return SteeredSampler(flow, critic, steering, posterior=posterior, num_steps=STEPS)


def inputs(steering: Steering = U, batch_size: int = BATCH) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch_size, OBS), (batch_size, ACTION), (STEPS, batch_size, steering.num_samples, ACTION))
    obs, noise, eps = (torch.randn(shape, generator=generator) for shape in shapes)
    return obs, noise, eps if steering.uses_posterior else None


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("steering", [U, M, Steering.unsteered()], ids=["U", "M", "unsteered"])
def test_it_gives_the_general_way_s_bits(steering, frozen, backend):
    sampler, arguments = build(steering), inputs(steering)
    if frozen:
        sampler.freeze()
    first = sampler(*arguments)
    assert torch.equal(sampler(*arguments), first) and backend.general == 1
    torch.manual_seed(3)
    drawn = sampler(arguments[0])
    assert backend.general == 1
    again = build(steering)
    torch.manual_seed(3)
    assert torch.equal(drawn, again(arguments[0]))
    assert drawn.grad_fn is None and not drawn.requires_grad


def test_a_strength_for_each_row(backend):
    sampler, arguments, alpha = build(), inputs(), torch.tensor([0.0, 0.7])
    first = sampler(*arguments, alpha=alpha)
    assert torch.equal(sampler(*arguments, alpha=alpha), first) and backend.general == 1
    assert not torch.equal(sampler(*arguments), first)


CHANGES: dict[str, Callable[[SteeredSampler], object]] = {
    "in place": lambda s: s.critic.weights[1].data.neg_(),
    "data": lambda s: setattr(s.critic.weights[1], "data", s.critic.weights[1].data.neg()),
    "parameter": lambda s: setattr(s.flow.hidden[0], "weight", nn.Parameter(-s.flow.hidden[0].weight.detach())),
    "submodule": lambda s: setattr(s.flow, "output", nn.Linear(8, ACTION)),
    "network": lambda s: setattr(s, "critic", CriticEnsemble(OBS, ACTION, 2, (8,))),
    "steering": lambda s: setattr(s, "steering", Steering.qpilots_u(alpha=0.9)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change, backend, watch):
    sampler, arguments = build(), inputs()
    before = sampler(*arguments)
    assert torch.equal(sampler(*arguments), before) and backend.general == 1
    change(sampler)
    after = sampler(*arguments)
    assert not torch.equal(after, before)
    fresh = SteeredSampler(sampler.flow, sampler.critic, sampler.steering, num_steps=STEPS)
    assert torch.equal(after, fresh(*arguments))


def test_each_batch_size_has_its_own(backend):
    sampler = build()
    sizes = [inputs(batch_size=size) for size in (1, 2, 3)]
    firsts = [sampler(*arguments) for arguments in sizes]
    for arguments, first in [*zip(sizes, firsts)] * 2:
        assert torch.equal(sampler(*arguments), first)
    assert backend.general == len(sizes)


REFUSED: dict[str, Callable[[], dict[str, Any]]] = {
    "obs of another dtype": lambda: {"obs": inputs()[0].double()},
    "transposed obs": lambda: {"obs": inputs()[0].t().contiguous().t()},
    "one observation": lambda: {"obs": inputs()[0][0], "noise": inputs()[1][0]},
    "chunks": lambda: {"noise": inputs()[1].view(BATCH, 1, ACTION)},
    "an array": lambda: {"obs": inputs()[0].numpy()},
    "the report": lambda: {"return_info": True},
}


@pytest.mark.parametrize("given", REFUSED.values(), ids=REFUSED)
def test_other_calls_keep_their_meaning(given, backend):
    sampler, (obs, noise, _) = build(), inputs()
    arguments = {"obs": obs, "noise": noise} | given()
    plain = sampler(obs, noise)
    got = sampler(**arguments)
    actions = got[0] if isinstance(got, tuple) else got
    assert torch.equal(actions.reshape(-1, ACTION), plain[: actions.numel() // ACTION])


def test_wrong_inputs_are_still_refused(backend):
    sampler, (obs, noise, _) = build(), inputs()
    sampler(obs, noise)
    with pytest.raises(ValueError, match="obs"):
        sampler(obs[:, :-1], noise)
    with pytest.raises(ValueError, match="noise"):
        sampler(obs, noise[:, :-1])
    with pytest.raises(ValueError, match="alpha"):
        sampler(obs, noise, alpha=torch.ones(BATCH + 1))


def test_a_recorded_call_is_replayed_on_its_own_stream_alone():
    """Two replays at once would share memory."""
    current, replays = [7], []

    def plain(obs: Tensor, noise: Tensor, posterior_noise: Tensor | None, alpha: Tensor | None) -> Tensor:
        return noise

    def capture() -> Any:
        return lambda obs, noise, posterior_noise: replays.append(1) or noise + 1

    kept = Cache(1)
    enqueue = quick.GraphedEnqueue(plain, capture, lambda: current[0], kept)
    x = torch.zeros(1)
    assert [enqueue(x, x, None, None).item() for _ in range(3)] == [0, 1, 1]
    current[0] = 8
    assert enqueue(x, x, None, None).item() == 0 and enqueue(x, x, None, x).item() == 0
    current[0] = 7
    assert enqueue(x, x, None, None).item() == 1 and len(replays) == 3
    quick.GraphedEnqueue(plain, capture, lambda: 7, kept)._record()  # takes the only place
    kept.obtain("another", capture)
    assert enqueue(x, x, None, None).item() == 0
