"""The arguments of anybody's sampling loop, in the conventions of this package, or refused with the conversion.

Here time runs from 0 (noise) to 1 (action) and the velocity is action - noise. openpi, LeRobot and diffusers run from
1 to 0 with the velocity noise - action: there steering as it stands would lower Q, without an error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .steering import check_choice

NOISE_AT_ZERO = "noise_at_zero"
CONVENTIONS = (NOISE_AT_ZERO, "noise_at_one")

_TIME_SLACK = 1e-6  # what adding up float32 steps leaves of 0 or 1


def check_step(op: str, convention: str, dt: float) -> None:
    """Raises unless dt has the sign of the convention."""
    check_choice(f"{op}: convention", convention, CONVENTIONS)
    if convention == NOISE_AT_ZERO:
        if not 0 < dt < math.inf:
            raise ValueError(
                f"{op}: dt is {dt}; expected dt > 0, as time runs from 0 (noise) to 1 (action) with velocity = action "
                "- noise. For a loop from 1 to 0 with velocity = noise - action (openpi, LeRobot, diffusers) call "
                + _CURES[op]
            )
    elif not 0 < -dt < math.inf:
        raise ValueError(
            f"{op}: dt is {dt}; expected dt < 0, as with convention='noise_at_one' time runs from 1 (noise) to 0 "
            "(action) with velocity = noise - action. For a loop from 0 to 1 with velocity = action - noise leave "
            "convention out, or pass convention='noise_at_zero'."
        )


_CURES = {
    "steer_step": "ops.steer_step(x, -v, 1 - t, -dt, ...), or add convention='noise_at_one' to the call as it is.",
    "steer_update": "ops.steer_update(x, -v, q_grad, -dt, ...), or ops.steer_step(x, v, t, dt, q_grad=q_grad, "
    "convention='noise_at_one').",
}


def from_convention(op: str, convention: str, velocity: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor | float]:
    """(velocity, t) of this package's convention."""
    check_choice(f"{op}: convention", convention, CONVENTIONS)
    check_time(op, t)
    return (velocity, t) if convention == NOISE_AT_ZERO else (-velocity, 1 - t)


def check_time(op: str, t: Tensor | float) -> None:
    """Raises where t leaves [0, 1]; a tensor is looked at where that costs no wait for a GPU and breaks no trace."""
    if isinstance(t, Tensor):
        if t.device.type != "cpu" or torch.compiler.is_compiling() or not _is_plain(t) or t.numel() == 0:
            return
        low, high = (float(edge) for edge in t.detach().aminmax())
    else:
        low = high = t
    if not (-_TIME_SLACK <= low and high <= 1 + _TIME_SLACK):
        got = f"{low}" if low == high else f"{low} to {high}"
        raise ValueError(
            f"{op}: t is {got}; expected times in [0, 1]. Divide a scheduler's timesteps by their largest (t / 1000); "
            "times that run from 1 (noise) to 0 go in as 1 - t with the velocity negated, or as they are with "
            "convention='noise_at_one' (ops.steer_step, ops.steer_velocity)."
        )


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def time_rows(op: str, t: Tensor | float, actions: Tensor) -> Tensor:
    """t as [1, 1], [B, 1] or, from one time a token [B, C] of actions [B, C, D], as [B, C D]."""
    if not isinstance(t, Tensor):
        return torch.full((1, 1), float(t), dtype=torch.float64, device=actions.device)
    batch = actions.shape[0]
    if t.numel() == 1 or t.shape in ((batch,), (batch, 1)):
        return t.reshape(-1, 1)
    if actions.ndim == 3 and t.shape in (actions.shape[:2], (*actions.shape[:2], 1)):
        return t.reshape(batch, -1, 1).expand(actions.shape).reshape(batch, -1)
    per_token = f", or one per token, {list(actions.shape[:2])}" if actions.ndim == 3 else ""
    raise ValueError(f"{op}: t has shape {list(t.shape)}; expected a number, [{batch}] or [{batch}, 1]{per_token}.")
