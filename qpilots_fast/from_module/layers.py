"""Structure of modules built from nn.Linear and nn.LayerNorm, read off the numbers that pass through them.

The first Linear's input tells the order of the input blocks and the time embedding; what lies between one Linear's
output and the next one's input tells the activation and where the LayerNorm sits, whether the activation is a
module or a function call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from ..reference_row_ops import layer_norm
from ..spec import TIME_EMBEDDINGS, NetworkSpec
from ..times import time_features
from .calling import TIMES, UserCall
from .refusal import FollowsOther, Refused, number, stopping_at
from .sources import Source, named_sources

EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}  # relative, of recomputations from numbers in a dtype
COLUMN_TOLERANCE = 1e-6  # a float32 cast inside the module is no other structure


@dataclass
class LinearCall:
    """One call of a Linear, and the LayerNorms called after it."""

    linear: nn.Linear
    input: Tensor
    output: Tensor
    norms: list[nn.LayerNorm] = field(default_factory=list)
    name: str = ""  # in the module

    def __str__(self) -> str:
        return f"{self.name} (Linear {self.linear.in_features} -> {self.linear.out_features})".lstrip()

    @property
    def is_constant(self) -> bool:
        """Whether a LayerNorm over one unit follows, which gives its bias whatever it reads."""
        return any(tuple(norm.normalized_shape) == (1,) for norm in self.norms)


@dataclass
class Trace:
    """What one call of the user's module did."""

    calls: list[LinearCall]
    output: Any
    traceable: bool  # False where Linears ran under vmap: their numbers cannot be read

    def reading(self, other: Trace) -> Trace:
        """The calls alone whose inputs differ from those of another call of the module, on other actions.

        Raises:
            Refused: where there are none, or the two calls took different ways.
        """
        if [call.linear for call in self.calls] != [call.linear for call in other.calls]:
            raise Refused("which of its Linears are called depends on the inputs' numbers")
        calls: list[LinearCall] = []
        for call, again in zip(self.calls, other.calls):
            moves = call.input.shape != again.input.shape or not torch.equal(call.input, again.input)
            if moves or (calls and calls[-1].is_constant and call.input.shape[-1] == 1):
                calls.append(call)
        if not calls:
            raise Refused("none of its Linears reads the actions")
        return Trace(calls, self.output, self.traceable)

    def chains(self) -> list[list[LinearCall]]:
        """The calls member by member: each member starts at a Linear that reads the network's input."""
        members: list[list[LinearCall]] = []
        for call in self.calls:
            first = self.calls[0].input
            if not members or (call.input.shape == first.shape and torch.equal(call.input, first)):
                members.append([])
            members[-1].append(call)
        return members


