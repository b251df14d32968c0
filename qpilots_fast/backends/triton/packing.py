"""Where every parameter sits in the packed buffers, and the table that one kernel launch fills them from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ...spec import NetworkSpec, SamplerSpec
from ..base import BoundNetwork
from ..captured import refuse_while_capturing
from .launch_table import Tile
from .launcher import launch

OPERAND_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_PLACEMENTS = {None: 0, "pre": 1, "post": 2}
_MOVING = {"flow": ("noisy_actions",), "critic": ("actions",), "meta_flow_map": ("noisy_actions", "xbar")}
PACK_TILE = 32  # rows and columns that one program of the pack kernel copies


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def padded_width(dim: int) -> int:
    """The power of two, at least 16, that a tile of dim columns needs."""
    return max(16, 1 << (dim - 1).bit_length())


@dataclass(frozen=True)
class NetworkLayout:
    """The packed form of one network (see mlp.py for the order of the blocks).

    Args:
        spec: the network.
        tile: of the kernel that runs it.
        times: flow times whose columns are folded into the first bias, one bias row each; empty to keep the input
            columns as they are, all of them (`forward` and `vjp` of a single network).
    """

    spec: NetworkSpec
    tile: Tile
    times: tuple[float, ...] = ()
    folded: bool = True

    @property
    def columns(self) -> tuple[tuple[str, int], ...]:
        """(block, first packed column) of the inputs that are columns of h."""
        if not self.folded:
            return tuple((block, part.start) for block, part in self.spec.block_slices.items())
        start, places = self.first_action_column, [("obs", 0)]
        for block in _MOVING[self.spec.kind]:
            places.append((block, start))
            start += self.action_pad
        return tuple(places)

    @property
    def first_action_column(self) -> int:
        return round_up(self.spec.obs_dim, 16)

    @property
    def action_pad(self) -> int:
        return padded_width(self.spec.action_dim)

    @property
    def out_pad(self) -> int:
        return padded_width(self.spec.output_dim)

    @property
    def out_rows(self) -> int:
        """Rows of the last weight; the cotangent's product runs over them in steps of block_k."""
        if self.folded and self.spec.kind == "critic":
            return self.out_pad
        return max(self.out_pad, self.tile.block_k)

    @cached_property
    def input_pad(self) -> int:
        """K0: padded inputs."""
        width = self.spec.input_dim
        if self.folded:
            width = self.first_action_column + self.action_pad * len(_MOVING[self.spec.kind])
        return round_up(width, self.tile.block_k)

    @cached_property
    def hidden_pad(self) -> int:
        return round_up(max(self.spec.hidden_dims), max(self.tile.block_n, self.tile.block_k))

    @property
    def leading_dim(self) -> int:
        return max(self.input_pad, self.hidden_pad)

    @property
    def depth(self) -> int:
        return len(self.spec.hidden_dims)

    @property
    def h_width(self) -> int:
        """Columns of the scratch h that this network needs."""
        return max(self.input_pad, self.hidden_pad, self.out_rows)

    @property
    def z_size(self) -> int:
        """Elements of the scratch z per program."""
        return (self.depth + 1) * self.tile.block_b * self.hidden_pad

    @property
    def stat_size(self) -> int:
        return 2 * self.depth * self.tile.block_b

    @property
    def norm(self) -> str:
        placements = set(self.spec.layer_norm)
        if placements == {None}:
            return "none"
        return next(iter(placements)) or "none" if len(placements) == 1 else "mixed"

    @property
    def member_weights(self) -> int:
        return (self.depth * self.hidden_pad + self.out_rows) * self.leading_dim

    @property
    def member_vectors(self) -> int:
        return self.depth * 3 * self.hidden_pad + self.out_rows

    @property
    def num_weights(self) -> int:
        return self.spec.num_members * self.member_weights

    @property
    def num_vectors(self) -> int:
        return round_up(self.spec.num_members * self.member_vectors, 16) + len(self.times) * self.hidden_pad

    @property
    def time_bias_start(self) -> int:
        return round_up(self.spec.num_members * self.member_vectors, 16)

    def layer_table(self) -> list[list[int]]:
        """[L + 1, 4]: true width, norm placement, depths of the forward and backward products (see mlp.py)."""
        padded = [round_up(w, max(self.tile.block_n, self.tile.block_k)) for w in self.spec.hidden_dims]
        last = 0 if self.folded and self.spec.kind == "critic" else self.out_rows
        placements = [_PLACEMENTS[n] for n in self.spec.layer_norm]
        rows = zip(self.spec.hidden_dims, placements, [self.input_pad, *padded], [*padded[1:], last])
        return [*map(list, rows), [self.spec.output_dim, 0, padded[-1], 0]]

    def time_columns(self) -> list[int]:
        parts = [self.spec.block_slices[block] for block in self.spec.time_rows(())]
        return [column for part in parts for column in range(part.start, part.stop)]

    def time_features(self) -> Tensor:
        """[len(times), columns] float32, computed in float64."""
        return torch.cat(list(self.spec.time_rows(self.times).values()), -1).to(torch.float32)


