"""Columns of the first layer that the user's module computes itself: from t alone, from obs alone, from the actions.

Whatever computes them (a time network, an encoder, a normaliser, a change of units), the module's own forward does, up
to the first Linear that reads the actions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..networks import Slots
from ..spec import MOVING_BLOCK, POSTERIOR_DRAW, NetworkSpec, OwnColumns
from ..times import time_features
from .calling import BLOCKS_OF_KIND, SCALES, TIMES, UserCall
from .layers import COLUMN_TOLERANCE, InputColumns, feature_tolerance
from .recording import Place, read_at, undisturbed
from .refusal import Refused, check_finite_numbers, number
from .sources import Source, named_sources, randomise, submodule
from .states import MODULATED

Columns = Callable[[dict[str, Tensor]], Tensor]  # the blocks -> what the first Linear reads


class _Reached(Exception):
    """The Linear was reached: the rest of the module need not run."""


class _UpTo(TorchFunctionMode):
    """Ends a call at the Linear of this weight; of this thread alone, and the module stays as it is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and any(value is self.weight for value in (*args, *(kwargs or {}).values())):
            raise _Reached(args[0])
        return func(*args, **(kwargs or {}))


def columns_before(
    weight: Tensor, module: nn.Module, call: UserCall, blocks: Sequence[Tensor], compiled: bool = False
) -> Tensor:
    """What the Linear of this weight reads when the module is called on these blocks: [B, D].

    compiled: whether torch.compile runs a part of the module; it is then called without.
    """
    with undisturbed(weight.device.type, compiled):
        try:
            with _UpTo(weight):
                call(module, blocks)
        except _Reached as reached:
            return reached.args[0].detach()
    raise Refused("its first Linear is not called every time")


def _has_compiled(module: nn.Module) -> bool:
    return any(
        "_orig_mod" in part._modules or part._compiled_call_impl is not None for _, part in module.named_modules()
    )


# ---------------------------------------------------------------- live


@dataclass(frozen=True)
class Followed:
    """A tensor of the module that its own columns of times and actions follow: one of a part's, by name."""

    path: tuple[str, ...]
    holder: str  # "_parameters", "_buffers", or "" for a plain attribute
    name: str

    def place(self, module: nn.Module) -> dict[str, Any]:
        """The dict that holds it."""
        part = submodule(module, self.path)
        return getattr(part, self.holder) if self.holder else vars(part)

    def find(self, module: nn.Module) -> Tensor:
        """The tensor as it is now."""
        return self.place(module)[self.name]


@dataclass(frozen=True)
class FilmPlaces:
    """Where a module makes the scale and the shift of one "film", and the function of MODULATED; None: 1, and 0."""

    width: int
    scale: tuple[Place, str] | None
    shift: tuple[Place, str] | None


@dataclass(frozen=True)
class OwnRecognition:
    """Where the module's own columns end.

    Args:
        weight: of the first Linear that reads the actions; where place is given, any of the module's parameters.
        followed: what the columns of times and actions, and the modulations, follow.
        place: of the columns, where they are not what the Linear of that weight reads.
        film: of each "film" of the network, in order.
    """

    weight: Source
    followed: tuple[Followed, ...] = ()
    place: Place | None = None
    film: tuple[FilmPlaces, ...] = ()


_ELSEWHERE = {**dict.fromkeys(TIMES, 0.5), **POSTERIOR_DRAW}  # times of a call that is about other columns


