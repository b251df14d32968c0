"""The native CPU backend: calls of the compiled module; the maths is in csrc/cpu."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spec import BoundNetwork, BoundNetworks, NetworkSpec, RawSample, SamplerSpec, StepReport
from .base import Backend, Call, Footprint, QuickCall, Slots
from .caches import Cache
from .counts import count_flops
from .cpu_plan import (
    MOST_NORMS,
    NO_OWN,
    Own,
    Plan,
    asked_isa,
    compute_own_rows,
    input_kind,
    make_plan,
    memory_of,
    network_handle,
    obs_of,
    sources_of,
    weight_format,
)
from .native import (
    INPUT_KINDS,
    PHASES,
    import_failure,
    load_module,
    machine_limits,
    read_weights_seconds,
    write_watch_refusal,
)  # fmt: skip

_KEPT = 1024  # plans, and tables of parameters, beside those whose sampler or network is gone


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
            load_module().cpu_isa(asked_isa())
        except ValueError as error:
            return str(error)
        return None

    def refusal(self, spec: SamplerSpec, device: torch.device) -> str | None:
        return self.network_refusal(spec.precision, device)

    def structure_refusal(self, network: NetworkSpec) -> str | None:
        most = max((sum(op.is_norm for op in chain) for chain in network.row_chains), default=0)
        if most > MOST_NORMS:
            return f"a layer of the {network.kind} has {most} norms; it runs at most {MOST_NORMS}"
        return super().structure_refusal(network)

    def network_refusal(self, precision: str, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"the tensors are on {device}, not on the CPU"
        return super().network_refusal(precision, device)

    def _get_plan(self, spec: SamplerSpec) -> Plan:
        isa = asked_isa()
        return self._plans.obtain(isa, lambda: make_plan(spec, isa), owner=spec)

    def _get_sources(self, plan: Plan, networks: BoundNetworks) -> list[Any]:
        bound = (networks.flow, networks.critic, networks.posterior)
        return [
            None if handle is None or network is None else self._bind(network, handle)
            for network, handle in zip(bound, plan.networks)
        ]

    def _bind(self, network: BoundNetwork, handle: Any) -> Any:
        return self._tables.obtain(handle, lambda: sources_of(network, handle), owner=network)

    def pack(self, spec: SamplerSpec, networks: BoundNetworks) -> Any:
        plan = self._get_plan(spec)
        packed = load_module().cpu_pack(plan.handle, *self._get_sources(plan, networks), torch.get_num_threads())
        return plan, packed, self._get_own(spec, plan, networks, frozen=True)

    def _get_own(self, spec: SamplerSpec, plan: Plan, networks: BoundNetworks, frozen: bool = False) -> Own:
        """The networks' own columns, the rows among them evaluated anew where what they follow changed.

        Args:
            frozen: from a copy of the modules as they are now, which nothing changes.
        """
        if spec.own_columns is None:
            return NO_OWN
        found = Own([], [])
        times = {"flow": spec.flow_times, "critic": (), "posterior": spec.times}
        for name, times_of in times.items():
            network: BoundNetwork | None = getattr(networks, name) if name in spec.networks else None
            if network is None or network.own is None:
                rows = obs = None
            else:
                if frozen:
                    network = replace(network, own=copy.deepcopy(network.own))
                rows, obs = self._own_rows(plan, network, name, times_of, frozen), obs_of(network)
            found.rows.append(rows)
            found.obs.append(obs)
        return found

    def _own_rows(self, plan: Plan, network: BoundNetwork, name: str, times: Sequence[float], frozen: bool) -> Any:
        def make() -> Any:
            followed = [] if frozen or network.own is None else network.own.followed()
            watch = write_watch_refusal() is None and not any(tensor.is_pinned() for tensor in followed)
            return load_module().CpuOwnRows([memory_of(tensor) for tensor in followed], followed, watch)

        rows = make() if frozen else self._tables.obtain((plan.handle, name), make, owner=network)
        if not rows.current():
            rows.refresh(partial(compute_own_rows, network, times))
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
        handle = network_handle(spec, weight_format(precision, [spec]), asked_isa())
        pointers = [0] * len(INPUT_KINDS)
        for name, block in zip(spec.input_order, blocks):
            _check(block, (batch, spec.block_dim(name)), name)
            pointers[input_kind(name)] = block.data_ptr()
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
