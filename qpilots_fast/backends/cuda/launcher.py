"""The way to the persistent kernel: programs and tables on the device, weights packed, one launch a call."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...spec import BoundNetwork, BoundNetworks, SamplerSpec
from ..caches import Cache
from ..captured import capturing, refuse_while_capturing
from .layout import WEIGHT_BYTES, NetworkLayout, fold_table, pack_table, presence
from .library import Loader, MemoryRange, memory_map, place, weight_regions
from .plan import Program, plan_network, plan_sample
from .structs import INPUTS, SampleArgs


@dataclass(frozen=True)
class DeviceProgram:
    """A program with its tables on the device."""

    key: Hashable
    program: Program
    phases: Tensor  # uint8
    time_tables: dict[str, Tensor]
    schedule: Tensor | None
    steered: Tensor | None
    bounds: Tensor | None
    token: object = field(default_factory=object, compare=False)  # stands for it in keys; its own hash is long


@dataclass(frozen=True)
class PackItems:
    """The pack kernel's items on the device."""

    copies: Tensor  # uint8
    num_copies: int
    num_tiles: int
    folds: Tensor  # uint8
    num_folds: int
    num_groups: int


@dataclass(frozen=True)
class Exchange:
    """What the blocks of a program's launches write to."""

    words: Tensor  # int64 [2][slot_words], zero when made
    tags: Tensor  # int64 [1 + num_blocks], likewise
    workspace: Tensor  # float32


@dataclass(frozen=True)
class PackTable:
    """The addresses that the pack kernel reads from; networks: views, which keep that memory."""

    items: PackItems
    program: Program
    networks: tuple[BoundNetwork, ...]


KEPT_PROGRAMS = 64


