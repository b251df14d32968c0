"""The packed buffers, and the table that one kernel launch fills them from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ...spec import LayerParameters
from ..base import BoundNetwork
from ..captured import refuse_while_capturing
from .launcher import launch
from .layouts import NetworkLayout, round_up
from .own_columns import OwnValues

OPERAND_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PACK_TILE = 32  # rows and columns that one program of the pack kernel copies
FOLD_ROWS = 16  # rows that one program of the fold kernel sums


@dataclass
class PackedNetwork:
    """Views of the packed buffers that belong to one network."""

    layout: NetworkLayout
    weights: Tensor
    vectors: Tensor
    time_bias: Tensor
    film: Tensor


@dataclass
class PackTable:
    """What one launch of the pack kernel needs; rebuilt when a parameter's storage moves."""

    addresses: tuple[int, ...]
    # kernel, dtype, whether it scales, items, blocks; copies first
    groups: list[tuple[str, torch.dtype, bool, Tensor, Tensor]] = field(default_factory=list)
    keep: list[Tensor] = field(default_factory=list)  # tensors whose addresses the items hold
    own: list[OwnValues] = field(default_factory=list)  # of each network


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
            weights = self.weights[w : w + layout.num_weights]
            time_bias, film = vectors[layout.time_bias_start :], vectors[layout.film_start :]
            self.networks.append(PackedNetwork(layout, weights, vectors, time_bias, film))
            w += layout.num_weights
            vec += size
            self._set_constants(layout, vectors)

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + self.vectors.nbytes

    @staticmethod
    def _set_constants(layout: NetworkLayout, vectors: Tensor) -> None:
        """Weights of norms: 1 where there are none, 0 in the padding; the numbers of chains."""
        for layer, width in enumerate(layout.spec.hidden_dims):
            numbers = [number for op in layout.chain(layer) or () for number in (*op.numbers, 0.0, 0.0)[:2]]
            for member in range(layout.spec.num_members):
                own = vectors[member * layout.member_vectors + layout.vector_start(layer) :]
                own[layout.hidden_pad :][: len(numbers)] = torch.tensor(numbers, dtype=torch.float32, device="cpu")
                for gain in layout.norm_vectors(layer):
                    own[gain * layout.hidden_pad :][:width] = 1.0

    def pack(self, bound: Sequence[BoundNetwork]) -> None:
        """Copies the current parameters in; no allocation of ours once the table stands."""
        self.prepare(bound)
        self.launch_pack()

    def prepare(self, bound: Sequence[BoundNetwork]) -> None:
        """What `launch_pack` reads: the table of these parameters, and what networks' own modules make now."""
        addresses = parameter_addresses(bound)
        if self._table is None or self._table.addresses != addresses:
            self._table = self._build_table(bound, addresses)
        self.refresh_own(bound)

    def refresh_own(self, bound: Sequence[BoundNetwork]) -> None:
        """What networks' own modules make now, where the table of `prepare` reads it."""
        assert self._table is not None
        for network, values in zip(bound, self._table.own):
            values.refresh(network)

    def launch_pack(self) -> None:
        """Copies the parameters in that the table tells."""
        assert self._table is not None
        for kernel, dtype, scale, items, blocks in self._table.groups:
            launch(
                kernel, (len(blocks),), item_ptr=items, block_ptr=blocks, weights_ptr=self.weights,
                vectors_ptr=self.vectors, **pack_options(kernel, dtype, scale),
            )  # fmt: skip

    def _build_table(self, bound: Sequence[BoundNetwork], addresses: tuple[int, ...]) -> PackTable:
        device = self.weights.device
        refuse_while_capturing(device, "a parameter's storage moved since the last call")
        table = PackTable(addresses)
        groups: dict[tuple[str, torch.dtype, bool], list[list[int]]] = {}
        w, vec = 0, 0
        for network, layout in zip(bound, self.layouts):
            known = None if network.spec.time_embedding == "module" or not layout.times else layout.time_features()
            values = OwnValues(network, layout.times, known)
            table.own.append(values)
            for kernel, dtype, scale, item in _items(network, layout, w, vec, values, table.keep):
                groups.setdefault((kernel, dtype, scale), []).append(item)
            w += layout.num_weights
            vec += round_up(layout.num_vectors, 16)
        for (kernel, dtype, scale), items in sorted(groups.items(), key=lambda group: group[0][0] == "fold"):
            blocks = [[i, *start] for i, item in enumerate(items) for start in _BLOCKS[kernel](item)]
            tensors = (torch.tensor(v, dtype=torch.int64, device="cpu").to(device) for v in (items, blocks))
            table.groups.append((kernel, dtype, scale, *tensors))  # type: ignore[arg-type]
        return table


def pack_options(kernel: str, dtype: torch.dtype, scale: bool) -> dict[str, Any]:
    """Constexpr arguments and compile options of the kernels "pack" and "fold"."""
    options = {"SOURCE": dtype, "num_warps": 4, "num_stages": 1}
    if kernel == "pack":
        return {**options, "ROWS": PACK_TILE, "COLUMNS": PACK_TILE}
    # ptxas would rather spill than have fewer blocks on a multiprocessor
    return {**options, "SCALE": scale, "ROWS": FOLD_ROWS, "COLUMNS": 64, "maxnreg": 128}


