"""The program of the persistent CUDA kernel: the phases of a whole call, or of one network's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...spec import NetworkSpec, SamplerSpec
from ...steering import Steering
from ..params import steering_params
from .layout import NetworkLayout, Presence, Region
from .phases import Memory, NetworkPhases, Share
from .structs import COLLECTED, INPUTS, PHASE_KINDS, RESULTS, Phase, SampleArgs

_GROUP_TILES = 3  # most tiles of neurons at once: kGroupTiles
# Up to so many rows every block computes an output of A numbers a row for itself: reading 8 rows of 512 in all blocks
# takes L2 about 0.4 us, an exchange costs more. Above, the output is shared like any product, and sent.
_OWN_ROWS = 8


@dataclass
class Program:
    """All that a launch needs besides tensors. Built once for a sampler (or network), batch size and precision."""

    layouts: list[NetworkLayout]
    memory: Memory
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


def _finish(program: Program, num_once: int, num_flow: int, shares: Sequence[Share]) -> Program:
    args, phases = program.args, program.phases
    args.num_once, args.num_flow_phases = num_once, num_flow
    args.num_step_phases = len(phases) - num_once
    args.stride = max(phase.in_stride for phase in phases)
    args.slot_words, args.num_norm_rows = program.memory.words.size, program.memory.norm_rows
    args.num_blocks = max(share.end for share in shares)
    args.group_tiles = min(_GROUP_TILES, max(-(-phase.tiles // phase.team_blocks) for phase in phases))
    # not of what runs once a call: K rows of time features would take the tile of 16 rows to every step
    program.max_rows = max(phase.rows for phase in phases[num_once:] or phases)
    return program


def _time_blocks(spec: NetworkSpec) -> tuple[str, ...]:
    return tuple(block for block in spec.input_order if block in ("t", "s", "u"))


def _time_table(spec: NetworkSpec, times: Sequence[float]) -> Tensor:
    """[K, columns] float32: the time columns of every step, in the order of the network's input."""
    return torch.cat(list(spec.time_rows(times).values()), dim=1).float().contiguous()


