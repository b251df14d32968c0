"""Phases of the persistent CUDA kernel that evaluate one network, who shares them, and where what they send lies."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...activations import ACTIVATIONS
from ...spec import NetworkSpec
from ..params import NORM_PLACEMENTS
from .layout import NetworkLayout, Region, round_up
from .structs import INPUTS, OPERANDS, PHASE_KINDS, RESULTS, TILE, TILE_SUMS, Phase

_ALIGNMENT = 32  # of a plane, in elements
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
