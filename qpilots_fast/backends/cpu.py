"""The native CPU backend: plans and pointer tables for the compiled module; the maths is in csrc/cpu."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..row_ops import ROW_OPS, Chain, RowOp, plain_layer
from ..spec import BoundNetwork, BoundNetworks, NetworkSpec, NormParameters, RawSample, SamplerSpec, StepReport
from .base import Backend, Call, Footprint, QuickCall, Slots
from .caches import Cache
from .counts import count_flops
from .native import (
    DTYPES,
    INPUT_KINDS,
    ISA_VARIABLE,
    PHASES,
    import_failure,
    load_module,
    machine_limits,
    read_weights_seconds,
    write_watch_refusal,
)  # fmt: skip
from .params import steering_params

_DTYPE_CODES = {getattr(torch, name): code for code, name in enumerate(DTYPES)}
_MOST_NORMS = 3  # of a layer, as in csrc/cpu/call/network.h
_KEPT = 1024  # plans, and tables of parameters, beside those whose sampler or network is gone


# ---------------------------------------------------------------- plans and pointer tables


class _Plan(NamedTuple):
    handle: Any  # _C.CpuPlan
    networks: tuple[Any, Any, Any]  # _C.CpuNetwork of flow, critic, posterior; None where the call does not use it


def _isa() -> str:
    return os.environ.get(ISA_VARIABLE, "")


def _input_kind(block: str) -> int:
    return INPUT_KINDS.index("x" if block in ("noisy_actions", "actions") else block)


def _format(precision: str, networks: Iterable[NetworkSpec]) -> str:
    """The format of weights and operands: the precision, save where bfloat16 would lose a LayerNorm over two units.

    Their normalised values are +-1 up to eps: rounded to bfloat16 they leave nothing of the derivative, and a norm
    match makes that rounding the whole gradient (50 times torch's error in the actions; over 3 units as torch's).
    """
    layers = ((width, chain) for spec in networks for width, chain in zip(spec.hidden_dims, spec.row_chains))
    return "float32" if any(width == 2 and any(map(_is_norm, chain)) for width, chain in layers) else precision


def _is_norm(op: RowOp) -> bool:
    return ROW_OPS[op.kind].has_weight


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
def _network(spec: NetworkSpec, precision: str, isa: str) -> Any:
    inputs = [(_input_kind(name), part.start, part.stop - part.start) for name, part in spec.block_slices.items()]
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
def _plan(spec: SamplerSpec, isa: str) -> _Plan:
    steering = spec.steering
    weights = _format(spec.precision, spec.networks.values())
    made = {name: _network(network, weights, isa) for name, network in spec.networks.items()}
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
    return _Plan(load_module().cpu_plan(fields), (flow, critic, posterior))


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


def _sources(network: BoundNetwork, handle: Any) -> Any:
    rows = []
    for member in range(network.spec.num_members):
        for layer in network.layers:
            norms = [*layer.norms, *[NormParameters()] * _MOST_NORMS][:_MOST_NORMS]
            vectors = (layer.bias, *(vector for norm in norms for vector in norm))
            parts = [_table_entry(layer.weight[member])]
            parts += [_table_entry(None if vector is None else vector[member]) for vector in vectors]
            rows.append([value for part in parts for value in part])
    # a GPU writes to pinned memory past the page tables of the CPU
    pinned = any(weight.is_pinned() for layer in network.layers for weight in layer.weight)
    watch = not pinned and write_watch_refusal() is None
    return load_module().cpu_bind(handle, np.array(rows, dtype=np.int64), watch)


# ---------------------------------------------------------------- columns that networks' own modules compute


class _Own(NamedTuple):
    """What a call reads of its networks' own columns: flow, critic, posterior.

    Args:
        rows: a _C.CpuOwnRows each, or None. obs: what makes each one's observations of the call's, or None.
    """

    rows: list[Any]
    obs: list[Callable[[Tensor], Tensor] | None]

    def __call__(self, obs: Tensor) -> list[Tensor | None]:
        return [None if make is None else make(obs) for make in self.obs]


_NO_OWN = _Own([], [None, None, None])


def _memory(tensor: Tensor) -> tuple[int, int]:
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


def _own_obs(network: BoundNetwork) -> Callable[[Tensor], Tensor] | None:
    if network.spec.obs_columns is None:
        return None
    return lambda obs: network.obs_input(obs).contiguous()


def _compute_own_rows(network: BoundNetwork, times: Sequence[float]) -> tuple[np.ndarray, ...]:
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


@lru_cache(maxsize=1)
def _torch_names() -> dict[str, Any]:
    """What the native quick call needs of torch. Devices and dtypes are named: users change the defaults."""
    return {
        "Tensor": Tensor,
        "float32": torch.float32,
        "randn": partial(torch.randn, device="cpu", dtype=torch.float32),
        "empty_like": torch.empty_like,
        "get_num_threads": torch.get_num_threads,
    }


class CpuBackend(Backend):
    """One parallel region a call runs all K steps on packed weights."""

    name = "cpu"
    precisions = ("float32", "bfloat16")
    runs_chains = True
    keeps = f"{_KEPT} plans for any batch size, and a workspace of the largest one for each of concurrent calls"

    def __init__(self) -> None:
        self._plans, self._tables = Cache(_KEPT), Cache(_KEPT)

    def unavailable_reason(self) -> str | None:
        failure = import_failure()
        if failure is not None:
            return failure
        try:
            load_module().cpu_isa(_isa())
        except ValueError as error:
            return str(error)
        return None

    def refusal(self, spec: SamplerSpec, device: torch.device) -> str | None:
        return self.network_refusal(spec.precision, device)

    def structure_refusal(self, network: NetworkSpec) -> str | None:
        most = max((sum(map(_is_norm, chain)) for chain in network.row_chains), default=0)
        if most > _MOST_NORMS:
            return f"a layer of the {network.kind} has {most} norms; it runs at most {_MOST_NORMS}"
        return super().structure_refusal(network)

    def network_refusal(self, precision: str, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"the tensors are on {device}, not on the CPU"
        return super().network_refusal(precision, device)

    def _get_plan(self, spec: SamplerSpec) -> _Plan:
        isa = _isa()
        return self._plans.obtain(isa, lambda: _plan(spec, isa), owner=spec)

    def _get_sources(self, plan: _Plan, networks: BoundNetworks) -> list[Any]:
        bound = (networks.flow, networks.critic, networks.posterior)
        return [
            None if handle is None or network is None else self._bind(network, handle)
            for network, handle in zip(bound, plan.networks)
        ]

    def _bind(self, network: BoundNetwork, handle: Any) -> Any:
        return self._tables.obtain(handle, lambda: _sources(network, handle), owner=network)

    def pack(self, spec: SamplerSpec, networks: BoundNetworks) -> Any:
        plan = self._get_plan(spec)
        packed = load_module().cpu_pack(plan.handle, *self._get_sources(plan, networks), torch.get_num_threads())
        return plan, packed, self._get_own(spec, plan, networks, frozen=True)

    def _get_own(self, spec: SamplerSpec, plan: _Plan, networks: BoundNetworks, frozen: bool = False) -> _Own:
        """The networks' own columns, the rows among them evaluated anew where what they follow changed.

        Args:
            frozen: from a copy of the modules as they are now, which nothing changes.
        """
        if spec.own_columns is None:
            return _NO_OWN
        found = _Own([], [])
        times = {"flow": spec.flow_times, "critic": (), "posterior": spec.times}
        for name, times_of in times.items():
            network: BoundNetwork | None = getattr(networks, name) if name in spec.networks else None
            if network is None or network.own is None:
                rows = obs = None
            else:
                if frozen:
                    network = replace(network, own=copy.deepcopy(network.own))
                rows, obs = self._own_rows(plan, network, name, times_of, frozen), _own_obs(network)
            found.rows.append(rows)
            found.obs.append(obs)
        return found

    def _own_rows(self, plan: _Plan, network: BoundNetwork, name: str, times: Sequence[float], frozen: bool) -> Any:
        def make() -> Any:
            followed = [] if frozen or network.own is None else network.own.followed()
            watch = write_watch_refusal() is None and not any(tensor.is_pinned() for tensor in followed)
            return load_module().CpuOwnRows([_memory(tensor) for tensor in followed], followed, watch)

        rows = make() if frozen else self._tables.obtain((plan.handle, name), make, owner=network)
        if not rows.current():
            rows.refresh(partial(_compute_own_rows, network, times))
        return rows

    def sample(self, call: Call) -> RawSample:
        return self._sample(call, 0)

    def quick_call(
        self, spec: SamplerSpec, networks: BoundNetworks, packed: Any, slots: Slots, batch_size: int
    ) -> QuickCall | None:
        if packed is None:
            plan, weights = self._get_plan(spec), None
            sources = self._get_sources(plan, networks)
            own = self._get_own(spec, plan, networks)
        else:
            (plan, weights, own), sources = packed, [None, None, None]
        return load_module().CpuQuickCall(slots, networks, plan.handle, *sources, weights, *own, _torch_names())

    def sample_phases(self, call: Call) -> tuple[RawSample, dict[str, float]]:
        """`sample`, and the seconds that its first thread spent in each of PHASES."""
        seconds = np.zeros(len(PHASES))
        raw = self._sample(call, seconds.ctypes.data)
        return raw, dict(zip(PHASES, seconds.tolist()))

    def _sample(self, call: Call, phases: int) -> RawSample:
        spec, noise, eps, batch = call.spec, call.noise, call.posterior_noise, call.batch_size
        if call.packed is None:
            plan, weights = self._get_plan(spec), None
            sources = self._get_sources(plan, call.networks)
            own = self._get_own(spec, plan, call.networks)
        else:
            (plan, weights, own), sources = call.packed, [None, None, None]
        _check(call.obs, (batch, spec.flow.obs_dim), "obs")
        _check(noise, (batch, spec.flow.action_dim), "noise")
        shape = spec.posterior_noise_shape(batch)
        if shape is not None and eps is not None:
            _check(eps, shape, "posterior_noise")
        own_obs = own(call.obs)
        for name, seen in zip(("flow", "critic", "posterior"), own_obs):
            if seen is not None:
                _check(seen, (batch, spec.networks[name].block_dim("obs")), f"obs of the {name}")
        actions = torch.empty_like(noise)
        if call.alpha is not None:
            _check(call.alpha, (batch,), "alpha")
        report = None
        if call.return_info:
            values, flags = noise.new_zeros(2, spec.num_steps, batch), noise.new_zeros(2, spec.num_steps, batch).bool()
            report = StepReport(values[0], flags[0], values[1], flags[1])
        load_module().cpu_sample(
            plan.handle,
            *sources,
            weights,
            call.obs.data_ptr(),
            noise.data_ptr(),
            _pointer(eps),
            _pointer(call.alpha),
            actions.data_ptr(),
            [_pointer(value) for value in report or (None,) * 4],
            own.rows,
            [_pointer(seen) for seen in own_obs],
            batch,
            torch.get_num_threads(),
            phases,
        )
        return RawSample(actions, report)

    def forward(self, network: BoundNetwork, blocks: Sequence[Tensor], precision: str) -> Tensor:
        batch = blocks[0].shape[0]
        out = blocks[0].new_empty(network.spec.num_members, batch, network.spec.output_dim)
        self._apply(network, blocks, precision, None, out)
        return out

    def vjp(self, network: BoundNetwork, blocks: Sequence[Tensor], cotangent: Tensor, precision: str) -> Tensor:
        batch = blocks[0].shape[0]
        out = blocks[0].new_empty(batch, network.spec.input_dim)
        _check(cotangent, (network.spec.num_members, batch, network.spec.output_dim), "cotangent")
        self._apply(network, blocks, precision, cotangent, out)
        return out

    def _apply(
        self, network: BoundNetwork, blocks: Sequence[Tensor], precision: str, cotangent: Tensor | None, out: Tensor
    ) -> None:
        spec, batch = network.spec, blocks[0].shape[0]
        if batch == 0:
            return
        handle = _network(spec, _format(precision, [spec]), _isa())
        pointers = [0] * len(INPUT_KINDS)
        for name, block in zip(spec.input_order, blocks):
            _check(block, (batch, spec.block_dim(name)), name)
            pointers[_input_kind(name)] = block.data_ptr()
        film = blocks[-1] if spec.film_dim else None
        if film is not None:
            _check(film, (batch, spec.film_dim), "film")
        load_module().cpu_network_apply(
            self._bind(network, handle),
            pointers,
            _pointer(film),
            _pointer(cotangent),
            out.data_ptr(),
            batch,
            torch.get_num_threads(),
            cotangent is not None,
        )

    def live_weights(self, spec: SamplerSpec, networks: BoundNetworks) -> str | None:
        sources = self._get_sources(self._get_plan(spec), networks)
        states = [
            f"{name} {source.watch_status}"
            for name, source in zip(("flow", "critic", "posterior"), sources)
            if source is not None
        ]
        why = write_watch_refusal()
        return f"read at every call ({why})" if why else ", ".join(states)

    def footprint(self, spec: SamplerSpec, batch_size: int) -> Footprint:
        plan, threads = self._get_plan(spec), torch.get_num_threads()
        steered = len(spec.steered_steps)
        flow, critic, posterior = (0 if n is None else n.arena_bytes for n in plan.networks)
        inner = 2 * spec.steering.glass_steps if spec.glass_table else 0
        flow_visits = spec.num_steps + steered * (inner + spec.pulls_flow)
        traffic = flow * flow_visits + 2 * steered * (critic + posterior)
        flops = count_flops(spec, batch_size)
        limits = machine_limits(threads)
        peak = limits.flops_bfloat16 if spec.precision == "bfloat16" else limits.flops_float32
        members = 0 if spec.critic is None else spec.critic.num_members
        twice = (critic // max(members, 1),) * members + ((posterior,) if posterior else ())
        reading, usual = read_weights_seconds(flow, twice if steered else (), max(steered, 1), flow_visits, threads)
        return Footprint(
            launches=1,
            flops=flops,
            weight_bytes=flow + critic + posterior,
            traffic_bytes=traffic,
            workspace_bytes=load_module().cpu_workspace_bytes(plan.handle, batch_size, threads),
            floor_s=max(flops / peak, reading),
            notes=(
                f"instruction set {plan.networks[0].isa}, {threads} threads",
                f"arithmetic peak {peak / 1e9:.0f} GF/s, cache {limits.cache_bytes / 1e9:.0f} GB/s, "
                f"memory {limits.memory_bytes / 1e9:.0f} GB/s (measured in this process)",
                f"loads of the weights alone, in the call's order: {reading * 1e3:.2f} ms at best, "
                f"{usual * 1e3:.2f} in the middle",
            ),
        )


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(
            f"backend 'cpu': {name} is {tensor.dtype} {list(tensor.shape)} "
            f"({'contiguous' if tensor.is_contiguous() else 'strided'}); expected contiguous float32 {list(shape)}."
        )
