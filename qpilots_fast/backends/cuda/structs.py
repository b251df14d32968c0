"""The structures of csrc/cuda/phase.h, field by field; their sizes are compared at loading."""

from __future__ import annotations

import ctypes

from ...steering import AGGREGATIONS, CLIPS, ESTIMATES, SCALES, Steering

STAGES = ("rows", "state", "estimate", "map_input", "hidden", "critic_top", "delta", "cotangent")
_I32, _I64, _F32, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class SteeringParams(ctypes.Structure):
    _fields_ = [
        *((name, _I32) for name in ("estimate", "clip", "aggregation", "scale", "q_scale_kind", "full_jacobian")),
        *((name, _I32) for name in ("steer_first_step", "num_samples", "glass_steps")),
        *((name, _F32) for name in ("alpha", "rho", "tau", "q_scale", "eps", "max_grad_norm")),
        *((name, _F32) for name in ("gaf_beta", "gaf_decay", "gaf_min", "action_low", "action_high")),
    ]


class Phase(ctypes.Structure):
    _fields_ = [
        *((name, _I32) for name in ("stage", "activation", "staged_norm", "activates", "members", "rows", "in_dim")),
        *((name, _I32) for name in ("in_stride", "out_dim", "input", "rows_per_addend", "ends_with_barrier")),
        ("norm_eps", _F32),
        ("completes_critics", _I32),
        *((name, _I64) for name in ("source", "source_member_stride", "source_slope", "source_delta")),
        *((name, _I64) for name in ("target", "target_slope", "row_addend", "step_addend", "weight", "bias")),
        *((name, _I64) for name in ("gamma", "beta", "top_weight", "top_bias", "member_bytes")),
    ]


class SampleArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("program", "weights", "workspace", "sync", "host_failure")),
        ("inputs", _POINTER * 4),
        *((name, _POINTER) for name in ("noise", "posterior_noise", "remaining_time", "steered")),
        *((name, _POINTER) for name in ("actions", "gradient_norms", "nonfinite")),
        *((name, _I64) for name in ("velocity", "map_output", "q_values", "critic_vjp", "estimate_vjp")),
        *((name, _I32) for name in ("num_once", "num_flow_phases", "num_step_phases", "num_steps", "batch")),
        *((name, _I32) for name in ("action_dim", "num_members", "stage_stride")),
        ("spin_limit", ctypes.c_uint32),
        ("dt", _F32),
        ("steering", SteeringParams),
    ]


class PackItem(ctypes.Structure):
    _fields_ = [
        ("source", ctypes.c_uint64),
        *((name, _I64) for name in ("row_stride", "column_stride", "target")),
        *((name, _I32) for name in ("rows", "columns", "target_columns", "target_stride", "source_type")),
        *((name, _I32) for name in ("target_type", "first_tile", "padding")),
    ]


class SteerStepArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("x", "v", "g", "q_std", "steered", "result", "gradient_norms", "nonfinite")),
        ("rows", _I64),
        ("action_dim", _I32),
        ("dt", _F32),
        ("steering", SteeringParams),
    ]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (Phase, SampleArgs, PackItem, SteerStepArgs)


def steering_params(steering: Steering, low: float, high: float) -> SteeringParams:
    """The steering as kernels read it."""
    batch_std = steering.q_scale == "batch_std"
    return SteeringParams(
        estimate=ESTIMATES.index(steering.estimate),
        clip=CLIPS.index(steering.clip),
        aggregation=AGGREGATIONS.index(steering.aggregation),
        scale=SCALES.index(steering.scale),
        q_scale_kind=2 if batch_std else 0 if steering.q_scale is None else 1,
        full_jacobian=steering.jacobian == "full",
        steer_first_step=steering.steer_first_step,
        num_samples=steering.num_samples,
        glass_steps=steering.glass_steps,
        q_scale=1.0 if batch_std or steering.q_scale is None else steering.q_scale,
        action_low=low,
        action_high=high,
        **{name: getattr(steering, name) for name in ("alpha", "rho", "tau", "eps", "max_grad_norm")},
        **{name: getattr(steering, name) for name in ("gaf_beta", "gaf_decay", "gaf_min")},
    )
