"""Writes the table of docs/networks.md: which networks pack, why others do not, and what a call takes here.

With --new it measures the networks alone that the table lacks.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

os.environ["QPILOTS_ZOO_WIDTH"] = "256"

import torch

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering
from qpilots_fast.from_module import from_module
from tests.zoo.entries import A, Entry, H, S
from tests.zoo.table import BEGIN, END, ENTRIES, TABLE, row, written

_ROUNDS = 21


def _seconds(samplers: list[SteeredSampler]) -> list[float]:
    """The middle of several calls of each at batch 1, one after the other in turn.

    In the process's own time: other work on the processor does not count.
    """
    obs, noise = torch.randn(1, S), torch.randn(1, A)
    times: list[list[float]] = [[] for _ in samplers]
    for _ in range(_ROUNDS + 3):
        for sampler, found in zip(samplers, times):
            began = time.process_time()
            sampler(obs, noise)
            found.append(time.process_time() - began)
    return [statistics.median(found[3:]) for found in times]


def measured(entry: Entry) -> tuple[str, str]:
    """A call packed, and with the module as a callable, in milliseconds."""
    torch.manual_seed(0)
    module = entry.build()
    packed = from_module(module, entry.kind, obs_dim=S, action_dim=A, **entry.hints)

    def opaque(*blocks: torch.Tensor) -> object:
        return module(*blocks)

    samplers = []
    for network in (packed, opaque):
        flow: object = FlowMLP(S, A, (H, H)) if entry.kind == "critic" else network
        critic: object = CriticEnsemble(S, A, 2, (H, H)) if entry.kind == "flow" else network
        bounds = {"action_low": -1.0, "action_high": 1.0}
        samplers.append(SteeredSampler(flow, critic, Steering.qpilots_u(), num_steps=10, **bounds))
    mine, theirs = _seconds(samplers)
    return f"{1e3 * mine:.2f}", f"{1e3 * theirs:.2f}"


def main() -> None:
    torch.set_num_threads(1)
    known = written() if sys.argv[1:] == ["--new"] else {}
    rows = []
    for entry in ENTRIES:
        times = known.get(row(entry).rsplit(" | ", 2)[0]) or (("", "") if entry.refused else measured(entry))
        rows.append(row(entry, times))
        print(rows[-1], file=sys.stderr)
    text = TABLE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    head = [
        "| codebase | network | as | outcome | ms packed | ms as callable |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    TABLE.write_text("\n".join([f"{before}{BEGIN}", *head, *rows, f"{END}{after}"]))


if __name__ == "__main__":
    main()
