"""Modules whose nn.Linears were seen at work: from the first that the actions reach to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import MOVING_BLOCK
from . import layers
from .calling import SCALES, OutputLayout, UserCall, read_layout
from .dependence import check_other_tensors
from .modules import Recognition
from .own_columns import (
    ModuleColumns,
    OwnRecognition,
    changed,
    columns_before,
    followed_by,
    others,
    read_own_columns,
)
from .proof import batch_size_apart_from, prove, random_blocks
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
        columns = _own_columns(probe, kind, call, traced, named, refusal, generator)
    return _from_trunk(probe, kind, dims, call, traced, named, columns, hints, generator)


def _own_columns(
    probe: nn.Module, kind: str, call: UserCall, traced: layers.Trace, named: dict[str, Tensor], refusal: Refused,
    generator: torch.Generator,
) -> layers.InputColumns:  # fmt: skip
    """What the first layer reads, where it is not the inputs as they are.

    Raises:
        Refused: for what it is; with the refusal of plain columns.
    """
    weight = traced.calls[0].linear.weight

    def columns_of(blocks: dict[str, Tensor]) -> Tensor:
        return columns_before(weight, probe, call, list(blocks.values()))

    rest = [tensor for _, _, tensor in others(probe, _parameters_of(traced))]
    try:
        with changed(rest, generator):  # a normaliser that was never trained changes nothing
            found = read_own_columns(columns_of, kind, named, generator)
    except Refused as own:
        with stopping_at(f"what {traced.calls[0]} reads"):
            raise Refused(f"{refusal}; {own}", refusal.cure) from None
    if not found.are_own:
        raise refusal
    return found


def _parameters_of(traced: layers.Trace) -> set[int]:
    return {id(p) for c in traced.calls for layer in (c.linear, *c.norms) for p in layer.parameters()}


def _from_trunk(
    probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, traced: layers.Trace,
    named: dict[str, Tensor], columns: layers.InputColumns, hints: dict[str, Any], generator: torch.Generator,
) -> Recognition:  # fmt: skip
    """The network that starts at the first Linear which the actions reach, proved."""
    spec = layers.read_spec(traced, kind, dims, columns)
    if "input_order" in hints and tuple(hints["input_order"]) != spec.input_order:
        raise Refused(
            f"the hint input_order is {list(hints['input_order'])}, but its columns are {list(spec.input_order)}",
            "Leave the hint out: the module's own columns tell the order.",
        )
    sources, used = layers.read_sources(probe, traced, spec), _parameters_of(traced)
    layout = read_layout(kind, traced.output, len(named["obs"]), spec.num_members)
    weight = traced.calls[0].linear.weight

    def first_columns(inputs: dict[str, Tensor], times: bool = True) -> Tensor:
        blocks = {name: block.detach() for name, block in inputs.items()}
        found = columns_before(weight, probe, call, list(blocks.values()))
        if columns.are_own:
            layers.check_time_columns(found, blocks, spec)
        elif times:
            layers.read_columns(found, blocks, spec.time_embedding)
        else:
            layers.check_plain_columns(found, blocks, spec)
        return found

    found = Recognition(spec, tuple(sources), call, layout)
    if columns.are_own:
        found = replace(found, own=_own(probe, found, named, weight, used, generator))
    live = None if found.own is None else ModuleColumns(probe, call, spec, found.own)

    def proves(layout: OutputLayout, times: bool = True, scales: Sequence[float] = SCALES[:1]) -> None:
        prove(probe, call, layout, spec, sources, generator, partial(first_columns, times=times), scales, live)

    layouts = [layout] if kind != "meta_flow_map" else [layout, OutputLayout(is_velocity=True)]
    for candidate in layouts:
        try:
            proves(candidate, scales=SCALES)
        except Refused:
            if candidate is layouts[-1]:
                raise
            continue
        check_other_tensors(probe, used, partial(proves, candidate), generator)
        return replace(found, layout=candidate)
    raise AssertionError("unreachable: the last layout raises")


def _own(
    probe: nn.Module, found: Recognition, named: dict[str, Tensor], weight: Tensor, used: set[int],
    generator: torch.Generator,
) -> OwnRecognition:  # fmt: skip
    """Where the module's own columns end, and what those that are kept between calls follow."""
    kept = [columns for columns, own in (
        (found.spec.block_slices.get("t"), found.spec.time_embedding == "module"),
        (found.spec.moving_columns, found.spec.action_columns is not None),
    ) if own and columns is not None]  # fmt: skip

    def read() -> Tensor:
        columns = columns_before(weight, probe, found.call, list(named.values()))
        return torch.cat([columns[:, part] for part in kept], 1)

    followed = followed_by(read, others(probe, used), generator) if kept else ()
    return OwnRecognition(found.sources[0], followed)
