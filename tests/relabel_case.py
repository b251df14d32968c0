"""A small data set and a sampler file, for the tests of relabelling in one process and on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

OBS_DIM, ACTION_DIM = 7, 4

SAMPLER = """
import torch
from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering

def make(seed=0):
    torch.manual_seed(seed)
    flow = FlowMLP(7, 4, hidden_dims=(32, 32))
    critic = CriticEnsemble(7, 4, num_critics=3, hidden_dims=(32, 32))
    return SteeredSampler(flow, critic, Steering.qpilots_u(0.5), action_low=-1.0, action_high=1.0)

def other():
    return make(1)

def no_critic():
    return SteeredSampler(FlowMLP(7, 4, hidden_dims=(32,)), None, Steering.unsteered())
"""


def sampler_file(folder: Path) -> Path:
    path = folder / "policy.py"
    path.write_text(SAMPLER)
    return path


def observations(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, OBS_DIM)).astype(np.float32)


def columns(out: Path) -> dict[str, Any]:
    """What was written, by name, in the order of row_id."""
    from pyarrow import parquet

    table = parquet.read_table(out).sort_by("row_id")
    found = {name: table[name].to_numpy() for name in ("row_id", "q_before", "q_after")}
    return {**found, "actions": np.array(table["actions"].to_pylist(), np.float32)}


def same_bytes(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[name].tobytes() == b[name].tobytes() for name in a)
