"""pytest-benchmark of torch.ops.qpilots.*: one pass of each, public functions alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import CASES, Workload, make_workload
from bench.machine import measure_peaks
from qpilots_fast import ops
from qpilots_fast.backends.counts import network_macs
from qpilots_fast.spec import NetworkSpec

Op = tuple[Callable[[], Tensor], Callable[[], Tensor], int, int]  # run, the plain PyTorch twin, flops, bytes


def _pass(spec: NetworkSpec, rows: int) -> tuple[int, int]:
    """(flops, weight bytes) of one forward pass in float32."""
    macs = network_macs(spec) * spec.num_members
    return 2 * macs * rows, 4 * macs


def velocity(w: Workload) -> Op:
    t = torch.full((w.batch_size, 1), 0.3)
    return (
        lambda: ops.velocity(w.obs, w.noise, t, w.flow),
        lambda: w.flow(w.obs, w.noise, t),
        *_pass(w.flow.spec, w.batch_size),
    )


def critic_values(w: Workload) -> Op:
    flops, weights = _pass(w.critic.spec, w.batch_size)
    return lambda: ops.critic_values(w.obs, w.noise, w.critic), lambda: w.critic(w.obs, w.noise), flops, weights


def critic_gradient(w: Workload) -> Op:
    """pessimistic_q and its gradient with respect to the actions."""

    def gradient(value: Callable[[Tensor], Tensor]) -> Tensor:
        actions = w.noise.detach().requires_grad_()
        return torch.autograd.grad(value(actions).sum(), actions)[0]

    def plain(actions: Tensor) -> Tensor:
        q = w.critic(w.obs, actions)
        return q.mean(0) - 0.5 * q.std(0, correction=0)

    flops, weights = _pass(w.critic.spec, w.batch_size)

    def ours(actions: Tensor) -> Tensor:
        return ops.pessimistic_q(w.obs, actions, w.critic)

    return lambda: gradient(ours), lambda: gradient(plain), 2 * flops, 2 * weights


def steer_update(w: Workload) -> Op:
    v, g = w.noise.flip(0), w.noise.flip(1)

    def plain() -> Tensor:
        norm_v, norm_g = (torch.linalg.vector_norm(u, dim=1, keepdim=True) for u in (v, g))
        return w.noise + 0.1 * (v + 0.2 * norm_v / (norm_g + 1e-8) * g)

    moved = 4 * 4 * w.noise.numel()  # x, v, g in; x out
    return lambda: ops.steer_update(w.noise, v, g, 0.1), plain, 8 * w.noise.numel(), moved


@pytest.fixture(scope="module")
def peaks() -> Any:
    """Measured once, in the same process as the times."""
    return measure_peaks()


@pytest.mark.parametrize("batch_size", [1, 16, 256])
@pytest.mark.parametrize("op", [velocity, critic_values, critic_gradient, steer_update], ids=lambda op: op.__name__)
def test_op(benchmark: Any, peaks: Any, op: Callable[[Workload], Op], batch_size: int) -> None:
    """One call on the paper's networks; agreement with plain PyTorch first."""
    run, plain, flops, moved = op(make_workload(CASES["paper"], "U", batch_size))
    torch.testing.assert_close(run(), plain(), rtol=1e-4, atol=1e-5)
    benchmark.pedantic(run, warmup_rounds=3, rounds=20)
    median = benchmark.stats.stats.median
    percent = None if op is steer_update else peaks.percent_of_flops(flops, median, "float32")
    benchmark.extra_info |= {
        "flops": flops,
        "bytes": moved,
        "gbytes_per_s": moved / median / 1e9,
        "percent_of_peak_flops": percent,
        "percent_of_cache_bandwidth": peaks.percent_of_bytes(moved, median),
    }
