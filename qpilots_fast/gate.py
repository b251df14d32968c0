"""The gate on the critics' disagreement, from data."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sampler import SteeredSampler


def calibrate_gate(
    sampler: SteeredSampler, obs: Any, quantile: float = 0.95, *, noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> float:  # fmt: skip
    """A number for Steering.max_disagreement: the quantile of the critics' std over rows and steered steps.

    Args:
        sampler: with any gate, which is left out of the run; not changed.
        obs: as in a call, [B, S]; the observations on which the policy is trusted.
        quantile: in [0, 1]; the share of (row, step) pairs of these observations that stays steered.
        noise: as in a call.
        generator: as in a call.

    Returns:
        The quantile of SampleInfo.q_std over the pairs that were steered, in units of Q, for
        `dataclasses.replace(sampler.steering, max_disagreement=...)`.

    Raises:
        TypeError: for a quantile that is no number.
        ValueError: for a quantile outside [0, 1], a sampler that does not steer, and observations without a finite Q.
    """
    if isinstance(quantile, bool) or not isinstance(quantile, (int, float, np.number)):
        raise TypeError(f"calibrate_gate: quantile is {quantile!r}; expected a number in [0, 1].")
    if not 0 <= quantile <= 1:
        raise ValueError(f"calibrate_gate: quantile is {quantile!r}; expected a number in [0, 1].")
    if not sampler.steering.steers:
        raise ValueError("calibrate_gate: the sampler's steering asks no critic; expected one that steers (alpha > 0).")
    ungated = copy.copy(sampler)  # the same networks, another steering
    ungated.steering = replace(sampler.steering, max_disagreement=None)
    _, info = ungated(obs, noise, generator=generator, return_info=True)
    steered = [
        k for k, step in enumerate(sampler.steering.schedule(sampler.num_steps, sampler.time_grid)) if step.weight
    ]
    if not steered:
        raise ValueError(
            "calibrate_gate: this sampler steers at no step (its window, step weights or number of steps leave none); "
            "expected a schedule with a steered step."
        )
    std, usable = info.q_std[steered], ~info.nonfinite[steered]
    found = std[usable].double().cpu().numpy()
    if not found.size:
        raise ValueError("calibrate_gate: no row had a finite Q and gradient at any steered step; expected some.")
    return float(np.quantile(found, float(quantile)))
