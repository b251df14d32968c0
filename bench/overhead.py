"""`python -m bench.overhead`: what steering adds to one chunk of an action expert as large as pi0's.

The expert is a plain transformer with random weights. It runs as a callable; critics and the meta flow map are packed.
A map of a few layers stands where the paper has an auxiliary network, so M here is what the draws and the critics cost.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from qpilots_fast import MetaFlowMap, SteeredSampler, Steering, backends, from_module
from qpilots_fast.integrations import ReversedTimeFlow, real_dims

from . import records, report
from .arguments import count
from .contestants import native_backend
from .machine import header
from .peers import Run
from .timing import Timing, combine_loads, interleave, prepare, ratio_spread

UNSTEERED = "unsteered"


@dataclass(frozen=True)
class Sizes:
    """The expert, its chunk, and what steers it.

    Args:
        width, depth, heads, head_dim, mlp: of the transformer; one head of keys and values serves all heads.
        prefix: tokens whose keys and values are cached. chunk, padded, real: actions, their padded and real width.
        features: width of the observation that critics and map read. critics, hidden: how many, and their layers.
        draws: N of M.
    """

    width: int = 1024
    depth: int = 18
    heads: int = 8
    head_dim: int = 256
    mlp: int = 4096
    prefix: int = 300
    chunk: int = 50
    padded: int = 32
    real: int = 7
    features: int = 64
    critics: int = 10
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    draws: int = 4
    steps: int = 10
    dtype: torch.dtype = torch.bfloat16


SIZES = Sizes()


class Block(nn.Module):
    """Attention to the prefix and to all actions, then a gated MLP; each on RMS-normalised tokens, and added."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        s = self.sizes = sizes
        self.before_attention, self.before_mlp = nn.RMSNorm(s.width), nn.RMSNorm(s.width)
        self.inwards = nn.Linear(s.width, (s.heads + 2) * s.head_dim, bias=False)
        self.outwards = nn.Linear(s.heads * s.head_dim, s.width, bias=False)
        self.gate_and_up = nn.Linear(s.width, 2 * s.mlp, bias=False)
        self.down = nn.Linear(s.mlp, s.width, bias=False)

    def forward(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        """tokens [B, C, width]; prefix [2, 1, P, head_dim], keys and values."""
        s = self.sizes
        heads = self.inwards(self.before_attention(tokens)).unflatten(-1, (s.heads + 2, s.head_dim)).transpose(1, 2)
        queries, own = heads[:, : s.heads], heads[:, s.heads :]
        keys, values = (
            torch.cat([cached.expand(len(tokens), -1, -1), new], 1).unsqueeze(1).expand(-1, s.heads, -1, -1)
            for cached, new in zip(prefix, own.unbind(1))
        )
        attended = F.scaled_dot_product_attention(queries, keys, values)
        tokens = tokens + self.outwards(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_and_up(self.before_mlp(tokens)).chunk(2, -1)
        return tokens + self.down(F.gelu(gate, approximate="tanh") * up)


class Expert(nn.Module):
    """(noisy chunk [B, C, padded], tau [B] from 1, noise, to 0) -> noise - actions [B, C, padded], float32."""

    prefix: Tensor
    frequencies: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.actions_in, self.actions_out = nn.Linear(sizes.padded, sizes.width), nn.Linear(sizes.width, sizes.padded)
        self.time = nn.Sequential(nn.Linear(sizes.width, sizes.width), nn.SiLU(), nn.Linear(sizes.width, sizes.width))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.last_norm = nn.RMSNorm(sizes.width)
        self.register_buffer("prefix", torch.randn(sizes.depth, 2, 1, sizes.prefix, sizes.head_dim))
        periods = torch.logspace(math.log10(4e-3), math.log10(4.0), sizes.width // 2)
        self.register_buffer("frequencies", 2 * math.pi / periods)

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        dtype = self.actions_in.weight.dtype
        angles = tau[:, None].float() * self.frequencies.float()
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1).to(dtype))
        tokens = self.actions_in(x.to(dtype)) + time.unsqueeze(1)
        for block, cached in zip(self.blocks, self.prefix):
            tokens = block(tokens, cached)
        return self.actions_out(self.last_norm(tokens)).float()


def make_expert(sizes: Sizes, device: str) -> Expert:
    """Frozen, with weights at random from a fixed seed."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(sizes.dtype)  # made in float32 first, it would take three times its memory
    try:
        return Expert(sizes).to(device).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def critic_member(sizes: Sizes) -> nn.Sequential:
    """Of features and a chunk's real entries: GELU, LayerNorm, one value."""
    layers: list[nn.Module] = []
    inputs = sizes.features + sizes.chunk * sizes.real
    for width in sizes.hidden:
        layers += [nn.Linear(inputs, width), nn.GELU(approximate="tanh"), nn.LayerNorm(width)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 1))


