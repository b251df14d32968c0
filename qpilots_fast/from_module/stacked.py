"""Structure of modules that hold their weights as plain tensors: [E, in, out], [E, out, in], or one MLP's [out, in].

Shapes and names propose which tensor is what; numbers decide among the proposals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from ..spec import INPUT_ORDER, NetworkSpec
from .calling import TIMES, OutputLayout
from .proof import TOLERANCE, evaluate, ours, to_module_output
from .refusal import Refused, number
from .sources import Source, find_source, named_sources


@dataclass(frozen=True)
class Roles:
    """Which tensor is what, layer by layer; each source resolves to [E, out, in] or [E, d]."""

    weights: tuple[Source, ...]
    biases: tuple[Source | None, ...]
    norm_weights: tuple[Source | None, ...]  # one per hidden layer
    norm_biases: tuple[Source | None, ...]

    @property
    def normed(self) -> tuple[bool, ...]:
        return tuple(w is not None or b is not None for w, b in zip(self.norm_weights, self.norm_biases))

    @property
    def flat(self) -> list[Source]:
        """In flat_parameters' order."""
        norms = (*zip(self.norm_weights, self.norm_biases), (None, None))
        rows = zip(self.weights, self.biases, norms)
        return [source for weight, bias, norm in rows for source in (weight, bias, *norm) if source is not None]


# ---------------------------------------------------------------- proposals


def roles_from_hints(module: nn.Module, hints: dict[str, Any]) -> Roles:
    """weights=, biases=, norm_weights=, norm_biases=: dotted names or the module's own tensors, layer by layer."""

    def sources(name: str, count: int) -> tuple[Source | None, ...]:
        entries = list(hints.get(name) or ())
        if len(entries) > count:
            raise Refused(f"the hint {name} has {len(entries)} entries, expected at most {count}")
        found: list[Source | None] = []
        for entry in entries:
            source = None if entry is None else find_source(module, entry)
            if entry is not None and source is None:
                raise Refused(
                    f"the hint {name} names {entry if isinstance(entry, str) else list(entry.shape)}, which the module "
                    "does not hold (it has " + ", ".join(str(source) for source, _ in named_sources(module)) + ")"
                )
            found.append(source)
        return (*found, *[None] * (count - len(found)))

    depth = len(hints["weights"])
    weights = sources("weights", depth)
    biases, scales, shifts = (
        sources(name, count)
        for name, count in (("biases", depth), ("norm_weights", depth - 1), ("norm_biases", depth - 1))
    )
    if None in weights:
        raise Refused("the hint weights has an entry None")
    lead = weights[0].find(module).ndim == 2  # type: ignore[union-attr]

    def member_view(source: Source | None) -> Source | None:
        if source is None:
            return None
        tensor = source.find(module)
        if lead:
            return source.viewed("lead")
        return source.viewed("squeeze") if tensor.ndim == 3 and tensor.shape[1] == 1 else source

    def all_views(found: Sequence[Source | None]) -> tuple[Source | None, ...]:
        return tuple(member_view(source) for source in found)

    matrices = tuple(source.viewed("lead") if lead else source for source in weights if source is not None)
    return Roles(matrices, all_views(biases), all_views(scales), all_views(shifts))


def transposed(roles: Roles) -> Roles:
    return replace(roles, weights=tuple(source.viewed("transpose") for source in roles.weights))


