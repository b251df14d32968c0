"""Several candidates per observation: where they start, and which one is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .reference import aggregate
from .spec import RawSample, StepReport
from .steering import Steering


@lru_cache(maxsize=64)
def _rotations(count: int, dim: int) -> Tensor:
    """[count, dim, dim] fixed orthogonal matrices, the first the identity: R e ~ N(0, I) when e is."""
    generator = torch.Generator().manual_seed(0x9E3779B9)
    rotations = torch.linalg.qr(torch.randn(count, dim, dim, generator=generator, dtype=torch.float64, device="cpu")).Q
    rotations[0] = torch.eye(dim, dtype=torch.float64, device="cpu")
    return rotations


def _constant_rotations(count: int, dim: int) -> Tensor:
    return _rotations(count, dim)


# A generator cannot be traced, and the matrices depend on no tensor. This is what assume_constant_result does, which
# imports torch._dynamo, and with it Triton, at once.
_constant_rotations._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rotated_starts(noise: Tensor, count: int) -> Tensor:
    """[B, n, A] starts of n candidates, a function of noise [B, A]: n fixed rotations of it, the first itself."""
    if count == 1:
        return noise.unsqueeze(1)
    rotations = _constant_rotations(count, noise.shape[-1]).to(noise.device)
    return torch.einsum("nij,bj->bni", rotations, noise.double()).to(noise.dtype)


def as_rows(value: Any, count: int, dim: int = 0) -> Any:
    """Each row count times in a row, so that candidates are rows of one larger batch; None stays None."""
    return value if value is None or count == 1 else value.repeat_interleave(count, dim=dim)


def keep_one(raw: RawSample, q_values: Tensor, steering: Steering, draws: Tensor | None) -> tuple[RawSample, Tensor]:
    """Per row the candidate that the critics value most, or one drawn with p ~ exp(Qbar / selection_temperature); one
    without a finite value never wins.

    Args:
        raw: of [B n] rows, the candidates of a row side by side. q_values: [E, B n].
        draws: [B, n] standard normal numbers, for selection="softmax".

    Returns:
        The chosen rows of raw, and their q_values [E, B].
    """
    count = steering.num_candidates
    rank = aggregate(q_values, steering.candidate_aggregation, steering.rho).view(-1, count)
    usable = rank.isfinite()
    if draws is not None:  # the largest of log p_n + Gumbel noise is a draw from p
        uniform = torch.special.ndtr(draws.double()).clamp(1e-300, 1 - 1e-16)
        rank = rank.double() / steering.selection_temperature - (-uniform.log()).log()
    best = torch.where(usable, rank, torch.full_like(rank, -math.inf)).argmax(-1)
    rows = torch.arange(best.shape[0], device=best.device) * count + best
    report = None if raw.report is None else StepReport(*(value[:, rows] for value in raw.report))
    return RawSample(raw.actions[rows], report), q_values[:, rows]


def side_by_side(raws: Sequence[RawSample]) -> RawSample:
    """Runs of one candidate each as one run whose rows are [B n]."""
    if len(raws) == 1:
        return raws[0]
    actions = torch.stack([raw.actions for raw in raws], 1).flatten(0, 1)
    reports = [raw.report for raw in raws if raw.report is not None]
    if not reports:
        return RawSample(actions)
    return RawSample(actions, StepReport(*(torch.stack(values, 2).flatten(1, 2) for values in zip(*reports))))
