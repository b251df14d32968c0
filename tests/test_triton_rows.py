"""The row-wise pieces in the interpreter (test_triton_interpreter.py starts it) against the reference."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: test_triton_interpreter.py starts it", allow_module_level=True)

from torch import Tensor

from qpilots_fast import ops, reference
from qpilots_fast.backends.triton import launches
from qpilots_fast.backends.triton.backend import TritonBackend
from qpilots_fast.steering import Steering
from tests import triton_interpreter

triton_interpreter.install()

B, A = 35, 6
X, V, G = torch.randn(3, B, A, generator=torch.Generator().manual_seed(1)).unbind()
STD = torch.rand(B, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("t", [torch.full((1, 1), 0.3), torch.rand(B, 1), torch.rand(B, A)], ids=["one", "row", "each"])
@pytest.mark.parametrize("width", [A, 700])
def test_clean_actions(t: Tensor, width: int) -> None:
    x, v = torch.randn(2, B, width)
    t = torch.rand(B, width) if t.shape[1] > 1 else t
    rows = TritonBackend().row_kernels(torch.device("cpu"))
    assert rows is not None
    torch.testing.assert_close(rows.clean_actions(x, v, t), reference.clean_actions(x, v, t))
    assert rows.clean_actions(x[:0], v[:0], torch.zeros(1, 1)).shape == (0, width)


@pytest.mark.parametrize(
    "steering",
    [
        Steering.qpilots_u(alpha=0.3),
        replace(Steering.qpilots_u(alpha=0.3), steered_dims=(1, 4)),
        replace(Steering.qpilots_u(), max_disagreement=0.5),
        Steering.gaf(0.5),
        Steering.qgf(0.1),
    ],
    ids=["u", "dims", "gated", "gaf", "qgf"],
)
def test_steer_step(steering: Steering) -> None:
    g = G.clone()
    g[0, 1], g[1], g[2] = torch.inf, 0, torch.nan  # rows that take the plain step
    needs = steering.scale == "gaf" or steering.max_disagreement is not None
    rows = TritonBackend().row_kernels(torch.device("cpu"))
    assert rows is not None
    got, norms, nonfinite = rows.steer_step(X, V, g, 0.1, steering, STD if needs else None)
    velocity, report = reference.steer_velocity(V, g, steering, STD)
    torch.testing.assert_close(got, X + 0.1 * velocity)
    torch.testing.assert_close(norms, report.gradient_norms)
    assert torch.equal(nonfinite, report.nonfinite) and nonfinite.dtype == torch.bool
    if needs:
        with pytest.raises(ValueError, match="q_std is None"):
            rows.steer_step(X, V, g, 0.1, steering)


def test_the_operators_use_them() -> None:
    launches.reset()
    got = ops.steer_update(X, V, G, 0.1, alpha=0.3)
    assert launches.by_name == {"steer_step": 1}
    expected = X + 0.1 * reference.steer_velocity(V, G, Steering.qpilots_u(alpha=0.3))[0]
    torch.testing.assert_close(got, expected)
    ops.clean_actions(X.bfloat16(), V.bfloat16(), 0.3)
    assert launches.by_name == {"steer_step": 1, "clean_actions": 1}