def propose_roles(module: nn.Module) -> Iterator[Roles]:
    """Every assignment of the module's tensors that its shapes, order and names suggest."""
    tensors = named_sources(module)
    for stacked in (True, False):
        rank = 3 if stacked else 2
        counts = [tensor.shape[0] for _, tensor in tensors if tensor.ndim == rank]
        if not counts or (stacked and len(set(counts)) != 1):
            continue
        entries = [
            (source, tensor)
            for source, tensor in tensors
            if tensor.ndim in (rank, rank - 1) and (not stacked or tensor.shape[0] == counts[0])
        ]
        natural = sorted(entries, key=lambda entry: _natural_key(entry[0]))  # a ParameterDict sorts "10" before "2"
        orders = [entries] if natural == entries else [entries, natural]
        for ordered, (transpose, squeezed) in product(orders, ((False, False), (True, False), (True, True))):
            views = () if stacked else ("lead",)
            matrices, vectors = [], []  # with their place in registration order
            for place, (source, tensor) in enumerate(ordered):
                is_vector = tensor.ndim == rank - 1 or (squeezed and tensor.shape[-2] == 1)
                if is_vector:
                    vectors.append((place, source.viewed(*views, *(("squeeze",) if tensor.ndim == 3 else ()))))
                else:
                    matrices.append((place, source.viewed(*views, *(("transpose",) if transpose else ()))))
            shapes = [tuple(source.find(module).shape) for _, source in matrices]
            linked = all(out == fan_in for (_, out, _), (_, _, fan_in) in pairwise(shapes))
            if len(matrices) < 2 or not linked or (squeezed and not stacked):
                continue
            yield from _assign_vectors(module, matrices, vectors)


def _assign_vectors(
    module: nn.Module, matrices: list[tuple[int, Source]], vectors: list[tuple[int, Source]]
) -> Iterator[Roles]:
    weights = tuple(source for _, source in matrices)
    widths = [source.find(module).shape[1] for source in weights]
    depth = len(weights)

    def roles(per_layer: list[list[Source]]) -> Roles | None:
        """[], [bias], [norm weight, norm bias] or [bias, norm weight, norm bias] of each layer."""
        columns: list[list[Source | None]] = [[], [], []]
        for index, found in enumerate(per_layer):
            if any(source.find(module).shape[1] != widths[index] for source in found) or len(found) > 3:
                return None
            triple = [*[None] * (len(found) == 2), *found, *[None] * (3 - len(found))]
            if triple[1] is not None and triple[2] is not None and _is_shift(triple[1]) and not _is_shift(triple[2]):
                triple[1], triple[2] = triple[2], triple[1]
            for column, source in zip(columns, triple[:3]):
                column.append(source)
        return Roles(weights, tuple(columns[0]), tuple(columns[1][: depth - 1]), tuple(columns[2][: depth - 1]))

    # in registration order: each layer's vectors follow its weight
    starts = [place for place, _ in matrices]
    following: list[list[Source]] = [[] for _ in weights]
    for place, source in vectors:
        layer = sum(start < place for start in starts) - 1
        if layer >= 0:
            following[layer].append(source)
    # or in families: biases.0, biases.1, ..., norm_weights.0, ...
    families: dict[str, list[Source]] = {}
    for _, source in vectors:
        families.setdefault(re.sub(r"\d+", "#", str(source)), []).append(source)
    grouped: list[list[Source]] = [[] for _ in weights]
    for family in sorted(families.values(), key=len, reverse=True):
        for group, source in zip(grouped, family):
            group.append(source)
    # or by name: q.0.bias beside q.0.weight, q.1.* without a matrix a LayerNorm
    beside: list[list[Source]] = [[] for _ in weights]
    places = {_parent(source): layer for layer, (_, source) in enumerate(matrices)}
    layer = -1
    for _, source in sorted([*matrices, *vectors], key=lambda entry: _natural_key(entry[1])):
        layer = places.get(_parent(source), layer)
        if source not in weights and layer >= 0:
            beside[layer].append(source)
    for per_layer in (following, grouped, beside):
        found = roles(per_layer)
        if found is not None:
            yield found


def _natural_key(source: Source) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(source))]


def _parent(source: Source) -> str:
    return re.sub(r"[^./]*$", "", str(source))


def _is_shift(source: Source) -> bool:
    return any(word in str(source).lower() for word in ("bias", "shift", "beta"))


# ---------------------------------------------------------------- the search