def _tiles(item: list[int]) -> Iterator[tuple[int, ...]]:
    """First row and column of every tile of a matrix whose last row may be short."""
    columns, elements = item[3:5]
    return product(range(0, -(-elements // columns), PACK_TILE), range(0, columns, PACK_TILE))


# where each program of a kernel begins in an item of its table
_BLOCKS: dict[str, Callable[[list[int]], Iterable[tuple[int, ...]]]] = {
    "pack": _tiles,
    "fold": lambda item: ((row,) for row in range(0, item[3], FOLD_ROWS)),
}


def parameter_addresses(bound: Sequence[BoundNetwork]) -> tuple[int, ...]:
    """Where the storage of every parameter starts; a change means that the table of items is stale."""
    return tuple(parameter.data_ptr() for network in bound for parameter in network.parameters())


def _items(
    network: BoundNetwork, layout: NetworkLayout, w: int, vec: int, own_values: OwnValues, keep: list[Tensor]
) -> list[tuple[str, torch.dtype, bool, list[int]]]:
    """(kernel, dtype of the source, whether it scales, row of the kernel's table) of one network whose buffers start at
    w and vec."""
    spec, items, device = layout.spec, [], network.device

    def indices(columns: Sequence[int]) -> Tensor:
        keep.append(torch.tensor(columns, dtype=torch.int64, device="cpu").to(device))
        return keep[-1]

    def add(p: Tensor, target: int, rows: int, columns: int, strides: tuple[int, int], ld: int, kind: int, *more: int):
        row = [p.data_ptr(), *strides, columns, rows * columns, target, ld, kind, *(more or (0, 0, 0, 0))]
        items.append(("pack", p.dtype, False, row))

    def add_vector(p: Tensor, target: int) -> None:
        """In rows of a tile's width: as one long row it would leave most of each tile idle."""
        (size,), (stride,) = p.shape, p.stride()
        row = [p.data_ptr(), PACK_TILE * stride, stride, PACK_TILE, size, target, PACK_TILE, 1, 0, 0, 0, 0]
        items.append(("pack", p.dtype, False, row))

    def add_bias(layer: LayerParameters, member: int, target: int, rows: int, features: Tensor, columns: Tensor):
        """Rows of bias + W[:, columns] features."""
        weight, bias = layer.weight[member], layer.bias[member] if layer.bias else None
        if bias is not None and (bias.dtype != weight.dtype or bias.stride(0) != 1):
            raise BackendUnavailable("the first layer's bias must be contiguous and of its weight's dtype.")
        strides = (weight.stride(0), weight.stride(1))
        more = (0 if bias is None else bias.data_ptr(), features.data_ptr(), columns.data_ptr(), len(columns))
        add(weight, target, rows, spec.hidden_dims[0], strides, layout.hidden_pad, 2, *more)

    mapped = spec.action_columns
    if mapped is not None:
        actions = spec.block_slices["actions"]
        action_places = indices(range(actions.start, actions.stop))
    for member in range(spec.num_members):
        for index, (layer, (fan_in, fan_out)) in enumerate(zip(network.layers, spec.layer_dims)):
            weight = layer.weight[member]
            target = w + member * layout.member_weights + layout.weight_start(index)
            strides = (weight.stride(0), weight.stride(1))
            vectors = vec + member * layout.member_vectors
            own, step = vectors + layout.vector_start(index), layout.vector_step(index)
            if index == 0:
                for block, column in layout.columns:
                    part = weight[:, spec.block_slices[block]]
                    if block == "actions" and mapped is not None and layout.split:
                        for j, dim in enumerate(mapped):
                            factor = own_values.scale[j].data_ptr()
                            place = target + column + dim
                            add(part[:, j : j + 1], place, fan_out, 1, strides, layout.leading_dim, 0, factor, 0, 0, 0)
                    elif part.shape[1]:
                        add(part, target + column, fan_out, part.shape[1], strides, layout.leading_dim, 0)
            elif layout.norm(index - 1) in ("post", "fold"):
                gain = vectors + layout.vector_start(index - 1) + 2 * layout.hidden_pad
                places = (own, own + step, gain, gain + layout.hidden_pad, int(layer.bias is not None))
                row = [weight.data_ptr(), *strides, fan_out, fan_in, target, layout.leading_dim, *places]
                items.append(("fold", weight.dtype, layout.norm(index - 1) == "fold", row))
            else:
                add(weight, target, fan_out, fan_in, strides, layout.leading_dim, 0)
            shifted = index == 0 and mapped is not None and layout.split
            if shifted:
                add_bias(layer, member, own, 1, own_values.shift, action_places)
            bias = None if shifted else layer.bias
            placed = [(0, bias)]
            for gain, norm in zip(layout.norm_vectors(index), layer.norms):
                placed += [(gain, norm.weight), (gain + 1, norm.bias)]
            for offset, values in placed:
                if values is not None:
                    add_vector(values[member], own + offset * step)
    if layout.times:
        start, columns = vec + layout.time_bias_start, indices(layout.time_columns())
        add_bias(network.layers[0], 0, start, len(layout.times), own_values.features, columns)
        if spec.film_dim:
            add_vector(own_values.film.view(-1), vec + layout.film_start)
    return items
