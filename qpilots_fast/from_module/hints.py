"""What a user says of a module beside the module itself: checked, and the widths and calls that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from ..callables import insides
from ..integers import as_int
from ..networks import PackableNetwork
from ..spec import INPUT_ORDER, TIME_EMBEDDINGS
from .calling import UserCall
from .refusal import Refused

_MOST_DIMS = 64  # widths of obs that are tried where none is known
_HINTS = (
    "obs_dim", "action_dim", "call", "input_order", "time_embedding", "time_embedding_dim", "chunk_shape", "activation",
    "layer_norm", "layer_norm_eps", "weights", "biases", "norm_weights", "norm_biases", "obs", "dims",
    "action_scale", "action_shift", "like", "observation_space", "action_space", "output",
)  # fmt: skip


def check_hints(kind: str, hints: dict[str, Any]) -> None:
    """Reads the hints in place: integers as Python's, widths from spaces and networks, arrays as tensors.

    Raises:
        TypeError, ValueError: for unknown ones, and values outside what they may be.
    """
    unknown = [name for name in hints if name not in _HINTS]
    if unknown:
        raise TypeError(f"from_module: unknown hint {unknown[0]!r}; expected some of {', '.join(_HINTS)}.")
    _read_dims(hints)
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
        if hints.get("dims") is None and hints.setdefault("action_dim", math.prod(chunk)) != math.prod(chunk):
            raise ValueError(
                f"from_module: action_dim is {hints['action_dim']}, chunk_shape {chunk!r}; expected C D = action_dim."
            )
    order = hints.get("input_order")
    if order is not None and sorted(order) != sorted(INPUT_ORDER[kind]):
        raise ValueError(f"from_module: input_order is {order!r}; expected an order of {', '.join(INPUT_ORDER[kind])}.")
    _check_own_inputs(kind, hints)


def _read_dims(hints: dict[str, Any]) -> None:
    """obs_dim and action_dim from a network that is like this one, and from gymnasium's spaces."""
    like = hints.pop("like", None)
    if like is not None and not isinstance(like, PackableNetwork):
        raise TypeError(
            f"from_module: like is {type(like).__name__}; expected a packed network: FlowMLP, from_module(...)."
        )
    spaces = {"obs_dim": hints.pop("observation_space", None), "action_dim": hints.pop("action_space", None)}
    for name, space in spaces.items():
        found = None if like is None else getattr(like.spec, name)
        if space is not None:
            shape = getattr(space, "shape", None)
            if not shape or not hasattr(space, "low"):
                raise TypeError(
                    f"from_module: {type(space).__name__} does not tell {name}; expected a Box, or the hint {name}."
                )
            found = math.prod(map(int, shape))
        if found is not None and as_int(hints.setdefault(name, found)) != found:
            raise ValueError(f"from_module: {name} is {hints[name]}, but the network or space says {found}.")


def _check_own_inputs(kind: str, hints: dict[str, Any]) -> None:
    """obs, dims, action_scale and action_shift."""
    function = hints.get("obs")
    if function is not None and not callable(function):
        raise TypeError(f"from_module: obs is {type(function).__name__}; expected a function of the call's obs.")
    mapped = [name for name in ("dims", "action_scale", "action_shift") if hints.get(name) is not None]
    if mapped and kind != "critic":
        raise ValueError(f"from_module: {mapped[0]} is for critics; a {kind}'s actions are the sampler's own.")
    dims = hints.get("dims")
    if dims is not None:
        hints["dims"] = dims = tuple(map(as_int, dims))
        width = hints.get("action_dim")
        if width is None:
            raise ValueError("from_module: dims needs action_dim, the width of the flow's actions (or like=flow).")
        if not dims or not all(type(dim) is int and 0 <= dim < width for dim in dims) or len(set(dims)) < len(dims):
            raise ValueError(f"from_module: dims is {dims!r}; expected different indices below action_dim={width}.")
    seen = len(dims) if dims is not None else hints.get("action_dim")
    for name in ("action_scale", "action_shift"):
        value = hints.get(name)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            continue
        if isinstance(value, (np.ndarray, list, tuple)):
            hints[name] = value = torch.as_tensor(np.asarray(value, np.float32).copy())
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim > 1:
            raise TypeError(f"from_module: {name} is {value!r}; expected a number, or a floating tensor or array [d].")
        if value.ndim and seen is not None and value.shape[0] not in (1, seen):
            raise ValueError(f"from_module: {name} has {value.shape[0]} numbers; expected {seen}, one for each action.")


