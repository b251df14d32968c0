"""The whole call in one launch of a persistent CUDA kernel, for small batches at control latency.

The kernels (csrc/cuda) are a shared library of their own, with a C ABI over raw pointers and streams:
`qpilots-fast build-cuda` compiles it, and nothing here needs it to import.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ...spec import BoundNetwork, BoundNetworks, RawSample, SamplerSpec, StepReport
from ...steering import Steering
from ..base import Backend, Call, Footprint
from ..counts import count_flops
from ..params import steering_params
from .build import library_paths
from .counts import count_barriers, count_traffic, counted_program
from .layout import WEIGHT_BYTES, NetworkLayout, pack_table, presence
from .library import BUILD_HINT, Library, MemoryRange, Recent, memory_map, weight_regions
from .plan import Program, plan_network, plan_sample
from .structs import SampleArgs, SteerStepArgs

__all__ = ["MAX_BATCH_SIZE", "CudaBackend", "PackedWeights"]

MAX_BATCH_SIZE = 16
_SPIN_LIMIT = 1 << 24  # polls of about 1 us: a block that waits so long has lost the others
_MAX_STEPS = 100_000
_T = TypeVar("_T")


@dataclass(frozen=True)
class PackedWeights:
    """A private copy of the weights in the kernels' layout."""

    weights: Tensor  # [bytes] uint8
    key: Hashable  # of the program it was made for, batch size apart


@dataclass(frozen=True)
class PreparedNetwork:
    """One network packed for several calls of forward and vjp."""

    network: BoundNetwork
    precision: str
    weights: Tensor


@dataclass(frozen=True)
class _DeviceProgram:
    """A program with its tables on the device."""

    key: Hashable
    program: Program
    phases: Tensor  # uint8
    tables: tuple[Tensor, ...]
    steered: Tensor | None


