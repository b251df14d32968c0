"""Which tile each kernel runs with: a short table with reasons instead of autotuning at the first call.

A tile depends on the kernel, the precision, the GPU and the network, never on the batch size: a row then has one
summation order whatever batch it comes in. `python -m bench.gpu.tune` measures alternatives on a
GPU and writes the rows of a JSON file that takes precedence over this table.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

_DOT = {"float32": "ieee", "tf32": "tf32", "bfloat16": "ieee", "float16": "ieee"}


def dot_mode(precision: str, capability: int) -> str:
    """input_precision of tl.dot; the interpreter (capability 0) multiplies half operands after widening them."""
    return "emulated" if capability == 0 and precision in ("bfloat16", "float16") else _DOT[precision]


@dataclass(frozen=True)
class Tile:
    """Block sizes and compile options of one kernel.

    Args:
        block_b: rows of a program. block_n: hidden columns of an accumulator tile. block_k: depth of one product step.
        num_warps, num_stages: Triton's compile options.
        programs_per_sm: resident programs that the persistent grid asks for.
        max_registers: per thread; stated because ptxas otherwise spills to fit two blocks on a multiprocessor.
    """

    block_b: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1
    max_registers: int = 255

    def narrowed(self, hidden_dim: int) -> Tile:
        """This tile for layers of at most hidden_dim columns: no wider than their power of two."""
        width = max(16, 1 << (hidden_dim - 1).bit_length())
        return replace(self, block_n=min(self.block_n, width))

    def options(self) -> dict[str, int]:
        """Block sizes and compile options as launch arguments."""
        return {
            "BLOCK_B": self.block_b,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


@dataclass(frozen=True)
class LaunchRow:
    """One line of the table: the first row whose bounds hold is taken.

    Args:
        kernel: "critic", "step" or "network".
        precisions: those it is for.
        capabilities: (lowest, highest) compute capability as 10 major + minor, inclusive.
        max_action_pad: largest padded action width whose tiles this row can hold in registers.
        tile: what to launch.
        reason: why.
    """

    kernel: str
    precisions: tuple[str, ...]
    capabilities: tuple[int, int]
    max_action_pad: int
    tile: Tile
    reason: str


_HALF = ("bfloat16", "float16")
_ANY = (80, 999)

TABLE: tuple[LaunchRow, ...] = (
    LaunchRow(
        "critic", _HALF, _ANY, 64, Tile(64, 256, 32, 8, 4),
        "64 rows are one warpgroup's MMA height on sm_90 and up, and halve the weight bytes of 32; 256 columns read "
        "a row's operands twice a layer instead of 8 times with 64 (L2 is the bound, docs/gpu.md), where 512 spill; "
        "80 KiB of shared memory in 4 stages fits the 99 KiB of sm_86 and sm_120.",
    ),
    LaunchRow(
        "critic", ("tf32",), _ANY, 64, Tile(64, 128, 32, 8, 3),
        "4-byte operands: half the columns keep 3 stages at 72 KiB.",
    ),
    LaunchRow(
        "critic", ("float32",), _ANY, 64, Tile(32, 64, 16, 8, 2),
        "No tensor cores in IEEE float32: the tile is bounded by registers of the FMA loop, not by shared memory.",
    ),
    LaunchRow(
        "step", _HALF, _ANY, 64, Tile(32, 256, 32, 8, 4),
        "One flow against E critics: fewer rows a program spread a batch of 256 over 8 multiprocessors, and leave "
        "registers for the [rows, action] tiles of the combination.",
    ),
    LaunchRow("step", ("tf32",), _ANY, 64, Tile(32, 128, 32, 8, 3), "As for half precision, with 4-byte operands."),
    LaunchRow("step", ("float32",), _ANY, 64, Tile(16, 64, 16, 8, 2), "As for the critics, fewer rows as above."),
    LaunchRow("critic", (*_HALF, "tf32"), _ANY, 256, Tile(32, 64, 32, 8, 3), "Wide actions: d_a stays in registers."),
    LaunchRow("critic", ("float32",), _ANY, 256, Tile(16, 64, 16, 8, 2), "Wide actions, as above."),
    LaunchRow("step", (*_HALF, "tf32"), _ANY, 256, Tile(16, 64, 32, 8, 3), "Wide actions: six such tiles at once."),
    LaunchRow("step", ("float32",), _ANY, 256, Tile(16, 64, 16, 8, 2), "Wide actions, as above."),
    LaunchRow("network", _HALF, _ANY, 256, Tile(32, 64, 32, 8, 4), "Single forward and vjp calls only."),
    LaunchRow("network", ("tf32",), _ANY, 256, Tile(32, 64, 32, 8, 3), "Single forward and vjp calls only."),
    LaunchRow("network", ("float32",), _ANY, 256, Tile(16, 64, 16, 8, 2), "Single forward and vjp calls only."),
)  # fmt: skip

MAX_ACTION_PAD = max(row.max_action_pad for row in TABLE)

# the interpreter runs every operation as a numpy call: few, large tiles are fastest; shapes in tests are tiny
INTERPRETER_TILE = Tile(16, 32, 32, 1, 1, 1)


@dataclass(frozen=True)
class LaunchTable:
    """Rows tried in order, before the built-in ones."""

    rows: tuple[LaunchRow, ...] = ()

    def tile(self, kernel: str, precision: str, capability: int, action_pad: int) -> Tile:
        """The tile of a kernel; capability 0 stands for the interpreter.

        Raises:
            ValueError: where no row fits.
        """
        for row in (*self.rows, *TABLE):
            low, high = row.capabilities
            fits = low <= capability <= high or (capability == 0 and row in self.rows)
            if row.kernel == kernel and precision in row.precisions and fits and action_pad <= row.max_action_pad:
                return row.tile
        if capability == 0:
            return INTERPRETER_TILE
        raise ValueError(
            f"no launch row for kernel {kernel!r}, precision {precision!r}, sm_{capability}, action width {action_pad}."
        )

    def to_json(self) -> str:
        return json.dumps([asdict(row) for row in self.rows], indent=2)

    @staticmethod
    def from_json(text: str) -> LaunchTable:
        rows = []
        for values in json.loads(text):
            tile = Tile(**values.pop("tile"))
            lists = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            rows.append(LaunchRow(tile=tile, **lists))  # type: ignore[arg-type]
        return LaunchTable(tuple(rows))


def tuned_path() -> Path:
    """Where `tune` writes: QPILOTS_TRITON_TABLE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qpilots_fast" / "triton_table.json"
    return Path(os.environ.get("QPILOTS_TRITON_TABLE", default))


@lru_cache(maxsize=1)
def default_table() -> LaunchTable:
    """The tuned rows of this machine where there are any."""
    path = tuned_path()
    return LaunchTable.from_json(path.read_text()) if path.is_file() else LaunchTable()
