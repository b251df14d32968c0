"""The row-wise pieces of a step, each one kernel of one warp a row, for any batch and anyone's loop."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...steering import Steering
from ..params import steering_params
from .library import Library, float32_rows, memory_map, place, pointer
from .structs import SteerStepArgs


def clean_actions(
    library: Library, x: Tensor, v: Tensor, t: float, low: float | None = None, high: float | None = None
) -> Tensor:
    """x + (1 - t) v [B, A], clipped to [low, high] where given."""
    steering = Steering(clip="none" if low is None else "straight_through")
    args = SteerStepArgs(dt=1 - t, steering=steering_params(steering, low or 0.0, high or 0.0))
    return _launch(library, args, x, v, None, None, None)[0]


def steer_step(
    library: Library, x: Tensor, v: Tensor, g: Tensor, dt: float, steering: Steering, q_std: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x + dt (v + scale(v, g) g) over the steered dims.

    Args:
        x, v, g: [B, A]. q_std: [B], the critics' std, for scale="gaf".

    Returns:
        The next x [B, A]; norms of g [B]; rows whose g was not finite, which took the plain step [B].
    """
    if steering.scale == "gaf" and q_std is None:
        raise ValueError("q_std is None; scale='gaf' needs the critics' std at the estimate, [B].")
    steered = None
    if steering.steered_dims is not None:
        steered = torch.zeros(x.shape[-1], dtype=torch.uint8, device="cpu")
        steered[list(steering.steered_dims)] = 1
        steered = steered.to(x.device)
    args = SteerStepArgs(dt=dt, steering=steering_params(steering, 0.0, 0.0))
    return _launch(library, args, x, v, g, q_std, steered)


def _launch(
    library: Library, args: SteerStepArgs, x: Tensor, v: Tensor, g: Tensor | None, q_std: Tensor | None,
    steered: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, v = float32_rows(x), float32_rows(v)
    g, q_std = (None if tensor is None else float32_rows(tensor) for tensor in (g, q_std))
    result, norms = torch.empty_like(x), x.new_zeros(len(x))
    nonfinite = torch.zeros(len(x), dtype=torch.uint8, device=x.device)
    if x.numel() == 0:
        return result, norms, nonfinite.bool()
    args.rows, args.action_dim = x.shape
    args.x, args.v, args.g, args.q_std = x.data_ptr(), v.data_ptr(), pointer(g), pointer(q_std)
    args.steered, args.result = pointer(steered), result.data_ptr()
    args.gradient_norms, args.nonfinite = norms.data_ptr(), nonfinite.data_ptr()
    named = {"x": x, "v": v, "g": g, "q_std": q_std, "steered dims": steered}
    outputs = {"result": result, "gradient norms": norms, "non-finite rows": nonfinite}
    library.call(
        "clean_actions" if g is None else "steer_step",
        ctypes.byref(args),
        *place(library, x.device),
        memory=lambda: memory_map(named, outputs),
    )
    return result, norms, nonfinite.bool()