@dataclass
class PackedNetwork:
    """Views of the packed buffers that belong to one network."""

    layout: NetworkLayout
    weights: Tensor
    vectors: Tensor
    time_bias: Tensor
    layers: Tensor  # [L + 1, 4] int32


@dataclass
class PackTable:
    """What one launch of the pack kernel needs; rebuilt when a parameter's storage moves."""

    addresses: tuple[int, ...]
    groups: list[tuple[torch.dtype, Tensor, Tensor]] = field(default_factory=list)  # dtype, items, blocks
    keep: list[Tensor] = field(default_factory=list)  # tensors whose addresses the items hold


class PackedBuffers:
    """The weights of several networks in one buffer of operands and one of float32 vectors."""

    def __init__(self, layouts: Sequence[NetworkLayout], precision: str, device: torch.device) -> None:
        self.layouts = tuple(layouts)
        self.weights = torch.zeros(sum(n.num_weights for n in layouts), dtype=OPERAND_DTYPES[precision], device=device)
        sizes = [round_up(n.num_vectors, 16) for n in layouts]
        self.vectors = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.networks: list[PackedNetwork] = []
        self._table: PackTable | None = None
        w, vec = 0, 0
        for layout, size in zip(self.layouts, sizes):
            vectors = self.vectors[vec : vec + size]
            layers = torch.tensor(layout.layer_table(), dtype=torch.int32, device=device)
            weights = self.weights[w : w + layout.num_weights]
            self.networks.append(PackedNetwork(layout, weights, vectors, vectors[layout.time_bias_start :], layers))
            w += layout.num_weights
            vec += size
            self._set_unit_gains(layout, vectors)

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + self.vectors.nbytes

    @staticmethod
    def _set_unit_gains(layout: NetworkLayout, vectors: Tensor) -> None:
        """LayerNorm weights are 1 where there are none, 0 in the padding."""
        for member in range(layout.spec.num_members):
            for layer, width in enumerate(layout.spec.hidden_dims):
                start = member * layout.member_vectors + (layer * 3 + 1) * layout.hidden_pad
                vectors[start : start + width] = 1.0

    def pack(self, bound: Sequence[BoundNetwork]) -> None:
        """Copies the current parameters in: one launch per parameter dtype, no allocation once the table stands."""
        addresses = parameter_addresses(bound)
        if self._table is None or self._table.addresses != addresses:
            self._table = self._build_table(bound, addresses)
        for dtype, items, blocks in self._table.groups:
            launch(
                "pack", (len(blocks),), item_ptr=items, block_ptr=blocks, weights_ptr=self.weights,
                vectors_ptr=self.vectors, SOURCE=dtype, **pack_options(),
            )  # fmt: skip

    def _build_table(self, bound: Sequence[BoundNetwork], addresses: tuple[int, ...]) -> PackTable:
        device = self.weights.device
        refuse_while_capturing(device, "a parameter's storage moved since the last call")
        table = PackTable(addresses)
        by_dtype: dict[torch.dtype, list[list[int]]] = {}
        w, vec = 0, 0
        for network, layout in zip(bound, self.layouts):
            for dtype, item in _items(network, layout, w, vec, table.keep, device):
                by_dtype.setdefault(dtype, []).append(item)
            w += layout.num_weights
            vec += round_up(layout.num_vectors, 16)
        for dtype, items in by_dtype.items():
            blocks = [
                [i, *start] for i, item in enumerate(items) for start in _tiles(columns=item[3], elements=item[4])
            ]
            tensors = (torch.tensor(v, dtype=torch.int64, device="cpu").to(device) for v in (items, blocks))
            table.groups.append((dtype, *tensors))  # type: ignore[arg-type]
        return table


