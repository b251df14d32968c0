"""Columns of networks' own modules on Triton, in the interpreter (test_triton_interpreter.py starts it)."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: test_triton_interpreter.py starts it", allow_module_level=True)

from qpilots_fast import BackendUnavailable, backends, from_module
from qpilots_fast.backends.triton import TritonBackend, launcher
from qpilots_fast.steering import Steering
from tests import test_own_columns as own
from tests import triton_interpreter
from tests.test_triton_captured import InterpretedGraph
from tests.zoo.own_inputs import CRITICS, Encoding, Everything
from tests.zoo.time_networks import Flow, SinusoidalMLP

triton_interpreter.install()


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns that a critic does not read
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[InterpretedGraph]:
    """Those that plain calls are recorded in, on a backend whose workspaces begin as NaN."""
    made: list[InterpretedGraph] = []

    def new_graph(device: torch.device) -> InterpretedGraph:
        made.append(InterpretedGraph())
        return made[-1]

    triton = TritonBackend(fill=float("nan"), new_graph=new_graph)
    choose = backends.choose
    monkeypatch.setattr(
        backends, "choose", lambda asked: backends.Choice(triton, {}) if asked.name == "triton" else choose(asked)
    )
    return made


@pytest.mark.parametrize("time", ["SinusoidalMLP", "StepTable", "PlainAttribute"])
def test_time_features(time: str, graphs) -> None:
    own.test_time_features(time, "triton")
    assert graphs  # the repeated calls were replays


@pytest.mark.parametrize(("kind", "steering"), [*zip(CRITICS, [*own.STEERINGS, "U"]), ("Everything", "QGF")])
def test_critics(kind: str, steering: str, graphs) -> None:
    own.test_critics(kind, steering, "triton")


def test_meta_flow_map(graphs) -> None:
    own.test_meta_flow_map("triton")


def test_frozen_keeps_them(graphs) -> None:
    own.test_frozen_keeps_them("triton")


def test_what_the_critic_is_shown(graphs) -> None:
    own.test_what_the_critic_is_shown("triton")


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_reduced_precisions(precision: str, graphs) -> None:
    flow, critic = Flow(SinusoidalMLP()), Everything()
    packed = from_module(flow, "flow", **own.DIMS), from_module(critic, "critic", **own.DIMS)
    sampler = own.sampler_of(*packed, backend="triton", precision=precision)
    for _ in range(2):
        own.agrees(sampler, flow, critic, own.BFLOAT16)
        own.change(flow, critic)


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_each_replay_asks_the_modules_first(frozen: bool, graphs) -> None:
    """Nothing of Python runs in a replay, so what follows obs and changed modules is computed before it."""
    flow, critic = Flow(SinusoidalMLP()), Everything()
    packed = from_module(flow, "flow", **own.DIMS), from_module(critic, "critic", **own.DIMS)
    sampler = own.sampler_of(*packed, backend="triton")
    if frozen:
        sampler.freeze()
    steering = sampler.steering
    for given in [own.inputs(3, steering) for _ in range(3)]:
        torch.testing.assert_close(sampler(*given), own.exact(flow, critic, steering, *given), rtol=0, atol=2e-5)
    assert len(graphs) == 1
    launcher.launches.reset()
    given = own.inputs(3, steering)
    before = own.exact(flow, critic, steering, *given)
    torch.testing.assert_close(sampler(*given), before, rtol=0, atol=own.FLOAT32)
    own.change(flow, critic)
    expected = before if frozen else own.exact(flow, critic, steering, *given)
    torch.testing.assert_close(sampler(*given), expected, rtol=0, atol=own.FLOAT32)
    assert launcher.launches.total == 0
    assert frozen or (expected - before).abs().max() > 100 * own.FLOAT32


def test_inside_a_capture_of_others(graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would not repeat what modules make of times and actions; of obs, it does."""
    for critic, refused in ((Everything(), True), (Encoding(), False)):
        flow = own.FlowMLP(own.S, own.A, (8,))
        sampler = own.sampler_of(flow, from_module(critic, "critic", **own.DIMS), backend="triton")
        given = own.inputs(2, sampler.steering)
        expected = sampler(*given)
        with monkeypatch.context() as patched:
            for module in ("captured", "triton.backend"):
                patched.setattr(f"qpilots_fast.backends.{module}.capturing", lambda device: True)
            if refused:
                with pytest.raises(BackendUnavailable, match=r"columns of obs and actions: sampler\.capture computes"):
                    sampler(*given)
            else:
                assert torch.equal(sampler(*given), expected)


def test_an_encoder_that_changed_its_width_is_named(graphs) -> None:
    critic = Encoding()
    sampler = own.sampler_of(
        own.FlowMLP(own.S, own.A, (8,)), from_module(critic, "critic", **own.DIMS), Steering.qgf(0.1), "triton"
    )
    columns = sampler._run._networks["critic"].bound().own
    columns.obs = lambda obs: obs[:, :3]
    with pytest.raises(ValueError, match=r"own module makes \[2, 3\] of obs \[2, 7\]; expected \[2, 9\]"):
        sampler(*own.inputs(2, sampler.steering))
