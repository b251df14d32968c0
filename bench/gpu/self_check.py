"""Compares every kernel with the float64 reference: `python -m bench.gpu.self_check` on a GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch

from qpilots_fast.backends import Call
from qpilots_fast.backends.reference import ReferenceBackend
from qpilots_fast.backends.triton.backend import TritonBackend
from qpilots_fast.spec import BoundNetworks, SamplerSpec
from qpilots_fast.steering import Steering
from qpilots_fast.testing import Case, Comparison, compare, make_case


@dataclass(frozen=True)
class CheckResult:
    """One comparison."""

    what: str
    precision: str
    compared: Comparison


def _steerings() -> dict[str, Steering]:
    u, m = Steering.qpilots_u(), Steering.qpilots_m()
    return {
        "unsteered": Steering.unsteered(),
        "U": u,
        "U identity": replace(u, jacobian="identity"),
        "M": m,
        "glass": replace(m, estimate="glass"),
        "QGF": Steering.qgf(0.1),
        "QGF-Jacobian": Steering.qgf(0.1, jacobian="full"),
        "GAF": Steering.gaf(0.5),
        "noisy": Steering.noisy(0.1),
    }


def _bound(case: Case) -> BoundNetworks:
    return BoundNetworks(case.flow.bound(), case.critic.bound(), case.posterior.bound())


def _spec(case: Case, precision: str) -> SamplerSpec:
    steers, mfm = case.steering.steers, case.steering.estimate == "mfm"
    critic, posterior = case.critic.spec if steers else None, case.posterior.spec if steers and mfm else None
    return SamplerSpec(case.flow.spec, critic, posterior, case.steering, case.num_steps, precision)


def self_check(
    device: torch.device,
    *,
    backend: TritonBackend | None = None,
    precisions: tuple[str, ...] = TritonBackend.precisions,
    quick: bool = False,
) -> list[CheckResult]:
    """Samplers over settings and batch sizes, then forward and vjp of each kind of network.

    Args:
        quick: tiny shapes and two settings, for the interpreter.
    """
    triton, reference = backend or TritonBackend(), ReferenceBackend()
    steerings = _steerings()
    batches: tuple[int, ...] = (1, 17, 257)
    shape = dict(obs_dim=40, action_dim=25, num_critics=4, hidden_dims=(512, 300), num_steps=10)
    if quick:
        steerings, batches = {name: steerings[name] for name in ("U", "QGF")}, (3,)
        shape = dict(obs_dim=5, action_dim=3, num_critics=1, hidden_dims=(9, 12), num_steps=2)
    results = []
    for precision in precisions:
        for name, steering in steerings.items():
            for batch_size in batches:
                case = make_case(steering, batch_size=batch_size, **shape)  # type: ignore[arg-type]
                exact, here = case.double(), case.to(device)
                want, got = (
                    backend.sample(Call(_spec(at, accuracy), _bound(at), at.obs, at.noise, at.posterior_noise)).actions
                    for backend, at, accuracy in ((reference, exact, "float64"), (triton, here, precision))
                )
                compared = compare(got, want, precision)
                results.append(CheckResult(f"sample {name}, B={batch_size}", precision, compared))
        results += _network_checks(triton, make_case(batch_size=batches[-1], **shape), device, precision)  # type: ignore[arg-type]
    return results


def _network_checks(triton: TritonBackend, case: Case, device: torch.device, precision: str) -> list[CheckResult]:
    results, reference = [], ReferenceBackend()
    generator = torch.Generator().manual_seed(0)
    for kind in ("flow", "critic", "posterior"):
        exact, here = getattr(case.double(), kind).bound(), getattr(case.to(device), kind).bound()
        blocks = [
            torch.randn(len(case.obs), exact.spec.block_dim(b), generator=generator, device="cpu")
            for b in exact.spec.input_order
        ]
        wide, on_device = [b.double() for b in blocks], [b.to(device) for b in blocks]
        want = reference.forward(exact, wide, "float64")
        cotangent = torch.randn(want.shape, generator=generator, device="cpu")
        pairs = {
            "forward": (triton.forward(here, on_device, precision), want),
            "vjp": (
                triton.vjp(here, on_device, cotangent.to(device), precision),
                reference.vjp(exact, wide, cotangent.double(), "float64"),
            ),
        }
        for what, (got, expected) in pairs.items():
            scale = 4 * max(expected.abs().max().item(), 1.0)  # outputs are not within [-1, 1]
            results.append(CheckResult(f"{what} {kind}", precision, compare(got, expected, precision, scale)))
    return results


def main() -> int:
    backend = TritonBackend()
    reason = backend.unavailable_reason()
    if reason is not None:
        print(f"cannot run here: {reason}")
        return 2
    results = self_check(torch.device("cuda"))
    for result in results:
        compared = result.compared
        errors = f"max {compared.max_error:.1e} mean {compared.mean_error:.1e}"
        print(f"{'ok' if compared.passed else 'WRONG':6} {result.precision:9} {result.what:32} {errors}")
    return 0 if all(result.compared.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
