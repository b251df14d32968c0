"""Flax parameter trees of JAX agents as networks that the backends run: arrays in, copies out; flax is not imported.

The trees of OGBench's, FQL's, QGF's and QAM's agents: an MLP of `Dense_i` (kernel [in, out], bias [out]) and, after
each hidden layer's activation, `LayerNorm_i` (scale, bias; epsilon 1e-6), its GELU the tanh form; an ensemble is one
tree whose arrays have a leading axis of members (`nn.vmap`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..networks import CriticEnsemble, FlowMLP, MetaFlowMap, PackableNetwork
from ..spec import KINDS, TIME_EMBEDDINGS

__all__ = ["from_flax"]

_LAYER = re.compile(r"Dense_(\d+)")


def from_flax(
    params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    kind: str = "flow",
    *,
    obs_dim: int | None = None,
    action_dim: int | None = None,
    activation: str = "gelu_tanh",
    layer_norm: str = "post",
    layer_norm_eps: float = 1e-6,
    time_embedding: str = "raw",
    time_embedding_dim: int | None = None,
) -> PackableNetwork:
    """The network of one flax module's parameters, as an ordinary module of this package with copies of them.

    Args:
        params: one module's subtree of arrays (numpy's, jax's, or what `np.asarray` takes), e.g.
            agent.network.params["modules_actor_bc_flow"]; levels with one child ("params", "mlp", "value_net") are
            stepped through. For a critic also a list of subtrees, one a member.
        kind: "flow", read as v(obs, actions, t); "critic", as Q(obs, actions); or "meta_flow_map", as
            vhat(obs, xbar, noisy_actions, t, s, u); columns in this order.
        obs_dim: S. A critic needs this or action_dim; the others' output tells A, and that S.
        action_dim: A.
        activation: of the hidden layers; flax's own `nn.gelu` is "gelu_tanh", `nn.swish` "silu".
        layer_norm: where the tree's LayerNorms stand: "post" (Linear, activation, LayerNorm) or "pre".
        layer_norm_eps: flax's default is 1e-6.
        time_embedding: as FlowMLP's: "raw", "sinusoidal" (QGF) or "fourier" (QAM).
        time_embedding_dim: as FlowMLP's.

    Returns:
        FlowMLP, CriticEnsemble or MetaFlowMap, float32.

    Raises:
        ValueError: where the tree is no such MLP, or its widths do not fit, with the paths and the numbers.
        TypeError: for arguments of the wrong type.
    """
    if kind not in KINDS:
        raise ValueError(f"from_flax: kind is {kind!r}; expected one of {', '.join(map(repr, KINDS))}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"from_flax: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
    if layer_norm not in ("pre", "post"):
        raise ValueError(f"from_flax: layer_norm is {layer_norm!r}; expected 'post' or 'pre', where the tree has any.")
    if isinstance(params, (list, tuple)):
        if kind != "critic":
            raise TypeError(f"from_flax: params is a list; expected one subtree, since kind is {kind!r}.")
        layers = _stacked([_layers(tree, f"params[{i}]") for i, tree in enumerate(params)])
    else:
        layers = _layers(params, "params")
    ensemble = layers[0]["kernel"].ndim == 3
    if ensemble and kind != "critic":
        raise ValueError(
            f"from_flax: the kernels have shape {list(layers[0]['kernel'].shape)}, those of an ensemble, but kind is "
            f"{kind!r}; expected [in, out]. Was a critic's subtree given?"
        )
    hidden = tuple(int(layer["kernel"].shape[-1]) for layer in layers[:-1])
    columns, outputs = int(layers[0]["kernel"].shape[-2]), int(layers[-1]["kernel"].shape[-1])
    norms = tuple(layer_norm if "scale" in layer else None for layer in layers[:-1])
    shape: dict[str, Any] = dict(
        hidden_dims=hidden, activation=activation, layer_norm=norms, layer_norm_eps=layer_norm_eps
    )
    made: FlowMLP | MetaFlowMap | CriticEnsemble
    if kind == "critic":
        if outputs != 1:
            raise ValueError(
                f"from_flax: the critic's last kernel gives {outputs} numbers; expected 1. A distributional critic's "
                "logits are not values; build its module in PyTorch and pass that."
            )
        obs_dim, action_dim = _critic_dims(columns, obs_dim, action_dim)
        made = CriticEnsemble(obs_dim, action_dim, layers[0]["kernel"].shape[0] if ensemble else 1, **shape)
    else:
        if action_dim not in (None, outputs):
            raise ValueError(f"from_flax: action_dim is {action_dim}, but the last kernel gives {outputs} numbers.")
        if time_embedding not in TIME_EMBEDDINGS:
            raise ValueError(
                f"from_flax: time_embedding is {time_embedding!r}; expected one of "
                f"{', '.join(map(repr, TIME_EMBEDDINGS))}."
            )
        width = TIME_EMBEDDINGS[time_embedding] if time_embedding_dim is None else time_embedding_dim
        actions, times = (1, 1) if kind == "flow" else (2, 3)
        left = columns - actions * outputs - times * width
        if left < 1 or obs_dim not in (None, left):
            raise ValueError(
                f"from_flax: the first kernel reads {columns} columns; with {actions} x {outputs} of actions and "
                f"{times} x {width} of time ({time_embedding}) {left} are left for obs, expected "
                f"{'at least 1' if obs_dim is None else obs_dim}. Is the time embedded (time_embedding=, "
                "time_embedding_dim=), or does the network read an encoder's features?"
            )
        cls = FlowMLP if kind == "flow" else MetaFlowMap
        made = cls(left, outputs, time_embedding=time_embedding, time_embedding_dim=width, **shape)
    _fill(made, layers)
    return made


def _critic_dims(columns: int, obs_dim: int | None, action_dim: int | None) -> tuple[int, int]:
    if obs_dim is None and action_dim is None:
        raise ValueError(
            f"from_flax: a critic's {columns} columns do not tell obs from actions; expected obs_dim= or action_dim=."
        )
    obs = columns - action_dim if obs_dim is None else obs_dim  # type: ignore[operator]
    actions = columns - obs
    if obs < 1 or actions < 1 or action_dim not in (None, actions):
        raise ValueError(
            f"from_flax: the critic's first kernel reads {columns} columns; expected obs_dim + action_dim, got "
            f"obs_dim={obs_dim}, action_dim={action_dim}. Does it read an encoder's features or a goal?"
        )
    return obs, actions


def _fill(made: PackableNetwork, layers: Sequence[dict[str, np.ndarray]]) -> None:
    """Copies the arrays into the parameters, in the order of flat_parameters."""
    flat: list[np.ndarray] = []
    for layer in layers:
        flat += [layer["kernel"].swapaxes(-1, -2), layer["bias"]]
        flat += [layer["scale"], layer["norm_bias"]] if "scale" in layer else []
    with torch.no_grad():
        for parameter, array in zip(made.flat_parameters(), flat, strict=True):
            parameter.copy_(_tensor(array).reshape(parameter.shape))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _layers(tree: Any, path: str) -> list[dict[str, np.ndarray]]:
    """kernel, bias and, where there is a norm, scale and norm_bias of each layer of the MLP in the tree."""
    path, tree = _mlp(tree, path)
    numbers = sorted(int(match[1]) for name in tree if (match := _LAYER.fullmatch(name)))
    if numbers != list(range(len(numbers))):
        raise ValueError(f"from_flax: {path} has Dense_{numbers}; expected Dense_0, Dense_1 and so on.")
    known = {f"Dense_{i}" for i in numbers} | {f"LayerNorm_{i}" for i in numbers[:-1]}
    others = sorted(name for name in tree if name not in known)
    if others:
        raise ValueError(
            f"from_flax: {path} has {', '.join(others)} beside its {len(numbers)} Dense layers; expected a plain MLP "
            "(Dense_i, and LayerNorm_i after hidden ones). Write the module in PyTorch and pass that to SteeredSampler."
        )
    layers = []
    for i in numbers:
        layer = {"kernel": _array(tree[f"Dense_{i}"], "kernel", f"{path}.Dense_{i}")}
        kernel = layer["kernel"]
        if kernel.ndim not in (2, 3):
            raise ValueError(
                f"from_flax: {path}.Dense_{i}.kernel has shape {list(kernel.shape)}; expected [in, out], or "
                "[members, in, out]."
            )
        row = kernel.shape[:-2] + kernel.shape[-1:]
        layer["bias"] = _row(tree[f"Dense_{i}"], "bias", row, 0.0, f"{path}.Dense_{i}")
        norm = f"LayerNorm_{i}"
        if norm in tree:
            layer["scale"] = _row(tree[norm], "scale", row, 1.0, f"{path}.{norm}")
            layer["norm_bias"] = _row(tree[norm], "bias", row, 0.0, f"{path}.{norm}")
        layers.append(layer)
    for i, (before, after) in enumerate(pairwise(layers)):
        have, reads = before["kernel"].shape, after["kernel"].shape
        if have[:-2] != reads[:-2] or have[-1] != reads[-2]:
            raise ValueError(
                f"from_flax: {path}.Dense_{i}.kernel has shape {list(have)} and Dense_{i + 1}.kernel {list(reads)}; "
                "expected the next one to read what this one gives."
            )
    if len(layers) < 2:
        raise ValueError(f"from_flax: {path} has {len(layers)} Dense layer; expected a hidden layer and an output.")
    return layers


def _mlp(tree: Any, path: str) -> tuple[str, Mapping[str, Any]]:
    """The one subtree that has Dense layers, and where it is."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"from_flax: {path} is {type(tree).__name__}; expected a mapping of parameters.")
    while not any(_LAYER.fullmatch(name) for name in tree):
        branches = [name for name, value in tree.items() if isinstance(value, Mapping)]
        if len(tree) != 1 or len(branches) != 1:
            raise ValueError(
                f"from_flax: {path} has {', '.join(map(str, tree)) or 'nothing'}; expected one module's subtree, with "
                f"Dense_0 in it. Pass the one that you mean, e.g. params[{next(iter(tree), 'name')!r}]; an encoder "
                "stays in its framework, and its features are the obs."
            )
        path, tree = f"{path}.{branches[0]}", tree[branches[0]]
    return path, tree