def plan_sample(
    spec: SamplerSpec, present: tuple[tuple[Presence, ...], ...], batch: int, weight_bytes: int, blocks: int
) -> Program:
    """The program of a whole sampling call on at most `blocks` blocks; present: of the networks that take part."""
    steering, flow, pulls_flow = spec.steering, spec.flow, spec.pulls_flow
    rows = batch * spec.num_draws
    action_dim = flow.action_dim
    layouts: list[NetworkLayout] = []
    memory = Memory()
    words = memory.words
    args = SampleArgs(batch=batch, action_dim=action_dim, num_steps=spec.num_steps)
    args.steering = steering_params(steering)
    args.state = words.plane("state", batch, action_dim)
    once: list[Phase] = []
    step: list[Phase] = []
    tables: dict[str, Tensor] = {}

    def add_network(
        network: NetworkSpec, share: Share, num_rows: int, moving: tuple[str, ...], pulled: tuple[str, ...], back: bool
    ) -> NetworkPhases:
        times = _time_blocks(network)
        layout = NetworkLayout(
            network, present[len(layouts)], layouts[-1].end if layouts else 0, weight_bytes, moving, pulled,
            (("obs",), times) if times else (("obs",),), keeps_output_transposed=back,
        )  # fmt: skip
        layouts.append(layout)
        return NetworkPhases(layout, memory, share, num_rows, differentiable=bool(pulled))

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

    def collect(name: str, num_rows: int, source: int) -> Phase:
        return Phase(
            kind=PHASE_KINDS.index("collect"), input=COLLECTED.index(name), rows=num_rows, out_dim=action_dim,
            source=source, weight=-1, team_blocks=1,
        )  # fmt: skip

    def to_all(phases: list[Phase], name: str, plane: int) -> list[Phase]:
        """How the numbers that the last of these products makes come to every block; takes it away where each does."""
        product = phases[-1]
        if product.rows > _OWN_ROWS:
            return [collect(name, product.rows, plane)]
        product.result, product.input = RESULTS.index("own"), COLLECTED.index(name)
        product.teams = product.team_blocks = 1
        return [phases.pop()]

    pulled = ("noisy_actions",) if pulls_flow else ()
    shares = [Share.of(flow, blocks)]
    flow_phases = add_network(flow, shares[0], batch, ("noisy_actions",), pulled, pulls_flow)
    velocity = words.plane("velocity", batch, action_dim)
    step += flow_phases.forward("state", action_dim, "numbers", velocity, **add_once("flow", flow_phases))
    velocity_to_all = to_all(step, "velocity", velocity)
    num_flow = len(step) + 1
    if spec.critic is not None:
        args.num_members = spec.critic.num_members
        args.q_values = words.plane("q_values", args.num_members, rows)
        args.critic_vjp = words.plane("critic vjp", args.num_members, rows, action_dim)
        shares.append(Share.of(spec.critic, blocks))
        critic_phases = add_network(spec.critic, shares[-1], rows, ("actions",), ("actions",), False)
        pulled_back = flow_phases
        if spec.posterior is not None:
            beside = shares[0].end
            share = Share.of(spec.posterior, blocks)
            if beside + share.end <= blocks:  # its forward pass runs while the flow's does
                share = Share(beside, share.teams, share.team_blocks)
            shares.append(share)
            pulled_back = add_network(spec.posterior, share, rows, ("xbar", "noisy_actions"), ("noisy_actions",), True)
            output = words.plane("posterior output", rows, action_dim)
            forward = pulled_back.forward(
                "posterior_input", 2 * action_dim, "numbers", output, **add_once("posterior", pulled_back)
            )
            output_to_all = to_all(forward, "posterior_output", output)
            for phase in forward:
                phase.steered_only = 1
            step += forward
            num_flow = len(step) + 1
            velocity_to_all += output_to_all
        step += velocity_to_all
        step += critic_phases.forward("estimate", action_dim, None, -1, **add_once("critic", critic_phases))
        step += critic_phases.backward("received", action_dim, "numbers", args.critic_vjp, critic_phases.top_delta)
        weigh = Phase(kind=PHASE_KINDS.index("weigh"), result=RESULTS.index("own"), tiles=1, weight=-1, team_blocks=1)
        step.append(weigh)
        if spec.posterior is not None or pulls_flow:
            vjp = words.plane("estimate vjp", rows, action_dim)
            backward = pulled_back.backward("cotangent", action_dim, "numbers", vjp, None)
            pulled_to_all = to_all(backward, "estimate_vjp", vjp)
            if spec.posterior is not None:  # the blocks of the product that takes the gradient
                for name in ("result", "tiles", "first_block", "teams", "team_blocks"):
                    setattr(weigh, name, getattr(backward[0], name))
            step += [*backward, *pulled_to_all]
    else:
        step += velocity_to_all
    args.num_flow_blocks = shares[0].end
    steps = [[1 - step.t, step.dt, step.weight] for step in spec.schedule]
    schedule = torch.tensor(steps, dtype=torch.float32, device="cpu")
    mask = None
    if steering.steered_dims is not None:
        mask = torch.zeros(action_dim, dtype=torch.uint8, device="cpu")
        mask[list(steering.steered_dims)] = 1
    program = Program(
        layouts, memory, once + step, args, weight_bytes, 0, layouts[-1].end, tables, schedule, mask,
        bounds=torch.tensor(spec.box, dtype=torch.float32, device="cpu"), num_steered=len(spec.steered_steps),
    )  # fmt: skip
    return _finish(program, len(once), num_flow, shares)


def plan_network(
    spec: NetworkSpec,
    present: tuple[Presence, ...],
    batch: int,
    weight_bytes: int,
    blocks: int,
    *,
    differentiable: bool,
) -> Program:
    """The program of one forward pass of "columns" [B, in], or with the pullback of "cotangent" [E, B, out]."""
    inputs = spec.input_order
    layout = NetworkLayout(spec, present, 0, weight_bytes, inputs, inputs, (), keeps_output_transposed=True)
    memory = Memory()
    share = Share.of(spec, blocks)
    phases = NetworkPhases(layout, memory, share, batch, differentiable=differentiable)
    width = spec.input_dim if differentiable else spec.output_dim
    output = memory.kept.plane("output", spec.num_members, batch, width)
    program_phases = phases.forward(
        "input", spec.input_dim, "output", output, input=INPUTS.index("columns"), source=0, bias=layout.bias[0]
    )
    if differentiable:
        cotangent = {"input": INPUTS.index("cotangent"), "source": 0}
        cotangent["source_member_stride"] = batch * spec.output_dim
        program_phases = program_phases[:-1]
        program_phases += phases.backward("input", spec.input_dim, "output", output, None, **cotangent)
    args = SampleArgs()
    args.steering = steering_params(Steering())
    size = spec.num_members * batch * width
    program = Program([layout], memory, program_phases, args, weight_bytes, 0, layout.end)
    program.output = Region("output", output, size)
    return _finish(program, 0, len(program_phases), [share])