def pack_options() -> dict[str, int]:
    """Tile and compile options of the pack kernel, as launch arguments."""
    return {"ROWS": PACK_TILE, "COLUMNS": PACK_TILE, "num_warps": 4, "num_stages": 1}


def _tiles(columns: int, elements: int) -> Iterator[tuple[int, int]]:
    """First row and column of every tile of a matrix whose last row may be short."""
    return product(range(0, -(-elements // columns), PACK_TILE), range(0, columns, PACK_TILE))


def parameter_addresses(bound: Sequence[BoundNetwork]) -> tuple[int, ...]:
    """Where the storage of every parameter starts; a change means that the table of items is stale."""
    return tuple(parameter.data_ptr() for network in bound for parameter in network.parameters())


def _items(
    network: BoundNetwork, layout: NetworkLayout, w: int, vec: int, keep: list[Tensor], device: torch.device
) -> list[tuple[torch.dtype, list[int]]]:
    """Rows of the pack kernel's table for one network whose buffers start at w and vec."""
    spec, items = layout.spec, []

    def add(p: Tensor, target: int, rows: int, columns: int, strides: tuple[int, int], ld: int, kind: int, *more: int):
        row = [p.data_ptr(), *strides, columns, rows * columns, target, ld, kind, *(more or (0, 0, 0, 0))]
        items.append((p.dtype, row))

    def add_vector(p: Tensor, target: int) -> None:
        """In rows of a tile's width: as one long row it would leave most of each tile idle."""
        (size,), (stride,) = p.shape, p.stride()
        row = [p.data_ptr(), PACK_TILE * stride, stride, PACK_TILE, size, target, PACK_TILE, 1, 0, 0, 0, 0]
        items.append((p.dtype, row))

    for member in range(spec.num_members):
        for index, (layer, (fan_in, fan_out)) in enumerate(zip(network.layers, spec.layer_dims)):
            weight = layer.weight[member]
            target = w + member * layout.member_weights + index * layout.hidden_pad * layout.leading_dim
            strides = (weight.stride(0), weight.stride(1))
            if index == 0:
                for block, column in layout.columns:
                    part = weight[:, spec.block_slices[block]]
                    add(part, target + column, fan_out, part.shape[1], strides, layout.leading_dim, 0)
            else:
                add(weight, target, fan_out, fan_in, strides, layout.leading_dim, 0)
            target = vec + member * layout.member_vectors + index * 3 * layout.hidden_pad
            vectors = (layer.bias, layer.norm_weight, layer.norm_bias)
            for offset, values in enumerate(v[member] if v else None for v in vectors):
                if values is not None:
                    add_vector(values, target + offset * layout.hidden_pad)
    if layout.times:
        first = network.layers[0]
        weight, bias = first.weight[0], first.bias[0] if first.bias else None
        if bias is not None and (bias.dtype != weight.dtype or bias.stride(0) != 1):
            raise BackendUnavailable("the first layer's bias must be contiguous and of its weight's dtype.")
        features = layout.time_features().to(device)
        columns = torch.tensor(layout.time_columns(), dtype=torch.int64, device=device)
        keep += [features, columns]
        more = (0 if bias is None else bias.data_ptr(), features.data_ptr(), columns.data_ptr(), features.shape[1])
        add(
            weight, vec + layout.time_bias_start, len(layout.times), spec.hidden_dims[0],
            (weight.stride(0), weight.stride(1)), layout.hidden_pad, 2, *more,
        )  # fmt: skip
    return items


def sampler_layouts(spec: SamplerSpec, critic_tile: Tile, step_tile: Tile) -> list[NetworkLayout]:
    """Layouts of the flow, then (where the sampler asks them) the critic and the posterior."""
    layouts = [NetworkLayout(spec.flow, step_tile, spec.flow_times)]
    if spec.critic is not None:
        layouts.append(NetworkLayout(spec.critic, critic_tile))
    if spec.posterior is not None:
        layouts.append(NetworkLayout(spec.posterior, step_tile, spec.times))
    return layouts


def launch_constants(layout: NetworkLayout, prefix: str = "") -> dict[str, Any]:
    """The constexpr arguments that describe a packed network."""
    return {
        f"{prefix}L": layout.depth,
        f"{prefix}K0": layout.input_pad,
        f"{prefix}H" if prefix else "H_PAD": layout.hidden_pad,
        f"{prefix}LD": layout.leading_dim,
        f"{prefix}ACT": layout.spec.activation,
        f"{prefix}NORM": layout.norm,
    }
