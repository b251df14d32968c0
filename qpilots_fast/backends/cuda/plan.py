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


class _CallPlan:
    """The phases of a whole call, network after network.

    Args:
        spec: of the sampler. present: of the networks that take part.
        batch: rows of the call. weight_bytes: of an operand. blocks: at most so many.
    """

    def __init__(
        self, spec: SamplerSpec, present: tuple[tuple[Presence, ...], ...], batch: int, weight_bytes: int, blocks: int
    ) -> None:
        self.spec, self._present, self._batch = spec, present, batch
        self._weight_bytes, self._blocks = weight_bytes, blocks
        self.action_dim = spec.flow.action_dim
        self.layouts: list[NetworkLayout] = []
        self.memory = Memory()
        self.args = SampleArgs(batch=batch, action_dim=self.action_dim, num_steps=spec.num_steps)
        self.args.steering = steering_params(spec.steering)
        self.args.state = self.memory.words.plane("state", batch, self.action_dim)
        self.once: list[Phase] = []
        self.step: list[Phase] = []
        self.tables: dict[str, Tensor] = {}
        self.shares = [Share.of(spec.flow, blocks)]
        pulled = ("noisy_actions",) if spec.pulls_flow else ()
        self._flow = self._network(spec.flow, batch, ("noisy_actions",), pulled, spec.pulls_flow)
        velocity = self.memory.words.plane("velocity", batch, self.action_dim)
        addends = self._addends("flow", self._flow)
        self.step += self._flow.forward("state", self.action_dim, "numbers", velocity, **addends)
        self._outputs_to_all = self._to_all(self.step, "velocity", velocity)
        self.num_flow = len(self.step) + 1
        self.args.num_flow_blocks = self.shares[0].end
        if spec.critic is None:
            self.step += self._outputs_to_all
        else:
            self._steer(spec.critic)

    def _network(
        self, network: NetworkSpec, rows: int, moving: tuple[str, ...], pulled: tuple[str, ...], back: bool
    ) -> NetworkPhases:
        """On the blocks that were shared out last."""
        times = _time_blocks(network)
        layout = NetworkLayout(
            network, self._present[len(self.layouts)], self.layouts[-1].end if self.layouts else 0,
            self._weight_bytes, moving, pulled, (("obs",), times) if times else (("obs",),),
            keeps_output_transposed=back,
        )  # fmt: skip
        self.layouts.append(layout)
        return NetworkPhases(layout, self.memory, self.shares[-1], rows, differentiable=bool(pulled))

    def _addends(self, name: str, phases: NetworkPhases) -> dict[str, int]:
        """Queues the products of a network's unchanging columns; returns the first layer's addends."""
        phase, obs_plane = phases.once(0, phases.spec.obs_dim, self._batch, "obs", with_bias=True)
        self.once.append(phase)
        fields = {"row_addend": obs_plane, "rows_per_addend": phases.rows // self._batch}
        if len(phases.layout.once) > 1:
            times = f"{name}_times"
            self.tables[times] = _time_table(phases.spec, self.spec.times)
            width = self.tables[times].shape[1]
            phase, fields["step_addend"] = phases.once(1, width, self.spec.num_steps, times, with_bias=False)
            self.once.append(phase)
        return fields

    def _to_all(self, phases: list[Phase], name: str, plane: int) -> list[Phase]:
        """How the numbers that the last of these products makes come to every block; takes it away where each does."""
        product = phases[-1]
        if product.rows > _OWN_ROWS:
            collect = Phase(
                kind=PHASE_KINDS.index("collect"), input=COLLECTED.index(name), rows=product.rows,
                out_dim=self.action_dim, source=plane, weight=-1, team_blocks=1,
            )  # fmt: skip
            return [collect]
        product.result, product.input = RESULTS.index("own"), COLLECTED.index(name)
        product.teams = product.team_blocks = 1
        return [phases.pop()]

    def _map(self, posterior: NetworkSpec, rows: int) -> NetworkPhases:
        """The map's forward pass, which runs while the flow's does where there are blocks enough."""
        beside = self.shares[0].end
        share = Share.of(posterior, self._blocks)
        if beside + share.end <= self._blocks:
            share = Share(beside, share.teams, share.team_blocks)
        self.shares.append(share)
        phases = self._network(posterior, rows, ("xbar", "noisy_actions"), ("noisy_actions",), True)
        output = self.memory.words.plane("posterior output", rows, self.action_dim)
        addends = self._addends("posterior", phases)
        forward = phases.forward("posterior_input", 2 * self.action_dim, "numbers", output, **addends)
        output_to_all = self._to_all(forward, "posterior_output", output)
        for phase in forward:
            phase.steered_only = 1
        self.step += forward
        self.num_flow = len(self.step) + 1
        self._outputs_to_all += output_to_all
        return phases

    def _steer(self, critic: NetworkSpec) -> None:
        """The critics, and their gradient pulled back to the state."""
        args, words, action_dim = self.args, self.memory.words, self.action_dim
        posterior, rows = self.spec.posterior, self._batch * self.spec.num_draws
        args.num_members = critic.num_members
        args.q_values = words.plane("q_values", args.num_members, rows)
        args.critic_vjp = words.plane("critic vjp", args.num_members, rows, action_dim)
        self.shares.append(Share.of(critic, self._blocks))
        critics = self._network(critic, rows, ("actions",), ("actions",), False)
        pulled_back = self._flow if posterior is None else self._map(posterior, rows)
        self.step += self._outputs_to_all
        self.step += critics.forward("estimate", action_dim, None, -1, **self._addends("critic", critics))
        self.step += critics.backward("received", action_dim, "numbers", args.critic_vjp, critics.top_delta)
        weigh = Phase(kind=PHASE_KINDS.index("weigh"), result=RESULTS.index("own"), tiles=1, weight=-1, team_blocks=1)
        self.step.append(weigh)
        if posterior is None and not self.spec.pulls_flow:
            return
        vjp = words.plane("estimate vjp", rows, action_dim)
        backward = pulled_back.backward("cotangent", action_dim, "numbers", vjp, None)
        pulled_to_all = self._to_all(backward, "estimate_vjp", vjp)
        if posterior is not None:  # the blocks of the product that takes the gradient
            for name in ("result", "tiles", "first_block", "teams", "team_blocks"):
                setattr(weigh, name, getattr(backward[0], name))
        self.step += [*backward, *pulled_to_all]


def plan_sample(
    spec: SamplerSpec, present: tuple[tuple[Presence, ...], ...], batch: int, weight_bytes: int, blocks: int
) -> Program:
    """The program of a whole sampling call on at most `blocks` blocks; present: of the networks that take part."""
    call = _CallPlan(spec, present, batch, weight_bytes, blocks)
    steps = [[1 - step.t, step.dt, step.weight] for step in spec.schedule]
    mask = None
    if spec.steering.steered_dims is not None:
        mask = torch.zeros(spec.flow.action_dim, dtype=torch.uint8, device="cpu")
        mask[list(spec.steering.steered_dims)] = 1
    program = Program(
        call.layouts, call.memory, call.once + call.step, call.args, weight_bytes, 0, call.layouts[-1].end, call.tables,
        torch.tensor(steps, dtype=torch.float32, device="cpu"), mask,
        bounds=torch.tensor(spec.box, dtype=torch.float32, device="cpu"), num_steered=len(spec.steered_steps),
    )  # fmt: skip
    return _finish(program, len(call.once), call.num_flow, call.shares)


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