def _array(owner: Any, name: str, path: str) -> np.ndarray:
    if not isinstance(owner, Mapping) or name not in owner:
        got = ", ".join(map(str, owner)) if isinstance(owner, Mapping) else type(owner).__name__
        raise ValueError(f"from_flax: {path} has {got}; expected {name}.")
    array = np.asarray(owner[name]).astype(np.float32)  # bfloat16 is a type of ml_dtypes, which torch does not read
    if not np.isfinite(array).all():
        raise ValueError(f"from_flax: {path}.{name} has non-finite values.")
    return array


def _row(owner: Mapping[str, Any], name: str, shape: tuple[int, ...], otherwise: float, path: str) -> np.ndarray:
    if name not in owner:
        return np.full(shape, otherwise, np.float32)
    array = _array(owner, name, path)
    if array.shape != shape:
        raise ValueError(f"from_flax: {path}.{name} has shape {list(array.shape)}; expected {list(shape)}.")
    return array


def _stacked(members: Sequence[list[dict[str, np.ndarray]]]) -> list[dict[str, np.ndarray]]:
    """The layers of several members, each array with a leading axis of members."""
    if not members:
        raise ValueError("from_flax: params is an empty list; expected one subtree a member.")
    first = [{name: array.shape for name, array in layer.items()} for layer in members[0]]
    for i, layers in enumerate(members[1:], 1):
        shapes = [{name: array.shape for name, array in layer.items()} for layer in layers]
        if shapes != first:
            raise ValueError(f"from_flax: params[{i}] has layers {shapes}; expected those of params[0]: {first}.")
    if members[0][0]["kernel"].ndim != 2:
        raise ValueError("from_flax: params is a list of ensembles; expected one member each, or one ensemble.")
    return [{name: np.stack([m[i][name] for m in members]) for name in layer} for i, layer in enumerate(members[0])]
