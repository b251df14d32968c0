"""The packed form of a network: where each of its weights and vectors sits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...row_ops import Chain
from ...spec import POSTERIOR_DRAW, NetworkSpec, SamplerSpec
from ..fold import folds
from .chain_ops import is_activation
from .launch_table import LaunchTable, Tile

_MOVING = {"flow": ("noisy_actions",), "critic": ("actions",), "meta_flow_map": ("noisy_actions", "xbar")}


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def padded_width(dim: int) -> int:
    """The power of two, at least 16, that a tile of dim columns needs."""
    return max(16, 1 << (dim - 1).bit_length())


@dataclass(frozen=True)
class NetworkLayout:
    """The packed form of one network: weights and vectors of each member, layer by layer (see layers.py).

    Args:
        spec: the network.
        tile: of its hidden layers. ends: of its outputs and input gradients.
        times: flow times whose columns are folded into the first bias, one bias row each; empty to keep the input
            columns as they are, all of them (`forward` and `vjp` of a single network).
        split: whether the actions' columns stand apart from the obs' and time's are left out.
    """

    spec: NetworkSpec
    tile: Tile
    ends: Tile
    times: tuple[float, ...] = ()
    split: bool = True

    @property
    def columns(self) -> tuple[tuple[str, int], ...]:
        """(block, first packed column) of the inputs that have columns."""
        if not self.split:
            return tuple((block, part.start) for block, part in self.spec.block_slices.items())
        start, places = self.first_action_column, [("obs", 0)]
        for block in _MOVING[self.spec.kind]:
            places.append((block, start))
            start += self.action_pad
        return tuple(places)

    @property
    def action_blocks(self) -> int:
        """Blocks of action columns beside the observation's."""
        return len(_MOVING[self.spec.kind]) if self.split else 0

    @property
    def first_action_column(self) -> int:
        return round_up(self.spec.block_dim("obs"), self.tile.block_k)

    @property
    def action_pad(self) -> int:
        return padded_width(self.spec.action_dim)

    @property
    def out_pad(self) -> int:
        """Padded outputs: rows of the last weight."""
        return padded_width(self.spec.output_dim)

    @cached_property
    def input_pad(self) -> int:
        """Padded inputs of the first layer."""
        if not self.split:
            return round_up(self.spec.input_dim, self.tile.block_k)
        return self.first_action_column + self.action_pad * self.action_blocks

    def padded(self, width: int) -> int:
        """Columns of a hidden layer that products read."""
        return round_up(width, max(self.tile.block_n, self.tile.block_k))

    @cached_property
    def hidden_pad(self) -> int:
        return round_up(max(self.spec.hidden_dims), max(self.tile.most_columns, self.tile.block_k))

    @property
    def leading_dim(self) -> int:
        return max(self.input_pad, self.hidden_pad)

    @property
    def depth(self) -> int:
        return len(self.spec.hidden_dims)

    def norm(self, layer: int) -> str:
        """ "none", "pre", "post" or "fold" of a hidden layer; "none" of what is no hidden layer."""
        if not 0 <= layer < self.depth:
            return "none"
        return "fold" if folds(self.spec, layer) else self.spec.layer_norm[layer] or "none"

    def chain(self, layer: int) -> Chain | None:
        """What chains.py's kernel does to a hidden layer's rows; None where its product's epilogue does all."""
        chain = self.spec.chains[layer] if self.spec.chains and layer < self.depth else None
        return None if chain is None or is_activation(chain) else chain

    def norm_vectors(self, layer: int) -> list[int]:
        """Which of a hidden layer's vectors are the gains of its norms, each before its shift."""
        chain = self.chain(layer)
        return [2] if chain is None else [2 + 2 * i for i, op in enumerate(chain) if op.is_norm]

    @property
    def member_weights(self) -> int:
        return (self.depth * self.hidden_pad + self.out_pad) * self.leading_dim

    @property
    def member_vectors(self) -> int:
        return round_up(self.vector_start(self.depth) + 2 * self.out_pad, 16)

    @property
    def num_weights(self) -> int:
        return self.spec.num_members * self.member_weights

    @property
    def num_vectors(self) -> int:
        return self.film_start + len(self.times) * self.spec.film_dim

    @property
    def time_bias_start(self) -> int:
        return self.spec.num_members * self.member_vectors

    @property
    def film_start(self) -> int:
        """Of what modulates rows by time, [times, film_dim]."""
        return self.time_bias_start + len(self.times) * self.hidden_pad

    def weight_start(self, layer: int) -> int:
        """Of a layer among a member's weights; the output is layer `depth`."""
        return layer * self.hidden_pad * self.leading_dim

    def vector_start(self, layer: int) -> int:
        """Of a layer's c among a member's vectors."""
        return self.hidden_pad * sum(2 + 2 * max(1, len(self.chain(below) or ())) for below in range(layer))

    def vector_step(self, layer: int) -> int:
        """From one of a layer's vectors to the next."""
        return self.hidden_pad if layer < self.depth else self.out_pad

    def time_columns(self) -> list[int]:
        parts = [self.spec.block_slices[block] for block in self.spec.input_order if block in ("t", *POSTERIOR_DRAW)]
        return [column for part in parts for column in range(part.start, part.stop)]

    def time_features(self) -> Tensor:
        """[len(times), columns] float32, computed in float64; of times that are not the network's own module's."""
        return torch.cat(list(self.spec.time_rows(self.times).values()), -1).to(torch.float32)


def sampler_layouts(spec: SamplerSpec, table: LaunchTable, capability: int) -> dict[str, NetworkLayout]:
    """Layouts of the networks that take part, by name."""
    times = {"flow": spec.flow_times, "critic": (), "posterior": spec.times}
    return {
        name: network_layout(network, spec.precision, table, capability, times=times[name])
        for name, network in spec.networks.items()
    }


def network_layout(
    spec: NetworkSpec, precision: str, table: LaunchTable, capability: int, **settings: Any
) -> NetworkLayout:
    """The layout of one network with the table's tiles; settings: of NetworkLayout."""
    tile, ends = (table.tile(kernel, precision, capability) for kernel in ("layer", "ends"))
    tile = tile.narrowed(max(spec.hidden_dims))
    if "pre" in spec.layer_norm:
        # such a norm is applied as operands are loaded, which takes registers; with a "post" one above, two norms are
        larger = () if "post" in spec.layer_norm else tile.larger
        tile = replace(tile, larger=larger, max_registers=255)
    depth = max(tile.block_n, tile.block_k)  # what a layer's width is padded to
    return NetworkLayout(spec, tile, replace(ends, block_k=min(ends.block_k, depth)), **settings)
