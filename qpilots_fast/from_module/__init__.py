"""from_module: the user's own nn.Module as a network that the backends can run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..activations import ACTIVATIONS
from ..callables import insides, is_list, name_of, unwrapped
from ..critic_outputs import describe, layout_of, read_output
from ..integers import as_int
from ..networks import PackableNetwork
from ..spec import INPUT_ORDER, KINDS, MOVING_BLOCK, TIME_EMBEDDINGS, NetworkSpec
from . import layers, stacked
from .calling import SCALES, OutputLayout, UserCall, check_argument_order
from .dependence import check_other_tensors, check_repeats, followed_modes
from .modules import ModuleNetwork, Recognition, dropouts
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
from .random_states import kept_random_states
from .refusal import FollowsOther, NotCallable, Refused, first_line
from .sources import named_sources, randomise, submodule
from .way_out import way_out

__all__ = ["ModuleNetwork", "Recognition", "cure_for", "from_module", "recognise"]

_HINTS = (
    "obs_dim", "action_dim", "call", "input_order", "time_embedding", "time_embedding_dim", "chunk_shape", "activation",
    "layer_norm", "layer_norm_eps", "weights", "biases", "norm_weights", "norm_biases",
)  # fmt: skip


def from_module(module: nn.Module | Sequence[nn.Module], kind: str = "flow", **hints: Any) -> PackableNetwork:
    """Recognises an MLP, or an ensemble of equal MLPs, in the user's module; the result shares its parameters.

    The structure is read from the module's own numbers and then proved: on float64 copies with random parameters,
    outputs and input gradients must agree on several batches. The result's forward calls the user's module, so
    training goes on as before; optimiser steps, load_state_dict, `.data` writes and `.to()` are seen by the next
    sampling call. The original module is not changed.

    Args:
        module: called as module(obs, noisy_actions, t) ("flow"), module(obs, actions) ("critic"), or
            module(obs, xbar, noisy_actions, t, s, u) ("meta_flow_map"), t being [B, 1] or [B]; or as
            module(columns) with one tensor, the blocks concatenated in `input_order`. A list, tuple or ModuleList of
            critics is an ensemble. Critics may return [E, B], [B, E], [E, B, 1], [B, 1], [B], or a list of these last.
        kind: "flow", "critic" or "meta_flow_map".
        hints: what the numbers cannot tell, or what shortens the search:
            obs_dim, action_dim: the widths (read from attributes of that name, or inferred for flows, where absent).
            call: (module, *blocks) -> output, for another argument order or output; blocks as above, times [B, 1].
            input_order: of the blocks "obs", "actions" | "noisy_actions", "xbar", "t", "s", "u" among the columns.
            time_embedding, time_embedding_dim: "raw", "sinusoidal" or "fourier", and its width.
            chunk_shape: (C, D) where the module takes actions as [B, C, D]; the result takes [B, A], A = C D.
            activation, layer_norm, layer_norm_eps: for modules that hold plain tensors.
            weights, biases, norm_weights, norm_biases: for these, per layer, dotted names or the tensors themselves.

    Returns:
        A PackableNetwork; pass it to SteeredSampler.

    Raises:
        ValueError: where the module is none of these, with the reason, the numbers, and how SteeredSampler takes it all
            the same: as a callable, which stays PyTorch.
        TypeError: for arguments of the wrong type.
    """
    if kind not in KINDS:
        raise ValueError(f"from_module: kind is {kind!r}; expected one of {', '.join(map(repr, KINDS))}.")
    module = unwrapped(module)  # a compiled module would compile anew for the proof
    if isinstance(module, PackableNetwork):
        if module.spec.kind != kind:
            raise ValueError(f"from_module: kind is {kind!r}, but the module is a packed {module.spec.kind}.")
        return module
    if is_list(module) or isinstance(module, (list, tuple)):
        module = [unwrapped(member) for member in module]
        if module and all(isinstance(member, nn.Module) for member in module):
            module = nn.ModuleList(module)
    if not isinstance(module, nn.Module):
        raise TypeError(f"from_module: module is {type(module).__name__}; expected an nn.Module or a list of them.")
    _check_hints(kind, hints)
    try:
        return recognise(module, kind, hints)[0].network(module)
    except Refused as refusal:
        cure = cure_for(refusal, module, kind, hints)
        raise ValueError(f"from_module: {name_of(module)} cannot run as a packed {kind}: {refusal}. {cure}") from None


def recognise(
    module: nn.Module, kind: str, hints: dict[str, Any], in_eval_mode: bool = False
) -> tuple[Recognition, nn.Module]:
    """What a module is, as `from_module` finds out, and the float64 copy that it was proved on.

    Args:
        module: not called; no random state is changed.
        hints: checked ones.
        in_eval_mode: recognises the module in eval mode, whatever mode it is in.

    Raises:
        Refused: with the reason.
    """
    _check_layers(module, in_eval_mode)
    if hints.get("call") is None:
        check_argument_order(module, kind)
    with (
        torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.device("cpu"), kept_random_states(),
    ):  # fmt: skip
        if hints.get("weights"):
            hints = {**hints, "weights": stacked.roles_from_hints(module, hints)}
        probe = _double_copy(module)
        return _recognise(probe.eval() if in_eval_mode else probe, kind, hints), probe


def _check_hints(kind: str, hints: dict[str, Any]) -> None:
    unknown = [name for name in hints if name not in _HINTS]
    if unknown:
        raise TypeError(f"from_module: unknown hint {unknown[0]!r}; expected some of {', '.join(_HINTS)}.")
    for name, allowed in (("activation", tuple(ACTIVATIONS)), ("time_embedding", tuple(TIME_EMBEDDINGS))):
        if hints.get(name) is not None and hints[name] not in allowed:
            raise ValueError(f"from_module: {name} is {hints[name]!r}; expected one of {', '.join(allowed)}.")
    for name in ("obs_dim", "action_dim", "time_embedding_dim"):
        if hints.get(name) is None:
            continue
        value = hints[name] = as_int(hints[name])
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"from_module: {name} is {value!r}; expected a non-negative integer.")
    chunk = hints.get("chunk_shape")
    if chunk is not None:
        hints["chunk_shape"] = chunk = tuple(map(as_int, chunk))
        if len(chunk) != 2 or not all(type(size) is int and size > 0 for size in chunk):
            raise ValueError(f"from_module: chunk_shape is {chunk!r}; expected (C, D), two integers >= 1.")
        if hints.setdefault("action_dim", math.prod(chunk)) != math.prod(chunk):
            raise ValueError(
                f"from_module: action_dim is {hints['action_dim']}, chunk_shape {chunk!r}; expected C D = action_dim."
            )
    order = hints.get("input_order")
    if order is not None and sorted(order) != sorted(INPUT_ORDER[kind]):
        raise ValueError(f"from_module: input_order is {order!r}; expected an order of {', '.join(INPUT_ORDER[kind])}.")


def _check_layers(module: nn.Module, in_eval_mode: bool) -> None:
    dropping = [] if in_eval_mode else dropouts(module)
    for name, layer in module.named_modules():
        if layer.training and any(layer is dropout for dropout in dropping):
            raise Refused(f"{name} is {layer} in training mode, so its output is random; call .eval() or set p=0 first")
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise Refused(f"{name} is {type(layer).__name__}, which is not supported")
    if any(tensor.is_meta for tensor in module.parameters()) and not named_sources(module):
        raise Refused("its parameters are on the meta device", "Give them values first: module.to_empty(device='cpu').")
    lazy = next((name for name, tensor in module.named_parameters() if is_lazy(tensor)), None)
    if lazy is not None:
        raise Refused(f"{lazy} has no shape yet", "Call the module once on a batch, which gives it one, and try again.")


# ---------------------------------------------------------------- widths and calls to try


def _known_dim(module: nn.Module, hints: dict[str, Any], names: Sequence[str]) -> int | None:
    if hints.get(names[0]) is not None:
        return hints[names[0]]
    values = (as_int(getattr(owner, name, None)) for owner in insides(module) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


def _dims_to_try(module: nn.Module, kind: str, hints: dict[str, Any]) -> list[tuple[int, int]]:
    """(obs_dim, action_dim): from hints and attributes, else what the first and last widths leave open."""
    obs_dim = _known_dim(module, hints, ("obs_dim", "observation_dim", "state_dim"))
    action_dim = _known_dim(module, hints, ("action_dim", "act_dim"))
    if obs_dim is not None and action_dim is not None:
        return [(obs_dim, action_dim)]
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not linears or (kind == "critic" and obs_dim is None and action_dim is None):
        missing = [name for name, value in (("obs_dim", obs_dim), ("action_dim", action_dim)) if value is None]
        raise Refused(f"{' and '.join(missing)} cannot be told from its weights; give the hint(s)")
    width = linears[0].in_features
    if kind == "critic":
        return [(width - action_dim, action_dim) if action_dim is not None else (obs_dim, width - obs_dim)]  # type: ignore[list-item,operator]
    if action_dim is None:
        action_dim = linears[-1].out_features
    n_times, n_actions = (1, 1) if kind == "flow" else (3, 2)
    embedding = hints.get("time_embedding_dim")
    widths = [embedding] if embedding else list(dict.fromkeys([*TIME_EMBEDDINGS.values(), 8, 32, 128, 256]))
    left = [width - n_actions * action_dim - n_times * w for w in widths]
    found = [(rest, action_dim) for rest in left if rest > 0 and obs_dim in (None, rest)]
    if not found:
        what = "none for obs" if obs_dim is None else f"other than obs_dim={obs_dim} for obs"
        raise Refused(
            f"its first Linear reads {width} columns, which with action_dim={action_dim} and t leaves {what}; give the "
            "hints obs_dim and action_dim"
        )
    return found


def cure_for(refusal: Refused, module: nn.Module, kind: str, hints: dict[str, Any]) -> str:
    """What to do about a refusal, in a sentence."""
    try:
        dims = _dims_to_try(module, kind, hints)
    except Refused:
        dims = []
    return refusal.cure or way_out(module, kind, dims, hints)


def _calls_to_try(kind: str, hints: dict[str, Any]) -> list[UserCall]:
    chunk = hints.get("chunk_shape")
    if hints.get("call") is not None:
        return [UserCall(kind, custom=hints["call"], chunk=chunk)]
    order = tuple(hints.get("input_order") or INPUT_ORDER[kind])
    embedding = hints.get("time_embedding") or "raw"
    width = hints.get("time_embedding_dim") or TIME_EMBEDDINGS[embedding]
    joined = UserCall(kind, "concatenated", None, order, embedding, width)
    return [
        UserCall(kind, chunk=chunk),
        *([UserCall(kind, "flat_time", chunk=chunk)] if kind != "critic" else []),
        joined,
    ]


# ---------------------------------------------------------------- recognition


def _double_copy(module: nn.Module) -> nn.Module:
    """A float64 copy on the CPU that shares nothing."""
    try:
        probe = copy.deepcopy(module).to("cpu") if not _has_meta(module) else copy.deepcopy(module)
    except Exception as error:
        raise Refused(f"it cannot be copied for the proof ({type(error).__name__}: {error})") from None
    probe = probe.double()
    for source, tensor in named_sources(probe):
        if tensor.dtype != torch.float64 and source.keys:  # a mapping held as a plain attribute: .double() passed it by
            holder = submodule(probe, source.path)
            holder = getattr(holder, source.name) if source.name else holder
            for key in source.keys[:-1]:
                holder = holder[key]
            holder[source.keys[-1]] = tensor.detach().cpu().double().requires_grad_(tensor.requires_grad)
    return probe


def _has_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in module.parameters())


def _recognise(probe: nn.Module, kind: str, hints: dict[str, Any]) -> Recognition:
    generator = torch.Generator().manual_seed(0)
    reasons: list[str] = []
    for dims, call, named in _attempts(probe, kind, hints, generator):
        blocks = list(named.values())
        try:
            with torch.no_grad():
                traced = layers.trace(probe, call, blocks)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(block.shape)}" for name, block in named.items())
            reasons.append(f"{call} with {shapes} raised {type(error).__name__}: {first_line(error)}")
            continue
        way = _from_layers if traced.traceable and traced.calls else _from_tensors
        try:
            found = way(probe, kind, dims, call, traced, hints, generator)
        except Refused:
            check_repeats(probe, call, blocks)
            raise
        return replace(found, modes=followed_modes(probe, call, found.layout, blocks))
    cast = (
        " (the proof runs in float64, which a cast to float32 inside the module stops)"
        if "dtype" in str(reasons)
        else ""
    )
    asks = "" if hints.get("call") is not None or cast else " (give the hint call where it takes other arguments)"
    raise NotCallable("it could not be called: " + "; ".join(reasons[:3]) + cast + asks)


def _attempts(
    probe: nn.Module, kind: str, hints: dict[str, Any], generator: torch.Generator
) -> Iterator[tuple[tuple[int, int], UserCall, dict[str, Tensor]]]:
    for dims in _dims_to_try(probe, kind, hints):
        if dims[0] < 0 or dims[1] < 1:
            raise Refused(
                f"obs_dim={dims[0]}, action_dim={dims[1]} do not fit its first Linear; give both hints, obs_dim and "
                "action_dim"
            )
        for call in _calls_to_try(kind, hints):
            yield dims, call, random_blocks(kind, dims, batch_size_apart_from(0), generator)


def _layout(kind: str, output: Any, batch_size: int, members: int) -> OutputLayout:
    if kind != "critic":
        if not isinstance(output, Tensor):
            raise Refused(f"it returns {describe(output)}; expected a tensor [B, action_dim] (use the hint call)")
        return OutputLayout()
    try:
        layout = layout_of(output, batch_size)
        found = len(read_output(output, layout))
    except (TypeError, ValueError):
        found = None
    if found != members:
        raise Refused(
            f"it returns {describe(output)} for a batch of {batch_size} and {members} member(s); expected [E, B], "
            "[B, E], [E, B, 1], or a list of [B, 1] (use the hint call)"
        )
    return OutputLayout(layout)


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


def _from_layers(
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
    layout = _layout(kind, traced.output, len(named["obs"]), spec.num_members)
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


def _from_tensors(
    probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, _: layers.Trace, hints: dict[str, Any],
    generator: torch.Generator,
) -> Recognition:  # fmt: skip
    """A module that holds its weights as plain tensors."""
    if hints.get("weights"):
        given = hints["weights"]
        proposals = [given, stacked.transposed(given)]
    else:
        proposals = list(stacked.propose_roles(probe))
    reasons = ["none of its tensors look like the weights of an MLP (expected [E, in, out], [E, out, in] or [out, in])"]
    for roles in proposals:
        shapes = [source.find(probe).shape for source in roles.weights]
        if any(b[2] != a[1] for a, b in pairwise(shapes)):
            continue
        used = [source.base(submodule(probe, source.path)) for source in roles.flat]
        randomise(used, generator)
        try:
            spec, layout = _search(probe, kind, dims, call, roles, shapes, hints, generator)
            prove(probe, call, layout, spec, roles.flat, generator)
        except Refused as refusal:
            reasons.append(str(refusal))
            continue

        def prove_again(times: bool, roles=roles, spec=spec, layout=layout) -> None:
            if times or spec.time_embedding == "raw":  # else what is not trained may make the time features
                prove(probe, call, layout, spec, roles.flat, generator, scales=SCALES[:1])

        check_other_tensors(probe, set(map(id, used)), prove_again, generator)
        return Recognition(spec, tuple(roles.flat), call, layout)
    raise Refused(reasons[-1])


def _search(
    probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, roles: stacked.Roles,
    shapes: Sequence[torch.Size], hints: dict[str, Any], generator: torch.Generator,
) -> tuple[NetworkSpec, OutputLayout]:  # fmt: skip
    members = shapes[0][0]
    size = batch_size_apart_from(members)
    named = random_blocks(kind, dims, size, generator)
    with torch.no_grad():
        output = call(probe, list(named.values()))
        layout = _layout(kind, output, size, members)
        layouts = [layout] if kind != "meta_flow_map" else [layout, OutputLayout(is_velocity=True)]
        specs = stacked.propose_specs(kind, dims, shapes, roles, hints)
        return stacked.search(probe, specs, roles, named, layout.apply(output), layouts)