class ModuleColumns(OwnColumns):
    """`OwnColumns` of a user's module, as it is at each call.

    Args:
        module: the user's own, or a copy.
    """

    def __init__(self, module: nn.Module, call: UserCall, spec: NetworkSpec, found: OwnRecognition) -> None:
        self._module, self._call, self._spec, self._found = module, call, spec, found
        self._compiled = _has_compiled(module)

    def obs(self, obs: Tensor) -> Tensor:
        return self._block("obs", len(obs), obs, obs=obs)

    def times(self, t: Tensor) -> Tensor:
        return self._block("t", len(t), t, t=t)

    def film(self, t: Tensor) -> Tensor:
        made = [part for film in self._found.film for part in (film.scale, film.shift) if part is not None]
        values = iter(
            read_at([place for place, _ in made], self._module, self._call, self._blocks(len(t), t=t), self._compiled)
        )
        parts = []
        for film in self._found.film:
            for of, plain in ((film.scale, 1.0), (film.shift, 0.0)):
                part = t.new_full((1, 1), plain)
                if of is not None:
                    part = MODULATED[of[1]](next(values)).reshape(len(t), -1).to(t)
                parts.append(part.expand(len(t), film.width))
        return torch.cat(parts, 1)

    def actions(self, like: Tensor) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([[0.0], [1.0]]).expand(2, self._spec.action_dim)
        shift, ahead = self._block("actions", 2, like, actions=ends)
        return ahead - shift, shift

    def followed(self) -> list[Tensor]:
        tensors = [f.find(self._module) for f in self._found.followed]
        return [tensor.detach() for tensor in (*tensors, *self._call.tensors)]

    def slots(self) -> Slots:
        """As `PackableNetwork.slots`, of what is followed."""
        places = [(f.place(self._module), f.name) for f in self._found.followed]
        slots: Slots = [(place, name, place[name]) for place, name in places]
        return slots + [({"tensor": tensor}, "tensor", tensor) for tensor in self._call.tensors]

    def _blocks(self, rows: int, **given: Tensor) -> list[Tensor]:
        """The inputs of a call on these, and on any others."""
        spec, weight = self._spec, self._found.weight.find(self._module)
        blocks = []
        for block in BLOCKS_OF_KIND[spec.kind]:
            width = 1 if block in TIMES else spec.obs_dim if block == "obs" else spec.action_dim
            value = given.get(block)
            if value is None:
                value = torch.full((rows, width), _ELSEWHERE.get(block, 0.0), dtype=weight.dtype, device=weight.device)
            blocks.append(value.detach().to(weight.device, weight.dtype))
        return blocks

    def _block(self, name: str, rows: int, like: Tensor, **given: Tensor) -> Tensor:
        blocks = self._blocks(rows, **given)
        if self._found.place is not None:
            (columns,) = read_at([self._found.place], self._module, self._call, blocks, self._compiled)
        else:
            weight = self._found.weight.find(self._module)
            columns = columns_before(weight, self._module, self._call, blocks, self._compiled)
        return columns[:, self._spec.block_slices[name]].to(like.device, like.dtype)


# ---------------------------------------------------------------- recognition


@contextmanager
def changed(tensors: Sequence[Tensor], generator: torch.Generator) -> Iterator[None]:
    """These tensors with other numbers, put back on leaving; what is not trained and >= 0 stays so, as variances."""
    before = [tensor.clone() for tensor in tensors]
    randomise(tensors, generator)
    with torch.no_grad():
        for tensor, value in zip(tensors, before):
            if not tensor.requires_grad and bool((value >= 0).all()):
                tensor.abs_()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)


def others(module: nn.Module, used: Collection[int]) -> list[tuple[Followed | None, str, Tensor]]:
    """The module's floating tensors but those used, plain attributes included: (place, name, tensor).

    place: None for a tensor inside a mapping.
    """
    found: list[tuple[Followed | None, str, Tensor]] = []
    for source, tensor in named_sources(module):
        held = "_buffers" if source.name in getattr(submodule(module, source.path), "_buffers", {}) else "_parameters"
        place = None if source.keys else Followed(source.path, held, source.name)
        found.append((place, str(source), tensor))
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                found.append((Followed(tuple(filter(None, path.split("."))), "", name), f"{path}.{name}", value))
    return [
        (place, name.lstrip("."), tensor)
        for place, name, tensor in found
        if id(tensor) not in used and not tensor.is_meta
    ]


def read_own_columns(columns: Columns, kind: str, named: dict[str, Tensor], generator: torch.Generator) -> InputColumns:
    """What each column follows, found by changing one input after the other.

    Args:
        columns: of the module, with random numbers in all of its tensors.
        named: blocks to start from.

    Raises:
        Refused: with the columns that are no function of one input.
    """
    moving = MOVING_BLOCK[kind]
    base = columns(named)
    check_finite_numbers("what its first Linear reads is", base)
    groups: list[tuple[str, ...]] = [("obs",), *((name,) for name in ("xbar", moving) if name in named)]
    groups += [tuple(name for name in TIMES if name in named)] if "t" in named else []
    follows: list[list[str]] = [[] for _ in range(base.shape[1])]
    for group in groups:
        other = {name: _another(name, named[name], generator) for name in group}
        for column in (columns({**named, **other}) != base).any(0).nonzero().flatten().tolist():
            follows[column].append(group[0])
    for column, inputs in enumerate(follows):
        if len(inputs) > 1:
            raise Refused(
                f"column {column} of what its first Linear reads follows {' and '.join(inputs)} together; a packed "
                "network reads columns of one input each"
            )
    runs = _runs([inputs[0] if inputs else "" for inputs in follows], has_times="t" in named)
    absent = [group[0] for group in groups if group[0] not in runs]
    if moving in absent or "xbar" in absent:
        raise Refused(f"its first Linear reads no columns of {moving if moving in absent else 'xbar'}")

    def is_plain(name: str) -> bool:
        for size in (SCALES[0], SCALES[-1]):
            block = size * named[name]
            part = columns({**named, name: block})[:, runs[name]]
            if part.shape != block.shape or _gap(part, block) > size * COLUMN_TOLERANCE:
                return False
        return True

    if "xbar" in named and not is_plain("xbar"):
        raise Refused("its first Linear reads xbar changed; expected xbar itself")
    obs_columns = None
    if "obs" in absent:
        obs_columns = 0 if named["obs"].shape[1] else None
    elif not is_plain("obs"):
        obs_columns = runs["obs"].stop - runs["obs"].start
    action_columns = None
    if not is_plain(moving):
        if kind != "critic":
            raise Refused(
                f"its first Linear reads {moving} changed (scaled, clipped or encoded?), which packed networks follow "
                "for critics alone"
            )
        action_columns = _affine(columns, named, runs[moving], COLUMN_TOLERANCE)
    embedding, width = "raw", 1
    if "t" in runs:
        width = runs["t"].stop - runs["t"].start
        part = base[:, runs["t"]]
        known = (
            e
            for e in _known(kind, width)
            if _gap(part, time_features(named["t"], e, width)) <= feature_tolerance(e, width)
        )
        embedding = next(known, "module")
    elif "t" in named:
        embedding, width = "module", 0
    order = [*sorted(runs, key=lambda name: runs[name].start)]
    order += [name for name in BLOCKS_OF_KIND[kind] if name not in order]
    return InputColumns(tuple(order), embedding, width, obs_columns, action_columns)


