"""`python -m bench.callables`: samplers of opaque callables against the plain loop that the README shows.

The networks are small MLPs behind plain functions, which nothing recognises: both sides call the same functions, so the
ratio is what the sampler itself costs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from qpilots_fast import SteeredSampler
from qpilots_fast.spec import BoundNetwork

from . import records, report
from .arguments import count
from .cases import Case, Workload, make_workload
from .machine import header
from .measure import Cell, measure_cell
from .peers import Contestant, Run
from .timing import combine_loads

SMALL = Case("small", "two hidden layers of 256, the widths of MuJoCo's agents", 17, 6, (256, 256), critic_norm=None)
METHODS = ("U", "U-identity", "M")
BATCH_SIZES = (1, 16, 256)


@dataclass(frozen=True)
class Opaque:
    """A workload's networks as functions."""

    flow: Callable[[Tensor, Tensor, Tensor], Tensor]
    critic: Callable[[Tensor, Tensor], Tensor]
    posterior: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None


def opaque(workload: Workload) -> Opaque:
    """Without LayerNorm, with the time as it is: what `SMALL` has."""
    flow, critic = mlp(workload.flow.bound()), mlp(workload.critic.bound())
    if workload.posterior is None:
        return Opaque(lambda obs, x, t: flow(obs, x, t)[0], critic_of(critic), None)
    drawn = mlp(workload.posterior.bound())

    def posterior(obs: Tensor, xbar: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return xbar + drawn(obs, xbar, x, t, torch.zeros_like(t), torch.ones_like(t))[0]

    return Opaque(lambda obs, x, t: flow(obs, x, t)[0], critic_of(critic), posterior)


def critic_of(members: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda obs, actions: members(obs, actions).squeeze(-1)


def mlp(network: BoundNetwork) -> Callable[..., Tensor]:
    """blocks -> [E, B, out], as short as PyTorch writes it."""
    weights = [torch.stack(layer.weight).transpose(1, 2).contiguous() for layer in network.layers]
    biases = [torch.stack(layer.bias or ()).unsqueeze(1) for layer in network.layers]
    last = len(weights) - 1

    def forward(*blocks: Tensor) -> Tensor:
        h = torch.cat(blocks, -1)
        if len(weights[0]) > 1:
            h = h.expand(len(weights[0]), -1, -1)
            for index, (weight, bias) in enumerate(zip(weights, biases)):
                h = torch.baddbmm(bias, h, weight)
                h = h if index == last else F.gelu(h, approximate="tanh")
            return h
        for index, (weight, bias) in enumerate(zip(weights, biases)):
            h = torch.addmm(bias[0], h, weight[0])
            h = h if index == last else F.gelu(h, approximate="tanh")
        return h.unsqueeze(0)

    return forward


def build_sampler(workload: Workload) -> Run:
    """SteeredSampler, as a user calls it."""
    networks = opaque(workload)
    sampler = SteeredSampler(
        networks.flow, networks.critic, workload.steering, posterior=networks.posterior, num_steps=workload.num_steps,
        action_low=-1.0, action_high=1.0,
    )  # fmt: skip
    return lambda: sampler(workload.obs, workload.noise, workload.posterior_noise)


def build_plain(workload: Workload) -> Run:
    """The README's loop, with the gradient of the method in its place."""
    networks, steering, steps = opaque(workload), workload.steering, workload.num_steps
    flow, critic, posterior = networks.flow, networks.critic, networks.posterior
    obs, rho, alpha = workload.obs, steering.rho, steering.alpha

    def value(a: Tensor) -> Tensor:
        q = critic(obs, a)
        return q.mean(0) - rho * q.std(0, unbiased=False)

    def clipped(a: Tensor) -> Tensor:
        return a + (a.clamp(-1, 1) - a).detach()

    def full(x: Tensor, t: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            v = flow(obs, leaf, t)
            (g,) = torch.autograd.grad(value(clipped(leaf + (1 - t) * v)).sum(), leaf)
        return v, g

    def identity(x: Tensor, t: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            v = flow(obs, x, t)
            a = (x + (1 - t) * v).clamp(-1, 1)
        with torch.enable_grad():
            leaf = a.requires_grad_()
            (g,) = torch.autograd.grad(value(leaf).sum(), leaf)
        return v, g

    def draws(x: Tensor, t: Tensor, k: int) -> tuple[Tensor, Tensor]:
        assert posterior is not None and workload.posterior_noise is not None
        with torch.no_grad():
            v = flow(obs, x, t)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            q = [value(clipped(posterior(obs, eps, leaf, t))) for eps in workload.posterior_noise[k].unbind(1)]
            (g,) = torch.autograd.grad(torch.logsumexp(steering.tau * torch.stack(q), 0).sum(), leaf)
        return v, g

    gradient = draws if posterior is not None else full if steering.jacobian == "full" else identity

    def run() -> Tensor:
        x = workload.noise
        for k in range(steps):
            t = torch.full((len(obs), 1), k / steps)
            v, g = gradient(x, t, k)
            if k > 0:
                v = v + alpha * v.norm(dim=1, keepdim=True) / (g.norm(dim=1, keepdim=True) + 1e-8) * g
            x = (x + v / steps).detach()
        return x.clamp(-1, 1)

    return run


def contestants() -> list[Contestant]:
    return [
        Contestant("qpilots_fast callables", "float32", build_sampler, ours=True),
        Contestant("plain loop", "float32", build_plain),
    ]


def ratios(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For the terminal: our time over the plain loop's; below 1 the sampler is the faster."""
    rows = []
    for cell in cells:
        found = cell.ratio("float32", "float32")
        ours, plain = cell.ours("float32"), cell.best_peer("float32")
        assert found is not None and ours is not None and plain is not None, "an actions check failed"
        assert ours.timing is not None and plain.timing is not None
        median, low, high = found
        rows.append(
            {
                "method": cell.workload.method,
                "B": cell.workload.batch_size,
                "sampler ms": report.milliseconds(ours.timing.p50),
                "plain loop ms": report.milliseconds(plain.timing.p50),
                "sampler / plain": f"{1 / median:.3f}",
                "quartiles": f"{1 / high:.3f} to {1 / low:.3f}",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and saves; the exit status is 1 where actions disagree with the reference."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench.callables", description="Samplers of opaque callables.")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of rounds a cell (default 6)")
    parser.add_argument("--rounds", type=count, help="interleaved rounds a cell (default: as many as fit --budget)")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of results (default bench/results)")
    options = parser.parse_args(arguments)
    console = Console(width=max(Console().width, 120))
    record, cells = header("callables", [], None), []
    record["command"] = "python -m bench.callables"
    for method in METHODS:
        for batch_size in BATCH_SIZES:
            workload = make_workload(SMALL, method, batch_size)
            cells.append(
                measure_cell(
                    workload, contestants(), precisions=("float32",), rounds=options.rounds, budget_s=options.budget,
                    memory=False,
                )
            )  # fmt: skip
            wrong = [r.failure or "actions disagree" for r in cells[-1].results if not r.usable]
            if wrong:
                console.print(f"{method} B={batch_size}: {'; '.join(wrong)}")
                return 1
            console.print(report.row_table("", ratios(cells[-1:])))
    console.print(report.row_table("time of a call, sampler over plain loop", ratios(cells)))
    record |= {"complete": True, "cells": [cell.to_json(None) for cell in cells], "verdicts": []}
    record["load"] = combine_loads([cell.load for cell in cells])
    report.print_load(console, record["load"])
    console.print(f"saved {records.save(record, options.out)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