class CudaBackend(Backend):
    """One cooperative launch a call; every result of a row is bitwise the same whatever the batch and the grid.

    Args:
        library: the kernels; None: the built library, loaded when first asked for.
        max_blocks: at most this many blocks; 0: one an SM.
    """

    name: ClassVar[str] = "cuda"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    max_batch_size: ClassVar[int | None] = MAX_BATCH_SIZE
    auto_for_networks: ClassVar[bool] = False  # one network needs no grid barrier

    def __init__(self, library: Library | None = None, max_blocks: int = 0, spin_limit: int = _SPIN_LIMIT) -> None:
        self._library, self._max_blocks, self._spin_limit = library, max_blocks, spin_limit
        self._load_failure: str | None = None
        self._lock = threading.Lock()
        self._programs, self._pack_tables = Recent(64), Recent(32)
        self._failure_words: dict[torch.device, Tensor] = {}

    # ---------------------------------------------------------------- availability

    def _load(self) -> Library | None:
        with self._lock:
            if self._library is None and self._load_failure is None:
                path = next((p for p in library_paths() if p.is_file()), None)
                if path is None:
                    self._load_failure = f"its kernels are not built; {BUILD_HINT}"
                else:
                    try:
                        self._library = Library(path)
                    except (OSError, RuntimeError) as error:
                        self._load_failure = f"its kernels do not load: {error}"
            return self._library

    def unavailable_reason(self) -> str | None:
        library = self._load()
        if library is None:
            return self._load_failure
        if library.device_type == "cuda" and not torch.cuda.is_available():
            built = torch.version.cuda is not None
            return "torch finds no CUDA GPU" if built else "this torch is built without CUDA"
        return library.unavailable_reason()

    def refusal(self, spec: SamplerSpec, device: torch.device) -> str | None:
        library = self._load()
        if library is None:
            return self._load_failure
        if device.type != library.device_type:
            return f"its tensors must be on a CUDA device, they are on {device}"
        if spec.precision not in self.precisions:
            return f"it has the precisions {', '.join(self.precisions)}, not {spec.precision}"
        if spec.glass_table:
            return "it has no glass estimate (its inner steps would multiply the barriers); 'triton' has"
        if spec.num_steps > _MAX_STEPS:
            return f"it counts barriers in 32 bits and takes at most {_MAX_STEPS} steps, not {spec.num_steps}"
        for network in spec.networks.values():
            if not network.hidden_dims:
                return f"its {network.kind} must have a hidden layer"
        return None

    def network_refusal(self, precision: str, device: torch.device) -> str | None:
        library = self._load()
        if library is not None and device.type != library.device_type:
            return f"its tensors must be on a CUDA device, they are on {device}"
        return super().network_refusal(precision, device)

    # ---------------------------------------------------------------- sampling

    def pack(self, spec: SamplerSpec, networks: BoundNetworks) -> PackedWeights:
        program = self._sample_program(spec, networks, 1)
        return PackedWeights(self._packed(program, spec.taking_part(networks)), _pack_key(spec, networks))

    def sample(self, call: Call) -> RawSample:
        spec, networks, noise, packed, batch = call.spec, call.networks, call.noise, call.packed, call.batch_size
        reason = self.refusal(spec, noise.device)
        if reason is None and batch > MAX_BATCH_SIZE:
            reason = (
                f"it is for batches up to {MAX_BATCH_SIZE} (candidates counted), this one has {batch}; "
                "'triton' has no limit"
            )
        if reason is not None:
            raise BackendUnavailable(f"backend 'cuda' cannot run this call: {reason}.")
        loaded = self._sample_program(spec, networks, batch)
        args = SampleArgs.from_buffer_copy(loaded.program.args)
        if packed is None:
            weights = self._packed(loaded, spec.taking_part(networks))
        elif packed.key != _pack_key(spec, networks):
            raise ValueError("packed was made for another sampler; expected what pack(spec, networks) returned.")
        else:
            weights = packed.weights
        inputs = [_float32(call.obs), *loaded.tables[:-1]]
        noise = _float32(noise)
        eps = None if call.posterior_noise is None else _float32(call.posterior_noise)
        actions = torch.empty_like(noise)
        alpha = None if call.alpha is None else _float32(call.alpha)
        report: StepReport | None = None
        if call.return_info:
            values = noise.new_empty(2, spec.num_steps, batch)
            flags = torch.empty(2, spec.num_steps, batch, dtype=torch.bool, device=noise.device)
            report = StepReport(values[0], flags[0], values[1], flags[1])
        args.noise, args.posterior_noise = noise.data_ptr(), _pointer(eps)
        args.schedule, args.steered = loaded.tables[-1].data_ptr(), _pointer(loaded.steered)
        args.alpha, args.actions = _pointer(alpha), actions.data_ptr()
        reported: dict[str, Tensor | None] = {} if report is None else report._asdict()
        for name, value in reported.items():
            setattr(args, name, _pointer(value))
        others = {"noise": noise, "posterior noise": eps, "schedule": loaded.tables[-1], "steered dims": loaded.steered}
        others["alpha"] = alpha
        outputs = {"actions": actions, **reported}
        self._launch(loaded, args, weights, inputs, others, outputs)
        return RawSample(actions, report)

    def capture(self, spec: SamplerSpec, networks: BoundNetworks, batch_size: int) -> Callable[..., Tensor]:
        device = networks.flow.device
        if device.type != "cuda":
            return super().capture(spec, networks, batch_size)
        obs = torch.zeros(batch_size, spec.flow.obs_dim, device=device)
        noise = torch.zeros(batch_size, spec.flow.action_dim, device=device)
        shape = spec.posterior_noise_shape(batch_size)
        eps = None if shape is None else torch.zeros(shape, device=device)
        call = Call(spec, networks, obs, noise, eps)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(side):
            self.sample(call)  # programs and tables reach the device before the capture
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.device(device), torch.cuda.graph(graph):
            actions = self.sample(call).actions

        def replay(new_obs: Tensor, new_noise: Tensor, new_eps: Tensor | None = None) -> Tensor:
            obs.copy_(new_obs)
            noise.copy_(new_noise)
            if eps is not None and new_eps is not None:
                eps.copy_(new_eps)
            graph.replay()
            return actions.clone()

        return replay

    # ---------------------------------------------------------------- one network

    def prepare(self, network: BoundNetwork, precision: str) -> PreparedNetwork:
        program = self._network_program(network, 1, precision, network.device, differentiable=True)
        return PreparedNetwork(network, precision, self._packed(program, [network]))

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
        inputs = _float32(torch.cat(list(blocks), dim=-1))
        batch, differentiable = len(inputs), cotangent is not None
        if batch == 0:
            width = bound.spec.input_dim if differentiable else bound.spec.output_dim
            return inputs.new_zeros(bound.spec.num_members, 0, width)
        loaded = self._network_program(bound, batch, precision, inputs.device, differentiable=differentiable)
        args = SampleArgs.from_buffer_copy(loaded.program.args)
        cotangents = None if cotangent is None else _float32(cotangent)
        if isinstance(network, PreparedNetwork):
            if network.precision != precision:
                raise ValueError(f"precision is {precision!r}; the network was prepared for {network.precision!r}.")
            weights = network.weights
        else:
            weights = self._packed(loaded, [bound])
        staged = [inputs] if cotangents is None else [inputs, inputs, inputs, cotangents]
        workspace = self._launch(loaded, args, weights, staged, {}, {})
        region = loaded.program.output
        assert region is not None
        return workspace[region.start : region.start + region.size].clone().view(bound.spec.num_members, batch, -1)

    def _network_program(
        self, network: BoundNetwork, batch: int, precision: str, device: torch.device, *, differentiable: bool
    ) -> _DeviceProgram:
        if precision not in WEIGHT_BYTES:
            raise ValueError(f"precision is {precision!r}; backend 'cuda' has {', '.join(WEIGHT_BYTES)}.")
        width, present = WEIGHT_BYTES[precision], presence(network)
        key = ("network", network.spec, present, batch, width, differentiable, device)

        def make() -> _DeviceProgram:
            program = plan_network(network.spec, present, batch, width, differentiable=differentiable)
            return _to_device(key, program, device)

        return self._programs.obtain(key, make)

    # ---------------------------------------------------------------- row-wise pieces

    def clean_actions(
        self, x: Tensor, v: Tensor, t: float, low: float | None = None, high: float | None = None
    ) -> Tensor:
        """x + (1 - t) v [B, A], clipped to [low, high] where given; one kernel, any batch."""
        steering = Steering(clip="none" if low is None else "straight_through")
        args = SteerStepArgs(dt=1 - t, steering=steering_params(steering, low or 0.0, high or 0.0))
        return self._steer_rows(args, x, v, None, None, None)[0]

    def steer_step(
        self, x: Tensor, v: Tensor, g: Tensor, dt: float, steering: Steering, q_std: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x + dt (v + scale(v, g) g) over the steered dims, one kernel, any batch.

        Args:
            x, v, g: [B, A]. q_std: [B], the critics' std, for scale="gaf".

        Returns:
            The next x [B, A]; norms of g [B]; rows whose g was not finite, which took the plain step [B].
        """
        if steering.scale == "gaf" and q_std is None:
            raise ValueError("q_std is None; scale='gaf' needs the critics' std at the estimate, [B].")
        steered = None
        if steering.steered_dims is not None:
            steered = torch.zeros(x.shape[-1], dtype=torch.uint8, device="cpu")
            steered[list(steering.steered_dims)] = 1
            steered = steered.to(x.device)
        args = SteerStepArgs(dt=dt, steering=steering_params(steering, 0.0, 0.0))
        return self._steer_rows(args, x, v, g, q_std, steered)

    def _steer_rows(
        self, args: SteerStepArgs, x: Tensor, v: Tensor, g: Tensor | None, q_std: Tensor | None, steered: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, v = _float32(x), _float32(v)
        g, q_std = (None if tensor is None else _float32(tensor) for tensor in (g, q_std))
        result, norms = torch.empty_like(x), x.new_zeros(len(x))
        nonfinite = torch.zeros(len(x), dtype=torch.uint8, device=x.device)
        if x.numel() == 0:
            return result, norms, nonfinite.bool()
        args.rows, args.action_dim = x.shape
        args.x, args.v, args.g, args.q_std = x.data_ptr(), v.data_ptr(), _pointer(g), _pointer(q_std)
        args.steered, args.result = _pointer(steered), result.data_ptr()
        args.gradient_norms, args.nonfinite = norms.data_ptr(), nonfinite.data_ptr()
        named = {"x": x, "v": v, "g": g, "q_std": q_std, "steered dims": steered}
        outputs = {"result": result, "gradient norms": norms, "non-finite rows": nonfinite}
        library = self._checked_library()
        library.call(
            "clean_actions" if g is None else "steer_step",
            ctypes.byref(args),
            *_place(library, x.device),
            memory=lambda: memory_map(named, outputs),
        )
        return result, norms, nonfinite.bool()

    # ---------------------------------------------------------------- counts

    def footprint(self, spec: SamplerSpec, batch_size: int) -> Footprint:
        program = counted_program(spec, batch_size)
        barriers = count_barriers(program)
        return Footprint(
            launches=3,  # pack, the barrier's counter, the persistent kernel; frozen: 2
            flops=count_flops(spec, batch_size),
            weight_bytes=program.weights_bytes,
            traffic_bytes=count_traffic(program),
            workspace_bytes=program.workspace.size * 4,
            floor_s=None,
            notes=(f"{barriers} grid barriers a call", "weights are kept twice, for the forward and backward passes"),
        )

    # ---------------------------------------------------------------- the way to the kernel

    def _checked_library(self) -> Library:
        library = self._load()
        if library is None:
            raise BackendUnavailable(f"backend 'cuda' cannot run here: {self._load_failure}.")
        return library

    def _sample_program(self, spec: SamplerSpec, networks: BoundNetworks, batch: int) -> _DeviceProgram:
        present = tuple(presence(network) for network in spec.taking_part(networks))
        device = networks.flow.device
        key = ("sample", spec, present, batch, device)
        return self._programs.obtain(
            key, lambda: _to_device(key, plan_sample(spec, present, batch, WEIGHT_BYTES[spec.precision]), device)
        )

    def _packed(self, loaded: _DeviceProgram, networks: Sequence[BoundNetwork]) -> Tensor:
        """The live weights in the kernels' layout, by one kernel; the table of pointers is kept between calls."""
        layouts = loaded.program.layouts
        device = loaded.phases.device
        key = tuple((t.data_ptr(), t.stride(), t.dtype, t.device) for network in networks for t in _parameters(network))
        wrong = next((d for *_, d in key if d != device), None)
        if wrong is not None:
            raise ValueError(f"a parameter is on {wrong}; expected every parameter on {device}.")
        table, num_items, num_tiles = self._pack_tables.obtain(
            (loaded.key, key), lambda: _device_pack_table(layouts, networks, device)
        )
        weights = torch.empty(loaded.program.weights_bytes, dtype=torch.uint8, device=device)
        library = self._checked_library()

        def memory() -> list[MemoryRange]:
            named = {f"parameter {i}": t for i, t in enumerate(t for n in networks for t in _parameters(n))}
            return memory_map({"pack table": table, **named}, {}) + weight_regions(layouts, weights, False)

        library.call(
            "pack",
            ctypes.c_void_p(table.data_ptr()),
            num_items,
            num_tiles,
            ctypes.c_void_p(weights.data_ptr()),
            *_place(library, device),
            memory=memory,
        )
        return weights

    def _launch(
        self,
        loaded: _DeviceProgram,
        args: SampleArgs,
        weights: Tensor,
        inputs: Sequence[Tensor],
        others: dict[str, Tensor | None],
        outputs: dict[str, Tensor | None],
    ) -> Tensor:
        """Queues the persistent kernel; returns its workspace."""
        library, device, program = self._checked_library(), weights.device, loaded.program
        with self._lock:
            if device not in self._failure_words:
                self._failure_words[device] = library.failure_word()
            failure = self._failure_words[device]
        if failure.item() != 0:
            failure.zero_()
            raise RuntimeError(
                "backend 'cuda': an earlier call gave up at a grid barrier, its actions are NaN; "
                "another process may have kept the GPU busy for seconds."
            )
        workspace = torch.empty(program.workspace.size, dtype=torch.float32, device=device)
        sync = torch.empty(2, dtype=torch.int32, device=device)
        args.program, args.weights, args.workspace = loaded.phases.data_ptr(), weights.data_ptr(), workspace.data_ptr()
        args.sync, args.host_failure, args.spin_limit = sync.data_ptr(), failure.data_ptr(), self._spin_limit
        for index, tensor in enumerate(inputs):
            args.inputs[index] = tensor.data_ptr()

        def memory() -> list[MemoryRange]:
            constants = {"program": loaded.phases, **others}
            constants |= {f"input {pointer}": tensor for pointer, tensor in {t.data_ptr(): t for t in inputs}.items()}
            planes = [
                (workspace.data_ptr() + 4 * region.start, 4 * region.size, region.name, False)
                for region in program.workspace.regions
            ]
            changing = {"barrier": sync, "failure word": failure, **outputs}
            return memory_map(constants, changing) + planes + weight_regions(program.layouts, weights, True)

        library.call(
            "sample",
            ctypes.byref(args),
            program.weight_bytes,
            program.max_rows,
            _place(library, device)[0],
            self._max_blocks,
            _place(library, device)[1],
            memory=memory,
        )
        return workspace


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _place(library: Library, device: torch.device) -> tuple[int, ctypes.c_void_p]:
    """Device index and current stream."""
    index = device.index if device.index is not None else 0
    return index, ctypes.c_void_p(library.stream(device))


def _pack_key(spec: SamplerSpec, networks: BoundNetworks) -> Hashable:
    return spec, tuple(presence(network) for network in spec.taking_part(networks))


def _parameters(network: BoundNetwork) -> list[Tensor]:
    return [
        tensor
        for layer in network.layers
        for group in (layer.weight, layer.bias, layer.norm_weight, layer.norm_bias)
        if group is not None
        for tensor in group
    ]


def _bytes_tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _to_device(key: Hashable, program: Program, device: torch.device) -> _DeviceProgram:
    steered = None if program.steered is None else program.steered.to(device)
    tables = tuple(table.to(device) for table in program.time_tables)
    return _DeviceProgram(key, program, _bytes_tensor(program.program_bytes(), device), tables, steered)


def _device_pack_table(
    layouts: Sequence[NetworkLayout], networks: Sequence[BoundNetwork], device: torch.device
) -> tuple[Tensor, int, int]:
    items = [item for layout, network in zip(layouts, networks) for item in layout.pack_items(network)]
    data, tiles = pack_table(items)
    return _bytes_tensor(data, device), len(items), tiles
