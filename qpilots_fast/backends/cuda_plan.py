"""The program of the persistent CUDA kernel: packed layout of the weights, planes of the workspace, list of phases.

The structures mirror csrc/cuda/phase.h field by field; `cuda.Library` compares their sizes with the compiled ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..networks import time_features
from ..spec import ACTIVATIONS, NetworkSpec, SamplerSpec
from ..steering import AGGREGATIONS, CLIPS, ESTIMATES, SCALES, Steering
from .base import BoundNetwork

_NORMS = (None, "pre", "post")
_STAGES = ("rows", "state", "estimate", "map_input", "hidden", "critic_top", "delta", "cotangent")
_ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_I32, _I64, _F32, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_WEIGHT_ALIGNMENT = 128  # bytes
_PLANE_ALIGNMENT = 32  # floats


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


@dataclass(frozen=True)
class Region:
    """A named stretch of the packed weights (bytes) or of the workspace (floats)."""

    name: str
    start: int
    size: int


# ---------------------------------------------------------------- packed weights


@dataclass(frozen=True)
class _Entry:
    """What fills one region of a member: parameter `field` of layer `layer`, its columns, perhaps transposed."""

    region: Region
    layer: int
    field: str
    columns: tuple[slice, ...]
    transposed: bool
    stride: int  # elements; vectors: their length
    is_vector: bool


@dataclass(frozen=True)
class Presence:
    """Which optional parameters a layer has."""

    bias: bool
    norm_weight: bool
    norm_bias: bool


def presence(network: BoundNetwork) -> tuple[Presence, ...]:
    return tuple(
        Presence(layer.bias is not None, layer.norm_weight is not None, layer.norm_bias is not None)
        for layer in network.layers
    )


class NetworkLayout:
    """Where each matrix of one network lies in the packed weights.

    Args:
        spec, present: the network.
        base: first byte.
        weight_bytes: 4 (float32) or 2 (bfloat16).
        moving: input blocks whose columns are multiplied at every step, in staged order.
        pulled: blocks to whose columns the backward pass leads; () where there is none.
        once: groups of blocks multiplied once a call.
        keeps_output_transposed: whether the backward pass starts with a cotangent of the output.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        present: tuple[Presence, ...],
        base: int,
        weight_bytes: int,
        moving: tuple[str, ...],
        pulled: tuple[str, ...],
        once: tuple[tuple[str, ...], ...],
        keeps_output_transposed: bool,
    ) -> None:
        self.spec, self.present, self.base, self._weight_bytes = spec, present, base, weight_bytes
        self.entries: list[_Entry] = []
        self._size = 0
        last = len(spec.layer_dims) - 1
        self.forward: list[int] = []
        self.transposed: dict[int, int] = {}
        self.bias = [-1] * (last + 1)
        self.gamma, self.beta = [-1] * last, [-1] * last
        first_columns = tuple(spec.block_slices[block] for block in moving)
        for layer, (fan_in, fan_out) in enumerate(spec.layer_dims):
            columns = first_columns if layer == 0 else (slice(0, fan_in),)
            self.forward.append(self._matrix(layer, columns, fan_out, transposed=False))
            if pulled and (layer < last or keeps_output_transposed):
                back = tuple(spec.block_slices[block] for block in pulled) if layer == 0 else (slice(0, fan_in),)
                self.transposed[layer] = self._matrix(layer, back, fan_out, transposed=True)
            if present[layer].bias:
                self.bias[layer] = self._vector(layer, "bias", fan_out)
            if layer < last and present[layer].norm_weight:
                self.gamma[layer] = self._vector(layer, "norm_weight", fan_out)
            if layer < last and present[layer].norm_bias:
                self.beta[layer] = self._vector(layer, "norm_bias", fan_out)
        self.once = [
            self._matrix(0, tuple(spec.block_slices[block] for block in group), spec.layer_dims[0][1], transposed=False)
            for group in once
        ]
        self.member_bytes = _round_up(self._size, _WEIGHT_ALIGNMENT)
        self.end = base + self.member_bytes * spec.num_members

    def stride(self, columns: int) -> int:
        """Row stride of a matrix: its columns padded to 16 bytes."""
        return _round_up(columns, 16 // self._weight_bytes)

    def _reserve(self, name: str, size: int) -> Region:
        region = Region(name, self._size, size)
        self._size = _round_up(self._size + size, _WEIGHT_ALIGNMENT)
        return region

    def _matrix(self, layer: int, columns: tuple[slice, ...], fan_out: int, *, transposed: bool) -> int:
        width = sum(c.stop - c.start for c in columns)
        rows, stride = (width, self.stride(fan_out)) if transposed else (fan_out, self.stride(width))
        name = f"{self.spec.kind} layer {layer} weight" + (" transposed" if transposed else "")
        region = self._reserve(name, rows * stride * self._weight_bytes)
        self.entries.append(_Entry(region, layer, "weight", columns, transposed, stride, is_vector=False))
        return self.base + region.start

    def _vector(self, layer: int, name: str, size: int) -> int:
        region = self._reserve(f"{self.spec.kind} layer {layer} {name}", size * 4)
        self.entries.append(_Entry(region, layer, name, (), False, size, is_vector=True))
        return self.base + region.start

    def regions(self) -> Iterator[Region]:
        """Every region of every member, from the start of the packed weights."""
        for member in range(self.spec.num_members):
            start = self.base + member * self.member_bytes
            for entry in self.entries:
                yield Region(f"{entry.region.name} of member {member}", start + entry.region.start, entry.region.size)

    def pack_items(self, network: BoundNetwork) -> Iterator[PackItem]:
        """One item for each copy; first_tile is left to the caller."""
        for entry in self.entries:
            members = getattr(network.layers[entry.layer], entry.field)
            for member, tensor in enumerate(members):
                target = self.base + member * self.member_bytes + entry.region.start
                yield from self._items_of(entry, tensor, target)

    def _items_of(self, entry: _Entry, tensor: Tensor, target: int) -> Iterator[PackItem]:
        source_type, size = _ELEMENT_TYPES[tensor.dtype], tensor.element_size()
        if entry.is_vector:
            yield PackItem(
                source=tensor.data_ptr(), column_stride=tensor.stride(0), target=target, rows=1, columns=entry.stride,
                target_columns=entry.stride, target_stride=entry.stride, source_type=source_type, target_type=0,
            )  # fmt: skip
            return
        out_stride, in_stride = tensor.stride()
        done = 0
        for index, columns in enumerate(entry.columns):
            width = columns.stop - columns.start
            item = PackItem(
                source=tensor.data_ptr() + columns.start * in_stride * size,
                target_stride=entry.stride,
                source_type=source_type,
                target_type=1 if self._weight_bytes == 2 else 0,
            )
            if entry.transposed:
                item.rows, item.columns, item.target_columns = width, tensor.shape[0], entry.stride
                item.row_stride, item.column_stride = in_stride, out_stride
                item.target = target + done * entry.stride * self._weight_bytes
            else:
                item.rows, item.columns = tensor.shape[0], width
                item.target_columns = entry.stride - done if index == len(entry.columns) - 1 else width
                item.row_stride, item.column_stride = out_stride, in_stride
                item.target = target + done * self._weight_bytes
            done += width
            yield item


def pack_table(items: list[PackItem]) -> tuple[bytes, int]:
    """The items as bytes, each with its first tile of 32 x 32 elements, and the number of tiles."""
    tiles = 0
    for item in items:
        item.first_tile = tiles
        tiles += -(-item.rows // 32) * -(-item.target_columns // 32)
    return b"".join(bytes(item) for item in items), tiles


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# ---------------------------------------------------------------- workspace and phases


@dataclass
class Workspace:
    """Planes of float32, one after the other."""

    regions: list[Region] = field(default_factory=list)
    size: int = 0

    def plane(self, name: str, *dims: int) -> int:
        size = 1
        for dim in dims:
            size *= dim
        start = self.size
        self.regions.append(Region(name, start, size))
        self.size = _round_up(start + size, _PLANE_ALIGNMENT)
        return start


class NetworkPhases:
    """The phases of one network on `rows` rows, forward and backward.

    Args:
        layout: its packed weights.
        workspace: where its planes are added.
        rows: rows of the moving input.
        differentiable: whether a backward pass follows.
    """

    def __init__(self, layout: NetworkLayout, workspace: Workspace, rows: int, *, differentiable: bool) -> None:
        self.layout, self.rows = layout, rows
        spec = layout.spec
        self.spec, self._workspace = spec, workspace
        self._values, self._slopes = [], []
        for layer, width in enumerate(spec.hidden_dims):
            name = f"{spec.kind} hidden {layer}"
            self._values.append(workspace.plane(name, spec.num_members, rows, width))
            keeps = differentiable and spec.layer_norm[layer] != "pre"
            self._slopes.append(workspace.plane(f"{name} slope", spec.num_members, rows, width) if keeps else -1)
        self._deltas = [
            workspace.plane(f"{spec.kind} hidden {layer} delta", spec.num_members, rows, width) if differentiable else -1
            for layer, width in enumerate(spec.hidden_dims)
        ]

    def _phase(self, stage: str, in_dim: int, out_dim: int, weight: int, target: int, **fields: int | float) -> Phase:
        phase = Phase(
            stage=_STAGES.index(stage),
            activation=ACTIVATIONS.index(self.spec.activation),
            members=self.spec.num_members,
            rows=self.rows,
            in_dim=in_dim,
            in_stride=self.layout.stride(in_dim),
            out_dim=out_dim,
            input=-1,
            rows_per_addend=1,
            ends_with_barrier=1,
            norm_eps=self.spec.layer_norm_eps,
            weight=weight,
            target=target,
            member_bytes=self.layout.member_bytes,
        )
        for name in ("source_slope", "source_delta", "target_slope", "row_addend", "step_addend", "bias", "gamma"):
            setattr(phase, name, -1)
        phase.beta = phase.top_weight = phase.top_bias = -1
        for name, value in fields.items():
            setattr(phase, name, value)
        return phase

    def _staged(self, layer: int) -> dict[str, int]:
        """Fields that say how hidden layer `layer` is staged, forward or backward."""
        return {
            "source": self._values[layer],
            "source_slope": self._slopes[layer],
            "source_delta": self._deltas[layer],
            "staged_norm": _NORMS.index(self.spec.layer_norm[layer]),
            "gamma": self.layout.gamma[layer],
            "beta": self.layout.beta[layer],
        }

    def _hidden_target(self, layer: int) -> dict[str, int]:
        return {
            "activates": int(self.spec.layer_norm[layer] != "pre"),
            "target": self._values[layer],
            "target_slope": self._slopes[layer],
        }

    def once(self, group: int, width: int, rows: int, input_index: int, *, with_bias: bool) -> tuple[Phase, int]:
        """The product of a group of unchanging first-layer columns, and its plane."""
        out_dim = self.spec.hidden_dims[0]
        plane = self._workspace.plane(f"{self.spec.kind} columns {group}", self.spec.num_members, rows, out_dim)
        phase = self._phase("rows", width, out_dim, self.layout.once[group], plane, rows=rows, input=input_index)
        phase.ends_with_barrier = 0
        phase.bias = self.layout.bias[0] if with_bias else -1
        return phase, plane

    def forward(self, first_stage: str, in_dim: int, output: int | None, **first_fields: int) -> list[Phase]:
        """Phases up to the output plane; output None stops at the last hidden layer."""
        spec, layout = self.spec, self.layout
        first = self._phase(first_stage, in_dim, spec.hidden_dims[0], layout.forward[0], 0, **first_fields)
        phases = [first]
        for name, value in self._hidden_target(0).items():
            setattr(first, name, value)
        for layer in range(1, len(spec.hidden_dims)):
            fan_in, fan_out = spec.layer_dims[layer]
            fields = {**self._staged(layer - 1), **self._hidden_target(layer), "bias": layout.bias[layer]}
            target = fields.pop("target")
            phases.append(self._phase("hidden", fan_in, fan_out, layout.forward[layer], target, **fields))
        if output is not None:
            fan_in, fan_out = spec.layer_dims[-1]
            fields = {**self._staged(len(spec.hidden_dims) - 1), "bias": layout.bias[-1]}
            phases.append(self._phase("hidden", fan_in, fan_out, layout.forward[-1], output, **fields))
        return phases

    def backward(self, pulled_dim: int, output: int, cotangent: dict[str, int] | None, stage: str = "") -> list[Phase]:
        """Phases from a cotangent (its fields and stage), or from the critics' top (None), to the input columns."""
        spec, layout = self.spec, self.layout
        phases = []
        top = len(spec.hidden_dims) - 1
        if cotangent is not None:
            out_dim, weight = spec.hidden_dims[-1], layout.transposed[top + 1]
            phases.append(self._phase(stage, spec.output_dim, out_dim, weight, self._deltas[top], **cotangent))
        for layer in range(top, -1, -1):
            at_top = layer == top and cotangent is None
            fields = self._staged(layer)
            if at_top:
                fields |= {"top_weight": layout.forward[-1], "top_bias": layout.bias[-1]}
            out_dim, target = (pulled_dim, output) if layer == 0 else (spec.hidden_dims[layer - 1], self._deltas[layer - 1])
            name = "critic_top" if at_top else "delta"
            phases.append(
                self._phase(name, spec.hidden_dims[layer], out_dim, layout.transposed[layer], target, **fields)
            )
        return phases


@dataclass
class Program:
    """All that a launch needs besides tensors. Built once for a sampler (or network), batch size and precision."""

    layouts: list[NetworkLayout]
    workspace: Workspace
    phases: list[Phase]
    args: SampleArgs  # sizes and offsets; pointers are filled in at each call
    weight_bytes: int
    max_rows: int
    weights_bytes: int
    time_tables: tuple[Tensor, ...] = ()  # flow's and map's features [K, .], 1 - t [K]; float32
    steered: Tensor | None = None  # [A] uint8
    output: Region | None = None

    def program_bytes(self) -> bytes:
        return b"".join(bytes(phase) for phase in self.phases)


def _finish(program: Program, num_once: int, num_flow: int) -> Program:
    args, phases = program.args, program.phases
    args.num_once, args.num_flow_phases = num_once, num_flow
    args.num_step_phases = len(phases) - num_once
    args.stage_stride = max(phase.in_stride for phase in phases)
    program.max_rows = max(phase.rows for phase in phases)
    return program


def _time_blocks(spec: NetworkSpec) -> tuple[str, ...]:
    return tuple(block for block in spec.input_order if block in ("t", "s", "u"))


def _time_table(spec: NetworkSpec, num_steps: int) -> Tensor:
    """[K, columns] float32: the time columns of every step, in the order of the network's input."""
    t = torch.arange(num_steps, dtype=torch.float64).unsqueeze(1) / num_steps
    at = {"t": t, "s": torch.zeros_like(t), "u": torch.ones_like(t)}
    blocks = [time_features(at[name], spec.time_embedding, spec.time_embedding_dim) for name in _time_blocks(spec)]
    return torch.cat(blocks, dim=1).float().contiguous()


def plan_sample(spec: SamplerSpec, present: tuple[tuple[Presence, ...], ...], batch: int, weight_bytes: int) -> Program:
    """The program of a whole sampling call; present: of flow, critic, posterior, as far as they take part."""
    steering, flow = spec.steering, spec.flow
    steers = steering.steers and spec.critic is not None
    uses_map = steers and steering.estimate == "mfm"
    pulls_flow = steers and steering.estimate == "tweedie" and steering.jacobian == "full"
    rows = batch * steering.num_samples if uses_map else batch
    action_dim = flow.action_dim
    layouts: list[NetworkLayout] = []

    def add_layout(network: NetworkSpec, moving: tuple[str, ...], pulled: tuple[str, ...], back: bool) -> NetworkLayout:
        base = layouts[-1].end if layouts else 0
        once = (("obs",), _time_blocks(network)) if _time_blocks(network) else (("obs",),)
        layout = NetworkLayout(
            network, present[len(layouts)], base, weight_bytes, moving, pulled, once, keeps_output_transposed=back
        )
        layouts.append(layout)
        return layout

    workspace = Workspace()
    args = SampleArgs(batch=batch, action_dim=action_dim, num_steps=spec.num_steps, dt=1 / spec.num_steps)
    args.steering = steering_params(steering, spec.action_low, spec.action_high)
    args.velocity = workspace.plane("velocity", batch, action_dim)
    once: list[Phase] = []
    step: list[Phase] = []

    def add_once(phases: NetworkPhases, times_input: int) -> dict[str, int]:
        """Queues the products of a network's unchanging columns; returns the first layer's addends."""
        phase, obs_plane = phases.once(0, phases.spec.obs_dim, batch, 0, with_bias=True)
        once.append(phase)
        fields = {"row_addend": obs_plane, "rows_per_addend": phases.rows // batch}
        if len(phases.layout.once) > 1:
            width = sum(phases.spec.block_dim(block) for block in _time_blocks(phases.spec))
            phase, fields["step_addend"] = phases.once(1, width, spec.num_steps, times_input, with_bias=False)
            once.append(phase)
        return fields

    pulled = ("noisy_actions",) if pulls_flow else ()
    flow_phases = NetworkPhases(
        add_layout(flow, ("noisy_actions",), pulled, pulls_flow), workspace, batch, differentiable=pulls_flow
    )
    step += flow_phases.forward("state", action_dim, args.velocity, **add_once(flow_phases, 1))
    num_flow = len(step)
    tables = [_time_table(flow, spec.num_steps)]
    if steers:
        assert spec.critic is not None
        args.num_members = spec.critic.num_members
        args.q_values = workspace.plane("q_values", args.num_members, rows)
        args.critic_vjp = workspace.plane("critic vjp", args.num_members, rows, action_dim)
        args.estimate_vjp = workspace.plane("estimate vjp", rows, action_dim)
        critic_phases = NetworkPhases(
            add_layout(spec.critic, ("actions",), ("actions",), False), workspace, rows, differentiable=True
        )
        pulled_back = flow_phases
        if uses_map:
            assert spec.posterior is not None
            args.map_output = workspace.plane("map output", rows, action_dim)
            layout = add_layout(spec.posterior, ("xbar", "noisy_actions"), ("noisy_actions",), True)
            pulled_back = NetworkPhases(layout, workspace, rows, differentiable=True)
            addends = add_once(pulled_back, 2)
            step += pulled_back.forward("map_input", 2 * action_dim, args.map_output, **addends)
            tables.append(_time_table(spec.posterior, spec.num_steps))
        step += critic_phases.forward("estimate", action_dim, None, **add_once(critic_phases, 0))
        step += critic_phases.backward(action_dim, args.critic_vjp, None)
        step[-1].completes_critics = 1
        if uses_map or pulls_flow:
            step += pulled_back.backward(action_dim, args.estimate_vjp, {}, "cotangent")
    once[-1].ends_with_barrier = 1
    remaining = (1 - torch.arange(spec.num_steps, dtype=torch.float64) / spec.num_steps).float()
    mask = None
    if steering.steered_dims is not None:
        mask = torch.zeros(action_dim, dtype=torch.uint8)
        mask[list(steering.steered_dims)] = 1
    program = Program(
        layouts, workspace, once + step, args, weight_bytes, 0, layouts[-1].end, (*tables, remaining), mask
    )
    return _finish(program, len(once), num_flow)


def plan_network(
    spec: NetworkSpec, present: tuple[Presence, ...], batch: int, weight_bytes: int, *, differentiable: bool
) -> Program:
    """The program of one forward pass (inputs[0] is [B, in]), or with the pullback of inputs[3] [E, B, out]."""
    blocks = spec.input_order
    layout = NetworkLayout(
        spec, present, 0, weight_bytes, blocks, blocks if differentiable else (), (), keeps_output_transposed=True
    )
    workspace = Workspace()
    phases = NetworkPhases(layout, workspace, batch, differentiable=differentiable)
    width = spec.input_dim if differentiable else spec.output_dim
    output = workspace.plane("output", spec.num_members, batch, width)
    program_phases = phases.forward(
        "rows", spec.input_dim, None if differentiable else output, input=0, bias=layout.bias[0]
    )
    if differentiable:
        cotangent = {"input": 3, "source_member_stride": batch * spec.output_dim}
        program_phases += phases.backward(spec.input_dim, output, cotangent, "rows")
    args = SampleArgs(batch=batch, action_dim=spec.action_dim, num_members=spec.num_members)
    args.steering = steering_params(Steering(), -1.0, 1.0)
    size = spec.num_members * batch * width
    program = Program([layout], workspace, program_phases, args, weight_bytes, 0, layout.end)
    program.output = Region("output", output, size)
    return _finish(program, len(program_phases), 0)
