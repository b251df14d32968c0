"""Where each matrix lies in the packed weights of the CUDA kernels, and the copies that fill them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...spec import NetworkSpec
from ..base import BoundNetwork
from ..fold import folds
from .structs import ELEMENT_TYPES, TILE, FoldItem, PackItem, Parameters

_ELEMENT_TYPES = {getattr(torch, name): index for index, name in enumerate(ELEMENT_TYPES)}
_WEIGHT_ALIGNMENT = 128  # bytes
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}  # of a packed weight, by precision


@dataclass(frozen=True)
class Region:
    """A named stretch of the packed weights (bytes) or of the workspace (floats)."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class _Entry:
    """What fills one region of a member: parameter `field` of layer `layer`, its columns, perhaps transposed."""

    region: Region
    layer: int
    field: str
    columns: tuple[slice, ...]
    transposed: bool
    rows: int  # with padding
    stride: int  # elements; vectors: their length
    is_vector: bool
    scaled: bool = False  # by the gain of the norm below, which is folded


@dataclass(frozen=True)
class _Fold:
    """What a folded norm leaves of the weight of `layer`, above it."""

    layer: int
    sums: Region
    bias: Region


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


def full_presence(spec: NetworkSpec) -> tuple[Presence, ...]:
    """Every optional parameter, for counts that need no parameters."""
    norms = (*(norm is not None for norm in spec.layer_norm), False)
    return tuple(Presence(True, norm, norm) for norm in norms)


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
        self.spec, self.present, self.base, self.weight_bytes = spec, present, base, weight_bytes
        self.entries: list[_Entry] = []
        self._size = 0
        last = len(spec.layer_dims) - 1
        self.forward: list[int] = []
        self.transposed: dict[int, int] = {}
        self.bias = [-1] * (last + 1)
        self.gamma, self.beta = [-1] * last, [-1] * last
        self.folded = tuple(self._folds(layer) for layer in range(last))
        self.fold_sums = [-1] * (last + 1)
        self._folds_of_weights: list[_Fold] = []
        first_columns = tuple(spec.block_slices[block] for block in moving)
        for layer, (fan_in, fan_out) in enumerate(spec.layer_dims):
            columns = first_columns if layer == 0 else (slice(0, fan_in),)
            self.forward.append(self._matrix(layer, columns, fan_out, transposed=False))
            if pulled and (layer < last or keeps_output_transposed):
                back = tuple(spec.block_slices[block] for block in pulled) if layer == 0 else (slice(0, fan_in),)
                self.transposed[layer] = self._matrix(layer, back, fan_out, transposed=True)
            if layer > 0 and self.folded[layer - 1]:
                name = f"{spec.kind} layer {layer}"
                fold = _Fold(
                    layer, self._reserve(f"{name} folded sums", fan_out * 4),
                    self._reserve(f"{name} folded bias", fan_out * 4),
                )  # fmt: skip
                self._folds_of_weights.append(fold)
                self.fold_sums[layer], self.bias[layer] = base + fold.sums.start, base + fold.bias.start
            elif present[layer].bias:
                self.bias[layer] = self._vector(layer, "bias", fan_out)
            if layer < last and present[layer].norm_weight and not self.folded[layer]:
                self.gamma[layer] = self._vector(layer, "norm_weight", fan_out)
            if layer < last and present[layer].norm_bias and not self.folded[layer]:
                self.beta[layer] = self._vector(layer, "norm_bias", fan_out)
        self.once = [
            self._matrix(0, tuple(spec.block_slices[block] for block in group), spec.layer_dims[0][1], transposed=False)
            for group in once
        ]
        self.member_bytes = round_up(self._size, _WEIGHT_ALIGNMENT)
        self.end = base + self.member_bytes * spec.num_members

    def _folds(self, layer: int) -> bool:
        """Not below the output; nor where some of the blocks that own neurons have none of the next layer's."""
        widths = self.spec.hidden_dims
        above = widths[layer + 1] if layer + 1 < len(widths) else 0
        return folds(self.spec, layer) and -(-above // TILE) >= -(-widths[layer] // TILE)

    def stride(self, columns: int) -> int:
        """Row stride of a matrix: its columns padded to whole tiles."""
        return round_up(columns, TILE)

    def _reserve(self, name: str, size: int) -> Region:
        region = Region(name, self._size, size)
        self._size = round_up(self._size + size, _WEIGHT_ALIGNMENT)
        return region

    def _matrix(self, layer: int, columns: tuple[slice, ...], fan_out: int, *, transposed: bool) -> int:
        width = sum(c.stop - c.start for c in columns)
        rows, stride = (width, self.stride(fan_out)) if transposed else (fan_out, self.stride(width))
        rows = round_up(rows, TILE)
        name = f"{self.spec.kind} layer {layer} weight" + (" transposed" if transposed else "")
        region = self._reserve(name, rows * stride * self.weight_bytes)
        scaled = layer > 0 and self.folded[layer - 1]
        self.entries.append(_Entry(region, layer, "weight", columns, transposed, rows, stride, False, scaled))
        return self.base + region.start

    def _vector(self, layer: int, name: str, size: int) -> int:
        region = self._reserve(f"{self.spec.kind} layer {layer} {name}", size * 4)
        self.entries.append(_Entry(region, layer, name, (), False, 1, size, is_vector=True))
        return self.base + region.start

    def regions(self) -> Iterator[Region]:
        """Every region of every member, from the start of the packed weights."""
        for member in range(self.spec.num_members):
            start = self.base + member * self.member_bytes
            folds = (region for fold in self._folds_of_weights for region in (fold.sums, fold.bias))
            for region in (*(entry.region for entry in self.entries), *folds):
                yield Region(f"{region.name} of member {member}", start + region.start, region.size)

    def pack_items(self, network: BoundNetwork) -> Iterator[PackItem]:
        """One item for each copy; first_tile is left to the caller."""
        for entry in self.entries:
            members = getattr(network.layers[entry.layer], entry.field)
            for member, tensor in enumerate(members):
                target = self.base + member * self.member_bytes + entry.region.start
                scale = _parameters(network.layers[entry.layer - 1].norm_weight if entry.scaled else None, member)
                for item in self._items_of(entry, tensor, target):
                    item.scale, item.scales_rows = scale, entry.transposed
                    yield item

    def fold_items(self, network: BoundNetwork) -> Iterator[FoldItem]:
        """One item for each folded norm and member; first_group is left to the caller."""
        for fold in self._folds_of_weights:
            layer, below = network.layers[fold.layer], network.layers[fold.layer - 1]
            for member, weight in enumerate(layer.weight):
                start = self.base + member * self.member_bytes
                yield FoldItem(
                    source=weight.data_ptr(), row_stride=weight.stride(0), column_stride=weight.stride(1),
                    gamma=_parameters(below.norm_weight, member), beta=_parameters(below.norm_bias, member),
                    bias=_parameters(layer.bias, member), sums_target=start + fold.sums.start,
                    bias_target=start + fold.bias.start, rows=weight.shape[0], columns=weight.shape[1],
                    source_type=_ELEMENT_TYPES[weight.dtype], operand_type=1 if self.weight_bytes == 2 else 0,
                )  # fmt: skip

    def _items_of(self, entry: _Entry, tensor: Tensor, target: int) -> Iterator[PackItem]:
        source_type, size = _ELEMENT_TYPES[tensor.dtype], tensor.element_size()
        if entry.is_vector:
            yield PackItem(
                source=tensor.data_ptr(), column_stride=tensor.stride(0), target=target, rows=1, columns=entry.stride,
                target_rows=1, target_columns=entry.stride, target_stride=entry.stride, source_type=source_type,
                target_type=0,
            )  # fmt: skip
            return
        out_stride, in_stride = tensor.stride()
        done = 0
        for index, columns in enumerate(entry.columns):
            width, is_last = columns.stop - columns.start, index == len(entry.columns) - 1
            item = PackItem(
                source=tensor.data_ptr() + columns.start * in_stride * size,
                target_stride=entry.stride,
                source_type=source_type,
                target_type=1 if self.weight_bytes == 2 else 0,
            )
            if entry.transposed:
                item.rows, item.columns, item.target_columns = width, tensor.shape[0], entry.stride
                item.target_rows = entry.rows - done if is_last else width
                item.row_stride, item.column_stride = in_stride, out_stride
                item.target = target + done * entry.stride * self.weight_bytes
            else:
                item.rows, item.columns, item.target_rows = tensor.shape[0], width, entry.rows
                item.target_columns = entry.stride - done if is_last else width
                item.row_stride, item.column_stride = out_stride, in_stride
                item.target = target + done * self.weight_bytes
            done += width
            yield item


def _parameters(vectors: tuple[Tensor, ...] | None, member: int) -> Parameters:
    if vectors is None:
        return Parameters()
    vector = vectors[member]
    return Parameters(vector.data_ptr(), vector.stride(0), _ELEMENT_TYPES[vector.dtype])


def pack_table(items: list[PackItem]) -> tuple[bytes, int]:
    """The items as bytes, each with its first tile of 32 x 32 elements, and the number of tiles."""
    tiles = 0
    for item in items:
        item.first_tile = tiles
        tiles += -(-item.target_rows // 32) * -(-item.target_columns // 32)
    return b"".join(bytes(item) for item in items), tiles


def fold_table(items: list[FoldItem]) -> tuple[bytes, int]:
    """The items as bytes, each with its first group of 8 rows, and the number of groups."""
    groups = 0
    for item in items:
        item.first_group = groups
        groups += -(-item.rows // 8)
    return b"".join(bytes(item) for item in items), groups


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