def trace(module: nn.Module, call: UserCall, blocks: Sequence[Tensor]) -> Trace:
    """Calls the module with hooks on its Linears and LayerNorms."""
    found = Trace([], None, True)

    def record(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not args or torch._C._functorch.is_functorch_wrapped_tensor(args[0]):
            found.traceable = False
        elif isinstance(layer, nn.Linear):  # cloned: an in-place activation would change the output
            name = names.get(id(layer), "")
            found.calls.append(LinearCall(layer, args[0].detach().clone(), output.detach().clone(), name=name))
        elif isinstance(layer, nn.LayerNorm) and found.calls:
            found.calls[-1].norms.append(layer)

    kinds, names = (nn.Linear, nn.LayerNorm), {id(layer): name for name, layer in module.named_modules()}
    hooks = [m.register_forward_hook(record) for _, m in module.named_modules() if isinstance(m, kinds)]
    try:
        found.output = call(module, blocks)
    finally:
        for hook in hooks:
            hook.remove()
    return found


# ---------------------------------------------------------------- the input columns


@dataclass(frozen=True)
class InputColumns:
    """The order of the blocks among the first layer's columns, and what they are: as the fields of a NetworkSpec."""

    order: tuple[str, ...]
    time_embedding: str = "raw"
    time_embedding_dim: int = 1
    obs_columns: int | None = None
    action_columns: tuple[int, ...] | None = None

    @property
    def are_own(self) -> bool:
        """Whether the module itself computes some of them."""
        return self.time_embedding == "module" or (self.obs_columns, self.action_columns) != (None, None)


def feature_tolerance(embedding: str, dim: int) -> float:
    """Users compute angles in float32: a few roundings of the largest angle."""
    largest = {"raw": 1.0, "sinusoidal": 1e4, "fourier": dim / 2}[embedding]
    return 1e-6 + 4e-7 * largest


def column_tolerance(block: Tensor) -> float:
    """How far columns may be off a block that they hold: a cast to float32 on the way."""
    return COLUMN_TOLERANCE * max(1.0, block.abs().max().item())


def read_columns(columns: Tensor, named: dict[str, Tensor], embedding: str | None = None) -> InputColumns:
    """Recognises each block by its numbers.

    Args:
        columns: [B, D], what the first Linear read.
        named: the blocks that the module was called with; times as [B, 1].
        embedding: the time embedding that a hint names; None tries all.

    Raises:
        Refused: with the first column that is none of the inputs.
    """
    plain = {name: block for name, block in named.items() if name not in TIMES and block.shape[1]}
    times = {name: block for name, block in named.items() if name in TIMES}
    spare = columns.shape[1] - sum(block.shape[1] for block in plain.values())
    width = spare // len(times) if times else 0
    if spare != width * len(times) or (times and width < 1):
        raise FollowsOther(
            f"its first Linear reads {columns.shape[1]} columns, but "
            + ", ".join(f"{name} has {block.shape[1]}" for name, block in plain.items())
            + (f"; {spare} columns do not make {len(times)} time embedding(s)" if times else "")
        )
    kinds = [embedding] if embedding else list(TIME_EMBEDDINGS)
    kinds = [kind for kind in kinds if (kind == "raw") == (width == 1) and (width == 1 or width % 2 == 0)]
    order: list[str] = [name for name, block in named.items() if name not in TIMES and not block.shape[1]]
    found: str | None = None
    start = 0
    while start < columns.shape[1]:
        name, kind = _block_at(columns[:, start:], plain, times, width, [found] if found else kinds)
        order.append(name)
        found = kind or found
        start += width if name in TIMES else named[name].shape[1]
        plain.pop(name, None)
        times.pop(name, None)
    return InputColumns(tuple(order), found or "raw", width or 1)


def check_plain_columns(columns: Tensor, named: dict[str, Tensor], spec: NetworkSpec) -> None:
    """Raises Refused unless the blocks but the times still stand where the spec says."""
    for name, block in named.items():
        if name not in TIMES and block.shape[1]:
            gap = (columns[:, spec.block_slices[name]] - block).abs().max().item()
            if not gap <= column_tolerance(block):
                raise Refused(f"its first Linear reads other columns than {name}: off by {number(gap)}")


def check_time_columns(columns: Tensor, named: dict[str, Tensor], spec: NetworkSpec) -> None:
    """Raises Refused unless the times that the module does not compute itself stand where the spec says."""
    for name, block in named.items():
        if name in TIMES and spec.time_embedding != "module":
            kind, width = spec.time_embedding, spec.time_embedding_dim
            gap = (columns[:, spec.block_slices[name]] - time_features(block, kind, width)).abs().max().item()
            if not gap <= feature_tolerance(kind, width):
                raise Refused(
                    f"its first Linear reads other columns than {kind} features of {name}: off by {number(gap)}"
                )


def _block_at(
    columns: Tensor, plain: dict[str, Tensor], times: dict[str, Tensor], width: int, kinds: Sequence[str]
) -> tuple[str, str | None]:
    """The block whose numbers the leading columns hold."""
    closest: list[tuple[float, str]] = []
    for name, block in plain.items():
        if block.shape[1] <= columns.shape[1]:
            gap = (columns[:, : block.shape[1]] - block).abs().max().item()
            if gap <= column_tolerance(block):
                return name, None
            closest.append((gap, name))
    for name, block in times.items():
        for kind in kinds:
            gap = (columns[:, :width] - time_features(block, kind, width)).abs().max().item()
            if gap <= feature_tolerance(kind, width):
                return name, kind
            closest.append((gap, f"{kind} features of {name} ({width} wide)"))
    gaps = "; ".join(f"{name}: off by {number(gap)}" for gap, name in sorted(closest))
    raise FollowsOther(
        "its first Linear reads columns that are none of the inputs (is an input normalised, clipped, or encoded, "
        f"is the time embedding learned, of another width, or in another order?): {gaps or 'no block fits the width'}"
    )


# ---------------------------------------------------------------- between two Linears


Match = tuple[str, str | None]  # activation, LayerNorm placement


def matches_between(call: LinearCall, following: Tensor) -> set[Match]:
    """The activations and LayerNorm placements that give the next Linear's input; one, but for degenerate widths.

    Raises:
        Refused: where nothing matches, with how far each candidate is off.
    """
    if len(call.norms) > 1:
        raise Refused(f"{len(call.norms)} LayerNorms follow one Linear; one is supported")
    if call.output.shape != following.shape:
        raise Refused(
            f"a Linear gives {list(call.output.shape)}, the next one reads {list(following.shape)}: something else "
            "sits between them"
        )
    found: set[Match] = set()
    gaps = []
    for kind in ACTIVATIONS:
        for placement in ("pre", "post") if call.norms else (None,):
            h = call.output.double()
            if placement == "pre":
                h = _norm(h, call.norms[0])
            h = ACTIVATIONS[kind].value(h)
            if placement == "post":
                h = _norm(h, call.norms[0])
            gap = (h - following).abs().max().item() / (1 + following.abs().max().item())
            if gap <= EXACT[call.output.dtype]:
                found.add((kind, placement))
            gaps.append((gap, kind if placement is None else f"{kind}, norm {placement!r}"))
    if not found:
        best = "; ".join(f"{name}: off by {number(gap)}" for gap, name in sorted(gaps)[:4])
        raise Refused(
            f"what lies between its Linears is no known activation (+ LayerNorm): {best} (a residual connection, "
            "another norm such as BatchNorm, a scale, or another activation)"
        )
    return found


def choose_matches(layers: Sequence[Sequence[set[Match]]]) -> tuple[str, tuple[str | None, ...]]:
    """One activation for all layers and one placement per layer that fit every member: layers[l][member].

    A LayerNorm over one unit is constant whatever it reads, so the matches of several layers decide together.
    """
    common = [set.intersection(*members) for members in layers]
    for kind in ACTIVATIONS:
        placements = [[placement for act, placement in sorted(m, key=str) if act == kind] for m in common]
        if all(placements):
            return kind, tuple(found[0] for found in placements)
    seen = sorted({f"{act}" if p is None else f"{act} with norm {p!r}" for row in layers for m in row for act, p in m})
    raise Refused(f"the activation or the LayerNorm's placement differs within the network ({', '.join(seen)})")


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    if tuple(norm.normalized_shape) != (x.shape[-1],):
        raise Refused(f"a LayerNorm is over {list(norm.normalized_shape)}; expected the {x.shape[-1]} hidden units")
    scale, shift = (None if p is None else p.double() for p in (norm.weight, norm.bias))
    return layer_norm(x, scale, shift, norm.eps)[0]


# ---------------------------------------------------------------- the whole network


def _same(name: str, values: Sequence[Any]) -> Any:
    if any(value != values[0] for value in values):
        raise Refused(f"{name} differs within the network ({', '.join(map(str, dict.fromkeys(values)))})")
    return values[0]


def read_spec(traced: Trace, kind: str, dims: tuple[int, int], columns: InputColumns) -> NetworkSpec:
    """The spec of what was traced, read from the first member; the others must have the same Linears."""
    chains = traced.chains()
    shapes = [tuple((c.linear.in_features, c.linear.out_features) for c in chain) for chain in chains]
    shape = _same("the members' layer widths: the shape", shapes)
    if len(shape) < 2:
        with stopping_at(chains[0][0]):
            raise Refused("it has no hidden layer")
    if kind != "critic" and len(chains) > 1:
        raise Refused(f"{len(chains)} of its Linears read the input; expected one MLP")
    with stopping_at(chains[0][-1]):
        _check_output_width(shape[-1][1], kind, dims[1])
    if any(chain[-1].norms for chain in chains):
        raise Refused("a LayerNorm follows the last Linear")
    matches: list[list[set[Match]]] = []
    for i in range(len(shape) - 1):
        matches.append([])
        for chain in chains:
            with stopping_at(f"what lies between {chain[i]} and {chain[i + 1]}"):
                matches[-1].append(matches_between(chain[i], chain[i + 1].input))
    act, placements = choose_matches(matches)
    norms = [call.norms[0] for chain in chains for call in chain if call.norms]
    biases = [tuple(call.linear.bias is not None for call in chain) for chain in chains]
    return NetworkSpec(
        kind=kind,  # type: ignore[arg-type]
        obs_dim=dims[0],
        action_dim=dims[1],
        hidden_dims=tuple(out for _, out in shape[:-1]),
        activation=act,
        layer_norm=placements,  # type: ignore[arg-type]
        layer_norm_eps=_same("LayerNorm's eps", [float(norm.eps) for norm in norms]) if norms else 1e-6,
        time_embedding=columns.time_embedding,  # type: ignore[arg-type]
        time_embedding_dim=columns.time_embedding_dim,
        num_members=len(chains),
        input_order=columns.order,
        obs_columns=columns.obs_columns,
        action_columns=columns.action_columns,
        biases=_same("which Linears have a bias", biases),
        norm_weight=_same("LayerNorm's affine weight", [norm.weight is not None for norm in norms]) if norms else True,
        norm_bias=_same("LayerNorm's bias", [norm.bias is not None for norm in norms]) if norms else True,
    )


def _check_output_width(width: int, kind: str, action_dim: int) -> None:
    if kind == "critic" and width != 1:
        raise Refused(
            f"its last Linear has {width} outputs, expected 1 (a distributional head, or one trunk shared by "
            f"{width} heads)"
        )
    if kind != "critic" and width != action_dim:
        raise Refused(f"its last Linear has {width} outputs, expected action_dim={action_dim}")


def read_sources(module: nn.Module, traced: Trace, spec: NetworkSpec) -> list[Source]:
    """Where the parameters live, in flat_parameters' order."""
    known = {id(tensor): source for source, tensor in named_sources(module)}
    chains = traced.chains()
    flat: list[Source] = []

    def add(tensors: Sequence[Tensor | None], what: str) -> None:
        for tensor in tensors:
            if tensor is None or id(tensor) not in known:
                raise Refused(
                    f"{what} is no registered parameter (weight norm, spectral norm and other parametrisations compute "
                    "it at every call)"
                )
            flat.append(known[id(tensor)])

    for index, has_bias in enumerate(spec.biases):
        calls = [chain[index] for chain in chains]
        add([call.linear.weight for call in calls], f"the weight of Linear {index}")
        if has_bias:
            add([call.linear.bias for call in calls], f"the bias of Linear {index}")
        if index < len(spec.hidden_dims) and spec.layer_norm[index] is not None:
            if spec.norm_weight:
                add([call.norms[0].weight for call in calls], f"the weight of LayerNorm {index}")
            if spec.norm_bias:
                add([call.norms[0].bias for call in calls], f"the bias of LayerNorm {index}")
    return flat
