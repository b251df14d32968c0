"""Modules whose nn.Linears were seen at work: from the first that the actions reach to the last."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import MOVING_BLOCK
from . import layers
from .calling import UserCall, read_layout
from .modules import Recognition
from .own_columns import OwnRecognition, columns_before
from .proof import batch_size_apart_from, random_blocks
from .proved import check_order, own_columns, proved
from .refusal import FollowsOther, Refused, stopping_at
from .sources import randomise


def _trunk(
    probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, members: int, generator: torch.Generator
) -> tuple[layers.Trace, dict[str, Tensor]]:
    """The calls of Linears that the actions reach, and the inputs of the module's call."""
    named = random_blocks(kind, dims, batch_size_apart_from(members), generator)
    moving = MOVING_BLOCK[kind]
    other = {**named, moving: torch.randn(named[moving].shape, generator=generator, dtype=named[moving].dtype)}
    with torch.no_grad():
        traced = layers.trace(probe, call, list(named.values()))
        return traced.reading(layers.trace(probe, call, list(other.values()))), named


def from_layers(
    probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, traced: layers.Trace, hints: dict[str, Any],
    generator: torch.Generator,
) -> Recognition:  # fmt: skip
    """A module whose nn.Linears were seen at work."""
    seen = {id(p): p for c in traced.calls for layer in (c.linear, *c.norms) for p in layer.parameters()}
    randomise(list(seen.values()), generator)
    traced, named = _trunk(probe, kind, dims, call, 0, generator)
    first = traced.calls[0]
    if first.input.ndim != 2:
        with stopping_at(first):
            raise Refused(
                f"its first Linear that reads the actions reads {list(first.input.shape)}; expected [B, columns]"
            )
    members = len(traced.chains())
    if batch_size_apart_from(members) != len(named["obs"]):
        traced, named = _trunk(probe, kind, dims, call, members, generator)
    try:
        with stopping_at(f"what {traced.calls[0]} reads"):
            columns = layers.read_columns(traced.calls[0].input, named, hints.get("time_embedding"))
        return _from_trunk(probe, kind, dims, call, traced, named, columns, hints, generator)
    except FollowsOther as refusal:
        if hints.get("time_embedding"):
            raise
        weight = traced.calls[0].linear.weight
        columns = own_columns(
            probe, kind, partial(_columns, probe, call, weight), _parameters_of(traced), named, refusal,
            f"what {traced.calls[0]} reads", generator,
        )  # fmt: skip
    return _from_trunk(probe, kind, dims, call, traced, named, columns, hints, generator)


def _columns(probe: nn.Module, call: UserCall, weight: Tensor, blocks: dict[str, Tensor]) -> Tensor:
    return columns_before(weight, probe, call, list(blocks.values()))


def _parameters_of(traced: layers.Trace) -> set[int]:
    return {id(p) for c in traced.calls for layer in (c.linear, *c.norms) for p in layer.parameters()}


def _from_trunk(
    probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, traced: layers.Trace,
    named: dict[str, Tensor], columns: layers.InputColumns, hints: dict[str, Any], generator: torch.Generator,
) -> Recognition:  # fmt: skip
    """The network that starts at the first Linear which the actions reach, proved."""
    spec = layers.read_spec(traced, kind, dims, columns)
    check_order(spec, hints)
    sources, used = layers.read_sources(probe, traced, spec), _parameters_of(traced)
    layout = read_layout(kind, traced.output, len(named["obs"]), spec.num_members)
    found = Recognition(spec, tuple(sources), call, layout)
    columns_of = partial(_columns, probe, call, traced.calls[0].linear.weight)
    if columns.are_own:
        found = replace(found, own=OwnRecognition(sources[0]))
    return proved(probe, found, columns, columns_of, used, named, generator)
