"""The row-wise pieces of a step, each one kernel of one warp a row, for any batch and anyone's loop."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...steering import Steering
from ..base import check_q_std
from ..caches import Cache
from ..captured import refuse_while_capturing
from ..params import steering_params
from .library import Loader, float32_rows, memory_map, place, pointer
from .structs import SteerStepArgs


class CudaRows:
    """`RowKernels` of the CUDA library."""

    def __init__(self, loader: Loader) -> None:
        self._loader, self._masks = loader, Cache(16)

    def clean_actions(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """x + (1 - t) v: x, v [B, A], t [1, 1], [B, 1] or [B, A] -> [B, A]."""
        times = float32_rows(t).expand(x.shape)
        row_stride, column_stride = times.stride()
        args = SteerStepArgs(times=pointer(times), time_row_stride=row_stride, time_column_stride=column_stride)
        return self._launch("clean_actions", args, x, {"v": float32_rows(v)}, {"times": times}, {})

    def steer_step(
        self, x: Tensor, v: Tensor, g: Tensor, dt: float, steering: Steering, q_std: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `RowKernels`."""
        check_q_std(steering, q_std)
        norms = torch.empty(len(x), dtype=torch.float32, device=x.device)
        nonfinite = torch.empty(len(x), dtype=torch.bool, device=x.device)
        read = {"v": float32_rows(v), "g": float32_rows(g), "q_std": None if q_std is None else float32_rows(q_std)}
        read["steered"] = self._mask(steering, x)
        args = SteerStepArgs(dt=dt, steering=steering_params(steering))
        result = self._launch("steer_step", args, x, read, {}, {"gradient_norms": norms, "nonfinite": nonfinite})
        return result, norms, nonfinite

    def _mask(self, steering: Steering, x: Tensor) -> Tensor | None:
        """[A] uint8, 1 where steered; kept, because a copy from the host would wait for the GPU."""
        dims, width, device = steering.steered_dims, x.shape[-1], x.device
        if dims is None:
            return None

        def make() -> Tensor:
            refuse_while_capturing(device, "these steered_dims have not been used yet")
            mask = torch.zeros(width, dtype=torch.uint8, device="cpu")
            mask[list(dims)] = 1
            return mask.to(device)

        return self._masks.obtain((dims, width, device), make)

    def _launch(
        self, name: str, args: SteerStepArgs, x: Tensor, read: dict[str, Tensor | None],
        others: dict[str, Tensor | None], written: dict[str, Tensor | None],
    ) -> Tensor:  # fmt: skip
        """The result [B, A]; read and written: tensors by their fields of args."""
        x = float32_rows(x)
        result = torch.empty_like(x)
        if x.numel() == 0:
            for tensor in written.values():
                assert tensor is not None
                tensor.zero_()
            return result
        args.rows, args.action_dim = x.shape
        read, written = {"x": x, **read}, {"result": result, **written}
        for field, tensor in {**read, **written}.items():
            setattr(args, field, pointer(tensor))
        library = self._loader.get()
        library.call(
            name, ctypes.byref(args), *place(library, x.device), memory=lambda: memory_map({**read, **others}, written)
        )
        return result
