"""Captured Triton samplers in the interpreter (test_triton_interpreter.py starts it): replays, and what they keep."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: test_triton_interpreter.py starts it", allow_module_level=True)

from torch import Tensor

from qpilots_fast import BackendUnavailable, SteeredSampler, backends
from qpilots_fast.backends import Call
from qpilots_fast.backends.triton import TritonBackend, launcher
from tests.recorded_graph import Record, RecordedGraph, not_held
from tests.test_triton_kernels import GLASS, M, U, backend, networks_of, small, spec_of


class InterpretedGraph(RecordedGraph):
    """Kernel launches, and the memory that they touch: their arguments, and the addresses in the pack table."""

    def __init__(self) -> None:
        super().__init__(self._catch_launches)
        self.ranges: list[tuple[int, int, str]] = []

    def _catch_launches(self, record: Record) -> Callable[[], object]:
        kernel_of = launcher.kernel_of

        def recorded(name: str) -> Any:
            note, kernel = self._note, kernel_of(name)

            class Grids:
                def __getitem__(self, grid: tuple[int, ...]) -> Any:
                    def launch(**arguments: Any) -> None:
                        note(name, arguments)
                        record(lambda: kernel[grid](**arguments))

                    return launch

            return Grids()

        launcher.kernel_of = recorded
        return lambda: setattr(launcher, "kernel_of", kernel_of)

    def _note(self, kernel: str, arguments: dict[str, Any]) -> None:
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.numel():
                self.ranges.append((value.data_ptr(), value.nbytes, f"{kernel}: {name}"))
        if kernel in ("pack", "fold"):
            for item in arguments["item_ptr"].tolist():
                addresses = (item[0], *item[8:11]) if kernel == "pack" else item[:1]
                self.ranges += [(address, 1, f"{kernel}: item {item}") for address in addresses if address]


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("steering", [U, M, GLASS], ids=["u", "m", "glass"])
def test_replays_are_the_calls(steering, frozen) -> None:
    case = small(steering, hidden_dims=(9,))
    triton, spec, networks, graph = backend(), spec_of(case), networks_of(case), InterpretedGraph()
    packed = triton.pack(spec, networks) if frozen else None
    captured = triton.capture(spec, networks, len(case.obs), packed, graph)
    assert len(graph.launches) == triton.footprint(spec, len(case.obs)).launches - 2 * frozen
    assert not_held(captured, graph.ranges) == []
    inputs = case.obs, case.noise, case.posterior_noise
    expected = triton.sample(Call(spec, networks, *inputs)).actions
    assert torch.equal(captured(*inputs), expected)
    with torch.no_grad():
        for parameter in case.flow.parameters():
            parameter.mul_(1.1)
    changed = triton.sample(Call(spec, networks, *inputs)).actions
    assert not torch.equal(changed, expected)
    del triton, networks
    gc.collect()
    assert torch.equal(captured(*inputs), expected if frozen else changed)


def test_inside_a_capture_of_others_what_it_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small(U, hidden_dims=(9,))
    triton, spec, networks = backend(), spec_of(case), networks_of(case)
    call = Call(spec, networks, case.obs, case.noise)
    expected = triton.sample(call).actions
    plan = triton.plan(spec, case.obs.device)
    (workspace,), (buffers,) = triton._workspaces.values(), triton._live.values()
    for module in ("captured", "triton.backend"):
        monkeypatch.setattr(f"qpilots_fast.backends.{module}.capturing", lambda device: True)
    assert torch.equal(triton.sample(call).actions, expected)
    kept = triton._captured
    assert kept[0] is workspace and kept[1] is buffers and kept[2] == (plan, buffers)
    with pytest.raises(BackendUnavailable, match=r"has not run at this batch size yet.*; call the sampler once"):
        triton.sample(call)  # its workspace and weights are the other graph's
    monkeypatch.undo()
    assert torch.equal(triton.sample(call).actions, expected)
    assert triton._workspaces.values()[0] is not workspace and triton._live.values()[0] is not buffers


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_plain_calls_are_recorded_at_the_third_and_replayed(frozen, monkeypatch) -> None:
    graphs: list[InterpretedGraph] = []

    def new_graph(device: torch.device) -> InterpretedGraph:
        graphs.append(InterpretedGraph())
        return graphs[-1]

    triton = TritonBackend(fill=float("nan"), new_graph=new_graph)
    monkeypatch.setattr(backends, "choose", lambda request: backends.Choice(triton, {}))
    case = small(U, hidden_dims=(9,))
    sampler = SteeredSampler(case.flow, case.critic, U, num_steps=case.num_steps, backend="triton")
    if frozen:
        sampler.freeze()
    inputs = case.obs, case.noise
    first = sampler(*inputs)
    assert torch.equal(sampler(*inputs), first) and not graphs
    assert torch.equal(sampler(*inputs), first) and len(graphs) == 1
    launcher.launches.reset()
    assert torch.equal(sampler(*inputs), first) and launcher.launches.total == 0  # a replay
    with torch.no_grad():
        for parameter in case.flow.parameters():
            parameter.mul_(1.1)
    assert torch.equal(sampler(*inputs), first) == frozen
    strengths = torch.full((len(case.obs),), 0.3)
    sampler(*inputs, alpha=strengths)
    assert launcher.launches.total > 0 and len(graphs) == 1  # launch by launch
    case.flow.output.weight.data = case.flow.output.weight.data.clone()  # what the graph reads, another memory
    expected = SteeredSampler(case.flow, case.critic, U, num_steps=case.num_steps, backend="reference")(*inputs)
    if not frozen:
        assert (sampler(*inputs) - expected).abs().max() < 1e-5


def test_what_cannot_be_recorded_is_launched(monkeypatch, caplog) -> None:
    def new_graph(device: torch.device) -> InterpretedGraph:
        raise RuntimeError("operation not permitted when stream is capturing")

    triton = TritonBackend(fill=float("nan"), new_graph=new_graph)
    monkeypatch.setattr(backends, "choose", lambda request: backends.Choice(triton, {}))
    case = small(U, hidden_dims=(9,))
    sampler = SteeredSampler(case.flow, case.critic, U, num_steps=case.num_steps, backend="triton")
    first = sampler(case.obs, case.noise)
    for _ in range(4):
        assert torch.equal(sampler(case.obs, case.noise), first)
    assert len([record for record in caplog.records if "no CUDA graph" in record.message]) == 1
