"""The structures of csrc/cuda/phase.h, field by field; their sizes are compared at loading."""

from __future__ import annotations

import ctypes

from ..params import SteeringParams

PHASE_KINDS = ("product", "norm", "norm_vjp", "collect", "weigh")
OPERANDS = ("received", "input", "state", "estimate", "posterior_input", "cotangent")
RESULTS = ("columns", "hidden", "critic_top", "delta", "own", "numbers", "output")
INPUTS = ("obs", "flow_times", "posterior_times", "columns", "cotangent")
COLLECTED = ("velocity", "posterior_output", "estimate_vjp")
ELEMENT_TYPES = ("float32", "bfloat16", "float16", "float64")
LISTS = {
    "PhaseKind": PHASE_KINDS,
    "Operand": OPERANDS,
    "Result": RESULTS,
    "Input": INPUTS,
    "Collected": COLLECTED,
    "ElementType": ELEMENT_TYPES,
}
TILE, TILE_SUMS = 16, 5  # kTile, kTileSums
_I32, _I64, _F32, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Phase(ctypes.Structure):
    _fields_ = [
        *((name, _I32) for name in ("kind", "operand", "result", "activation", "norm", "members", "rows", "in_dim")),
        *((name, _I32) for name in ("in_stride", "out_dim", "tiles", "copy_shift", "input", "rows_per_addend")),
        *((name, _I32) for name in ("at_top", "folded", "steered_only", "first_block", "teams", "team_blocks")),
        *((name, _I32) for name in ("first_norm_row", "source_norm_row")),
        ("layer_norm_eps", _F32),
        *((name, _I32) for name in ("first_member", "tile_begin", "tile_end")),
        *((name, _I64) for name in ("source", "source_member_stride", "target", "sums", "vjp_sums")),
        *((name, _I64) for name in ("source_sums", "delta_sums")),
        *((name, _I64) for name in ("values", "slopes", "deltas", "linear", "row_addend", "step_addend")),
        *((name, _I64) for name in ("weight", "bias", "fold_sums")),
        *((name, _I64) for name in ("gamma", "beta", "top_weight", "top_bias", "member_bytes")),
    ]


class SampleArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("program", "weights", "workspace", "exchange", "tags", "host_failure")),
        ("inputs", _POINTER * len(INPUTS)),
        *((name, _POINTER) for name in ("noise", "posterior_noise", "schedule", "alpha", "bounds", "steered")),
        *((name, _POINTER) for name in ("actions", "gradient_norms", "nonfinite", "q_std", "gated")),
        *((name, _I64) for name in ("state", "q_values", "critic_vjp", "slot_words")),
        *((name, _I32) for name in ("num_once", "num_flow_phases", "num_step_phases", "num_steps")),
        *((name, _I32) for name in ("num_flow_blocks", "num_blocks", "batch", "action_dim", "num_members", "stride")),
        *((name, _I32) for name in ("group_tiles", "buffers", "num_norm_rows")),
        ("spin_limit", ctypes.c_uint32),
        ("steering", SteeringParams),
    ]


class Parameters(ctypes.Structure):
    _fields_ = [("source", ctypes.c_uint64), ("stride", _I64), ("type", _I32), ("padding", _I32)]


class PackItem(ctypes.Structure):
    _fields_ = [
        ("source", ctypes.c_uint64),
        *((name, _I64) for name in ("row_stride", "column_stride", "target")),
        ("scale", Parameters),
        *((name, _I32) for name in ("scales_rows", "rows", "columns", "target_rows", "target_columns")),
        *((name, _I32) for name in ("target_stride", "source_type", "target_type", "first_tile", "padding")),
    ]


class FoldItem(ctypes.Structure):
    _fields_ = [
        ("source", ctypes.c_uint64),
        *((name, _I64) for name in ("row_stride", "column_stride")),
        *((name, Parameters) for name in ("gamma", "beta", "bias")),
        *((name, _I64) for name in ("sums_target", "bias_target")),
        *((name, _I32) for name in ("rows", "columns", "source_type", "operand_type", "first_group", "padding")),
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


STRUCTURES: tuple[type[ctypes.Structure], ...] = (Phase, SampleArgs, PackItem, FoldItem, SteerStepArgs)
