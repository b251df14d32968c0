"""The program of the persistent CUDA kernel: its phases, who shares them, and where what they hand over lies."""

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
from .structs import (
    COLLECTED,
    INPUTS,
    OPERANDS,
    PHASE_KINDS,
    RESULTS,
    TILE,
    TILE_SUMS,
    Phase,
    SampleArgs,
)

_ALIGNMENT = 32  # of a plane, in elements
_GROUP_TILES = 3  # most tiles of neurons at once: kGroupTiles
# Up to so many rows every block computes an output of A numbers a row for itself: reading 8 rows of 512 in all blocks
# takes L2 about 0.4 us, an exchange costs more. Above, the output is shared like any product, and sent.
_OWN_ROWS = 8
_SUMS = ("sums", "vjp_sums", "source_sums", "delta_sums")
_KEPT = ("values", "slopes", "deltas", "linear", "row_addend", "step_addend")
_WEIGHTS = ("weight", "bias", "fold_sums", "gamma", "beta", "top_weight", "top_bias")
_ABSENT = ("source", "target", *_SUMS, *_KEPT, *_WEIGHTS, "first_norm_row", "source_norm_row")  # -1


@dataclass
class Planes:
    """Arrays of one type, one after the other."""

    regions: list[Region] = field(default_factory=list)
    size: int = 0

    def plane(self, name: str, *dims: int) -> int:
        size = 1
        for dim in dims:
            size *= dim
        start = self.size
        self.regions.append(Region(name, start, size))
        self.size = round_up(start + size, _ALIGNMENT)
        return start


@dataclass
class Memory:
    """What a program's phases lay out."""

    kept: Planes = field(default_factory=Planes)  # float32: what blocks keep for themselves, and an output
    words: Planes = field(default_factory=Planes)  # uint64: what they send, one slot of the exchange
    norm_rows: int = 0  # scalars in shared memory


