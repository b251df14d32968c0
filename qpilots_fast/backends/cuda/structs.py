"""The structures of csrc/cuda/phase.h, field by field; their sizes are compared at loading."""

from __future__ import annotations

import ctypes

from ..params import SteeringParams

STAGES = ("rows", "state", "estimate", "posterior_input", "hidden", "critic_top", "delta", "cotangent")
INPUTS = ("obs", "flow_times", "posterior_times", "columns", "cotangent")
ELEMENT_TYPES = ("float32", "bfloat16", "float16", "float64")
_I32, _I64, _F32, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Phase(ctypes.Structure):
    _fields_ = [
        *((name, _I32) for name in ("stage", "activation", "staged_norm", "activates", "members", "rows", "in_dim")),
        *((name, _I32) for name in ("in_stride", "out_dim", "input", "rows_per_addend", "ends_with_barrier")),
        ("layer_norm_eps", _F32),
        ("completes_critics", _I32),
        *((name, _I64) for name in ("source", "source_member_stride", "source_slope", "source_delta")),
        *((name, _I64) for name in ("target", "target_slope", "row_addend", "step_addend", "weight", "bias")),
        *((name, _I64) for name in ("gamma", "beta", "top_weight", "top_bias", "member_bytes")),
    ]


class SampleArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("program", "weights", "workspace", "sync", "host_failure")),
        ("inputs", _POINTER * len(INPUTS)),
        *((name, _POINTER) for name in ("noise", "posterior_noise", "schedule", "alpha", "bounds", "steered")),
        *((name, _POINTER) for name in ("actions", "gradient_norms", "nonfinite", "q_std", "gated")),
        *((name, _I64) for name in ("velocity", "posterior_output", "q_values", "critic_vjp", "estimate_vjp")),
        *((name, _I32) for name in ("num_once", "num_flow_phases", "num_step_phases", "num_steps", "batch")),
        *((name, _I32) for name in ("action_dim", "num_members", "stage_stride")),
        ("spin_limit", ctypes.c_uint32),
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
        *((name, _POINTER) for name in ("x", "v", "g", "q_std", "steered", "times")),
        *((name, _POINTER) for name in ("result", "gradient_norms", "nonfinite")),
        *((name, _I64) for name in ("rows", "time_row_stride", "time_column_stride")),
        ("action_dim", _I32),
        ("dt", _F32),
        ("steering", SteeringParams),
    ]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (Phase, SampleArgs, PackItem, SteerStepArgs)
