"""What the Triton backend does before a kernel runs: availability, refusals, tables, layouts, counts, compilation."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
import torch

from bench.gpu.roofline import DEVICES, triton_seconds
from bench.gpu.static_triton import LIMITS
from qpilots_fast import BackendUnavailable
from qpilots_fast.backends import Call
from qpilots_fast.backends.counts import network_macs
from qpilots_fast.backends.triton import LaunchRow, LaunchTable, Tile, TritonBackend
from qpilots_fast.backends.triton.counts import launch_counts, num_launches, programs, workspace_bytes
from qpilots_fast.backends.triton.launch_table import TABLE
from qpilots_fast.backends.triton.layouts import NetworkLayout
from qpilots_fast.backends.triton.plan import SamplerPlan
from qpilots_fast.row_ops import Chain, RowOp
from qpilots_fast.spec import BoundNetworks, NetworkSpec, SamplerSpec
from qpilots_fast.steering import Steering
from qpilots_fast.testing import make_case

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def _networks(steering: Steering) -> tuple[NetworkSpec, NetworkSpec, NetworkSpec | None]:
    dims = (512,) * 4
    posterior = NetworkSpec("meta_flow_map", 40, 25, dims) if steering.estimate == "mfm" else None
    critic = NetworkSpec("critic", 40, 25, dims, layer_norm=("post",) * 4, num_members=10)
    return NetworkSpec("flow", 40, 25, dims), critic, posterior


def paper(steering: Steering, precision: str = "bfloat16") -> SamplerSpec:
    return SamplerSpec(*_networks(steering), steering, 10, precision)


def plan(steering: Steering, precision: str = "bfloat16") -> SamplerPlan:
    return SamplerPlan(paper(steering, precision), CPU, LaunchTable(), sm=90)


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


NORM, FILM = RowOp("layer_norm", (1e-5,)), RowOp("film")


@pytest.mark.parametrize(
    ("chain", "width", "reason"),
    [
        ((NORM,) * 7, 64, "7 row operations; it runs at most 6"),
        ((NORM,), 4097, "4097 columns; it runs row operations on at most 4096"),
        ((FILM, NORM, FILM), 64, "several modulations by the time; it runs one"),
        ((NORM,) * 6, 64, ""),
        ((RowOp("tanh"),), 4097, ""),  # the product's own
    ],
)
def test_row_operations_beyond_its_kernel_are_refused(chain: Chain, width: int, reason: str) -> None:
    spec = NetworkSpec("flow", 40, 25, (64, width), chains=((NORM, RowOp("relu"), NORM), chain))
    refusal = TritonBackend().structure_refusal(spec)
    assert refusal is None if not reason else reason in refusal and "hidden layer 1 of the flow" in refusal


def test_launch_table_round_trip_and_precedence() -> None:
    row = LaunchRow("layer", ("bfloat16",), (90, 90), Tile(128, 128, 64, 8, 3), "measured")
    table = LaunchTable.from_json(LaunchTable((row,)).to_json())
    assert table == LaunchTable((row,))
    assert table.tile("layer", "bfloat16", 90) == row.tile
    assert table.tile("layer", "bfloat16", 80) == LaunchTable().tile("layer", "bfloat16", 80)
    assert all(r.reason for r in TABLE)
    with pytest.raises(ValueError, match="sm_75"):
        table.tile("layer", "bfloat16", 75)


@pytest.mark.parametrize("precision", TritonBackend.precisions)
def test_every_precision_has_tiles_that_fit(precision: str) -> None:
    size = 2 if precision in ("bfloat16", "float16") else 4
    for sm in (80, 86, 90, 100, 120):
        tile = LaunchTable().tile("layer", precision, sm)
        for one in (tile.for_rows(rows) for rows in (1, *(rows for rows, _, _ in tile.larger))):
            shared = (one.block_b + one.block_n) * one.block_k * one.num_stages * size
            assert shared <= LIMITS[sm].shared_per_block
        ends = LaunchTable().tile("ends", precision, sm)
        # of what is in flight and what is multiplied, one stage is in registers
        assert (ends.block_b + 256) * ends.block_k * (ends.num_stages - 1) * size <= 99 << 10


def test_programs_grow_with_the_rows_while_half_of_an_h100_is_full() -> None:
    made = plan(Steering.qpilots_u())
    sizes = []
    for batch_size in (64, 128, 256, 640):
        ((_, launches),) = programs(made, batch_size)
        layer = [one for one in launches if one.name == "layer" and one.grid[2] == 10][-1]
        sizes.append((layer.arguments["BLOCK_B"], layer.arguments["BLOCK_N"]))
        assert launch_counts(layer, 2).programs >= 66
    assert sizes == [(64, 64), (64, 128), (128, 128), (128, 256)]


def test_packed_columns_do_not_overlap_and_hold_every_weight() -> None:
    spec = NetworkSpec("meta_flow_map", 7, 5, (37, 24), layer_norm=(None, "pre"))
    layout = NetworkLayout(spec, Tile(16, 32, 32, 4, 2), Tile(16, 16, 32, 4, 2))
    assert layout.columns == (("obs", 0), ("noisy_actions", 32), ("xbar", 48))
    assert layout.input_pad == 64 and layout.hidden_pad == 64
    assert [layout.norm(layer) for layer in (-1, 0, 1, 2)] == ["none", "none", "pre", "none"]
    assert layout.num_weights >= network_macs(spec)


@pytest.mark.parametrize(
    "steering, launches", [(Steering.qpilots_u(), 22), (Steering.qpilots_m(), 27), (Steering.qgf(0.1), 17)]
)
def test_launches_of_a_steered_step(steering: Steering, launches: int) -> None:
    """docs/gpu.md has them one by one; a call grows by as many for each step, whatever the batch."""
    one, two = (SamplerSpec(*_networks(steering), steering, steps, "bfloat16") for steps in (3, 4))
    for batch_size in (1, 64):
        counts = [num_launches(SamplerPlan(s, CPU, LaunchTable(), sm=90), batch_size).total() for s in (one, two)]
        assert counts[1] - counts[0] == launches


def test_workspace_count_is_what_is_allocated() -> None:
    for steering in (Steering.qpilots_u(), Steering.qpilots_m(), Steering(estimate="glass", num_samples=2)):
        for batch_size in (1, 300):
            made = plan(steering)
            assert made.workspace(batch_size).nbytes == workspace_bytes(made, batch_size)


def test_planes_do_not_grow_with_the_batch() -> None:
    """Beyond a chunk only the report and alpha grow."""
    made = plan(Steering.qpilots_u())
    assert workspace_bytes(made, 131072) - workspace_bytes(made, 65536) == 65536 * (10 * made.spec.num_steps + 4)
    assert made.chunk == 1664 and plan(Steering.qpilots_m()).chunk == 416  # 1664 draws


def test_predictions_grow_with_work_and_shrink_with_precision() -> None:
    for device in DEVICES:
        half, full = (plan(Steering.qpilots_u(), p) for p in ("bfloat16", "float32"))
        assert triton_seconds(half, 256, device) < triton_seconds(half, 4096, device)
        assert triton_seconds(half, 4096, device) < triton_seconds(full, 4096, device)


@needs_triton
def test_static_check_of_the_machine_code() -> None:
    """A layer's backward for sm_90: no spill, tensor cores, wide loads. All kernels: python -m bench.gpu_static."""
    command = [sys.executable, "-m", "bench.gpu_static", "--quick", "--targets", "90", "--match", "triton delta U"]
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
    from bench.gpu.aot import cases, compile_launch

    for case in (case for case in islice(cases(90, ("bfloat16",)), 3) if case.kernel in ("pack", "fold")):
        code = compile_launch(case.launch, 90).asm["ptx"]
        assert "ld.global" in code and not re.search(r"\b(div|rem)\.[su](32|64)", code)


