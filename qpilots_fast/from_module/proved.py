"""The last part of every recognition that knows the network's columns: what they are, and the proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import NetworkSpec
from . import layers
from .calling import SCALES, OutputLayout
from .dependence import check_other_tensors
from .modules import Recognition
from .own_columns import ModuleColumns, changed, followed_by, others, read_own_columns
from .proof import prove, prove_far
from .refusal import Refused, stopping_at

ColumnsOf = Callable[[dict[str, Tensor]], Tensor]  # the blocks -> what the network reads


def own_columns(
    probe: nn.Module, kind: str, columns_of: ColumnsOf, used: set[int], named: dict[str, Tensor], refusal: Refused,
    where: str, generator: torch.Generator,
) -> layers.InputColumns:  # fmt: skip
    """What the network reads, where it is not the inputs as they are.

    Args:
        used: ids of the tensors that the network reads. refusal: of plain columns. where: they stand.

    Raises:
        Refused: for what it is; with the refusal of plain columns.
    """
    rest = [tensor for _, _, tensor in others(probe, used)]
    try:
        with changed(rest, generator):  # a normaliser that was never trained changes nothing
            found = read_own_columns(columns_of, kind, named, generator)
    except Refused as own:
        with stopping_at(where):
            raise Refused(f"{refusal}; {own}", refusal.cure) from None
    if not found.are_own:
        raise refusal
    return found


def check_order(spec: NetworkSpec, hints: dict[str, Any]) -> None:
    """Raises Refused where a hint says another order of the columns."""
    if "input_order" in hints and tuple(hints["input_order"]) != spec.input_order:
        raise Refused(
            f"the hint input_order is {list(hints['input_order'])}, but its columns are {list(spec.input_order)}",
            "Leave the hint out: the module's own columns tell the order.",
        )


def proved(
    probe: nn.Module, found: Recognition, columns: layers.InputColumns, columns_of: ColumnsOf, used: set[int],
    named: dict[str, Tensor], generator: torch.Generator,
) -> Recognition:  # fmt: skip
    """The recognition, proved, with its layout, and with what its own columns follow.

    Raises:
        Refused: where it is something else, or follows more than the network does.
    """
    spec = found.spec

    def first_columns(inputs: dict[str, Tensor], times: bool = True) -> Tensor:
        blocks = {name: block.detach() for name, block in inputs.items()}
        got = columns_of(blocks)
        if columns.are_own:
            layers.check_time_columns(got, blocks, spec)
        elif times:
            layers.read_columns(got, blocks, spec.time_embedding)
        else:
            layers.check_plain_columns(got, blocks, spec)
        return got

    live = None
    if found.own is not None:
        live = ModuleColumns(probe, found.call, spec, found.own)
        followed = _followed(probe, spec, columns_of, live, named, generator)
        own = replace(found.own, followed=followed)
        found, live = replace(found, own=own), ModuleColumns(probe, found.call, spec, own)

    def proves(
        layout: OutputLayout, times: bool = True, scales: Sequence[float] = SCALES[:1], far: bool = False
    ) -> None:
        check = partial(first_columns, times=times)
        prove(probe, found.call, layout, spec, found.sources, generator, check, scales, live, far)

    layouts = [found.layout] if spec.kind != "meta_flow_map" else [found.layout, OutputLayout(is_velocity=True)]
    for candidate in layouts:
        try:
            proves(candidate, scales=SCALES)
        except Refused:
            if candidate is layouts[-1]:
                raise
            continue
        prove_far(probe, used, lambda scale, layout=candidate: proves(layout, scales=(scale,), far=True))  # type: ignore[misc]
        check_other_tensors(probe, used, partial(proves, candidate), generator)
        return replace(found, layout=candidate)
    raise AssertionError("unreachable: the last layout raises")


def _followed(
    probe: nn.Module, spec: NetworkSpec, columns_of: ColumnsOf, live: ModuleColumns, named: dict[str, Tensor],
    generator: torch.Generator,
) -> tuple:  # fmt: skip
    """What those of the module's own columns that are kept between calls follow."""
    kept = [columns for columns, own in (
        (spec.block_slices.get("t"), spec.time_embedding == "module"),
        (spec.moving_columns, spec.action_columns is not None),
    ) if own and columns is not None]  # fmt: skip
    if not kept and not spec.film_dim:
        return ()

    def read() -> Tensor:
        columns = columns_of(named)
        film = [live.film(named["t"])] if spec.film_dim else []
        return torch.cat([*(columns[:, part] for part in kept), *film], 1)

    return followed_by(read, others(probe, ()), generator)  # a layer of the trunk may make time features too
