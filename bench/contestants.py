"""Who runs: qpilots_fast's backends and the peers, by name."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from qpilots_fast import backends

from . import peers_jax
from .cases import PRECISIONS, Workload
from .peers import Contestant, Run, build_compiled_loop, build_compiled_step, build_cuda_graph, build_eager

PeerChoice = Literal["all", "best", "none"]

EAGER = "torch eager"
COMPILED_LOOP = "torch.compile"
COMPILED_STEP = "torch.compile per step"
JAX = "JAX jit + scan"
REDUCE_OVERHEAD = "torch.compile reduce-overhead"
CUDA_GRAPH = "eager in a CUDA graph"

# the whole loop is one graph of K steps: unrolling it pays where a call is short
_COMPILED_LOOP_UP_TO = 64


def build_ours(workload: Workload, precision: str, backend: str, frozen: bool) -> Run:
    """SteeredSampler, as a user calls it."""
    sampler = workload.sampler(backend, precision, frozen)

    def run() -> Tensor:
        return sampler(workload.obs, workload.noise, workload.posterior_noise)

    return run


def build_captured(workload: Workload, precision: str, backend: str) -> Run:
    """SteeredSampler.capture: one replay of a CUDA graph a call."""
    replay = workload.sampler(backend, precision).capture(workload.batch_size)
    return lambda: replay(workload.obs, workload.noise, workload.posterior_noise)


def native_backend() -> str:
    """The fastest of our backends that can run here on CPU tensors."""
    return "cpu" if backends.unavailable_reason("cpu") is None else "reference"


def our_contestants(
    workload: Workload, precisions: tuple[str, ...], device: str, frozen: bool = True
) -> list[Contestant]:
    """Our backends for the device, live and (on a CPU) frozen; those that refuse the workload are left out."""
    names = [native_backend()] if device == "cpu" else ["triton", "cuda"]
    found = []
    for name in names:
        if backends.unavailable_reason(name) is not None:
            continue
        for precision in precisions:
            if not _accepts(name, workload, precision):
                continue
            build = partial(build_ours, precision=precision, backend=name, frozen=False)
            found.append(Contestant(f"qpilots_fast {name}", precision, build, ours=True))
            if device == "cuda":
                graph = partial(build_captured, precision=precision, backend=name)
                found.append(Contestant(f"qpilots_fast {name} captured", precision, graph, ours=True, frozen=True))
            elif frozen and name != "reference":  # the reference packs nothing
                packed = partial(build_ours, precision=precision, backend=name, frozen=True)
                found.append(Contestant(f"qpilots_fast {name} frozen", precision, packed, ours=True, frozen=True))
    return found


def _accepts(name: str, workload: Workload, precision: str) -> bool:
    backend = backends.get(name)
    if backend.max_batch_size is not None and workload.batch_size > backend.max_batch_size:
        return False
    spec = workload.sampler("reference", "float32")._run.spec
    assert spec is not None
    return backend.refusal(replace(spec, precision=precision), workload.obs.device) is None


def peer_contestants(
    workload: Workload, choice: PeerChoice = "all", precisions: tuple[str, ...] = PRECISIONS, device: str = "cpu"
) -> list[Contestant]:
    """The peers for a batch size.

    Args:
        choice: "all"; "best": without the whole-loop compile and JAX, whose first call takes longest; "none".
    """
    if choice == "none":
        return []
    found = []
    for precision in precisions:
        found.append(Contestant(EAGER, precision, partial(build_eager, precision=precision)))
        step = partial(build_compiled_step, precision=precision)
        found.append(Contestant(COMPILED_STEP, precision, step, compile_s=8))
        if choice == "all" and (device == "cuda" or workload.batch_size <= _COMPILED_LOOP_UP_TO):
            loop = partial(build_compiled_loop, precision=precision)
            found.append(Contestant(COMPILED_LOOP, precision, loop, compile_s=60))
        if choice == "all" and peers_jax.unavailable_reason() is None and device == "cpu":
            found.append(Contestant(JAX, precision, partial(peers_jax.build_jax, precision=precision), compile_s=4))
        if device == "cuda":
            graph = partial(build_cuda_graph, precision=precision)
            found.append(Contestant(CUDA_GRAPH, precision, graph, compile_s=1))
            fewer = partial(build_compiled_loop, precision=precision, mode="reduce-overhead")
            found.append(Contestant(REDUCE_OVERHEAD, precision, fewer, compile_s=60))
    return found


def forget_compiled() -> None:
    """Drops torch.compile's graphs, so that its limit on recompilations is not met over many shapes."""
    torch._dynamo.reset()
