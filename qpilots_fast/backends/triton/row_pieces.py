"""The row-wise pieces of a step, each one kernel, for any batch and anyone's loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...steering import Steering
from ..base import check_q_std
from ..caches import Cache
from ..captured import refuse_while_capturing
from .evaluation import Launch
from .launcher import launch
from .layouts import padded_width

_VALUES = 512  # of a program: 4 a lane


def clean_actions_launch(x: Tensor, v: Tensor, times: Tensor, result: Tensor) -> Launch:
    """x + (1 - t) v into result; all [B, A], times at any strides."""
    block = min(padded_width(x.shape[1]), _VALUES)
    row_stride, column_stride = times.stride()
    return Launch.of(
        "clean_actions", (-(-len(x) // (_VALUES // block)), -(-x.shape[1] // block)), x_ptr=x, v_ptr=v, t_ptr=times,
        out_ptr=result, num_rows=len(x), row_stride=row_stride, column_stride=column_stride, ACTION_DIM=x.shape[1],
        BLOCK_A=block, BLOCK_B=_VALUES // block, num_warps=4,
    )  # fmt: skip


def steer_step_launch(
    x: Tensor, v: Tensor, g: Tensor, std: Tensor | None, dims: Tensor, dt: float, steering: Steering, result: Tensor,
    norms: Tensor, nonfinite: Tensor,
) -> Launch:  # fmt: skip
    """x + dt (v + scale(v, g) g) into result [B, A]; norms and nonfinite [B], int8, of g; dims [A]: 1 where steered."""
    pad = padded_width(x.shape[1])
    block = max(1, _VALUES // pad)
    return Launch.of(
        "steer_step", (-(-len(x) // block),), x_ptr=x, v_ptr=v, g_ptr=g, std_ptr=norms if std is None else std,
        dims_ptr=dims, out_ptr=result, norm_ptr=norms, nonfinite_ptr=nonfinite, num_rows=len(x), dt=float(dt),
        alpha=float(steering.alpha), **scale_arguments(steering), STD=std is not None, SCALE=steering.scale,
        ACTION_DIM=x.shape[1], A_PAD=pad, BLOCK_B=block, num_warps=min(16, max(4, pad // 256)),
    )  # fmt: skip


class TritonRows:
    """`RowKernels`, where no library of CUDA kernels was built."""

    def __init__(self) -> None:
        self._masks = Cache(16)

    def clean_actions(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """x + (1 - t) v: x, v [B, A], t [1, 1], [B, 1] or [B, A] -> [B, A]."""
        x = _rows(x)
        result = torch.empty_like(x)
        if x.numel():
            times = t.detach().to(torch.float32).expand(x.shape)
            item = clean_actions_launch(x, _rows(v), times, result)
            launch(item.name, item.grid, **item.arguments)
        return result

    def steer_step(
        self, x: Tensor, v: Tensor, g: Tensor, dt: float, steering: Steering, q_std: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `RowKernels`."""
        check_q_std(steering, q_std)
        x, std = _rows(x), None if q_std is None else _rows(q_std)
        result, norms = torch.empty_like(x), x.new_empty(len(x))
        nonfinite = torch.empty(len(x), dtype=torch.bool, device=x.device)
        if not x.numel():
            return result, norms.zero_(), nonfinite.zero_()
        mask, flags = self._mask(steering, x), nonfinite.view(torch.int8)
        item = steer_step_launch(x, _rows(v), _rows(g), std, mask, dt, steering, result, norms, flags)
        launch(item.name, item.grid, **item.arguments)
        return result, norms, nonfinite

    def _mask(self, steering: Steering, x: Tensor) -> Tensor:
        """[A], 1 where steered; kept, because a copy from the host would wait for the GPU."""
        dims, width, device = steering.steered_dims, x.shape[-1], x.device

        def make() -> Tensor:
            refuse_while_capturing(device, "these steered_dims have not been used yet")
            mask = torch.zeros(width, dtype=torch.float32, device="cpu")
            mask[slice(None) if dims is None else list(dims)] = 1.0
            return mask.to(device)

        return self._masks.obtain((dims, width, device), make)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def scale_arguments(steering: Steering) -> dict[str, Any]:
    """What `_steer_velocity` reads of a steering beside alpha."""
    return dict(
        gain=1.0 / steering.gaf_beta, floor=float(steering.eps), max_grad_norm=float(steering.max_grad_norm),
        gaf_decay=float(steering.gaf_decay), gaf_min=float(steering.gaf_min),
        max_disagreement=math.inf if steering.max_disagreement is None else float(steering.max_disagreement),
    )  # fmt: skip