def _known_dim(module: nn.Module, hints: dict[str, Any], names: Sequence[str]) -> int | None:
    if hints.get(names[0]) is not None:
        return hints[names[0]]
    values = (as_int(getattr(owner, name, None)) for owner in insides(module) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


def dims_to_try(module: nn.Module, kind: str, hints: dict[str, Any]) -> list[tuple[int, int]]:
    """(obs_dim, action_dim): from hints and attributes, else what the first and last widths leave open."""
    obs_dim = _known_dim(module, hints, ("obs_dim", "observation_dim", "state_dim"))
    action_dim = _known_dim(module, hints, ("action_dim", "act_dim"))
    if obs_dim is not None and action_dim is not None:
        return [(obs_dim, action_dim)]
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    tables = [layer for layer in module.modules() if isinstance(layer, nn.Embedding)]
    if not linears or (kind == "critic" and obs_dim is None and action_dim is None):
        missing = [name for name, value in (("obs_dim", obs_dim), ("action_dim", action_dim)) if value is None]
        raise Refused(f"{' and '.join(missing)} cannot be told from its weights; give the hint(s)", hint=missing[0])
    width = linears[0].in_features
    if kind == "critic":
        return [(width - action_dim, action_dim) if action_dim is not None else (obs_dim, width - obs_dim)]  # type: ignore[list-item,operator]
    if action_dim is None:
        action_dim = linears[-1].out_features
    n_times, n_actions = (1, 1) if kind == "flow" else (3, 2)
    embedding = hints.get("time_embedding_dim")
    widths = [embedding] if embedding else list(dict.fromkeys([*TIME_EMBEDDINGS.values(), 8, 32, 128, 256]))
    # where a time network makes the features, the first Linear may be its own, and they are as wide as it makes them
    made = [layer.out_features for layer in linears] + [table.embedding_dim for table in tables]
    read = dict.fromkeys([width, *(layer.in_features for layer in linears)])
    features = dict.fromkeys([*(n_times * w for w in widths), *([] if embedding else made)])
    left = dict.fromkeys(reads - n_actions * action_dim - f for reads in read for f in features)
    found = [(rest, action_dim) for rest in left if rest > 0 and obs_dim in (None, rest)][:_MOST_DIMS]
    if obs_dim is None and (width, action_dim) not in found:
        found.append((width, action_dim))  # an encoder's first Linear reads obs alone
    if not found:
        what = "none for obs" if obs_dim is None else f"other than obs_dim={obs_dim} for obs"
        raise Refused(
            f"its first Linear reads {width} columns, which with action_dim={action_dim} and t leaves {what}; give the "
            "hints obs_dim and action_dim",
            hint="obs_dim",
        )
    return found


def calls_to_try(kind: str, hints: dict[str, Any]) -> list[UserCall]:
    """The ways that a module may be called, the likely one first."""
    chunk = hints.get("chunk_shape")
    names = ("obs", "dims", "action_scale", "action_shift", "output")
    shown: dict[str, Any] = {name: hints.get(name) for name in names}
    if hints.get("call") is not None:
        return [UserCall(kind, custom=hints["call"], chunk=chunk, **shown)]
    order = tuple(hints.get("input_order") or INPUT_ORDER[kind])
    embedding = hints.get("time_embedding") or "raw"
    width = hints.get("time_embedding_dim") or TIME_EMBEDDINGS[embedding]
    joined = UserCall(kind, "concatenated", None, order, embedding, width, **shown)
    return [
        UserCall(kind, chunk=chunk, **shown),
        *([UserCall(kind, "flat_time", chunk=chunk, **shown)] if kind != "critic" else []),
        joined,
    ]
