"""What from_module found in a module, or where it stopped, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..callables import name_of
from ..networks import PackableNetwork
from ..row_ops import RowOp
from ..spec import NetworkSpec
from .held import Held
from .modules import Recognition
from .refusal import Refused
from .sources import Source
from .way_out import as_callable

_PLACES = {"flow": "flow", "critic": "critic", "meta_flow_map": "posterior"}


@dataclass(frozen=True)
class ModuleExplanation:
    """What became of a module; str() is the text that was printed.

    Args:
        packs: whether from_module packs it.
        layers: what was recognised, a line each; empty where it was refused.
        reason, stopped_at, hint: of a refusal: why, at which part of the module, and the hint that could help.
        line: the Python that makes the sampler's network of `module` as a callable.
        callable_seconds: of one step of it at batch 1, measured; None where it could not be called.
    """

    title: str
    packs: bool
    layers: tuple[str, ...] = ()
    reason: str = ""
    stopped_at: str = ""
    hint: str = ""
    line: str = ""
    callable_seconds: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.title} {'packs' if self.packs else 'runs as a callable'}", *map("  {}".format, self.layers)]
        if not self.packs:
            helps = f"{self.hint}= could help" if self.hint else "none can help"
            lines += [f"  stopped at   {self.stopped_at or 'the whole module'}", f"  because      {self.reason}"]
            lines += [f"  hint         {helps}"]
        if self.line:
            cost = "one forward and one backward a step, in PyTorch"
            if self.callable_seconds is not None:
                cost += f": {1e3 * self.callable_seconds:.3g} ms at batch 1, measured here"
            lines += [f"  as callable  {self.line}", f"               {cost}"]
        return "\n".join(lines)


def explain_packed(network: PackableNetwork) -> ModuleExplanation:
    """Of a network that is packed already."""
    return ModuleExplanation(_title(network, network.spec.kind), True, tuple(_layers(network.spec, None)))


def explain_own(
    module: nn.Module, kind: str, hints: dict[str, Any], dims: Sequence[tuple[int, int]], found: Recognition | None,
    refusal: Refused | None,
) -> ModuleExplanation:  # fmt: skip
    """Of a user's module.

    Args:
        dims: (obs_dim, action_dim) that it may have. found, refusal: what came of it, one of the two.
    """
    line, seconds = as_callable(module, kind, dims, hints)
    title = _title(module, kind)
    if found is not None:
        layers = tuple(_layers(found.spec, found.sources))
        return ModuleExplanation(title, True, layers, line=line, callable_seconds=seconds)
    assert refusal is not None
    return ModuleExplanation(
        title, False, reason=str(refusal), stopped_at=refusal.where, hint=refusal.hint, line=line,
        callable_seconds=seconds,
    )  # fmt: skip


def _title(module: nn.Module, kind: str) -> str:
    return f"{_PLACES[kind]} {name_of(module)}"


def _layers(spec: NetworkSpec, sources: Sequence[Source | Held] | None) -> Iterator[str]:
    """The structure, a line each."""
    if spec.num_members > 1:
        yield f"members      {spec.num_members}"
    for block in spec.input_order:
        yield f"reads        {_block(spec, block)}"
    weights = _weights(spec, sources)
    for index, (fan_in, fan_out) in enumerate(spec.layer_dims):
        parts = [f"Linear {fan_in} -> {fan_out}" + ("" if spec.biases[index] else " without bias")]
        if index < len(spec.hidden_dims):
            parts += [_in_words(op) for op in spec.row_chains[index]]
        yield f"layer {index}      {', '.join(parts)}{weights[index]}"


_WORDS = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "keep": "row kept",
    "add": "kept row added",
    "film": "scaled and shifted by what the module makes of t",
}


def _in_words(op: RowOp) -> str:
    """One operation of a chain."""
    if op.name in _WORDS:
        return _WORDS[op.name]
    return op.name + (f"({', '.join(f'{number:g}' for number in op.numbers)})" if op.numbers else "")


def _block(spec: NetworkSpec, block: str) -> str:
    width = spec.block_dim(block)
    columns = f"{block} [{width} columns]"
    if block == "obs" and spec.obs_columns is not None:
        return f"{columns} that the module itself makes of obs [{spec.obs_dim}], once a call"
    if block == "actions" and spec.action_columns is not None:
        return f"{columns}: actions {list(spec.action_columns)} of {spec.action_dim}, scaled and shifted"
    if block in ("t", "s", "u"):
        if spec.time_embedding == "module":
            return f"{columns} that the module itself makes of the times, when what they follow changed"
        return f"{columns}, {spec.time_embedding}"
    return columns


def _weights(spec: NetworkSpec, sources: Sequence[Source | Held] | None) -> list[str]:
    """Where the first member's weights are, layer by layer."""
    if sources is None:
        return [""] * len(spec.layer_dims)
    names, at, copies = [], 0, 1 if spec.stacked else spec.num_members
    for index, has_bias in enumerate(spec.biases):
        ops = spec.row_chains[index] if index < len(spec.hidden_dims) else ()
        names.append(f"  ({sources[at]})")
        at += copies * (1 + has_bias + sum(op.weight + op.bias for op in ops))
    return names
