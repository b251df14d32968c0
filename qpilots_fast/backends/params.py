"""What crosses to C++: the mirror of csrc/include/qpilots/types.h, compared with what a library was compiled from."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from ..activations import ACTIVATIONS
from ..row_ops import ROW_OPS
from ..steering import AGGREGATIONS, CLIPS, ESTIMATES, SCALES, Steering

NORM_PLACEMENTS = (None, "pre", "post")
Q_SCALES = ("none", "number", "batch_std")
ENUMS: dict[str, tuple[str | None, ...]] = {  # in C++ -> the values' names, in order
    "Activation": tuple(ACTIVATIONS),
    "NormPlacement": NORM_PLACEMENTS,
    "RowOpKind": tuple(ROW_OPS),
    "Aggregation": AGGREGATIONS,
    "Scale": SCALES,
    "Clip": CLIPS,
    "Estimate": ESTIMATES,
    "QScale": Q_SCALES,
}
_I32, _F32 = ctypes.c_int32, ctypes.c_float


FIELDS: list[tuple[str, type[ctypes.c_int32] | type[ctypes.c_float]]] = [
    *((name, _I32) for name in ("estimate", "clip", "aggregation", "scale", "q_scale_kind", "full_jacobian")),
    *((name, _I32) for name in ("num_samples", "glass_steps")),
    *((name, _F32) for name in ("alpha", "rho", "tau", "q_scale", "eps", "max_grad_norm")),
    *((name, _F32) for name in ("gaf_beta", "gaf_decay", "gaf_min", "max_disagreement")),
]


class SteeringParams(ctypes.Structure):
    _fields_ = FIELDS


def steering_params(steering: Steering) -> SteeringParams:
    """The steering as kernels read it."""
    batch_std = steering.q_scale == "batch_std"
    return SteeringParams(
        estimate=ESTIMATES.index(steering.estimate),
        clip=CLIPS.index(steering.clip),
        aggregation=AGGREGATIONS.index(steering.aggregation),
        scale=SCALES.index(steering.scale),
        q_scale_kind=Q_SCALES.index("batch_std" if batch_std else "none" if steering.q_scale is None else "number"),
        full_jacobian=steering.jacobian == "full",
        num_samples=steering.num_samples,
        glass_steps=steering.glass_steps,
        q_scale=1.0 if batch_std or steering.q_scale is None else steering.q_scale,
        max_disagreement=math.inf if steering.max_disagreement is None else steering.max_disagreement,
        **{name: getattr(steering, name) for name in ("alpha", "rho", "tau", "eps", "max_grad_norm")},
        **{name: getattr(steering, name) for name in ("gaf_beta", "gaf_decay", "gaf_min")},
    )


def interface_lines(own: Mapping[str, Sequence[str]]) -> list[str]:
    """The lists above, and a library's own, as interface.h writes those of C++."""
    kinds = {_I32: "int32", _F32: "float32"}
    fields = [f"{name}:{kinds[kind]}@{getattr(SteeringParams, name).offset}" for name, kind in FIELDS]
    layout = [*fields, str(ctypes.sizeof(SteeringParams))]
    lists: dict[str, Sequence[str | None]] = {**ENUMS, "SteeringParams": layout, **own}
    return [" ".join([name, *(value or "none" for value in values)]) for name, values in lists.items()]


def interface_mismatch(compiled: str, own: Mapping[str, Sequence[str]]) -> str | None:
    """How a library's text (csrc/include/qpilots/interface.h) differs from ours; None where it is the same."""
    for ours, theirs in zip_longest(interface_lines(own), compiled.splitlines()):
        if ours != theirs:
            return f"it was compiled from other sources: it has {theirs!r}, expected {ours!r}"
    return None
