"""The program of the persistent CUDA kernel: planes of the workspace and the list of phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...spec import NetworkSpec, SamplerSpec
from ...steering import Steering
from ..params import NORM_PLACEMENTS, steering_params
from .layout import NetworkLayout, Presence, Region, round_up
from .structs import INPUTS, STAGES, Phase, SampleArgs

_PLANE_ALIGNMENT = 32  # floats


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
        self.size = round_up(start + size, _PLANE_ALIGNMENT)
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
            workspace.plane(f"{spec.kind} hidden {layer} delta", spec.num_members, rows, width)
            if differentiable
            else -1
            for layer, width in enumerate(spec.hidden_dims)
        ]

    def _phase(self, stage: str, in_dim: int, out_dim: int, weight: int, target: int, **fields: int | float) -> Phase:
        phase = Phase(
            stage=STAGES.index(stage),
            activation=tuple(ACTIVATIONS).index(self.spec.activation),
            members=self.spec.num_members,
            rows=self.rows,
            in_dim=in_dim,
            in_stride=self.layout.stride(in_dim),
            out_dim=out_dim,
            input=-1,
            rows_per_addend=1,
            ends_with_barrier=1,
            layer_norm_eps=self.spec.layer_norm_eps,
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
            "staged_norm": NORM_PLACEMENTS.index(self.spec.layer_norm[layer]),
            "gamma": self.layout.gamma[layer],
            "beta": self.layout.beta[layer],
        }

    def _hidden_target(self, layer: int) -> dict[str, int]:
        return {
            "activates": int(self.spec.layer_norm[layer] != "pre"),
            "target": self._values[layer],
            "target_slope": self._slopes[layer],
        }

    def once(self, group: int, width: int, rows: int, name: str, *, with_bias: bool) -> tuple[Phase, int]:
        """The product of a group of unchanging first-layer columns, from the input of this name, and its plane."""
        out_dim = self.spec.hidden_dims[0]
        plane = self._workspace.plane(f"{self.spec.kind} columns {group}", self.spec.num_members, rows, out_dim)
        phase = self._phase("rows", width, out_dim, self.layout.once[group], plane, rows=rows, input=INPUTS.index(name))
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
            out_dim, target = (
                (pulled_dim, output) if layer == 0 else (spec.hidden_dims[layer - 1], self._deltas[layer - 1])
            )
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
    time_tables: dict[str, Tensor] = field(default_factory=dict)  # features [K, .] by input; float32
    schedule: Tensor | None = None  # [K, 3]; float32
    steered: Tensor | None = None  # [A] uint8
    bounds: Tensor | None = None  # [2, A] float32
    output: Region | None = None
    num_steered: int = 0  # steps that run all step phases

    def program_bytes(self) -> bytes:
        return b"".join(bytes(phase) for phase in self.phases)


def _finish(program: Program, num_once: int, num_flow: int) -> Program:
    args, phases = program.args, program.phases
    args.num_once, args.num_flow_phases = num_once, num_flow
    args.num_step_phases = len(phases) - num_once
    args.stage_stride = max(phase.in_stride for phase in phases)
    # not of what runs once a call: K rows of time features would take the tile of 16 rows to every step
    program.max_rows = max(phase.rows for phase in phases[num_once:] or phases)
    return program


def _time_blocks(spec: NetworkSpec) -> tuple[str, ...]:
    return tuple(block for block in spec.input_order if block in ("t", "s", "u"))


def _time_table(spec: NetworkSpec, times: Sequence[float]) -> Tensor:
    """[K, columns] float32: the time columns of every step, in the order of the network's input."""
    return torch.cat(list(spec.time_rows(times).values()), dim=1).float().contiguous()


