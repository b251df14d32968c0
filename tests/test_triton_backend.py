"""What the Triton backend does before a kernel runs: availability, refusals, tables, layouts, counts, compilation."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bench.gpu.roofline import DEVICES, triton_seconds
from qpilots_fast import BackendUnavailable
from qpilots_fast.backends import Call
from qpilots_fast.backends.counts import network_macs
from qpilots_fast.backends.triton import LaunchRow, LaunchTable, Tile, TritonBackend
from qpilots_fast.backends.triton.counts import call_counts, workspace_bytes
from qpilots_fast.backends.triton.launch_table import TABLE
from qpilots_fast.backends.triton.packing import NetworkLayout
from qpilots_fast.backends.triton.plan import SamplerPlan
from qpilots_fast.spec import BoundNetworks, NetworkSpec, SamplerSpec
from qpilots_fast.steering import Steering
from qpilots_fast.testing import make_case

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def paper(steering: Steering, precision: str = "bfloat16") -> SamplerSpec:
    dims = (512,) * 4
    posterior = NetworkSpec("meta_flow_map", 40, 25, dims) if steering.estimate == "mfm" else None
    critic = NetworkSpec("critic", 40, 25, dims, layer_norm=("post",) * 4, num_members=10)
    return SamplerSpec(NetworkSpec("flow", 40, 25, dims), critic, posterior, steering, 10, precision)


def plan(steering: Steering, precision: str = "bfloat16", sms: int = 132) -> SamplerPlan:
    return SamplerPlan(paper(steering, precision), CPU, LaunchTable(), sms=sms, sm=90)


def test_importing_the_backend_does_not_import_triton() -> None:
    code = "import sys, qpilots_fast.backends.triton as t; t.TritonBackend(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.getcwd())


def test_the_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed" in (TritonBackend().unavailable_reason() or "")
    old = type(sys)("triton")
    old.__version__ = "3.1.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", old)
    assert "3.1.0 is older than 3.2" in (TritonBackend().unavailable_reason() or "")
    old.__version__ = "3.9.0"  # type: ignore[attr-defined]
    assert "no CUDA device" in (TritonBackend().unavailable_reason() or "")
    assert "CUDA devices" in (TritonBackend().refusal(paper(Steering.qpilots_u()), CPU) or "")


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend, spec = TritonBackend(), paper(Steering.qpilots_m())
    assert backend.refusal(spec, CPU) is None
    coupled = replace(spec, steering=replace(spec.steering, q_scale="batch_std"))
    assert "couples all rows" in (backend.refusal(coupled, CPU) or "")
    assert "precision 'float64'" in (backend.refusal(replace(spec, precision="float64"), CPU) or "")
    plain = replace(spec, steering=Steering.unsteered())
    wide = replace(plain, flow=replace(spec.flow, action_dim=257, input_order=()))
    assert "at most 256" in (backend.refusal(wide, CPU) or "")
    flat = replace(plain, flow=NetworkSpec("flow", 40, 25, ()))
    assert "no hidden layer" in (backend.refusal(flat, CPU) or "")


def test_launch_table_round_trip_and_precedence() -> None:
    row = LaunchRow("critic", ("bfloat16",), (90, 90), 64, Tile(128, 128, 64, 8, 3), "measured")
    table = LaunchTable.from_json(LaunchTable((row,)).to_json())
    assert table == LaunchTable((row,))
    assert table.tile("critic", "bfloat16", 90, 32) == row.tile
    assert table.tile("critic", "bfloat16", 80, 32) == LaunchTable().tile("critic", "bfloat16", 80, 32)
    assert all(r.reason for r in TABLE)
    with pytest.raises(ValueError, match="sm_75"):
        table.tile("critic", "bfloat16", 75, 32)


@pytest.mark.parametrize("kernel", ["critic", "step", "network"])
@pytest.mark.parametrize("precision", TritonBackend.precisions)
def test_every_kernel_precision_and_width_has_a_tile(kernel: str, precision: str) -> None:
    for action_pad in (16, 32, 64, 128, 256):
        tile = LaunchTable().tile(kernel, precision, 90, action_pad)
        size = 2 if precision in ("bfloat16", "float16") else 4
        assert (tile.block_b + tile.block_n) * tile.block_k * tile.num_stages * size <= 99 << 10


def test_packed_blocks_do_not_overlap_and_hold_every_weight() -> None:
    spec = NetworkSpec("critic", 7, 5, (37, 24), layer_norm=(None, "post"), num_members=3)
    layout = NetworkLayout(spec, Tile(16, 32, 32, 4, 2))
    assert layout.columns == (("obs", 0), ("actions", 16))
    assert layout.input_pad == 32 and layout.hidden_pad == 64 and layout.norm == "mixed"
    assert layout.layer_table() == [[37, 0, 32, 32], [24, 2, 64, 0], [1, 0, 32, 0]]
    assert layout.num_weights >= 3 * network_macs(spec)


def test_launches_a_call_stay_within_the_budget() -> None:
    for steering in (Steering.qpilots_u(), Steering.qpilots_m(), Steering.qgf(0.1), Steering.unsteered()):
        for batch_size in (1, 256, 65536):
            assert len(call_counts(plan(steering), batch_size)) + 1 <= 2 * 10 + 2


def test_workspace_count_is_what_is_allocated() -> None:
    for steering in (Steering.qpilots_u(), Steering.qpilots_m(), Steering(estimate="glass", num_samples=2)):
        for batch_size in (1, 300):
            made = plan(steering, sms=4)
            assert made.workspace(batch_size).nbytes == workspace_bytes(made, batch_size)


def test_scratch_does_not_grow_with_the_batch() -> None:
    """Persistent programs: beyond a full GPU only the estimates and their gradients grow."""
    made = plan(Steering.qpilots_u())
    per_row = (workspace_bytes(made, 131072) - workspace_bytes(made, 65536)) / 65536
    assert per_row == 4 * (2 * 25 + 25 + 10 * 26) + 4 + 10 * 10  # alpha, and the report


def test_predictions_grow_with_work_and_shrink_with_precision() -> None:
    for device in DEVICES:
        half, full = (plan(Steering.qpilots_u(), p, device.multiprocessors) for p in ("bfloat16", "float32"))
        assert triton_seconds(half, 256, device) < triton_seconds(half, 4096, device)
        assert triton_seconds(half, 4096, device) < triton_seconds(full, 4096, device)


@needs_triton
def test_static_check_of_the_machine_code() -> None:
    """The critic kernels for sm_90: no spill, tensor cores, wide loads. All kernels: python -m bench.gpu_static."""
    command = [sys.executable, "-m", "bench.gpu_static", "--quick", "--targets", "90", "--match", "critic"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "HGMMA" in result.stdout and "128:" in result.stdout


@needs_triton
def test_static_check_refuses_spills_and_missing_tensor_cores() -> None:
    from bench.gpu.static_triton import LIMITS, Kernel, Machine, failures

    kernel = Kernel("k", "label", True, lambda: (b"", 0, 0))
    good = Machine(128, 0, 0, 1024, 8, {"HGMMA": 8}, {128: 4}, 100)
    assert failures(good, kernel, LIMITS[90]) == []
    assert "spill" in failures(replace(good, spill_instructions=2), kernel, LIMITS[90])[0]
    assert "tensor-core" in failures(replace(good, tensor_core={}), kernel, LIMITS[90])[0]
    assert "shared memory" in failures(replace(good, shared_bytes=100 << 10), kernel, LIMITS[86])[0]
    assert good.blocks_per_sm(LIMITS[90]) == 2


def test_summary_of_the_machine_codes_has_a_line_for_each_precision_target_and_kernel() -> None:
    from bench.gpu.static_triton import summary

    rows = [
        ("sm_90", "triton critic", "U, paper (bfloat16)", "200", "0", "80", "1", "HGMMA 8 HMMA 2", "128:6 32:2", "yes"),
        ("sm_90", "triton critic", "M, paper (bfloat16)", "210", "3", "60", "2", "HGMMA 8", "128:2 32:6", "no"),
        ("sm_90", "triton pack", "all parameters (tf32)", "64", "0", "0", "8", "-", "64:4 32:4", "yes"),
    ]
    assert summary(rows) == [
        ("bfloat16", "sm_90", "critic", "2", "200 to 210", "3", "80", "1", "HGMMA, HMMA", "50 %"),
        ("tf32", "sm_90", "pack", "1", "64", "0", "0", "8", "-", "0 %"),
    ]


@needs_triton
def test_packing_divides_nothing() -> None:
    """A division of 64-bit integers an element costs several times its copy."""
    from bench.gpu.aot import cases, compile_case

    pack = next(case for case in cases(90, ("bfloat16",)) if case.kernel == "pack")
    code = compile_case(pack, 90).asm["ptx"]
    assert "ld.global" in code and not re.search(r"\b(div|rem)\.[su](32|64)", code)


@needs_triton
@pytest.mark.parametrize("estimate", ["noisy", "tweedie", "mfm", "glass"])
def test_no_kernel_is_compiled_again_for_another_address_or_batch(
    estimate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Triton compiles for is the same wherever a caller's tensors lie and whatever number an integer is."""
    from qpilots_fast.backends.triton import kernels, launcher

    monkeypatch.setattr("qpilots_fast.backends.triton.backend.interpreting", lambda: True)
    seen: list[tuple[str, dict]] = []

    class Grids:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **arguments: seen.append((self._name, arguments))

    monkeypatch.setattr(launcher, "kernel_of", Grids)
    case = make_case(Steering(estimate=estimate), batch_size=3, num_steps=2)  # type: ignore[arg-type]
    posterior = case.posterior if estimate == "mfm" else None
    networks = BoundNetworks(case.flow.bound(), case.critic.bound(), posterior and posterior.bound())
    spec = SamplerSpec(case.flow.spec, case.critic.spec, posterior and posterior.spec, case.steering, 2)
    backend, alpha = TritonBackend(), torch.rand(3)
    given = [case.obs, case.noise, alpha, *([] if case.posterior_noise is None else [case.posterior_noise])]
    backend.sample(Call(spec, networks, case.obs, case.noise, case.posterior_noise, alpha))
    cotangent = torch.rand(1, 3, case.flow.spec.output_dim)
    blocks = [case.obs, case.noise, torch.rand(3, 1)]
    backend.forward(networks.flow, blocks, "float32")
    backend.vjp(networks.flow, blocks, cotangent, "float32")
    addresses = {tensor.data_ptr() for tensor in (*given, *blocks, cotangent)}
    found = set()
    for name, arguments in seen:
        for parameter in getattr(kernels, f"_{name}_kernel").params:
            value = arguments[parameter.name]
            if isinstance(value, torch.Tensor) and value.data_ptr() in addresses:
                found.add((name, parameter.name))
                assert parameter.do_not_specialize_on_alignment, (name, parameter.name)
            elif isinstance(value, int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, (name, parameter.name)
    expected = {("critic", "obs_ptr"), ("network", "cotangent_ptr")}
    expected |= {("step", argument) for argument in ("x_in_ptr", "obs_ptr", "alpha_ptr", "eps_ptr")}
    assert found == expected  # eps_ptr stands for the noise where nothing is drawn


def test_capture_needs_a_gpu() -> None:
    case = make_case(batch_size=2)
    spec = SamplerSpec(case.flow.spec, case.critic.spec, None, case.steering, 10)
    with pytest.raises(BackendUnavailable, match="CUDA device"):
        TritonBackend().capture(spec, BoundNetworks(case.flow.bound(), case.critic.bound()), 2)
