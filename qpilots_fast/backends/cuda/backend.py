"""The whole call in one launch of a persistent CUDA kernel, for small batches at control latency.

The kernels (csrc/cuda) are a shared library of their own, with a C ABI over raw pointers and streams:
`qpilots-fast build-cuda` compiles it, and nothing here needs it to import.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ...spec import BoundNetwork, BoundNetworks, RawSample, SamplerSpec, StepReport
from ..base import Backend, Call, Footprint, Graph, Slots
from ..captured import CapturedSampler, CudaGraph, capturing
from ..counts import count_flops
from ..quick import QuickDeviceCall
from .counts import count_call_exchanges, count_traffic, counted_program
from .launcher import KEPT_PROGRAMS, DeviceProgram, Launcher
from .layout import presence
from .library import Library, Loader, float32_rows, pointer
from .rows import CudaRows
from .structs import SampleArgs

__all__ = ["MAX_BATCH_SIZE", "CudaBackend", "PackedWeights"]

MAX_BATCH_SIZE = 16
_SPIN_LIMIT = 1 << 24  # polls of about 1 us: who waits so long has lost the others
_MAX_STEPS = 100_000


@dataclass(frozen=True)
class PackedWeights:
    """A private copy of the weights in the kernels' layout."""

    weights: Tensor  # [bytes] uint8
    key: Hashable  # of the program it was made for, batch size apart


@dataclass(frozen=True)
class ReadyCall:
    """All of a call at one batch size but its own tensors."""

    loaded: DeviceProgram
    table: Any  # PackTable of live weights
    packed: PackedWeights | None
    args: SampleArgs


@dataclass(frozen=True)
class PreparedNetwork:
    """One network packed for several calls of forward and vjp."""

    network: BoundNetwork
    precision: str
    weights: Tensor