@needs_triton
@pytest.mark.parametrize("estimate", ["noisy", "tweedie", "mfm", "glass"])
def test_no_kernel_is_compiled_again_for_another_address_or_batch(
    estimate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Triton compiles for is the same wherever a caller's tensors lie and whatever number an integer is."""
    from qpilots_fast.backends.triton import launcher

    monkeypatch.setattr("qpilots_fast.backends.triton.backend.interpreting", lambda: True)
    seen: list[tuple[str, dict]] = []

    class Grids:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **arguments: seen.append((self._name, arguments))

    kernel_of = launcher.kernel_of
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
    addresses = {tensor.untyped_storage().data_ptr() for tensor in (*given, *blocks, cotangent)}
    found = set()
    for name, arguments in seen:
        for parameter in kernel_of(name).params:
            value = arguments[parameter.name]
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in addresses:
                found.add((name, parameter.name))
                assert parameter.do_not_specialize_on_alignment, (name, parameter.name)
            elif isinstance(value, int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, (name, parameter.name)
    expected = {("layer", "obs_ptr"), ("layer", "x_ptr"), ("delta", "cotangent_ptr")}
    expected |= {("input_gradient", "cotangent_ptr"), ("update", "x_ptr"), ("update", "alpha_ptr")}
    expected |= {("layer", "xbar_ptr"), ("output", "add_ptr")} if estimate == "mfm" else set()
    expected |= {("glass_draw", "from_ptr")} if estimate == "glass" else set()
    assert found == expected


def test_capture_needs_a_gpu() -> None:
    case = make_case(batch_size=2)
    spec = SamplerSpec(case.flow.spec, case.critic.spec, None, case.steering, 10)
    with pytest.raises(BackendUnavailable, match="CUDA device"):
        TritonBackend().capture(spec, BoundNetworks(case.flow.bound(), case.critic.bound()), 2)
