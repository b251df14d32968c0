"""What every backend computes, as short hashes of its bits: recorded before a refactoring and compared after each step.

    python -m tests.same_bits cpu|reference|cuda|triton record|compare

"cuda" runs under the emulator; "triton" needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from qpilots_fast import Steering
from qpilots_fast.testing import PRESETS, Case, make_case, random_case

FILE = Path(__file__).with_suffix(".json")
ISA = "QPILOTS_CPU_ISA"


def digest(*tensors: Tensor | None) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(b"-" if tensor is None else tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()[:10]


def run(case: Case, backend: str, precision: str) -> str:
    actions, info = case.sampler(backend, precision)(case.obs, case.noise, case.posterior_noise, return_info=True)
    return digest(actions, info.gradient_norms, info.nonfinite, info.q_values)


def extra_steerings() -> dict[str, Steering]:
    u, m = Steering.qpilots_u(), Steering.qpilots_m(num_samples=3)
    return {
        "dims": dataclasses.replace(u, steered_dims=(0, 2, 3)),
        "gaf_full": dataclasses.replace(u, scale="gaf", clip="masked", steer_first_step=True),
        "m_scale": dataclasses.replace(m, q_scale=3.0, tau=2.0, aggregation="min"),
        "m_gaf": dataclasses.replace(m, scale="gaf", steer_first_step=True, clip="none"),
        "m_batch_std": dataclasses.replace(m, q_scale="batch_std"),
        "glass_dims": dataclasses.replace(PRESETS["glass"], steered_dims=(1, 4), aggregation="mean", glass_steps=3),
    }


def wide(steering: Steering, batch_size: int) -> Case:
    return make_case(
        steering, batch_size=batch_size, obs_dim=40, action_dim=25, num_critics=10, hidden_dims=(512,) * 4, num_steps=2
    )


def cases(count: int, *, big: bool) -> Iterator[tuple[str, Case]]:
    for seed in range(count):
        yield f"random{seed}", random_case(seed)
    for name, steering in {**PRESETS, **extra_steerings()}.items():
        yield name, make_case(steering, num_steps=3)
        if big and name in ("qpilots_u", "qpilots_m", "qgf"):
            for batch_size in (1, 3, 16, 64, 200):
                yield f"{name}-wide{batch_size}", wide(steering, batch_size)


def record_cpu() -> dict[str, str]:
    from qpilots_fast.backends.native import load_module

    found, before = {}, os.environ.get(ISA)
    every = list(cases(200, big=True))
    try:
        for isa in load_module().cpu_isa_paths():
            os.environ[ISA] = isa
            for precision in ("float32", "bfloat16"):
                for name, case in every:
                    if not (isa == "portable" and "wide" in name and len(case.obs) > 16):  # minutes
                        found[f"cpu {isa} {precision} {name}"] = run(case, "cpu", precision)
    finally:
        os.environ.pop(ISA) if before is None else os.environ.__setitem__(ISA, before)
    return found


def record_reference() -> dict[str, str]:
    found = {}
    for name, case in cases(60, big=False):
        found[f"reference float32 {name}"] = run(case, "reference", "float32")
        found[f"reference float64 {name}"] = run(case.double(), "reference", "float64")
        flow, critic, posterior = case.flow, case.critic, case.posterior
        mixed = dataclasses.replace(
            case,
            flow=lambda o, x, t, net=flow: net(o, x, t),  # type: ignore[arg-type]
            posterior=lambda o, e, x, t, net=posterior: net(o, e, x, t),  # type: ignore[arg-type]
        )
        found[f"callable flow {name}"] = run(mixed, "cpu", "float32")
        mixed = dataclasses.replace(case, critic=lambda o, a, net=critic: net(o, a))  # type: ignore[arg-type]
        found[f"callable critic {name}"] = run(mixed, "cpu", "float32")
    return found


def record_cuda() -> dict[str, str]:
    import cuda_emulator

    from qpilots_fast.backends.cuda import CudaBackend
    from tests.test_cuda_emulated import sample

    library = cuda_emulator.emulated_kernels()
    library.emulator.configure()
    cuda, found = CudaBackend(library), {}
    for name, case in cases(8, big=False):
        small = dataclasses.replace(
            case, obs=case.obs[:3], noise=case.noise[:3], num_steps=2,
            posterior_noise=None if case.posterior_noise is None else case.posterior_noise[:2, :3].contiguous(),
        )  # fmt: skip
        if small.steering.estimate == "glass" or small.steering.num_candidates > 1:
            continue
        for precision in ("float32", "bfloat16"):
            raw = sample(cuda, small, precision)
            found[f"cuda {precision} {name}"] = digest(raw.actions, raw.report.gradient_norms, raw.report.nonfinite)
    return found


def record_triton() -> dict[str, str]:
    from tests import triton_interpreter

    triton_interpreter.install()
    found = {}
    for name, case in cases(6, big=False):
        if case.steering.q_scale == "batch_std":
            continue
        for precision in ("float32", "bfloat16"):
            found[f"triton {precision} {name}"] = run(case, "triton", precision)
    return found


RECORDERS = {"cpu": record_cpu, "reference": record_reference, "cuda": record_cuda, "triton": record_triton}


def differences(what: str) -> list[str]:
    """The cases of one backend whose bits are not those that were recorded."""
    recorded = json.loads(FILE.read_text())
    found = RECORDERS[what]()
    assert found, "nothing ran"
    return [name for name, bits in found.items() if recorded.get(name, bits) != bits]


def main() -> None:
    what, action = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent))
    if action == "record":
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps({**known, **RECORDERS[what]()}, indent=0) + "\n")
    else:
        changed = differences(what)
        print(f"{len(changed)} cases differ", *changed[:40], sep="\n")
        sys.exit(bool(changed))


if __name__ == "__main__":
    main()
