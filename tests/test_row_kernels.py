"""The row-wise operators on the kernels of a GPU backend: which calls go there, and the same results. Emulated CUDA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qpilots_fast import CriticEnsemble, Steering, backends, ops
from qpilots_fast.backends.cuda import CudaBackend
from qpilots_fast.op_implementations import REFERENCES

cuda_emulator = pytest.importorskip("cuda_emulator")
pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="g++ is missing")

B, A = 9, 6


class CountedRows:
    """The emulated row kernels, with the names of those that ran."""

    def __init__(self) -> None:
        library = cuda_emulator.emulated_kernels()
        library.emulator.configure()
        self._rows = CudaBackend(library).row_kernels(torch.device("cpu"))
        self.ran: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.ran.append(name)
        return getattr(self._rows, name)


@pytest.fixture
def rows(monkeypatch) -> CountedRows:
    counted = CountedRows()
    monkeypatch.setattr(backends, "for_rows", lambda device: counted)
    return counted


def noise(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*(shape or (B, A)), generator=torch.Generator().manual_seed(sum(shape)), **options)


X, V, G = (torch.randn(3, B, A, generator=torch.Generator().manual_seed(1))[i] for i in range(3))
TIMES = {
    "number": 0.3,
    "row": torch.rand(B, generator=torch.Generator().manual_seed(2)),
    "column": torch.rand(B, 1, generator=torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)
def test_clean_actions(rows, t):
    got = ops.clean_actions(X, V, t)
    at = t.reshape(-1, 1) if isinstance(t, Tensor) else t
    torch.testing.assert_close(got, X + (1 - at) * V)
    assert rows.ran == ["clean_actions"]


def test_clean_actions_of_chunks_with_a_time_for_each_token(rows):
    x, v, t = X.view(B, 3, 2), V.view(B, 3, 2), torch.rand(B, 3)
    torch.testing.assert_close(ops.clean_actions(x, v, t), x + (1 - t.unsqueeze(-1)) * v)
    assert rows.ran == ["clean_actions"]


@pytest.mark.parametrize("dims", [None, (1, 4)])
def test_steer_update_and_steer_step_with_a_gradient(rows, dims):
    g = G.clone()
    g[0, 1], g[1] = torch.inf, 0  # rows that take the plain step
    expected = REFERENCES["steer_update"]([X, V, g], [], 0.1, 0.3, 1e-8, dims and list(dims))
    torch.testing.assert_close(ops.steer_update(X, V, g, 0.1, alpha=0.3, steered_dims=dims), expected)
    steering = replace(Steering.qpilots_u(alpha=0.3, jacobian="identity"), steered_dims=dims)
    torch.testing.assert_close(ops.steer_step(X, V, 0.5, 0.1, q_grad=g, steering=steering), expected)
    assert rows.ran == ["steer_step"] * 2
    torch.testing.assert_close(ops.steer_velocity(X, V, 0.5, q_grad=g, steering=steering), (expected - X) / 0.1)


def test_default_arguments_that_the_dispatcher_leaves_out(rows):
    expected = REFERENCES["steer_update"]([X, V, G], [], 0.1)
    torch.testing.assert_close(torch.ops.qpilots.steer_update(X, V, G, 0.1), expected)
    assert rows.ran == ["steer_step"]


@pytest.mark.parametrize(
    "steering",
    [
        Steering.qpilots_u(jacobian="identity"),
        replace(Steering.qpilots_u(jacobian="identity"), max_disagreement=1.0),
        Steering.gaf(0.5),
        Steering.qgf(0.1),
    ],
    ids=["u", "gated", "gaf", "qgf"],
)
def test_steer_step_with_a_critic(rows, steering, monkeypatch):
    torch.manual_seed(0)
    obs, critic = torch.randn(B, 5), CriticEnsemble(5, A, num_critics=3, hidden_dims=(16,))
    if steering.max_disagreement is not None:  # half of the rows
        q_values = ops.critic_values(obs, ops.clean_actions(X, V, 0.4).clamp(-1, 1), critic).detach()
        steering = replace(steering, max_disagreement=float(q_values.std(0, unbiased=False).median()) * 1.001)
        rows.ran.clear()
    got = ops.steer_step(X, V, 0.4, 0.1, obs=obs, critic=critic, steering=steering)
    assert rows.ran == ["steer_step"]
    monkeypatch.setattr(backends, "for_rows", lambda device: None)
    expected = ops.steer_step(X, V, 0.4, 0.1, obs=obs, critic=critic, steering=steering)
    torch.testing.assert_close(got, expected)
    plain = X + 0.1 * V
    gated = (got - plain).abs().amax(1) < 1e-6
    assert gated.any() == (steering.max_disagreement is not None) and not gated.all()


def test_gradients_are_those_of_torch_code(rows):
    leaves = [tensor.clone().requires_grad_() for tensor in (X, V, G)]
    got = torch.autograd.grad(ops.steer_update(*leaves, 0.1).square().sum(), leaves)
    assert rows.ran == ["steer_step"]
    own = [tensor.clone().requires_grad_() for tensor in (X, V, G)]
    expected = torch.autograd.grad(REFERENCES["steer_update"](own, [], 0.1).square().sum(), own)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_half_precision_is_computed_in_float32(rows):
    x, v = X.bfloat16(), V.bfloat16()
    got = ops.clean_actions(x, v, 0.3)
    assert got.dtype == torch.bfloat16 and rows.ran == ["clean_actions"]
    assert torch.equal(got, (x.float() + 0.7 * v.float()).bfloat16())


def test_float64_stays_in_torch_code(rows):
    got = ops.clean_actions(X.double(), V.double(), 0.3)
    assert torch.equal(got, X.double() + (1 - 0.3) * V.double())
    ops.steer_update(X.double(), V.double(), G.double(), 0.1)
    assert rows.ran == []


def test_strided_inputs(rows):
    wide = noise(B, 2 * A)
    x, v = wide[:, ::2], noise(A, B).t()
    torch.testing.assert_close(ops.clean_actions(x, v, 0.3), x + 0.7 * v)


def test_functorch_transforms_go_through(rows):
    batched = torch.vmap(lambda x, v: ops.clean_actions(x, v, 0.3))(X.view(3, 3, A), V.view(3, 3, A))
    torch.testing.assert_close(batched.view(B, A), X + 0.7 * V)
    assert "clean_actions" in rows.ran


def test_the_mask_of_steered_dims_is_uploaded_once():
    emulated = CudaBackend(cuda_emulator.emulated_kernels()).row_kernels(torch.device("cpu"))
    steering = Steering(steered_dims=(1, 4))
    first = emulated._mask(steering, X)
    assert first.tolist() == [0, 1, 0, 0, 1, 0] and emulated._mask(Steering(alpha=0.3, steered_dims=(1, 4)), X) is first
    assert emulated._mask(steering, X[:, :5]).tolist() == [0, 1, 0, 0, 1]


# ---------------------------------------------------------------- the choice


@pytest.fixture
def no_memory():
    backends.for_rows.cache_clear()
    yield
    backends.for_rows.cache_clear()


@pytest.mark.usefixtures("no_memory")
def test_cpu_tensors_have_no_row_kernels():
    assert backends.for_rows(torch.device("cpu")) is None


@pytest.mark.usefixtures("no_memory")
def test_the_first_backend_that_has_them(monkeypatch):
    emulated = CudaBackend(cuda_emulator.emulated_kernels())
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda name: emulated if name == "cuda" else load(name))
    assert backends.for_rows(torch.device("cpu")) is emulated.row_kernels(torch.device("cpu"))


@pytest.mark.usefixtures("no_memory")
def test_without_the_library_or_a_gpu_torch_code_runs(monkeypatch, tmp_path):
    monkeypatch.setattr("qpilots_fast.backends.cuda.library.library_paths", lambda: (tmp_path / "absent.so",))
    assert CudaBackend().row_kernels(torch.device("cuda")) is None
    library = cuda_emulator.emulated_kernels()
    library.emulator.configure(has_device=False)
    assert CudaBackend(library).row_kernels(torch.device("cpu")) is None
    library.emulator.configure()
    monkeypatch.setattr(backends, "_load", lambda name: "it does not import")
    assert torch.equal(ops.clean_actions(X, V, 0.3), X + (1 - torch.full((1, 1), 0.3)) * V)


def test_a_library_for_gpus_is_not_loaded_for_cpu_tensors(monkeypatch):
    backend = CudaBackend()
    monkeypatch.setattr(backend._loader, "find", lambda: pytest.fail("loaded"))
    assert backend.row_kernels(torch.device("cpu")) is None