@dataclass(frozen=True)
class Share:
    """The blocks that work on a network: teams of blocks, each with whole members."""

    first_block: int
    teams: int
    team_blocks: int

    @property
    def end(self) -> int:
        return self.first_block + self.teams * self.team_blocks

    @staticmethod
    def of(spec: NetworkSpec, blocks: int, first_block: int = 0) -> Share:
        """As many of `blocks` as can be at work at once."""
        teams = min(spec.num_members, blocks)
        tiles = max(count_tiles(width) for width in spec.hidden_dims)
        return Share(first_block, teams, min(blocks // teams, tiles))


def count_tiles(width: int) -> int:
    return -(-width // TILE)


class NetworkPhases:
    """The phases of one network on `rows` rows, forward and backward.

    Args:
        layout: its packed weights.
        memory: where what its blocks keep and send is added.
        share: the blocks that work on it.
        rows: rows of the moving input.
        differentiable: whether a backward pass follows.
    """

    def __init__(self, layout: NetworkLayout, memory: Memory, share: Share, rows: int, *, differentiable: bool) -> None:
        self.layout, self.rows, self.share = layout, rows, share
        self.spec, self._memory = layout.spec, memory
        spec, members, kept = self.spec, self.spec.num_members, memory.kept
        self.top_delta = -1  # words: d z of the critics' last hidden layer
        self._hidden: list[dict[str, int | float]] = []  # what all phases of a hidden layer need
        for layer, width in enumerate(spec.hidden_dims):
            norm, name = spec.layer_norm[layer], f"{spec.kind} hidden {layer}"
            fields: dict[str, int | float] = {
                "activation": tuple(ACTIVATIONS).index(spec.activation),
                "norm": NORM_PLACEMENTS.index(norm),
                "layer_norm_eps": spec.layer_norm_eps,
                "gamma": layout.gamma[layer],
                "beta": layout.beta[layer],
            }
            folded, above_folded = layout.folded[layer], layer > 0 and layout.folded[layer - 1]
            if folded:
                fields["folded"] = 1
            if norm is not None and (differentiable or not folded):
                fields["values"] = kept.plane(f"{name} values", members, rows, width)
            if differentiable:
                fields["slopes"] = kept.plane(f"{name} slopes", members, rows, width)
            if differentiable and norm is not None:
                fields["first_norm_row"] = memory.norm_rows
                memory.norm_rows += -(-members // share.teams) * rows
                if not folded:
                    fields["deltas"] = kept.plane(f"{name} deltas", members, rows, width)
            if above_folded:
                fields["fold_sums"] = layout.fold_sums[layer]
                if differentiable:
                    fields["linear"] = kept.plane(f"{name} linear", members, rows, width)
                    fields["delta_sums"] = self._sums(f"hidden {layer} delta sums for the norm below", width)
            self._hidden.append(fields)

    def _operands(self, name: str, width: int) -> int:
        """A plane of operands [members][rows][width], as words."""
        words = count_tiles(width) * TILE * self.layout.weight_bytes // 4
        return self._memory.words.plane(f"{self.spec.kind} {name}", self.spec.num_members, self.rows, words)

    def _sums(self, name: str, width: int) -> int:
        name = f"{self.spec.kind} {name}"
        return self._memory.words.plane(name, self.spec.num_members, self.rows, count_tiles(width), TILE_SUMS)

    def _phase(self, kind: str, out_dim: int, **fields: int | float) -> Phase:
        phase = Phase(
            kind=PHASE_KINDS.index(kind),
            members=self.spec.num_members,
            rows=self.rows,
            out_dim=out_dim,
            tiles=count_tiles(out_dim),
            rows_per_addend=1,
            first_block=self.share.first_block,
            teams=self.share.teams,
            team_blocks=self.share.team_blocks,
            member_bytes=self.layout.member_bytes,
        )
        for name in _ABSENT:
            setattr(phase, name, -1)
        for name, value in fields.items():
            setattr(phase, name, value)
        return phase

    def _product(
        self, operand: str, result: str, in_dim: int, out_dim: int, weight: int, **fields: int | float
    ) -> Phase:
        stride = self.layout.stride(in_dim)
        slice_vectors = -(-stride // TILE // 8) * (TILE * self.layout.weight_bytes // 16)  # of 16 bytes, of one warp
        return self._phase(
            "product",
            out_dim,
            operand=OPERANDS.index(operand),
            result=RESULTS.index(result),
            in_dim=in_dim,
            in_stride=stride,
            copy_shift=min(5, (slice_vectors - 1).bit_length()),
            weight=weight,
            **fields,
        )

    def once(self, group: int, width: int, rows: int, name: str, *, with_bias: bool) -> tuple[Phase, int]:
        """The product of a group of unchanging first-layer columns, from the input of this name, and its plane."""
        out_dim = self.spec.hidden_dims[0]
        plane = self._memory.kept.plane(f"{self.spec.kind} columns {group}", self.spec.num_members, rows, out_dim)
        bias = self.layout.bias[0] if with_bias else -1
        phase = self._product(
            "input", "columns", width, out_dim, self.layout.once[group], rows=rows, input=INPUTS.index(name),
            source=0, target=plane, bias=bias,
        )  # fmt: skip
        return phase, plane

    def forward(self, operand: str, in_dim: int, output: str | None, target: int, **first: int) -> list[Phase]:
        """Phases up to the output, whose result and target are given; None: the critics' top, Q and d z included."""
        spec, layout = self.spec, self.layout
        phases: list[Phase] = []
        source: dict[str, int] = dict(first)
        for layer, width in enumerate(spec.hidden_dims):
            at_top = output is None and layer == len(spec.hidden_dims) - 1
            fields = self._hidden[layer]
            name = f"hidden {layer}"
            if at_top:
                fields |= {"top_weight": layout.forward[-1], "top_bias": layout.bias[-1]}
            if layer > 0:
                source["bias"] = layout.bias[layer]
                source["source_norm_row"] = int(self._hidden[layer - 1].get("first_norm_row", -1))
            sent = self._operands(f"{name} delta" if at_top else name, width)
            if at_top:
                self.top_delta = sent
            fan_in = in_dim if layer == 0 else spec.hidden_dims[layer - 1]
            product = self._product(
                operand, "critic_top" if at_top else "hidden", fan_in, width, layout.forward[layer], **fields, **source
            )
            phases.append(product)
            product.target = sent
            if at_top:
                product.vjp_sums = self._sums(f"{name} delta sums", width)
            if at_top and spec.layer_norm[layer] == "post":
                pass  # the sums of its norm and of the derivative travel together
            elif spec.layer_norm[layer] is not None and not layout.folded[layer]:
                product.sums = self._sums(f"{name} sums", width)
                norm = self._phase("norm", width, sums=product.sums, target=sent, at_top=int(at_top), **fields)
                norm.vjp_sums = product.vjp_sums
                phases.append(norm)
            if at_top:
                phases.append(
                    self._phase("norm_vjp", width, vjp_sums=product.vjp_sums, target=sent, at_top=1, **fields)
                )
            operand, source = "received", {"source": sent}
        if output is not None:
            phases.append(
                self._product(
                    operand,
                    output,
                    spec.hidden_dims[-1],
                    spec.output_dim,
                    layout.forward[-1],
                    bias=layout.bias[-1],
                    target=target,
                    **source,
                )
            )
        return phases

    def backward(
        self, operand: str, pulled_dim: int, result: str, target: int, delta: int | None, **cotangent: int
    ) -> list[Phase]:
        """Phases from a cotangent of the output, or from the plane `delta` of d z at the top, to the input columns."""
        spec, layout = self.spec, self.layout
        phases: list[Phase] = []
        source: dict[str, int] = dict(cotangent)
        fan_in = spec.output_dim
        if delta is not None:
            operand, source = "received", {"source": delta}
        for layer in range(len(spec.hidden_dims) - (delta is not None), -1, -1):
            if layer == 0:
                product = self._product(
                    operand, result, spec.hidden_dims[0], pulled_dim, layout.transposed[0], target=target, **source
                )
                phases.append(product)
                break
            fan_in = spec.output_dim if layer == len(spec.hidden_dims) else spec.hidden_dims[layer]
            width, fields, name = spec.hidden_dims[layer - 1], self._hidden[layer - 1], f"hidden {layer - 1} delta"
            sent = self._operands(name, width)
            product = self._product(
                operand, "delta", fan_in, width, layout.transposed[layer], target=sent, **fields, **source
            )
            phases.append(product)
            if layout.folded[layer - 1]:
                product.source_sums = int(self._hidden[layer]["delta_sums"])
            elif spec.layer_norm[layer - 1] is not None:
                product.vjp_sums = self._sums(f"{name} sums", width)
                phases.append(self._phase("norm_vjp", width, vjp_sums=product.vjp_sums, target=sent, **fields))
            operand, source = "received", {"source": sent}
        return phases


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
