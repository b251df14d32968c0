"""Measures tiles on this GPU and writes the fastest correct ones: `python -m bench.gpu.tune`.

Writes a JSON launch table (QPILOTS_TRITON_TABLE, else the user's cache folder) that later processes read before the
built-in rows, after every kernel; begins no tile after --minutes. A tile must reproduce the shipped one's actions to
the precision's tolerance to be considered. The row is for this GPU's compute capability; its reason records what was
measured. A tile that breaks the CUDA context ends the run: what was found before stands.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch

from qpilots_fast.backends import Call
from qpilots_fast.backends.triton.backend import TritonBackend
from qpilots_fast.backends.triton.launch_table import LaunchRow, LaunchTable, Tile, tuned_path
from qpilots_fast.backends.triton.plan import capability
from qpilots_fast.files import write_text
from qpilots_fast.spec import BoundNetworks, SamplerSpec
from qpilots_fast.steering import Steering
from qpilots_fast.testing import compare, make_case

from .static_triton import LIMITS

_ROUNDS = 30
_LEAST_SHARED = min(limits.shared_per_block for limits in LIMITS.values())


def candidates(kernel: str, precision: str, shared_bytes: int) -> list[Tile]:
    """Tiles worth a measurement, those nearest to the shipped shape first.

    Args:
        shared_bytes: what a block may have of shared memory, for its stages of operands.
    """
    rows = (64, 128) if kernel == "layer" else (16, 32, 64)
    wide = precision in ("bfloat16", "float16")
    columns = (64, 128, 256) if kernel == "layer" else (16,)  # of the ends, the network's own
    depths = (32, 64) if wide else (16, 32)
    found = []
    for block_b, block_n, block_k, warps, stages in product(rows, columns, depths, (4, 8), (2, 3, 4)):
        operands = (block_b + block_n) * block_k * stages * (2 if wide else 4)
        accumulator = block_b * block_n // (32 * warps)
        if operands <= shared_bytes and accumulator <= 128:
            found.append(Tile(block_b, block_n, block_k, warps, stages))
    # 3 stages, 8 warps and the deeper steps have mostly won elsewhere; the others follow while there is time
    return sorted(found, key=lambda t: (abs(t.num_stages - 3), -t.num_warps, -t.block_k, -t.block_n))


def measure(
    backend: TritonBackend, spec: SamplerSpec, networks: BoundNetworks, inputs: tuple
) -> tuple[float, torch.Tensor]:
    """Median milliseconds of a graph replay's worth of kernels, by CUDA events, and the actions."""
    packed = backend.pack(spec, networks)
    actions = backend.sample(Call(spec, networks, *inputs, packed=packed)).actions
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.sample(Call(spec, networks, *inputs, packed=packed))
    times = []
    for _ in range(_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2], actions


def tune(
    precision: str, batch_size: int, rows: list[LaunchRow], in_time: Callable[[], bool], save: Callable[[], None]
) -> None:
    """The fastest tile of the hidden layers, then of the ends, at the paper's sizes; puts it first among rows.

    Raises:
        RuntimeError: where a tile broke the CUDA context, after which nothing can be measured.
    """
    device = torch.device("cuda")
    case = make_case(
        Steering.qpilots_u(), batch_size=batch_size, obs_dim=40, action_dim=25, num_critics=10, hidden_dims=(512,) * 4
    ).to(device)
    spec = SamplerSpec(case.flow.spec, case.critic.spec, None, case.steering, case.num_steps, precision)
    networks = BoundNetworks(case.flow.bound(), case.critic.bound())
    inputs = (case.obs, case.noise, None)
    sm = capability(device)
    shared_bytes = LIMITS[sm].shared_per_block if sm in LIMITS else _LEAST_SHARED
    for kernel in ("layer", "ends"):
        shipped, wanted = measure(TritonBackend(LaunchTable(tuple(rows))), spec, networks, inputs)
        best, best_tile = shipped, None
        for tile in candidates(kernel, precision, shared_bytes):
            if not in_time():
                print("  out of time (--minutes): the other tiles were not tried")
                break
            row = LaunchRow(kernel, (precision,), (sm, sm), tile, "candidate")
            try:
                took, actions = measure(TritonBackend(LaunchTable((row, *rows))), spec, networks, inputs)
            except Exception as error:  # a tile that this Triton or GPU cannot run is simply not chosen
                print(f"  {tile}: {type(error).__name__}")
                try:
                    torch.cuda.synchronize()
                except RuntimeError as broken:
                    raise RuntimeError(f"{kernel} {tile} broke the CUDA context ({broken}); start again") from error
                continue
            wrong = not compare(actions, wanted, precision).passed
            print(f"  {kernel} {tile}: {took:.3f} ms{' WRONG' if wrong else ''}", flush=True)
            if not wrong and took < 0.98 * best:  # 2 % is what a changed table must be worth
                best, best_tile = took, tile
        if best_tile is not None:
            name = torch.cuda.get_device_name(device)
            reason = f"measured on {name}: a call at B={batch_size} takes {best:.3f} ms, {shipped:.3f} ms before."
            rows.insert(0, LaunchRow(kernel, (precision,), (sm, sm), best_tile, reason))
            save()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "tf32", "float32"])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--minutes", type=float, default=20.0, help="after which no tile is begun (default 20)")
    args = parser.parse_args(argv)
    reason = TritonBackend().unavailable_reason()
    if reason is not None or not torch.cuda.is_available():
        print(f"cannot tune here: {reason or 'there is no CUDA device'}")
        return 2
    path = tuned_path()
    rows: list[LaunchRow] = list(LaunchTable.from_json(path.read_text()).rows) if path.is_file() else []
    end = time.perf_counter() + 60 * args.minutes

    def save() -> None:
        write_text(path, replace(LaunchTable(), rows=tuple(rows)).to_json())
        print(f"wrote {path}")

    try:
        for precision in args.precisions:
            print(precision)
            tune(precision, args.batch_size, rows, lambda: time.perf_counter() < end, save)
    except RuntimeError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
