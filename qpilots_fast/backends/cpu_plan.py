"""What the native CPU backend is handed: a call's plan, tables of its parameters' memory, networks' own columns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..row_ops import Chain, plain_layer
from ..spec import BoundNetwork, NetworkSpec, NormParameters, SamplerSpec
from .native import DTYPES, INPUT_KINDS, ISA_VARIABLE, load_module, write_watch_refusal
from .params import steering_params

_DTYPE_CODES = {getattr(torch, name): code for code, name in enumerate(DTYPES)}
MOST_NORMS = 3  # of a layer, as in csrc/cpu/call/network.h


# ---------------------------------------------------------------- plans and pointer tables


class Plan(NamedTuple):
    handle: Any  # _C.CpuPlan
    networks: tuple[Any, Any, Any]  # _C.CpuNetwork of flow, critic, posterior; None where the call does not use it


def asked_isa() -> str:
    """The instruction set that the environment asks for; empty for the best."""
    return os.environ.get(ISA_VARIABLE, "")


def input_kind(block: str) -> int:
    """Which of INPUT_KINDS a block of columns is."""
    return INPUT_KINDS.index("x" if block in ("noisy_actions", "actions") else block)


def weight_format(precision: str, networks: Iterable[NetworkSpec]) -> str:
    """The format of weights and operands: the precision, save where bfloat16 would lose a LayerNorm over two units.

    Their normalised values are +-1 up to eps: rounded to bfloat16 they leave nothing of the derivative, and a norm
    match makes that rounding the whole gradient (50 times torch's error in the actions; over 3 units as torch's).
    """
    layers = ((width, chain) for spec in networks for width, chain in zip(spec.hidden_dims, spec.row_chains))
    return "float32" if any(width == 2 and any(op.is_norm for op in chain) for width, chain in layers) else precision


def _hidden(chain: Chain) -> dict[str, Any]:
    """A hidden layer as the native module takes it: an activation with at most one LayerNorm, or a chain."""
    plain = plain_layer(chain)
    if plain is None:
        return {"chain": [(op.kind, op.name, list(op.numbers)) for op in chain]}
    activation, placement, norm = plain
    return {
        "activation": activation,
        "norm": placement,
        "layer_norm_eps": 0.0 if norm is None else norm.numbers[0],
    }


@lru_cache(maxsize=256)
def network_handle(spec: NetworkSpec, precision: str, isa: str) -> Any:
    """The _C.CpuNetwork of a structure."""
    inputs = [(input_kind(name), part.start, part.stop - part.start) for name, part in spec.block_slices.items()]
    shape = {
        "members": spec.num_members,
        "widths": [*spec.hidden_dims, spec.output_dim],
        "hidden": [_hidden(chain) for chain in spec.row_chains],
        "scalar_head": spec.kind == "critic",
        "inputs": inputs,
    }
    return load_module().cpu_network(shape, precision, isa)


def _time_rows(spec: NetworkSpec, times: Sequence[float]) -> dict[str, np.ndarray]:
    if spec.time_embedding == "module":  # of each call: OwnRows
        return {block: np.zeros(0, np.float32) for block in ("t", "s", "u")}
    return {block: rows.to(torch.float32).numpy() for block, rows in spec.time_rows(times).items()}


@lru_cache(maxsize=64)
def make_plan(spec: SamplerSpec, isa: str) -> Plan:
    """A sampler's calls."""
    steering = spec.steering
    weights = weight_format(spec.precision, spec.networks.values())
    made = {name: network_handle(network, weights, isa) for name, network in spec.networks.items()}
    flow, critic, posterior = (made.get(name) for name in ("flow", "critic", "posterior"))
    fields = {
        "flow": flow,
        "critic": critic,
        "posterior": posterior,
        "steering": bytes(steering_params(steering)),
        **{name: np.array(bound, np.float32) for name, bound in zip(("action_low", "action_high"), spec.box)},
        "schedule": [tuple(step) for step in spec.schedule],
        "glass": [(c.p_x, c.p_xbar, c.c_x, c.c_xbar, c.c_v) for row in spec.glass_table for c in row],
        "obs_dim": spec.flow.obs_dim,
        "action_dim": spec.flow.action_dim,
        "steered_dims": None if steering.steered_dims is None else list(steering.steered_dims),
        "own_obs": [n is not None and n.obs_columns is not None for n in (spec.flow, spec.critic, spec.posterior)],
        "own_times": [n is not None and n.time_embedding == "module" for n in (spec.flow, spec.critic, spec.posterior)],
        "action_columns": [] if spec.critic is None else list(spec.critic.action_columns or ()),
        "flow_times": _time_rows(spec.flow, spec.flow_times)["t"],
    }
    if spec.posterior is not None:
        fields |= {f"posterior_{block}": rows for block, rows in _time_rows(spec.posterior, spec.times).items()}
    return Plan(load_module().cpu_plan(fields), (flow, critic, posterior))