def plan_sample(spec: SamplerSpec, present: tuple[tuple[Presence, ...], ...], batch: int, weight_bytes: int) -> Program:
    """The program of a whole sampling call; present: of flow, critic, posterior, as far as they take part."""
    steering, flow, pulls_flow = spec.steering, spec.flow, spec.pulls_flow
    rows = batch * spec.num_draws
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
    args = SampleArgs(batch=batch, action_dim=action_dim, num_steps=spec.num_steps)
    args.steering = steering_params(steering)
    args.velocity = workspace.plane("velocity", batch, action_dim)
    once: list[Phase] = []
    step: list[Phase] = []

    tables: dict[str, Tensor] = {}

    def add_once(name: str, phases: NetworkPhases) -> dict[str, int]:
        """Queues the products of a network's unchanging columns; returns the first layer's addends."""
        phase, obs_plane = phases.once(0, phases.spec.obs_dim, batch, "obs", with_bias=True)
        once.append(phase)
        fields = {"row_addend": obs_plane, "rows_per_addend": phases.rows // batch}
        if len(phases.layout.once) > 1:
            times = f"{name}_times"
            tables[times] = _time_table(phases.spec, spec.times)
            width = tables[times].shape[1]
            phase, fields["step_addend"] = phases.once(1, width, spec.num_steps, times, with_bias=False)
            once.append(phase)
        return fields

    pulled = ("noisy_actions",) if pulls_flow else ()
    flow_phases = NetworkPhases(
        add_layout(flow, ("noisy_actions",), pulled, pulls_flow), workspace, batch, differentiable=pulls_flow
    )
    step += flow_phases.forward("state", action_dim, args.velocity, **add_once("flow", flow_phases))
    num_flow = len(step)
    if spec.critic is not None:
        args.num_members = spec.critic.num_members
        args.q_values = workspace.plane("q_values", args.num_members, rows)
        args.critic_vjp = workspace.plane("critic vjp", args.num_members, rows, action_dim)
        args.estimate_vjp = workspace.plane("estimate vjp", rows, action_dim)
        critic_phases = NetworkPhases(
            add_layout(spec.critic, ("actions",), ("actions",), False), workspace, rows, differentiable=True
        )
        pulled_back = flow_phases
        if spec.posterior is not None:
            args.posterior_output = workspace.plane("posterior output", rows, action_dim)
            layout = add_layout(spec.posterior, ("xbar", "noisy_actions"), ("noisy_actions",), True)
            pulled_back = NetworkPhases(layout, workspace, rows, differentiable=True)
            addends = add_once("posterior", pulled_back)
            step += pulled_back.forward("posterior_input", 2 * action_dim, args.posterior_output, **addends)
        step += critic_phases.forward("estimate", action_dim, None, **add_once("critic", critic_phases))
        step += critic_phases.backward(action_dim, args.critic_vjp, None)
        step[-1].completes_critics = 1
        if spec.posterior is not None or pulls_flow:
            step += pulled_back.backward(action_dim, args.estimate_vjp, {}, "cotangent")
    once[-1].ends_with_barrier = 1
    steps = [[1 - step.t, step.dt, step.weight] for step in spec.schedule]
    schedule = torch.tensor(steps, dtype=torch.float32, device="cpu")
    mask = None
    if steering.steered_dims is not None:
        mask = torch.zeros(action_dim, dtype=torch.uint8, device="cpu")
        mask[list(steering.steered_dims)] = 1
    program = Program(
        layouts, workspace, once + step, args, weight_bytes, 0, layouts[-1].end, tables, schedule, mask,
        bounds=torch.tensor(spec.box, dtype=torch.float32, device="cpu"), num_steered=len(spec.steered_steps),
    )  # fmt: skip
    return _finish(program, len(once), num_flow)


def plan_network(
    spec: NetworkSpec, present: tuple[Presence, ...], batch: int, weight_bytes: int, *, differentiable: bool
) -> Program:
    """The program of one forward pass of "columns" [B, in], or with the pullback of "cotangent" [E, B, out]."""
    blocks = spec.input_order
    layout = NetworkLayout(spec, present, 0, weight_bytes, blocks, blocks, (), keeps_output_transposed=True)
    workspace = Workspace()
    phases = NetworkPhases(layout, workspace, batch, differentiable=differentiable)
    width = spec.input_dim if differentiable else spec.output_dim
    output = workspace.plane("output", spec.num_members, batch, width)
    program_phases = phases.forward(
        "rows", spec.input_dim, None if differentiable else output, input=INPUTS.index("columns"), bias=layout.bias[0]
    )
    if differentiable:
        cotangent = {"input": INPUTS.index("cotangent"), "source_member_stride": batch * spec.output_dim}
        program_phases += phases.backward(spec.input_dim, output, cotangent, "rows")
    args = SampleArgs()  # no state in shared memory: any batch
    args.steering = steering_params(Steering())
    size = spec.num_members * batch * width
    program = Program([layout], workspace, program_phases, args, weight_bytes, 0, layout.end)
    program.output = Region("output", output, size)
    return _finish(program, len(program_phases), 0)