def propose_specs(
    kind: str, dims: tuple[int, int], shapes: Sequence[torch.Size], roles: Roles, hints: dict[str, Any]
) -> Iterator[NetworkSpec]:
    """Specs with these weights, the likely ones first; hints narrow them."""
    n_times = sum(name in TIMES for name in INPUT_ORDER[kind])
    n_actions = sum(name in ("actions", "noisy_actions", "xbar") for name in INPUT_ORDER[kind])
    spare = shapes[0][2] - dims[0] - n_actions * dims[1]
    width = spare // n_times if n_times else 1
    if spare != width * n_times * bool(n_times) or width < 1 or (width > 1 and width % 2):
        return
    if shapes[-1][1] != (1 if kind == "critic" else dims[1]):
        return
    affine = any(roles.normed)
    placements: list[tuple] = []
    for placement in [hints["layer_norm"]] if "layer_norm" in hints else [None, "post", "pre"]:
        if placement is None or isinstance(placement, str):
            normed = roles.normed if affine else (True,) * len(roles.normed)
            placements.append(tuple(placement if norm else None for norm in normed))
        else:
            placements.append(tuple(placement))
    # without a LayerNorm's parameters it may still be there, without an affine part
    placements = [p for p in dict.fromkeys(placements) if any(p) or not affine]
    orders = [hints["input_order"]] if "input_order" in hints else _orders(kind)
    embeddings = ["raw"] if width == 1 else ["sinusoidal", "fourier"]
    if hints.get("time_embedding"):
        embeddings = [hints["time_embedding"]]
    activations = [hints["activation"]] if "activation" in hints else list(ACTIVATIONS)
    for placement, embedding, order, activation in product(placements, embeddings, orders, activations):
        for eps in (
            [hints["layer_norm_eps"]] if "layer_norm_eps" in hints else (1e-5, 1e-6) if any(placement) else (1e-6,)
        ):
            yield NetworkSpec(
                kind=kind,  # type: ignore[arg-type]
                obs_dim=dims[0],
                action_dim=dims[1],
                hidden_dims=tuple(shape[1] for shape in shapes[:-1]),
                activation=activation,
                layer_norm=placement,
                layer_norm_eps=float(eps),
                time_embedding=embedding,
                time_embedding_dim=width,
                num_members=shapes[0][0],
                input_order=tuple(order),
                biases=tuple(source is not None for source in roles.biases),
                norm_weight=any(source is not None for source in roles.norm_weights),
                norm_bias=any(source is not None for source in roles.norm_biases),
                stacked=True,
            )


def _orders(kind: str) -> list[tuple[str, ...]]:
    usual = INPUT_ORDER[kind]
    if kind == "meta_flow_map":
        return [usual]  # 720 orders: other ones need a hint
    return [usual, *(order for order in permutations(usual) if order != usual)]


def search(
    module: nn.Module,
    specs: Iterator[NetworkSpec],
    roles: Roles,
    named: dict[str, Tensor],
    output: Tensor,
    layouts: Sequence[OutputLayout],
) -> tuple[NetworkSpec, OutputLayout]:
    """The spec whose first member gives the module's output [first member] on these inputs.

    Raises:
        Refused: with the closest miss.
    """
    flat = [source.find(module).double()[:1] for source in roles.flat]
    target = output[:1] if layouts[0].of_critic is not None else output
    closest: tuple[float, str] | None = None
    for spec in specs:
        output_of_first, _ = evaluate(ours(replace(spec, num_members=1), flat), named, None)
        for layout in layouts:
            candidate = to_module_output(spec, output_of_first, named, layout)
            gap = (candidate - target).abs().max().item() / (1 + target.abs().max().item())
            if gap <= TOLERANCE[target.dtype]:
                return spec, layout
            label = (
                f"{spec.activation}, layer_norm {next((p for p in spec.layer_norm if p), None)!r}, "
                f"inputs {list(spec.input_order)}"
            )
            if closest is None or gap < closest[0]:
                closest = (gap, label)
    if closest is None:
        raise Refused("no assignment of its tensors fits the input and output widths")
    normed = any(source is not None for source in roles.norm_weights + roles.norm_biases)
    eps = " (an eps other than 1e-05 and 1e-06 needs the hint layer_norm_eps)" if normed else ""
    raise Refused(
        f"no known structure gives its output: the closest ({closest[1]}) is off by {number(closest[0])}{eps}"
    )