class Launcher:
    """Programs by what they are made for, pack tables by the parameters' addresses.

    Args:
        max_blocks: at most this many blocks; 0: one an SM.
        spin_limit: polls of a word before a thread gives up.
    """

    def __init__(self, loader: Loader, max_blocks: int, spin_limit: int) -> None:
        self._loader, self._max_blocks, self._spin_limit = loader, max_blocks, spin_limit
        self._lock = threading.Lock()
        self._programs, self._pack_tables, self._exchanges = Cache(KEPT_PROGRAMS), Cache(32), Cache(KEPT_PROGRAMS)
        self._failure_words: dict[torch.device, tuple[Tensor, Any]] = {}  # and its number, read without torch

    def sample_program(self, spec: SamplerSpec, networks: BoundNetworks, batch: int) -> DeviceProgram:
        present = tuple(presence(network) for network in spec.taking_part(networks))
        device = networks.flow.device
        blocks = self._blocks(device)
        key = ("sample", spec, present, batch, device, blocks)
        width = WEIGHT_BYTES[spec.precision]
        return self._programs.obtain(
            key, lambda: _to_device(key, plan_sample(spec, present, batch, width, blocks), device)
        )

    def _blocks(self, device: torch.device) -> int:
        most = self._loader.get().multiprocessors(device)
        return min(most, self._max_blocks) if self._max_blocks > 0 else most

    def network_program(
        self, network: BoundNetwork, batch: int, precision: str, device: torch.device, *, differentiable: bool
    ) -> DeviceProgram:
        if precision not in WEIGHT_BYTES:
            raise ValueError(f"precision is {precision!r}; backend 'cuda' has {', '.join(WEIGHT_BYTES)}.")
        width, present = WEIGHT_BYTES[precision], presence(network)
        blocks = self._blocks(device)
        key = ("network", network.spec, present, batch, width, differentiable, device, blocks)

        def make() -> DeviceProgram:
            program = plan_network(network.spec, present, batch, width, blocks, differentiable=differentiable)
            return _to_device(key, program, device)

        return self._programs.obtain(key, make)

    def pack_table(self, loaded: DeviceProgram, networks: Sequence[BoundNetwork]) -> PackTable:
        """Where these parameters lie, for `pack`.

        Raises:
            ValueError: where one is on another device.
        """
        layouts = loaded.program.layouts
        device = loaded.phases.device
        key = tuple((t.data_ptr(), t.stride(), t.dtype, t.device) for network in networks for t in network.parameters())
        wrong = next((d for *_, d in key if d != device), None)
        if wrong is not None:
            raise ValueError(f"a parameter is on {wrong}; expected every parameter on {device}.")
        items = self._pack_tables.obtain((loaded.key, key), lambda: _device_pack_items(layouts, networks, device))
        return PackTable(items, loaded.program, tuple(networks))

    def pack(self, table: PackTable) -> Tensor:
        """The parameters' values now in the kernels' layout, by one kernel."""
        items, device = table.items, table.items.copies.device
        weights = torch.empty(table.program.weights_bytes, dtype=torch.uint8, device=device)
        library = self._loader.get()

        def memory() -> list[MemoryRange]:
            named = {f"parameter {i}": t for i, t in enumerate(t for n in table.networks for t in n.parameters())}
            written = weight_regions(table.program.layouts, weights, False)
            return memory_map({"pack table": items.copies, "fold table": items.folds, **named}, {}) + written

        library.call(
            "pack",
            ctypes.c_void_p(items.copies.data_ptr()),
            items.num_copies,
            items.num_tiles,
            ctypes.c_void_p(items.folds.data_ptr()),
            items.num_folds,
            items.num_groups,
            ctypes.c_void_p(weights.data_ptr()),
            *place(library, device),
            memory=memory,
        )
        return weights

    def check_failure(self, device: torch.device) -> Tensor:
        """The word that kernels of this device write to when they give up.

        Raises:
            RuntimeError: where one did, in an earlier call or replay; once.
        """
        known = self._failure_words.get(device)
        if known is None:
            with self._lock:
                if device not in self._failure_words:
                    word = self._loader.get().failure_word()
                    self._failure_words[device] = (word, word.numpy())
                known = self._failure_words[device]
        failure, value = known
        if value[0] != 0:
            failure.zero_()
            raise RuntimeError(
                "backend 'cuda': an earlier call gave up waiting for another block, its actions are NaN; "
                "another process may have kept the GPU busy for seconds."
            )
        return failure

    def _exchange(self, loaded: DeviceProgram, device: torch.device, stream: int | None) -> Exchange:
        """Of this program on this stream, whose calls follow each other; inside a capture the graph's own.

        A graph takes over one that was made before, and goes on counting its tags; where there is none, it makes one,
        and clears it at each replay.
        """
        key = (loaded.token, stream)

        def make() -> Exchange:
            program = loaded.program
            return Exchange(
                torch.zeros(2 * program.memory.words.size, dtype=torch.int64, device=device),
                torch.zeros(1 + program.args.num_blocks, dtype=torch.int64, device=device),
                torch.empty(program.memory.kept.size, dtype=torch.float32, device=device),
            )

        if not capturing(device):
            return self._exchanges.obtain(key, make)
        found = self._exchanges.take(lambda other: other[0] is loaded.token)
        return make() if found is None else found

    def launch(
        self,
        loaded: DeviceProgram,
        args: SampleArgs,
        weights: Tensor,
        inputs: dict[str, Tensor],
        others: dict[str, Tensor | None],
        outputs: dict[str, Tensor | None],
    ) -> tuple[Exchange, Tensor]:
        """Queues the persistent kernel; returns what its blocks write to, and the failure word.

        Raises:
            RuntimeError: where an earlier call gave up.
        """
        library, device, program = self._loader.get(), weights.device, loaded.program
        failure = self.check_failure(device)
        index, stream = place(library, device)
        exchange = self._exchange(loaded, device, stream.value)
        workspace = exchange.workspace
        args.program, args.weights, args.workspace = loaded.phases.data_ptr(), weights.data_ptr(), workspace.data_ptr()
        args.exchange, args.tags = exchange.words.data_ptr(), exchange.tags.data_ptr()
        args.host_failure, args.spin_limit = failure.data_ptr(), self._spin_limit
        for name, tensor in inputs.items():
            args.inputs[INPUTS.index(name)] = tensor.data_ptr()

        def memory() -> list[MemoryRange]:
            constants = {"program": loaded.phases, **inputs, **others}
            kept, words = program.memory.kept.regions, program.memory.words
            planes = [(workspace.data_ptr() + 4 * region.start, 4 * region.size, region.name, False) for region in kept]
            planes += [
                (
                    exchange.words.data_ptr() + 8 * (slot * words.size + region.start),
                    8 * region.size,
                    f"words of {region.name}",
                    False,
                )
                for slot in range(2)
                for region in words.regions
            ]
            changing = {"words of tags": exchange.tags, "failure word": failure, **outputs}
            return memory_map(constants, changing) + planes + weight_regions(program.layouts, weights, True)

        library.call("sample", ctypes.byref(args), program.weight_bytes, program.max_rows, index, stream, memory=memory)
        return exchange, failure


def _bytes_tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _to_device(key: Hashable, program: Program, device: torch.device) -> DeviceProgram:
    refuse_while_capturing(device, "this sampler has not run at this batch size yet")
    tables = {name: table.to(device) for name, table in program.time_tables.items()}
    rows = (program.schedule, program.steered, program.bounds)
    rest = (None if row is None else row.to(device) for row in rows)
    return DeviceProgram(key, program, _bytes_tensor(program.program_bytes(), device), tables, *rest)


def _device_pack_items(
    layouts: Sequence[NetworkLayout], networks: Sequence[BoundNetwork], device: torch.device
) -> PackItems:
    refuse_while_capturing(device, "a parameter's storage moved since the last call")
    items = [item for layout, network in zip(layouts, networks) for item in layout.pack_items(network)]
    folds = [item for layout, network in zip(layouts, networks) for item in layout.fold_items(network)]
    (data, tiles), (fold_data, groups) = pack_table(items), fold_table(folds)
    empty = b"\0"  # torch makes no tensor of nothing
    return PackItems(
        _bytes_tensor(data, device), len(items), tiles, _bytes_tensor(fold_data or empty, device), len(folds), groups
    )