class CudaBackend(Backend):
    """One cooperative launch a call; every result of a row is bitwise the same whatever the batch and the grid.

    Args:
        library: the kernels; None: the built library, loaded when first asked for.
        max_blocks: at most this many blocks; 0: one an SM.
    """

    name: ClassVar[str] = "cuda"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    max_batch_size: ClassVar[int | None] = MAX_BATCH_SIZE
    keeps: ClassVar[str] = f"the programs of the {KEPT_PROGRAMS} latest (sampler, batch size) pairs"
    quick_by_batch_size: ClassVar[bool] = True
    auto_for_networks: ClassVar[bool] = False  # one network is no chain of steps

    def __init__(self, library: Library | None = None, max_blocks: int = 0, spin_limit: int = _SPIN_LIMIT) -> None:
        self._loader = Loader(library)
        self._rows = CudaRows(self._loader)
        self._launcher = Launcher(self._loader, max_blocks, spin_limit)
        self._captured: list[Any] = []  # read by graphs that others captured: never freed

    # ---------------------------------------------------------------- availability

    def unavailable_reason(self) -> str | None:
        library = self._loader.find()
        if library is None:
            return self._loader.failure
        if library.device_type == "cuda" and not torch.cuda.is_available():
            built = torch.version.cuda is not None
            return "torch finds no CUDA GPU" if built else "this torch is built without CUDA"
        return library.unavailable_reason()

    def refusal(self, spec: SamplerSpec, device: torch.device) -> str | None:
        library = self._loader.find()
        if library is None:
            return self._loader.failure
        if device.type != library.device_type:
            return f"its tensors must be on a CUDA device, they are on {device}"
        if spec.precision not in self.precisions:
            return f"it has the precisions {', '.join(self.precisions)}, not {spec.precision}"
        if spec.own_columns is not None:
            return f"{spec.own_columns}, which this backend does not read yet"
        if spec.glass_table:
            return "it has no glass estimate (its inner steps would multiply the exchanges); 'triton' has"
        if spec.num_steps > _MAX_STEPS:
            return f"it takes at most {_MAX_STEPS} steps, not {spec.num_steps}"
        for network in spec.networks.values():
            if not network.hidden_dims:
                return f"its {network.kind} must have a hidden layer"
        return None

    def network_refusal(self, precision: str, device: torch.device) -> str | None:
        library = self._loader.find()
        if library is not None and device.type != library.device_type:
            return f"its tensors must be on a CUDA device, they are on {device}"
        return super().network_refusal(precision, device)

    # ---------------------------------------------------------------- sampling

    def pack(self, spec: SamplerSpec, networks: BoundNetworks) -> PackedWeights:
        program = self._launcher.sample_program(spec, networks, 1)
        weights = self._launcher.pack(self._launcher.pack_table(program, spec.taking_part(networks)))
        return PackedWeights(weights, _pack_key(spec, networks))

    def sample(self, call: Call) -> RawSample:
        raw, holds = self._enqueue(call)
        if capturing(call.noise.device):
            self._captured.append(holds)
        return raw

    def quick_call(
        self, spec: SamplerSpec, networks: BoundNetworks, packed: Any, slots: Slots, batch_size: int
    ) -> QuickDeviceCall:
        device = networks.flow.device
        ready = self._prepare_call(spec, networks, packed, batch_size, device)

        def enqueue(obs: Tensor, noise: Tensor, posterior_noise: Tensor | None, alpha: Tensor | None) -> Tensor:
            call = Call(spec, networks, obs, noise, posterior_noise, alpha, packed)
            return self._queue(call, ready)[0].actions

        return QuickDeviceCall(spec, device, batch_size, slots, enqueue)

    def _enqueue(self, call: Call) -> tuple[RawSample, Any]:
        """The call, queued, and what its kernels read and write besides the call's own tensors and the result."""
        device = call.noise.device
        ready = self._prepare_call(call.spec, call.networks, call.packed, call.batch_size, device)
        plain = replace(
            call,
            obs=float32_rows(call.obs),
            noise=float32_rows(call.noise),
            posterior_noise=None if call.posterior_noise is None else float32_rows(call.posterior_noise),
            alpha=None if call.alpha is None else float32_rows(call.alpha),
        )
        return self._queue(plain, ready)

    def _prepare_call(
        self, spec: SamplerSpec, networks: BoundNetworks, packed: Any, batch: int, device: torch.device
    ) -> ReadyCall:
        """What calls at this batch size need while no parameter's memory moves.

        Raises:
            BackendUnavailable: where they cannot run. ValueError: where packed belongs to another sampler.
        """
        reason = self.refusal(spec, device)
        if reason is None and batch > MAX_BATCH_SIZE:
            reason = (
                f"it is for batches up to {MAX_BATCH_SIZE} (candidates counted), this one has {batch}; "
                "'triton' has no limit"
            )
        if reason is not None:
            raise BackendUnavailable(f"backend 'cuda' cannot run this call: {reason}.")
        loaded = self._launcher.sample_program(spec, networks, batch)
        if packed is None:
            table = self._launcher.pack_table(loaded, spec.taking_part(networks))
        elif packed.key != _pack_key(spec, networks):
            raise ValueError("packed was made for another sampler; expected what pack(spec, networks) returned.")
        else:
            table = None
        args = SampleArgs.from_buffer_copy(loaded.program.args)
        args.schedule, args.steered, args.bounds = map(pointer, (loaded.schedule, loaded.steered, loaded.bounds))
        return ReadyCall(loaded, table, packed, args)

    def _queue(self, call: Call, ready: ReadyCall) -> tuple[RawSample, Any]:
        """A call of contiguous float32 tensors."""
        loaded, noise, eps, alpha = ready.loaded, call.noise, call.posterior_noise, call.alpha
        weights = self._launcher.pack(ready.table) if ready.packed is None else ready.packed.weights
        inputs = {"obs": call.obs, **loaded.time_tables}
        actions = torch.empty_like(noise)
        report: StepReport | None = None
        if call.return_info:
            values = noise.new_empty(2, call.spec.num_steps, call.batch_size)
            flags = torch.empty(2, call.spec.num_steps, call.batch_size, dtype=torch.bool, device=noise.device)
            report = StepReport(values[0], flags[0], values[1], flags[1])
        args = SampleArgs.from_buffer_copy(ready.args)
        args.noise, args.posterior_noise, args.alpha = noise.data_ptr(), pointer(eps), pointer(alpha)
        args.actions = actions.data_ptr()
        reported: dict[str, Tensor | None] = {} if report is None else report._asdict()
        for name, value in reported.items():
            setattr(args, name, pointer(value))
        others = {"noise": noise, "posterior noise": eps, "schedule": loaded.schedule, "steered dims": loaded.steered}
        others |= {"alpha": alpha, "bounds": loaded.bounds}
        outputs = {"actions": actions, **reported}
        exchange, failure = self._launcher.launch(loaded, args, weights, inputs, others, outputs)
        return RawSample(actions, report), (ready, weights, exchange, failure)

    def capture(
        self,
        spec: SamplerSpec,
        networks: BoundNetworks,
        batch_size: int,
        packed: Any = None,
        graph: Graph | None = None,
    ) -> CapturedSampler:
        device = networks.flow.device
        graph = CudaGraph(device) if graph is None else graph

        def enqueue(call: Call) -> tuple[Tensor, Any]:
            raw, holds = self._enqueue(call)
            return raw.actions, holds

        def watch(_: Call) -> None:
            self._launcher.check_failure(device)

        return CapturedSampler(spec, networks, batch_size, enqueue, graph, packed, before_replay=watch)

    # ---------------------------------------------------------------- one network

    def prepare(self, network: BoundNetwork, precision: str) -> PreparedNetwork:
        program = self._launcher.network_program(network, 1, precision, network.device, differentiable=True)
        return PreparedNetwork(network, precision, self._launcher.pack(self._launcher.pack_table(program, [network])))

    def forward(self, network: BoundNetwork | PreparedNetwork, blocks: Sequence[Tensor], precision: str) -> Tensor:
        return self._run_network(network, blocks, None, precision)

    def vjp(
        self, network: BoundNetwork | PreparedNetwork, blocks: Sequence[Tensor], cotangent: Tensor, precision: str
    ) -> Tensor:
        per_member = self._run_network(network, blocks, cotangent, precision)
        total = per_member[0].clone()
        for member in per_member[1:]:
            total += member
        return total

    def _run_network(
        self,
        network: BoundNetwork | PreparedNetwork,
        blocks: Sequence[Tensor],
        cotangent: Tensor | None,
        precision: str,
    ) -> Tensor:
        """[E, B, out], or with a cotangent [E, B, in]."""
        bound = network.network if isinstance(network, PreparedNetwork) else network
        columns = float32_rows(torch.cat(list(blocks), dim=-1))
        batch, differentiable = len(columns), cotangent is not None
        if batch == 0:
            width = bound.spec.input_dim if differentiable else bound.spec.output_dim
            return columns.new_zeros(bound.spec.num_members, 0, width)
        loaded = self._launcher.network_program(bound, batch, precision, columns.device, differentiable=differentiable)
        args = SampleArgs.from_buffer_copy(loaded.program.args)
        cotangents = None if cotangent is None else float32_rows(cotangent)
        if isinstance(network, PreparedNetwork):
            if network.precision != precision:
                raise ValueError(f"precision is {precision!r}; the network was prepared for {network.precision!r}.")
            weights = network.weights
        else:
            weights = self._launcher.pack(self._launcher.pack_table(loaded, [bound]))
        inputs = {"columns": columns} if cotangents is None else {"columns": columns, "cotangent": cotangents}
        exchange, _ = self._launcher.launch(loaded, args, weights, inputs, {}, {})
        region = loaded.program.output
        assert region is not None
        return (
            exchange.workspace[region.start : region.start + region.size]
            .clone()
            .view(bound.spec.num_members, batch, -1)
        )

    def row_kernels(self, device: torch.device) -> CudaRows | None:
        if device.type != self._loader.device_type or self.unavailable_reason() is not None:
            return None
        return self._rows

    # ---------------------------------------------------------------- counts

    def footprint(self, spec: SamplerSpec, batch_size: int) -> Footprint:
        program = counted_program(spec, batch_size)
        exchanges = count_call_exchanges(program)
        return Footprint(
            launches=2,  # pack, the persistent kernel; frozen: 1
            flops=count_flops(spec, batch_size),
            weight_bytes=program.weights_bytes,
            traffic_bytes=count_traffic(program),
            workspace_bytes=program.memory.kept.size * 4 + program.memory.words.size * 16,
            floor_s=None,
            notes=(
                f"{exchanges} dependent exchanges a call",
                "weights are kept twice, for the forward and backward passes",
            ),
        )


def _pack_key(spec: SamplerSpec, networks: BoundNetworks) -> Hashable:
    return spec, tuple(presence(network) for network in spec.taking_part(networks))
