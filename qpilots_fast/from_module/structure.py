"""Modules read operation by operation: residual blocks, heads, norms, modulation, any order of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..critic_outputs import MOST_HEADS, Layout, layout_of, read_output
from ..spec import MOVING_BLOCK, NetworkSpec
from . import layers
from .calling import OutputLayout, UserCall
from .held import sources_of
from .lowering import Layer, Origin, layers_of
from .modules import Recognition
from .numberwise import number_by_number
from .own_columns import FilmPlaces, OwnRecognition
from .proof import batch_size_apart_from, random_blocks
from .proved import check_order, own_columns, proved
from .recording import Place, Recording, read_at, record
from .refusal import FollowsOther, Refused
from .sources import Source, named_sources, randomise, submodule
from .states import Modulation
from .walk import Walk
from .whole_rows import HANDLERS


def from_operations(
    probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, hints: dict[str, Any],
    generator: torch.Generator,
) -> Recognition:  # fmt: skip
    """The network that a module is, proved; on a float64 copy.

    Raises:
        Refused: with the operation at which reading stopped.
    """
    first: Refused | None = None
    for late in (True, False):  # what is done to the actions alone: a change of columns, or an operation
        try:
            return _read(probe, kind, dims, call, hints, generator, late)
        except Refused as refusal:
            first = first or refusal
    assert first is not None
    raise first


def _read(
    probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, hints: dict[str, Any],
    generator: torch.Generator, late: bool,
) -> Recognition:  # fmt: skip
    named, recording, walk, layout, members = _members(probe, kind, dims, call, generator, late)
    if kind != "critic" and len(members) > 1:
        raise Refused(f"{len(members)} networks make its output; expected one")
    used = _tensors(probe, members)
    assert walk.columns is not None
    place = next((recording.place_of(tensor) for tensor in recording.tensors_like(walk.columns)), None)
    if place is None:
        raise Refused("the columns that its first Linear reads are made by no function of torch")

    def columns_of(blocks: dict[str, Tensor]) -> Tensor:
        return read_at([place], probe, call, list(blocks.values()))[0]

    try:
        columns = layers.read_columns(walk.columns, named, hints.get("time_embedding"))
    except FollowsOther as refusal:
        columns = own_columns(
            probe, kind, columns_of, set(map(id, used)), named, refusal, "the columns that it reads", generator
        )
    spec, sources = _spec(members, kind, dims, columns)
    check_order(spec, hints)
    found = Recognition(spec, sources, call, layout)
    if columns.are_own or spec.film_dim:
        weight = next((s for origin in sources for s in _read_by(origin)), None)
        if weight is None:
            raise Refused("all of its weights are constants")
        base = Source(weight.path, weight.name, weight.keys)
        film = tuple(_film(recording, layer.width, *pair) for layer in members[0] for pair in layer.films)
        found = replace(found, own=OwnRecognition(base, (), place, film))
    with torch.no_grad():
        _randomise(probe, used, generator)
    return proved(probe, found, columns, columns_of, set(map(id, used)), named, generator)


def _members(
    probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, generator: torch.Generator, late: bool
) -> tuple[dict[str, Tensor], Recording, Walk, OutputLayout, list[list[Layer]]]:
    """The module's call on random inputs, and the layers of each member."""
    count = 0
    while True:
        named = random_blocks(kind, dims, batch_size_apart_from(count), generator)
        recording = record(probe, call, list(named.values()))
        layout, outputs = _outputs(kind, recording.output, len(named["obs"]))
        if count or len(outputs) != len(named["obs"]):
            break
        count = len(outputs)
    walk = Walk(recording, named, MOVING_BLOCK[kind], _every_source(probe), HANDLERS, number_by_number, late)
    coded = _codes(walk, recording.output)
    codes = _outputs(kind, coded, len(named["obs"]), layout)[1]
    members = []
    for member in codes:
        rows = walk.rows_of(member, "its output")
        if len(rows.states) != 1 or not torch.equal(rows.batch, torch.arange(walk.batch)):
            raise Refused("its output is in an order that is not followed")
        members.append(layers_of(rows.states[0]))
    if layout.of_critic is not None:
        _check_heads(walk, coded, layout.of_critic)
    return named, recording, walk, layout, members


def _check_heads(walk: Walk, coded: Any, layout: Layout, hint: str = "q: q.T") -> None:
    """Raises Refused where the columns of one Linear are more than members can be taken to be."""
    if isinstance(layout, tuple):
        for entry, part in zip(coded, layout):
            _check_heads(walk, entry, part, "qs: [q.T for q in qs]")
        return
    members = read_output(coded, layout)
    if layout != "batch_first" or len(members) <= MOST_HEADS:
        return
    if len({id(walk.codes.entry(int(member[0]))[0]) for member in members}) == 1:
        raise Refused(
            f"its last Linear has {len(members)} outputs, which could be the atoms of a distribution; heads of one "
            f"Linear are taken as members up to {MOST_HEADS}; of more the hint output=lambda {hint} says that they are",
            hint="output",
        )


