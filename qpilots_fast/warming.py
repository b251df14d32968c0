"""Calls made ahead of time, so that none that counts is the first of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .inputs import reader_of
from .integers import as_int
from .trees import common_rows, with_rows

_CALLS = 3  # the first makes plans, packs and workspaces; the second goes the quick way; a GPU's third records a graph


def warm_up(sampler: Any, batch_sizes: Sequence[int], obs: Any) -> None:
    """Calls a sampler at each of these batch sizes; see SteeredSampler.warm_up."""
    if isinstance(as_int(batch_sizes), int):
        raise TypeError(f"warm_up: batch_sizes is {batch_sizes!r}; expected a sequence, e.g. ({batch_sizes},).")
    sizes = [as_int(size) for size in batch_sizes]
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"warm_up: batch_sizes has {size!r}; expected integers >= 1.")
    reader = reader_of(sampler, sampler.networks)
    if obs is None and not reader.reads_obs:
        raise ValueError(
            "warm_up: obs is None, and the networks are callables that read any obs; expected obs, a batch of yours "
            "(its rows are repeated as needed)."
        )
    action = sampler.chunk_shape or (None if reader.action_dim is None else (reader.action_dim,))
    if action is None:
        raise ValueError(
            "warm_up: no network tells the action width; give the sampler bounds of that width (action_low=[-1.0] * "
            "A), or, where callables take chunks, a chunk_shape."
        )
    like = next((p for p in sampler.parameters() if p.is_floating_point()), torch.empty(0))

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64 if reader.float64() else torch.float32, device=like.device)

    for size in sizes:
        rows = zeros(size, reader.packed.spec.obs_dim) if obs is None and reader.packed else _rows(obs, size)
        noise, steering = zeros(size, *action), sampler.steering
        draws = (sampler.num_steps, size, steering.num_samples, *action)
        eps = zeros(*draws) if steering.draws_posterior else None
        for _ in range(_CALLS):
            # a generator of its own: what later calls draw does not depend on it
            sampler(rows, noise, eps, torch.Generator(like.device) if steering.num_candidates > 1 else None)


def _rows(obs: Any, size: int) -> Any:
    """size rows of a batch of observations."""
    if isinstance(obs, Tensor) and obs.ndim == 1:
        return obs.expand(size, -1)
    rows = len(obs) if isinstance(obs, (Tensor, np.ndarray)) else common_rows(obs)
    if rows is None:
        raise ValueError("warm_up: the tensors of obs do not share a first dimension; expected a batch of B rows.")
    return with_rows(obs, rows, size)