def _known(kind: str, width: int) -> list[str]:
    """Embeddings of a single time that this width may be."""
    if kind == "meta_flow_map":  # t, s and u would each have to be found
        return []
    return ["raw"] if width == 1 else [] if width % 2 else ["sinusoidal", "fourier"]


def _another(name: str, block: Tensor, generator: torch.Generator) -> Tensor:
    if name in TIMES:
        return torch.rand(block.shape, generator=generator, dtype=torch.float32).to(block.dtype)
    return torch.randn(block.shape, generator=generator, dtype=torch.float64).to(block.dtype)


def _runs(follows: Sequence[str], has_times: bool) -> dict[str, slice]:
    """The columns of each input; constant ones (which follow nothing) go with the times or obs beside them.

    has_times: whether the network is given times; where no column follows these, constant ones stand in their place.
    """
    runs: list[list[Any]] = []  # input, first column, end
    for name, group in groupby(enumerate(follows), key=lambda entry: entry[1]):
        places = [place for place, _ in group]
        runs.append([name, places[0], places[-1] + 1])
    for host in ("t", "obs"):
        joined: list[list[Any]] = []
        for run in runs:
            before = joined[-1] if joined else None
            if before is not None and {before[0], run[0]} <= {host, ""} and host in (before[0], run[0]):
                joined[-1] = [host, before[1], run[2]]
            else:
                joined.append(run)
        runs = joined
    if has_times and not any(run[0] == "t" for run in runs):
        runs = [["t", *run[1:]] if not run[0] else run for run in runs]
    lonely = next((run for run in runs if not run[0]), None)
    if lonely is not None:
        raise Refused(
            f"columns {lonely[1]} to {lonely[2] - 1} of what its first Linear reads follow none of its inputs"
        )
    names = [run[0] for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Refused(f"the columns of {twice} that its first Linear reads do not stand side by side")
    return {name: slice(first, end) for name, first, end in runs}


def _affine(columns: Columns, named: dict[str, Tensor], part: slice, tolerance: float) -> tuple[int, ...]:
    """The action dimension that each of these columns is an affine map of.

    Raises:
        Refused: where one is another function of the actions, or of several.
    """
    actions = named["actions"]
    width = actions.shape[1]
    ends = torch.cat([torch.zeros(1, width, dtype=actions.dtype), torch.eye(width, dtype=actions.dtype)])
    beside = {name: block[:1].expand(width + 1, -1) for name, block in named.items()}
    at = columns({**beside, "actions": ends})[:, part]
    shift, slopes = at[0], at[1:] - at[0]
    dims = slopes.abs().argmax(0)
    scale = slopes.gather(0, dims.unsqueeze(0)).squeeze(0)
    for size in SCALES:
        gap = _gap(columns({**named, "actions": size * actions})[:, part], size * actions[:, dims] * scale + shift)
        if not gap <= tolerance * size:
            raise Refused(
                f"its first Linear reads columns of the actions that are no scaled and shifted action: off by "
                f"{number(gap)} at actions of scale {size:g} (clipped, squashed or encoded?)"
            )
    if len(dims) > width:
        raise Refused(f"its first Linear reads {len(dims)} columns of {width} actions; expected at most {width}")
    return tuple(dims.tolist())


def followed_by(
    read: Callable[[], Tensor], candidates: Sequence[tuple[Followed | None, str, Tensor]], generator: torch.Generator
) -> tuple[Followed, ...]:
    """Those of the tensors whose change moves what is read.

    Raises:
        Refused: where one of them is held where it cannot be found again.
    """
    before, found = read(), []
    for place, name, tensor in candidates:
        with changed([tensor], generator):
            try:
                moved = not torch.equal(read(), before)
            except Exception:  # random numbers may not do there: it is read
                moved = True
        if moved and place is None:
            raise Refused(f"its columns of times or actions follow {name}, which is held inside a mapping")
        if moved and place is not None:
            found.append(place)
    return tuple(found)


def _gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0