def _outputs(
    kind: str, output: Any, batch: int, layout: OutputLayout | None = None
) -> tuple[OutputLayout, Sequence[Tensor]]:
    """Each member's output [B, out]."""
    if kind != "critic":
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise Refused("it returns no tensor [B, action_dim] (use the hint call)", hint="call")
        return OutputLayout(is_velocity=kind == "meta_flow_map"), [output]
    try:
        found = OutputLayout(layout_of(output, batch)) if layout is None else layout
        assert found.of_critic is not None
        return found, [member.unsqueeze(-1) for member in read_output(output, found.of_critic)]
    except (TypeError, ValueError) as error:
        raise Refused(f"its output is none that is read: {error}", hint="call") from None


def _codes(walk: Walk, output: Any) -> Any:
    if isinstance(output, (list, tuple)):
        return [_codes(walk, entry) for entry in output]
    return walk.codes_of(output)


def _every_source(probe: nn.Module) -> list[tuple[Source, Tensor]]:
    """Parameters, buffers, entries of mappings, and plain tensors that modules hold."""
    found = named_sources(probe)
    for path, part in probe.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                found.append((Source(tuple(filter(None, path.split("."))), name), value))
    return found


def _origins(layer: Layer) -> list[Origin]:
    pairs = [origin for pair in layer.norms for origin in pair]
    return [origin for origin in (layer.weight, layer.bias, *pairs) if origin is not None]


def _read_by(origin: Origin) -> list[Source]:
    return [origin] if isinstance(origin, Source) else list(sources_of(origin.expression))


def _tensors(probe: nn.Module, members: Sequence[Sequence[Layer]]) -> list[Tensor]:
    """The module's tensors that the network reads."""
    sources = [s for member in members for layer in member for origin in _origins(layer) for s in _read_by(origin)]
    found = [source.base(submodule(probe, source.path)) for source in sources]
    return list({id(tensor): tensor for tensor in found}.values())


def _randomise(probe: nn.Module, used: Sequence[Tensor], generator: torch.Generator) -> None:
    """Other numbers in what the network reads; of buffers such as supports and deviations, positive ones stay so."""
    trained = {id(tensor) for tensor in probe.parameters()}
    randomise([tensor for tensor in used if id(tensor) in trained or tensor.requires_grad], generator)
    for tensor in used:
        if id(tensor) not in trained and not tensor.requires_grad:
            factor, shift = torch.rand(2, *tensor.shape, generator=generator, dtype=torch.float64)
            tensor.mul_(0.75 + factor / 2).add_(0.1 * shift)


def _film(recording: Recording, width: int, scale: Modulation | None, shift: Modulation | None) -> FilmPlaces:
    def place(modulation: Modulation | None) -> tuple[Place, str] | None:
        if modulation is None:
            return None
        found = recording.place_of(modulation.tensor)
        if found is None:
            raise Refused("what modulates its hidden rows is made inside a function of torch")
        return found, modulation.function

    return FilmPlaces(width, place(scale), place(shift))


def _spec(
    members: Sequence[Sequence[Layer]], kind: str, dims: tuple[int, int], columns: layers.InputColumns
) -> tuple[NetworkSpec, tuple[Origin, ...]]:
    """The spec of equal members, and where flat_parameters live."""
    shapes = {tuple((layer.width, layer.bias is not None, tuple(layer.chain)) for layer in m) for m in members}
    if len(shapes) > 1:
        raise Refused("its members differ in their layers (widths, biases, norms or activations)")
    first = members[0]
    if len(first) < 2:
        raise Refused("it has no hidden layer")
    width = dims[1] if kind != "critic" else 1
    if first[-1].width != width:
        raise Refused(f"its last Linear has {first[-1].width} outputs, expected {width}")
    flat: list[Origin] = []
    for same in zip(*members):
        groups = [[layer.weight for layer in same], [layer.bias for layer in same]]
        for index in range(len(same[0].norms)):
            groups += [[layer.norms[index][part] for layer in same] for part in (0, 1)]
        flat += [origin for group in groups for origin in group if origin is not None]
    spec = NetworkSpec(
        kind=kind,  # type: ignore[arg-type]
        obs_dim=dims[0],
        action_dim=dims[1],
        hidden_dims=tuple(layer.width for layer in first[:-1]),
        time_embedding=columns.time_embedding,  # type: ignore[arg-type]
        time_embedding_dim=columns.time_embedding_dim,
        num_members=len(members),
        input_order=columns.order,
        obs_columns=columns.obs_columns,
        action_columns=columns.action_columns,
        biases=tuple(layer.bias is not None for layer in first),
        chains=tuple(tuple(layer.chain) for layer in first[:-1]),
    )
    return spec, tuple(flat)
