"""Faults planted in the Triton kernels, and the tests that catch them, in the interpreter (test_triton_interpreter.py).

Each fault is one edit of one file in a copy of the package; the named test of the suite passes without it and fails a
comparison with it. A fault that no test sees means that the suite has a hole.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: test_triton_interpreter.py starts it", allow_module_level=True)

from qpilots_fast.spec import NetworkSpec
from qpilots_fast.steering import Steering
from tests import test_chains
from tests import test_own_columns as own
from tests import test_triton_chains as row_ops
from tests import test_triton_kernels as kernels
from tests import test_triton_rows as row_pieces

PACKAGE = "qpilots_fast.backends.triton"


@dataclass(frozen=True)
class Fault:
    """An edit of a file of the package, and a test that sees it.

    Args:
        file: without .py. right: text that stands there once. wrong: what is planted in its place.
    """

    file: str
    right: str
    wrong: str
    test: Callable[[], None]


norms = kernels.test_larger_programs_for_many_rows
setting = kernels.test_every_setting_of_steering
steps = partial(kernels.test_unsteered_steps_between_steered_ones, kernels.U, (0.0, 0.5, 0.0, 0.0, 2.0, 0.0))
strengths = partial(kernels.test_gate_and_strength_of_each_row, kernels.U)
post = partial(norms, "post")
post_below_pre = partial(norms, ("post", "pre"))
m, u, glass = partial(setting, "m"), partial(setting, "u"), partial(setting, "glass")
chunks = partial(kernels.test_rows_in_chunks, kernels.U)


def own_columns() -> None:
    """A flow's and a critic's own columns, in one call."""
    own_flow, critic = own.Flow(own.SinusoidalMLP()), own.Everything()
    bound = [own.from_module(n, kind, **own.DIMS).bound() for n, kind in ((own_flow, "flow"), (critic, "critic"))]
    spec = kernels.SamplerSpec(bound[0].spec, bound[1].spec, None, kernels.U, 2)
    obs, noise, _ = own.inputs(3, kernels.U)
    call = kernels.Call(spec, kernels.BoundNetworks(*bound), obs, noise)
    want = kernels.REFERENCE.sample(call).actions
    torch.testing.assert_close(kernels.backend().sample(call).actions, want, atol=kernels.FLOAT32_ERROR, rtol=0)


def modulated() -> None:
    """A flow whose rows its module scales and shifts by the time."""
    flow = test_chains.Modulated(NetworkSpec("flow", own.S, own.A, (21, 21), chains=test_chains.FILM), 1)
    spec = kernels.SamplerSpec(flow.spec, None, None, Steering.unsteered(), 3)
    obs, noise, _ = own.inputs(3, spec.steering)
    call = kernels.Call(spec, kernels.BoundNetworks(flow.bound()), obs, noise)
    want = kernels.REFERENCE.sample(call).actions
    torch.testing.assert_close(kernels.backend().sample(call).actions, want, atol=kernels.FLOAT32_ERROR, rtol=0)


normed, blocks, head = (partial(row_ops.test_one_network, n) for n in ("two norms", "pre-norm blocks", "softmax"))
ties = row_ops.test_of_equal_ones_the_first_are_the_lowest

FAULTS = {
    # LayerNorm folded into the weights above it, and its pull-back
    "the pull-back of a norm loses its mean": Fault(
        "deltas", "level = -rstd * d_mean - mean * slope", "level = -mean * slope", post
    ),
    "the pull-back of a norm loses its spread": Fault(
        "deltas", "(_activation(z, ACT) * slope[:, None] + level[:, None])", "level[:, None]", post
    ),
    "a pre-norm's pull-back loses its spread": Fault("deltas", " - xhat * d_spread[:, None])", ")", post_below_pre),
    "no mean leaves a folded product": Fault(
        "layers", "(acc - mean[:, None] * tl.load(u_ptr", "(acc - 0.0 * tl.load(u_ptr", post
    ),
    "shifts are not folded": Fault(
        "pack", "c += tl.sum(w * tl.load(shift_ptr", "c += 0.0 * tl.sum(w * tl.load(shift_ptr", u
    ),
    "u sums the weights before their gain": Fault(
        "pack", "u += tl.sum(packed.to(tl.float32), axis=1)", "u += tl.sum(w, axis=1)", u
    ),
    # sums over a row, tile by tile
    "one column of the padding counts": Fault(
        "tiles", "tl.where((offs_n < WIDTH)[None, :]", "tl.where((offs_n <= WIDTH)[None, :]", u
    ),
    "moments are merged without the means' distance": Fault(
        "tiles", "square += count * delta * delta", "square += 0.0 * delta", post
    ),
    "the last tile weighs as much as the others": Fault(
        "tiles", "tl.minimum(WIDTH - start, STAT_N).to(tl.float32)", "tl.full((), STAT_N, tl.float32)", post
    ),
    "the second sum stays the first tile's": Fault(
        "deltas", "second += tl.load(sum_ptr + capacity + rows)", "second += 0.0", post
    ),
    "the halves of a tile are its even and odd columns": Fault(
        "tiles",
        "tl.split(tl.permute(parts, (0, 2, 1)))",
        "tl.split(tl.reshape(parts, (tile.shape[0], tile.shape[1] // 2, 2)))",
        post,
    ),
    # planes, chunks, rows
    "a plane's stride is the rows' number": Fault(
        "deltas",
        "    plane = (member * capacity + first_row) * H_PAD",
        "    plane = (member * num_rows + first_row) * H_PAD",
        u,
    ),
    "a layer reads the plane that it writes": Fault(
        "evaluation", "else self.scratch.planes[(layer - 1) % 2]", "else self.scratch.planes[layer % 2]", u
    ),
    "a pull-back reads the sums of another layer": Fault(
        "evaluation",
        "above_sum_ptr=self.scratch.sums[(layer + 1) % 2]",
        "above_sum_ptr=self.scratch.sums[layer % 2]",
        post,
    ),
    "every chunk reads the first one's rows": Fault(
        "plan", "return tensor[start : start + rows]", "return tensor[: start + rows]", chunks
    ),
    "a draw reads another row's observation": Fault(
        "layers", "of_row = (rows // num_draws).to(tl.int64)", "of_row = (rows // num_draws * 0).to(tl.int64)", m
    ),
    "every step takes the first step's time": Fault(
        "pack", "tl.load(features + row * num_features + j", "tl.load(features + 0 * row + j", u
    ),
    # columns of networks' own modules
    "a column that is scaled is read as it is": Fault(
        "pack", "mask=has_factor, other=1.0)", "mask=False, other=1.0)", own_columns
    ),
    "a shift of actions is not in the bias": Fault("own_columns", "self.shift.copy_(shift)", "pass", own_columns),
    "columns of actions are read in the flow's order": Fault(
        "packing", "target + column + dim", "target + column + j", own_columns
    ),
    # row operations
    "a norm's mean is taken of its padding too": Fault(
        "chains",
        "z = tl.where(within, z - (tl.sum(z, axis=1) / WIDTH)[:, None], 0.0)",
        "z = z - (tl.sum(z, axis=1) / WIDTH)[:, None]",
        normed,
    ),
    "a second norm has the first one's vectors": Fault(
        "chains", "    vec_ptr += (2 + 2 * INDEX) * H_PAD", "    vec_ptr += 2 * H_PAD", normed
    ),
    "the pull-back of whole rows loses their mean": Fault(
        "chains", "d -= (tl.sum(d, axis=1) / WIDTH)[:, None]", "d -= 0.0", normed
    ),
    "a kept row's cotangent is lost": Fault("chains", "        d += d_kept", "        d += 0.0 * d_kept", blocks),
    "a block's rows are not handed on": Fault(
        "evaluation", 'names[:1] == ["add"], "keep" in names', 'names[:1] == ["add"], names[:1] == ["keep"]', blocks
    ),
    "probabilities are pulled back one by one": Fault(
        "chains", "d = p * (d - tl.sum(p * d, axis=1)[:, None])", "d = p * (d - p * d)", head
    ),
    "of equal ones the last is the lowest": Fault("chains", "(j < offs_n)", "(j > offs_n)", ties),
    "every step is modulated as the first": Fault(
        "evaluation", "(time or 0) * spec.film_dim", "0 * spec.film_dim", modulated
    ),
    # cotangents, gradients, the update
    "a scaled cotangent is not scaled back": Fault("deltas", "acc *= _row_peak(", "acc += 0.0 * _row_peak(", u),
    "the weights of draws miss the tilt": Fault(
        "rows",
        "weight = tl.exp(tilt * own - tilt * peak) / total",
        "weight = tl.exp(own - peak) / total",
        partial(setting, "m_three_draws"),
    ),
    "the std is the sample's": Fault("rows", "std = tl.sqrt(spread / E)", "std = tl.sqrt(spread / (E - 1))", u),
    "the bounds mask from below alone": Fault(
        "rows",
        "d_a = tl.where((a >= low) & (a <= high), d_a, 0.0)",
        "d_a = tl.where(a >= low, d_a, 0.0)",
        partial(kernels.test_bounds_of_each_dimension_and_a_free_time_grid, replace(kernels.U, clip="masked")),
    ),
    "the pull-back through the flow misses 1 - t": Fault(
        "rows", "g += tl.load(schedule_ptr) * tl.load(through_ptr", "g += tl.load(through_ptr", u
    ),
    "steps weigh the same": Fault("rows", " * tl.load(schedule_ptr + 2)", "", steps),
    "rows have the first one's strength": Fault(
        "rows",
        "tl.load(alpha_ptr + rows, mask=mask_b, other=0.0)",
        "tl.load(alpha_ptr + 0 * rows, mask=mask_b, other=0.0)",
        strengths,
    ),
    "nothing is gated": Fault(
        "rows", "gated = usable & (std > max_disagreement)", "gated = usable & (std < 0.0)", strengths
    ),
    "dimensions that are not steered move": Fault(
        "rows", "g = tl.where(dims > 0.0, g, 0.0)", "g = tl.where(dims >= 0.0, g, 0.0)", partial(setting, "u_dims")
    ),
    "an inner step of draws moves by the next one's": Fault(
        "rows", "tl.load(glass_ptr - 1) * tl.load(v_ptr", "tl.load(glass_ptr + 4) * tl.load(v_ptr", glass
    ),
    "a single step's rows are cut short": Fault(
        "row_pieces",
        '"steer_step", (-(-len(x) // block),)',
        '"steer_step", (len(x) // block,)',
        partial(row_pieces.test_steer_step, Steering.qpilots_u(alpha=0.3)),
    ),
}


@contextmanager
def planted(fault: Fault, folder: Path) -> Iterator[ModuleType]:
    """The package with the fault, in place of the right one."""
    source = Path(sys.modules[PACKAGE].__file__ or "").parent
    copy = folder / "triton"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / f"{fault.file}.py"
    text = path.read_text()
    assert text.count(fault.right) == 1, f"{fault.file}.py says {text.count(fault.right)} times: {fault.right}"
    path.write_text(text.replace(fault.right, fault.wrong))
    names = [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]
    kept = {name: sys.modules.pop(name) for name in names}
    try:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, copy / "__init__.py", submodule_search_locations=[str(copy)]
        )
        assert spec is not None and spec.loader is not None
        module = sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
            del sys.modules[name]
        sys.modules.update(kept)


@pytest.mark.parametrize("name", FAULTS)
def test_it_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    torch.manual_seed(0)
    fault.test()
    with planted(fault, tmp_path) as faulty:
        for suite in (kernels, row_ops, row_pieces):
            monkeypatch.setattr(suite, "TritonBackend", faulty.TritonBackend)
        torch.manual_seed(0)
        with pytest.raises(AssertionError):
            fault.test()