def _table_entry(parameter: Tensor | None) -> tuple[int, int, int, int]:
    """(address, row stride, column stride, dtype code) of a weight [out, in] or a vector [out]."""
    if parameter is None:
        return (0, 0, 0, 0)
    if parameter.device.type != "cpu" or parameter.dtype not in _DTYPE_CODES:
        raise ValueError(
            f"backend 'cpu' got a parameter of {parameter.dtype} on {parameter.device}; expected a floating dtype on "
            "the CPU. Move the networks with .to('cpu'), or use backend='auto'."
        )
    strides = parameter.stride()
    return (parameter.data_ptr(), strides[0], strides[1] if len(strides) > 1 else 0, _DTYPE_CODES[parameter.dtype])


def sources_of(network: BoundNetwork, handle: Any) -> Any:
    """The _C.BoundSources of a network: where its parameters lie."""
    rows = []
    for member in range(network.spec.num_members):
        for layer in network.layers:
            norms = [*layer.norms, *[NormParameters()] * MOST_NORMS][:MOST_NORMS]
            vectors = (layer.bias, *(vector for norm in norms for vector in norm))
            parts = [_table_entry(layer.weight[member])]
            parts += [_table_entry(None if vector is None else vector[member]) for vector in vectors]
            rows.append([value for part in parts for value in part])
    # a GPU writes to pinned memory past the page tables of the CPU
    pinned = any(weight.is_pinned() for layer in network.layers for weight in layer.weight)
    watch = not pinned and write_watch_refusal() is None
    return load_module().cpu_bind(handle, np.array(rows, dtype=np.int64), watch)


# ---------------------------------------------------------------- columns that networks' own modules compute


class Own(NamedTuple):
    """What a call reads of its networks' own columns: flow, critic, posterior.

    Args:
        rows: a _C.CpuOwnRows each, or None. obs: what makes each one's observations of the call's, or None.
    """

    rows: list[Any]
    obs: list[Callable[[Tensor], Tensor] | None]

    def __call__(self, obs: Tensor) -> list[Tensor | None]:
        return [None if make is None else make(obs) for make in self.obs]


NO_OWN = Own([], [None, None, None])


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """(address, bytes) of what a tensor reads."""
    if not tensor.numel():
        return (0, 0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    needed = (last + 1) * tensor.element_size()
    held = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    if tensor.device.type != "cpu" or held < needed:
        raise ValueError(
            f"backend 'cpu': a network's own columns follow a tensor {list(tensor.shape)} on {tensor.device} with "
            f"{held} of its {needed} bytes; expected one on the CPU that has its memory."
        )
    return (tensor.data_ptr(), needed)


def obs_of(network: BoundNetwork) -> Callable[[Tensor], Tensor] | None:
    """What makes a network's own observations of the call's; None where it reads these."""
    if network.spec.obs_columns is None:
        return None
    return lambda obs: network.obs_input(obs).contiguous()


def compute_own_rows(network: BoundNetwork, times: Sequence[float]) -> tuple[np.ndarray, ...]:
    """(times, scale, shift, film), float32; empty where the network has no own ones."""
    nothing = np.zeros(0, np.float32)
    is_own = network.spec.time_embedding == "module"
    named = network.time_rows(times) if is_own or network.spec.film_dim else {}
    rows, film = (
        named[name].to(torch.float32).contiguous().numpy() if wanted else nothing
        for name, wanted in (("t", is_own), ("film", network.spec.film_dim > 0))
    )
    mapped = network.action_map(torch.zeros(0, dtype=torch.float32, device=network.device))
    maps = (nothing, nothing) if mapped is None else (mapped.scale.numpy(), mapped.shift.numpy())
    return (rows, *maps, film)