def samplers(expert: Expert, device: str) -> dict[str, SteeredSampler]:
    """By row of the table."""
    sizes = expert.sizes
    action_dim, dims = sizes.chunk * sizes.padded, real_dims(sizes.chunk, sizes.padded, sizes.real)
    flow = ReversedTimeFlow(
        expert, chunk_shape=(sizes.chunk, sizes.padded), call=lambda module, obs, x, tau: module(x, tau)
    )
    members = [critic_member(sizes).to(device) for _ in range(sizes.critics)]
    critic = from_module(members, "critic", obs_dim=sizes.features, action_dim=action_dim, dims=list(dims))
    posterior = MetaFlowMap(sizes.features, action_dim, hidden_dims=sizes.hidden).to(device)

    def made(steering: Steering, **networks: Any) -> SteeredSampler:
        return SteeredSampler(
            flow, networks.pop("critic", critic), steering, num_steps=sizes.steps, action_low=None, action_high=None,
            precision="bfloat16", **networks,
        )  # fmt: skip

    return {
        UNSTEERED: made(Steering.unsteered(), critic=None),
        "U, identity": made(replace(Steering.qpilots_u(jacobian="identity"), steered_dims=dims)),
        "U, full": made(replace(Steering.qpilots_u(), steered_dims=dims)),
        f"M, N = {sizes.draws}": made(
            replace(Steering.qpilots_m(num_samples=sizes.draws), steered_dims=dims), posterior=posterior
        ),
    }


def inputs(sizes: Sizes, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features [1, S], noise [1, A] and the draws' noise [K, 1, N, A]."""
    generator, action_dim = torch.Generator().manual_seed(1), sizes.chunk * sizes.padded
    shapes = ((1, sizes.features), (1, action_dim), (sizes.steps, 1, sizes.draws, action_dim))
    obs, noise, draws = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return obs, noise, draws


def measure(
    sizes: Sizes, device: str, rounds: int | None, budget_s: float
) -> tuple[dict[str, Timing], dict[str, Any] | None]:
    """Times by row, and the load of other processes."""
    obs, noise, draws = inputs(sizes, device)
    runs: dict[str, Run] = {}
    timings: dict[str, Timing] = {}
    for name, sampler in samplers(make_expert(sizes, device), device).items():
        posterior_noise = draws if sampler.posterior is not None else None
        runs[name], timings[name], _ = prepare(lambda s=sampler, p=posterior_noise: lambda: s(obs, noise, p))  # type: ignore[misc]
    load = interleave(runs, timings, rounds=rounds, budget_s=budget_s, cuda=device == "cuda")
    return timings, combine_loads([load])


def table(timings: dict[str, Timing]) -> list[dict[str, Any]]:
    """For the terminal: the time of a chunk, and what is over the unsteered one's."""
    rows = []
    for name, timing in timings.items():
        ratio, low, high = ratio_spread(timing, timings[UNSTEERED])
        row = {"a chunk": name, "ms": report.milliseconds(timing.p50), "over unsteered": "", "quartiles": ""}
        if name != UNSTEERED:
            row["over unsteered"] = f"{100 * (ratio - 1):+.1f} %"
            row["quartiles"] = f"{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %"
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description="What steering adds to a chunk.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=count, help="interleaved rounds (default: as many as fit --budget)")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds of rounds (default 90)")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of results (default bench/results)")
    options = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    console = Console(width=max(Console().width, 120))
    if options.device == "cpu" and native_backend() != "cpu":
        reason = backends.unavailable_reason("cpu")
        console.print(
            f"the critics would run on the reference, which this table is not about: {reason}", soft_wrap=True
        )
        return 1
    record = header("overhead", [], None)
    record["command"] = f"python -m bench.overhead --device {options.device}"
    timings, load = measure(SIZES, options.device, options.rounds, options.budget)
    cells = [
        {
            "case": "action expert",
            "method": name,
            "batch_size": 1,
            "results": [{"name": "SteeredSampler", "precision": "bfloat16", "ours": True, **timing.summary()}],
        }
        for name, timing in timings.items()
    ]
    record |= {"complete": True, "cells": cells, "verdicts": [], "load": load}
    console.print(report.row_table(f"an action expert's chunk on {options.device}", table(timings)))
    report.print_load(console, load)
    console.print(f"saved {records.save(record, options.out)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
