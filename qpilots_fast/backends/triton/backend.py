"""The Triton backend: one launch a layer, no host synchronisation, no allocation but the result."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ...spec import BoundNetwork, BoundNetworks, NetworkSpec, RawSample, SamplerSpec, StepReport
from ..base import Backend, Call, Footprint, Graph, Slots
from ..caches import Cache
from ..captured import CapturedSampler, CudaGraph, capturing, refuse_while_capturing
from ..quick import GraphedEnqueue, QuickDeviceCall
from .chain_ops import chain_refusal
from .evaluation import Evaluation, Scratch, Tape
from .launch_table import MAX_ACTION_PAD, LaunchTable, default_table, dot_mode
from .launcher import launch
from .layouts import network_layout, padded_width, round_up
from .own_columns import asks_host, copied_encoders, shown_obs
from .packing import OPERAND_DTYPES, PackedBuffers, parameter_addresses
from .plan import SamplerPlan, Workspace, capability, chunk_rows
from .row_pieces import TritonRows

OLDEST_TRITON = (3, 2)
_NOT_READY = "this sampler has not run at this batch size yet, or not since its last capture"
_KEPT = 16  # workspaces, packed buffers and plans kept per backend; the least recently used goes first
_KEPT_GRAPHS = 8  # each has a workspace and weights of its own
_MOST_NODES = 4096  # of such a graph: a call of more rows is long enough to hide its host's time, by the model


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU in this process (TRITON_INTERPRET=1 before the import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass
class PackedSampler:
    """What `pack` returns: frozen weights of one sampler."""

    spec: SamplerSpec
    buffers: PackedBuffers
    encoders: dict[str, BoundNetwork]  # networks whose own modules encode observations, copied

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedSampler:
        return self  # frozen: never written again


@dataclass
class PreparedNetwork:
    """What `prepare` returns: one packed network for `forward` and `vjp`."""

    network: BoundNetwork
    precision: str
    buffers: PackedBuffers


class TritonBackend(Backend):
    """See docs/gpu.md.

    Args:
        table: launch rows that precede the built-in ones; None takes those that `tune` wrote, if any.
        fill: value that fresh workspaces are filled with (tests pass NaN).
        chunk: rows that go through a call's steps together; None: as many as plan.PLANE_BYTES allows.
        new_graph: what plain calls are recorded in, from the third of a batch size on; None: they are not.
    """

    name = "triton"
    runs_chains = True
    precisions = ("float32", "tf32", "bfloat16", "float16")
    quick_by_batch_size = True
    keeps = (
        f"the workspaces and plans of the {_KEPT} latest (sampler, batch size) pairs, and CUDA graphs of "
        f"{_KEPT_GRAPHS}, recorded at the third call"
    )

    def __init__(
        self,
        table: LaunchTable | None = None,
        fill: float | None = None,
        chunk: int | None = None,
        new_graph: Callable[[torch.device], Graph] | None = CudaGraph,
    ) -> None:
        self._table, self._fill, self._chunk, self._new_graph = table, fill, chunk, new_graph
        self._graphs, self._rows = Cache(_KEPT_GRAPHS), TritonRows()
        self._lock = threading.RLock()  # launches of two threads on one stream must not interleave in a workspace
        self._plans, self._workspaces, self._live, self._single = (Cache(_KEPT) for _ in range(4))
        self._captured: list[Any] = []  # owned by someone's CUDA graph: never reused, never freed

    @property
    def table(self) -> LaunchTable:
        return default_table() if self._table is None else self._table

    # ------------------------------------------------------------ availability

    def unavailable_reason(self) -> str | None:
        try:
            import triton
        except ImportError:
            return "Triton is not installed (pip install triton)"
        version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
        if version < OLDEST_TRITON:
            return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
        if interpreting():
            return None
        if not torch.cuda.is_available():
            return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
        return "its launch tables are for NVIDIA GPUs" if torch.version.hip else None

    def refusal(self, spec: SamplerSpec, device: torch.device) -> str | None:
        reason = self._device_refusal(device)
        if reason is not None:
            return reason
        if spec.precision not in self.precisions:
            return f"precision {spec.precision!r} is not one of {', '.join(self.precisions)}"
        steering = spec.steering
        if steering.steers and steering.q_scale == "batch_std":
            return "q_scale='batch_std' couples all rows, which a call does in chunks"
        if padded_width(spec.flow.action_dim) > MAX_ACTION_PAD:
            return f"action_dim is {spec.flow.action_dim}; expected at most {MAX_ACTION_PAD}"
        if not all(n.hidden_dims for n in spec.networks.values()):
            return "a network has no hidden layer"
        return None

    def _device_refusal(self, device: torch.device) -> str | None:
        if interpreting():
            return None if device.type == "cpu" else "TRITON_INTERPRET=1 takes CPU tensors"
        if device.type != "cuda":
            return f"its kernels run on CUDA devices, the tensors are on {device}"
        if capability(device) < 80:
            return f"compute capability {capability(device) / 10} is below 8.0"
        return None

    def structure_refusal(self, network: NetworkSpec) -> str | None:
        return chain_refusal(network) or super().structure_refusal(network)

    def network_refusal(self, precision: str, device: torch.device) -> str | None:
        return self._device_refusal(device) or super().network_refusal(precision, device)

    # ------------------------------------------------------------ the sampler

    def plan(self, spec: SamplerSpec, device: torch.device) -> SamplerPlan:
        def make() -> SamplerPlan:
            refuse_while_capturing(device, _NOT_READY)
            return SamplerPlan(spec, device, self.table, chunk=self._chunk)

        return self._plans.obtain((spec, device), make)

    def pack(self, spec: SamplerSpec, networks: BoundNetworks) -> PackedSampler:
        bound = spec.taking_part(networks)
        device = networks.flow.device
        with _on(device):
            buffers = PackedBuffers(self.plan(spec, device).packed_layouts, spec.precision, device)
            buffers.pack(bound)
        return PackedSampler(spec, buffers, copied_encoders(spec, networks))

    @torch.no_grad()
    def sample(self, call: Call) -> RawSample:
        spec, noise, device, batch_size = call.spec, call.noise, call.noise.device, call.batch_size
        with self._lock, _on(device):
            plan = self.plan(spec, device)
            plan.check_size(batch_size)
            ws: Workspace = self._obtain(
                self._workspaces, (device, spec, batch_size), lambda: plan.workspace(batch_size, self._fill)
            )
            if call.packed is None:
                if asks_host(spec):
                    refuse_while_capturing(device, f"{spec.own_columns}: sampler.capture computes them at each replay")
                bound = spec.taking_part(call.networks)
                key = (device, spec, parameter_addresses(bound))
                buffers = self._obtain(
                    self._live, key, lambda: PackedBuffers(plan.packed_layouts, spec.precision, device)
                )
                buffers.pack(bound)
            else:
                buffers = call.packed.buffers
            if capturing(device):
                self._captured.append((plan, buffers))
            actions = torch.empty_like(noise)
            obs = shown_obs(spec, call.networks, call.obs, call.packed.encoders if call.packed else {})
            plan.run(ws, buffers, obs, noise, call.posterior_noise, actions, call.alpha)
            if call.return_info:
                norms, nonfinite, q_std, gated = ws.report
                return RawSample(actions, StepReport(norms.clone(), nonfinite.bool(), q_std.clone(), gated.bool()))
        return RawSample(actions)

    def quick_call(
        self, spec: SamplerSpec, networks: BoundNetworks, packed: Any, slots: Slots, batch_size: int
    ) -> QuickDeviceCall:
        def enqueue(obs: Tensor, noise: Tensor, posterior_noise: Tensor | None, alpha: Tensor | None) -> Tensor:
            return self.sample(Call(spec, networks, obs, noise, posterior_noise, alpha, packed)).actions

        device = networks.flow.device
        if self._new_graph is None or (device.type != "cuda" and self._new_graph is CudaGraph):
            return QuickDeviceCall(spec, device, batch_size, slots, enqueue)
        new_graph = self._new_graph
        if self.footprint(spec, batch_size).launches > _MOST_NODES:
            return QuickDeviceCall(spec, device, batch_size, slots, enqueue)

        def capture() -> CapturedSampler:
            return self.capture(spec, networks, batch_size, packed, new_graph(device))

        graphed = GraphedEnqueue(enqueue, capture, lambda: _stream(device), self._graphs)
        return QuickDeviceCall(spec, device, batch_size, slots, graphed)

    def _obtain(self, cache: Cache, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The entry of the current stream. A CUDA graph under capture takes an entry over for good."""
        device = key[0]
        if not capturing(device):
            return cache.obtain((key, _stream(device)), make)
        taken = cache.take(lambda kept: kept[0] == key)
        if taken is None:
            refuse_while_capturing(device, _NOT_READY)
        self._captured.append(taken)
        return taken

    def capture(
        self,
        spec: SamplerSpec,
        networks: BoundNetworks,
        batch_size: int,
        packed: Any = None,
        graph: Graph | None = None,
    ) -> CapturedSampler:
        """One call as a CUDA graph, with a workspace and (unless packed) weights of its own."""
        device, bound = networks.flow.device, spec.taking_part(networks)
        graph = CudaGraph(device) if graph is None else graph
        with self._lock, _on(device):
            plan = self.plan(spec, device)
            plan.check_size(batch_size)
            workspace = plan.workspace(batch_size, self._fill)
            buffers = PackedBuffers(plan.packed_layouts, spec.precision, device) if packed is None else packed.buffers
            # what networks' own modules make is computed before each replay, into memory that the graph reads
            shown = {
                name: torch.zeros(batch_size, n.obs_columns, dtype=torch.float32, device=device)
                for name, n in spec.networks.items()
                if n.obs_columns is not None
            }
            if packed is None:
                buffers.prepare(bound)

        def before_replay(call: Call) -> None:
            with self._lock, _on(device):
                if packed is None and asks_host(spec):
                    buffers.refresh_own(bound)
                made = shown_obs(spec, networks, call.obs, packed.encoders if packed else {}) if shown else {}
                for name, target in shown.items():
                    target.copy_(made[name])

        def enqueue(call: Call) -> tuple[Tensor, Any]:
            if packed is None:
                buffers.launch_pack()
            actions = torch.empty_like(call.noise)
            obs = {name: shown.get(name, call.obs) for name in spec.networks}
            plan.run(workspace, buffers, obs, call.noise, call.posterior_noise, actions)
            return actions, (plan, workspace, buffers, shown)

        return CapturedSampler(spec, networks, batch_size, enqueue, graph, packed, before_replay)

    # ------------------------------------------------------------ single networks

    def prepare(self, network: BoundNetwork, precision: str) -> PreparedNetwork:
        device = network.device
        reason = self._device_refusal(device)
        if reason is None and precision not in self.precisions:
            reason = f"precision {precision!r} is not one of {', '.join(self.precisions)}"
        spec = network.spec
        if reason is None and (padded_width(spec.output_dim) > MAX_ACTION_PAD or not spec.hidden_dims):
            reason = f"output_dim is {spec.output_dim} with {len(spec.hidden_dims)} hidden layers"
        if reason is not None:
            raise BackendUnavailable(f"backend 'triton' cannot run this network: {reason}.")
        with _on(device):
            layout = network_layout(spec, precision, self.table, capability(device), split=False)
            buffers = PackedBuffers([layout], precision, device)
            buffers.pack([network])
        return PreparedNetwork(network, precision, buffers)

    def forward(self, network: Any, blocks: Sequence[Tensor], precision: str) -> Tensor:
        return self._run_network(network, blocks, None, precision)

    def vjp(self, network: Any, blocks: Sequence[Tensor], cotangent: Tensor, precision: str) -> Tensor:
        return self._run_network(network, blocks, cotangent, precision).sum(0)

    @torch.no_grad()
    def _run_network(self, network: Any, blocks: Sequence[Tensor], cotangent: Tensor | None, precision: str) -> Tensor:
        prepared = network if isinstance(network, PreparedNetwork) else self.prepare(network, precision)
        packed = prepared.buffers.networks[0]
        layout, spec, operand = packed.layout, packed.layout.spec, OPERAND_DTYPES[prepared.precision]
        given = [block.to(torch.float32) for block in blocks]
        film = given.pop().contiguous() if spec.film_dim else None
        inputs = torch.cat(given, -1).contiguous()
        device, batch_size = inputs.device, len(inputs)
        out = inputs.new_empty(spec.num_members, batch_size, spec.output_dim)
        d_in = inputs.new_empty(0 if cotangent is None else spec.num_members, batch_size, spec.input_dim)
        if batch_size == 0:
            return out if cotangent is None else d_in
        chunk = chunk_rows(layout, operand) if self._chunk is None else self._chunk
        if cotangent is not None:
            cotangent = cotangent.to(torch.float32).contiguous()

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            made = torch.empty(shape, dtype=dtype, device=device)
            return made if self._fill is None else made.fill_(self._fill)

        def scratch() -> tuple[Tape, Scratch]:
            capacity = round_up(min(batch_size, chunk), max(layout.tile.most_rows, layout.ends.block_b))
            return Tape(layout, capacity, operand, make), Scratch([layout], [capacity], operand, make)

        with self._lock, _on(device):
            tape, space = self._obtain(self._single, (device, layout, operand, min(batch_size, chunk)), scratch)
            for start in range(0, batch_size, chunk):
                part = slice(start, start + chunk)
                rows = len(inputs[part])
                whole = rows == batch_size
                target = out if whole else make(*out.shape[:1], rows, out.shape[2])
                run = Evaluation(packed, tape, space, target, rows, 1, dot_mode(prepared.precision, capability(device)))
                launches = list(run.forward(inputs[part], film=None if film is None else film[part]))
                if cotangent is not None:
                    of_part = cotangent[:, part].contiguous()
                    gradient = d_in if whole else make(len(d_in), rows, spec.input_dim)
                    launches += run.pull_back(of_part, gradient, 0, spec.input_dim, 64)
                for item in launches:
                    launch(item.name, item.grid, **item.arguments)
                if not whole:
                    out[:, part] = target
                    if cotangent is not None:
                        d_in[:, part] = gradient
        return out if cotangent is None else d_in

    def row_kernels(self, device: torch.device) -> TritonRows | None:
        if self.unavailable_reason() is not None or self._device_refusal(device) is not None:
            return None
        return self._rows

    # ------------------------------------------------------------ counts

    def footprint(self, spec: SamplerSpec, batch_size: int) -> Footprint:
        from .counts import footprint

        device = torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")
        return footprint(self.plan(spec, device), batch_size)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
