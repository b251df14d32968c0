"""Classifier-free guidance: a flow with and without its condition, told as one flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..steering import check_number


class ClassifierFreeGuidance(nn.Module):
    """velocity(obs, x, t) = v_null + weight (v_obs - v_null), v_null the flow's at null_obs (arXiv 2207.12598).

    A flow like any other: give it to SteeredSampler, and the critic steers the guided flow. Where obs and null_obs are
    tensors, the flow is asked once for both; else twice.

    Args:
        flow: (obs, noisy_actions [B, A] or [B, C, D], t [B, 1]) -> velocity. Parameters stay live.
        null_obs: the obs of no condition: [S] or [1, S] where obs is a tensor [B, S] (any further dimensions alike);
            for flows that read other obs, any object that the flow takes in its place. A tensor moves with the module
            and takes obs's dtype.
        weight: 0 is the unconditional flow, 1 the conditional one, more exaggerates the condition.

    Raises:
        ValueError, TypeError: for a weight or a null_obs that is not finite; in a call, for shapes that do not fit.

    Example:
        ```python
        SteeredSampler(ClassifierFreeGuidance(flow, torch.zeros(40), 1.5), critic, Steering.qpilots_u())
        ```
    """

    asks_twice: ClassVar[str] = "guidance asks its flow twice a step, which no packed network does"

    def __init__(self, flow: Callable[..., Tensor], null_obs: Any, weight: float) -> None:
        super().__init__()
        if not callable(flow):
            raise TypeError(f"ClassifierFreeGuidance: flow is {type(flow).__name__}; expected a callable.")
        check_number("ClassifierFreeGuidance: weight", weight, -math.inf)
        self.flow = flow
        if isinstance(null_obs, np.ndarray):
            if null_obs.dtype.kind != "f":
                raise TypeError(
                    f"ClassifierFreeGuidance: null_obs is {null_obs.dtype}; expected floating numbers, e.g. np.float32."
                )
            null_obs = torch.from_numpy(null_obs.copy())
        self.null_obs: Any
        if isinstance(null_obs, Tensor) and not isinstance(null_obs, nn.Parameter):
            self.register_buffer("null_obs", null_obs)
        else:
            self.null_obs = null_obs
        if isinstance(null_obs, Tensor) and not bool(null_obs.isfinite().all()):
            raise ValueError("ClassifierFreeGuidance: null_obs is not finite everywhere; expected finite numbers.")
        self.weight = weight

    def forward(self, obs: Any, noisy_actions: Tensor, t: Tensor) -> Tensor:
        """Returns the guided velocity in the shape of noisy_actions, at t [B, 1]."""
        if isinstance(obs, Tensor) and isinstance(self.null_obs, Tensor):
            both = torch.cat([self._null_rows(obs), obs])
            v_null, v_obs = self.flow(both, torch.cat([noisy_actions] * 2), torch.cat([t] * 2)).chunk(2)
        else:
            v_null, v_obs = (self.flow(given, noisy_actions, t) for given in (self.null_obs, obs))
        return v_null + self.weight * (v_obs - v_null)

    def _null_rows(self, obs: Tensor) -> Tensor:
        """null_obs for every row of obs."""
        null = self.null_obs.to(obs.dtype)
        if null.ndim == obs.ndim - 1:
            null = null.unsqueeze(0)
        if null.shape != (1, *obs.shape[1:]):
            row = list(obs.shape[1:])
            raise ValueError(
                f"ClassifierFreeGuidance: null_obs has shape {list(self.null_obs.shape)} and obs {list(obs.shape)}; "
                f"expected null_obs {row} or {[1, *row]}."
            )
        return null.expand(obs.shape)
