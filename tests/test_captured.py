"""The captured sampler without a GPU: its checks, what it keeps alive, and replays of the emulated CUDA kernels."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qpilots_fast import BackendUnavailable, SteeredSampler, Steering, backends
from qpilots_fast.backends import Call
from qpilots_fast.backends.captured import CapturedSampler, CudaGraph
from qpilots_fast.backends.cuda import CudaBackend
from qpilots_fast.spec import BoundNetworks, SamplerSpec
from qpilots_fast.testing import Case, make_case
from tests.recorded_graph import Record, RecordedGraph, not_held

cuda_emulator = pytest.importorskip("cuda_emulator")
needs_compiler = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="g++ is missing")

U, M = Steering.qpilots_u(), Steering.qpilots_m(num_samples=2)


def sampler_of(case: Case, precision: str = "float32") -> tuple[SamplerSpec, BoundNetworks]:
    posterior = case.posterior if case.steering.estimate == "mfm" else None
    spec = SamplerSpec(
        case.flow.spec,
        case.critic.spec,
        posterior and posterior.spec,
        case.steering,
        case.num_steps,
        precision,
    )
    return spec, BoundNetworks(case.flow.bound(), case.critic.bound(), posterior and posterior.bound())


# ---------------------------------------------------------------- checks and ownership, on a graph of plain PyTorch


class FunctionGraph:
    """Replays by calling a function that fills the recorded actions from the recorded inputs."""

    def __init__(self) -> None:
        self.fill: Callable[[], None] = lambda: None
        self.recorded = 0

    def record(self, enqueue: Callable[[], Any]) -> Any:
        self.recorded += 1
        return enqueue()

    def replay(self) -> None:
        self.fill()


def summed(case: Case, **arguments: Any) -> tuple[CapturedSampler, FunctionGraph]:
    """A captured sampler whose actions are its noise + the sums of its other inputs."""
    graph = FunctionGraph()

    def enqueue(call: Call) -> tuple[Tensor, Any]:
        actions = torch.zeros_like(call.noise)

        def fill() -> None:
            eps = 0 if call.posterior_noise is None else call.posterior_noise.sum()
            actions.copy_(call.noise + call.obs.sum(1, keepdim=True) + eps)

        graph.fill = fill
        return actions, None

    return CapturedSampler(*sampler_of(case), len(case.obs), enqueue, graph, **arguments), graph


@pytest.mark.parametrize("steering", [U, M], ids=["u", "m"])
def test_replay_reads_its_arguments(steering):
    case = make_case(steering, batch_size=3, num_steps=2)
    captured, graph = summed(case)
    expected = case.noise + case.obs.sum(1, keepdim=True)
    expected = expected if steering is U else expected + case.posterior_noise.sum()
    got = captured(case.obs, case.noise, case.posterior_noise)
    torch.testing.assert_close(got, expected)
    assert graph.recorded == 1
    captured(2 * case.obs, case.noise, case.posterior_noise)
    torch.testing.assert_close(got, expected)  # a result is the caller's own


WRONG = {
    "obs of another batch": (dict(obs=torch.zeros(4, 7)), ValueError, r"obs has shape \[4, 7\]; .*\[3, 7\] on cpu"),
    "one observation": (dict(obs=torch.zeros(7)), ValueError, r"obs has shape \[7\]"),
    "float64 obs": (dict(obs=torch.zeros(3, 7).double()), TypeError, r"obs is torch.float64; .*obs.float\(\)"),
    "obs elsewhere": (dict(obs=torch.zeros(3, 7, device="meta")), ValueError, r"obs is on meta; .* on cpu"),
    "obs as a list": (dict(obs=[[0.0] * 7] * 3), TypeError, r"obs is list; .*torch.as_tensor"),
    "narrow noise": (dict(noise=torch.zeros(3, 4)), ValueError, r"noise has shape \[3, 4\]; .*\[3, 5\]"),
    "no noise": (dict(noise=None), ValueError, r"noise is None; .*\[3, 5\] .*draws nothing itself"),
    "float16 noise": (dict(noise=torch.zeros(3, 5).half()), TypeError, r"noise is torch.float16"),
    "no draws": (dict(posterior_noise=None), ValueError, r"posterior_noise is None; .*\[2, 3, 2, 5\]"),
    "draws of one step": (dict(posterior_noise=torch.zeros(1, 3, 2, 5)), ValueError, r"posterior_noise has shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_before_anything_is_written(name):
    wrong, kind, message = WRONG[name]
    case = make_case(M, batch_size=3, num_steps=2, obs_dim=7, action_dim=5)
    captured, graph = summed(case)
    right = dict(obs=case.obs, noise=case.noise, posterior_noise=case.posterior_noise)
    captured(**right)
    before = {name: own.clone() for name, own in captured._inputs.items()}
    graph.fill = lambda: pytest.fail("replayed")
    with pytest.raises(kind, match=message):
        captured(**{**{name: value + 1 for name, value in right.items()}, **wrong})
    assert all(torch.equal(own, before[name]) for name, own in captured._inputs.items())


def test_posterior_noise_is_not_asked_for_where_nothing_is_drawn():
    case = make_case(U, batch_size=3)
    captured, _ = summed(case)
    expected = captured(case.obs, case.noise)
    assert torch.equal(captured(case.obs, case.noise, torch.zeros(1)), expected)


def test_inputs_that_require_grad_and_inference_mode():
    case = make_case(U, batch_size=3)
    with torch.inference_mode():
        captured, _ = summed(case)
        expected = captured(case.obs, case.noise)
    got = captured(case.obs.clone().requires_grad_(), case.noise)
    assert torch.equal(got, expected) and not got.requires_grad
    assert torch.equal(captured(case.obs, case.noise), expected)


def test_a_failed_check_stops_the_replay():
    case = make_case(U, batch_size=3)

    def fail(_: object) -> None:
        raise RuntimeError("an earlier replay gave up")

    captured, graph = summed(case, before_replay=fail)
    graph.fill = lambda: pytest.fail("replayed")
    with pytest.raises(RuntimeError, match="gave up"):
        captured(case.obs, case.noise)


def test_threads_get_their_own_actions():
    case = make_case(U, batch_size=3)
    captured, graph = summed(case)
    fill = graph.fill

    def slowly() -> None:
        time.sleep(0.01)
        fill()

    graph.fill = slowly
    wrong = []

    def call(offset: float) -> None:
        for _ in range(5):
            got = captured(case.obs, case.noise + offset)
            if not torch.allclose(got, case.noise + offset + case.obs.sum(1, keepdim=True)):
                wrong.append(offset)

    threads = [threading.Thread(target=call, args=(float(i),)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_parameter_given_other_memory_leaves_its_old_memory_to_the_graph():
    case = make_case(U, batch_size=3)
    captured, _ = summed(case)
    parameters = list(case.flow.parameters())
    old = [(p.data_ptr(), p.nbytes, str(i)) for i, p in enumerate(parameters)]
    for parameter in parameters:
        parameter.data = torch.zeros_like(parameter)
    assert not_held(captured, old) == []


def test_graphs_need_a_gpu():
    with pytest.raises(BackendUnavailable, match="CUDA device; the networks are on cpu"):
        CudaGraph(torch.device("cpu"))


# ---------------------------------------------------------------- the emulated CUDA kernels


@pytest.fixture(scope="module")
def library():
    return cuda_emulator.emulated_kernels()


class EmulatedGraph(RecordedGraph):
    """The calls of an emulated library, and the memory that they touch."""

    def __init__(self, library: Any, warm_up: bool = True) -> None:
        super().__init__(self._catch_calls, warm_up)
        self._library, self.ranges = library, list[tuple[int, int, str]]()

    def _catch_calls(self, record: Record) -> Callable[[], object]:
        call = self._library.call

        def recorded(name: str, *arguments: Any, memory: Any = None) -> None:
            if memory is None:  # asks, and launches nothing
                return call(name, *arguments)
            touched = memory()  # numbers alone: no tensor lives because of a graph
            self.ranges += [(start, size, f"{name}: {what}") for start, size, what, _ in touched]
            record(lambda: call(name, *arguments, memory=lambda: touched))

        self._library.call = recorded
        return lambda: self._library.__dict__.pop("call")


@needs_compiler
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("steering", [U, M], ids=["u", "m"])
def test_emulated_replays_are_the_calls(library, steering, frozen):
    library.emulator.configure()
    cuda, graph = CudaBackend(library), EmulatedGraph(library)
    case = make_case(steering, batch_size=3, num_steps=3)
    spec, networks = sampler_of(case)
    packed = cuda.pack(spec, networks) if frozen else None
    captured = cuda.capture(spec, networks, 3, packed, graph)
    assert len(graph.launches) == 1 + (not frozen)
    assert not_held(captured, graph.ranges) == []
    inputs = case.obs, case.noise, case.posterior_noise
    expected = cuda.sample(Call(spec, networks, *inputs)).actions
    assert torch.equal(captured(*inputs), expected)
    with torch.no_grad():
        for parameter in case.flow.parameters():
            parameter.mul_(1.1)
    changed = cuda.sample(Call(spec, networks, *inputs)).actions
    assert not torch.equal(changed, expected)
    assert torch.equal(captured(*inputs), expected if frozen else changed)
    del cuda, networks
    gc.collect()
    assert torch.equal(captured(*inputs), expected if frozen else changed)


@needs_compiler
def test_replay_sees_that_an_earlier_one_gave_up(library):
    library.emulator.configure(num_sms=4)
    cuda, graph = CudaBackend(library, spin_limit=1), EmulatedGraph(library, warm_up=False)
    case = make_case(U, batch_size=1, num_steps=2)
    captured = cuda.capture(*sampler_of(case), 1, None, graph)
    assert captured(case.obs, case.noise).isnan().all()
    with pytest.raises(RuntimeError, match="gave up waiting"):
        captured(case.obs, case.noise)
    assert captured(case.obs, case.noise).isnan().all()  # it is said once


@needs_compiler
def test_inside_a_capture_of_others_tables_are_kept_and_nothing_is_uploaded(library, monkeypatch):
    library.emulator.configure()
    cuda = CudaBackend(library)
    case = make_case(U, batch_size=2, num_steps=2)
    spec, networks = sampler_of(case)
    call = Call(spec, networks, case.obs, case.noise)
    expected = cuda.sample(call).actions
    monkeypatch.setattr("qpilots_fast.backends.captured.capturing", lambda device: True)
    for module in ("backend", "launcher"):
        monkeypatch.setattr(f"qpilots_fast.backends.cuda.{module}.capturing", lambda device: True)
    assert torch.equal(cuda.sample(call).actions, expected)
    ((ready, *_),) = cuda._captured
    assert ready.loaded is cuda._launcher.sample_program(spec, networks, 2) and ready.packed is None
    assert any(ready.table.items is kept for kept in cuda._launcher._pack_tables.values())
    with pytest.raises(BackendUnavailable, match="has not run at this batch size yet; call the sampler once"):
        cuda.sample(Call(spec, networks, case.obs[:1], case.noise[:1]))
    moved = make_case(U, batch_size=2, num_steps=2, seed=1)
    with pytest.raises(BackendUnavailable, match="a parameter's storage moved"):
        cuda.sample(Call(*sampler_of(moved), moved.obs, moved.noise))


# ---------------------------------------------------------------- SteeredSampler.capture


class CapturingBackend(CudaBackend):
    """The emulated backend as the chosen one, with a graph that needs no GPU."""

    def capture(self, spec, networks, batch_size, packed=None, graph=None):
        return super().capture(spec, networks, batch_size, packed, EmulatedGraph(self._loader.get()))


@needs_compiler
def test_capture_of_a_frozen_sampler_keeps_its_weights(library, monkeypatch):
    library.emulator.configure()
    monkeypatch.setattr(backends, "choose", lambda request: backends.Choice(CapturingBackend(library), {}))
    case = make_case(U, batch_size=2, num_steps=2)
    sampler = SteeredSampler(case.flow, case.critic, U, num_steps=2).freeze()
    captured = sampler.capture(2)
    before = captured(case.obs, case.noise)
    with torch.no_grad():
        next(case.flow.parameters()).mul_(1.5)
    assert torch.equal(captured(case.obs, case.noise), before)
    assert not torch.equal(sampler.unfreeze().capture(2)(case.obs, case.noise), before)


def test_capture_of_best_of_n_is_refused():
    case = make_case(batch_size=2)
    sampler = SteeredSampler(case.flow, case.critic, Steering.best_of_n(4))
    with pytest.raises(BackendUnavailable, match="num_candidates=4; expected 1"):
        sampler.capture(2)
