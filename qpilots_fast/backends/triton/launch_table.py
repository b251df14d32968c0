"""Which tile each kernel runs with: a short table with reasons instead of autotuning at the first call.

A tile depends on the kernel, the precision, the GPU and the network. The batch size decides only how many rows a
program takes, with as many more warps: each warp's work, and so a row's order of sums, stays the same.
`python -m bench.gpu.tune` measures alternatives on a GPU and writes the rows of a JSON file that takes precedence.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

_DOT = {"float32": "ieee", "tf32": "tf32", "bfloat16": "ieee", "float16": "ieee"}
MAX_ACTION_PAD = 256  # outputs of a network, padded: one column tile holds them


def dot_mode(precision: str, capability: int) -> str:
    """input_precision of tl.dot; the interpreter (capability 0) multiplies half operands after widening them."""
    return "emulated" if capability == 0 and precision in ("bfloat16", "float16") else _DOT[precision]


@dataclass(frozen=True)
class Tile:
    """Block sizes and compile options of one kernel.

    Args:
        block_b: rows of a program. block_n: columns of its accumulator. block_k: depth of one product step.
        num_warps, num_stages: Triton's compile options.
        larger: (rows of all members from which programs are larger, times the rows, times the columns), in rising
            order: larger programs read fewer operand bytes and leave fewer to fill the GPU. They have as many more
            warps as rows, and their epilogue takes block_n columns at a time: what a warp adds up of a row stays the
            same.
        max_registers: a thread's; 0: as ptxas likes, which may spill to fit more blocks on a multiprocessor.
    """

    block_b: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    larger: tuple[tuple[int, int, int], ...] = ()
    max_registers: int = 0

    def narrowed(self, hidden_dim: int) -> Tile:
        """This tile for layers of at most hidden_dim columns: no wider than their power of two."""
        width = max(16, 1 << (hidden_dim - 1).bit_length())
        block_n = min(self.block_n, width)
        larger = tuple((rows, taller, min(wider, width // block_n)) for rows, taller, wider in self.larger)
        return replace(self, block_n=block_n, larger=larger)

    def for_rows(self, rows: int) -> Tile:
        """This tile for a launch over so many rows."""
        fitting = [times for least, *times in self.larger if rows >= least]
        if not fitting:
            return self
        taller, wider = fitting[-1]
        block_b, block_n, warps = self.block_b * taller, self.block_n * wider, self.num_warps * taller
        return replace(self, block_b=block_b, block_n=block_n, num_warps=warps, larger=())

    def with_columns(self, columns: int) -> Tile:
        """This tile with so many columns."""
        return replace(self, block_n=columns)

    @property
    def most_rows(self) -> int:
        """Rows of a program, at most."""
        return self.block_b * max((taller for _, taller, _ in self.larger), default=1)

    @property
    def most_columns(self) -> int:
        """Columns of a program, at most."""
        return self.block_n * max((wider for _, _, wider in self.larger), default=1)

    def options(self) -> dict[str, int]:
        """Block sizes and compile options as launch arguments."""
        return {
            "BLOCK_B": self.block_b,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **({"maxnreg": self.max_registers} if self.max_registers else {}),
        }


@dataclass(frozen=True)
class LaunchRow:
    """One line of the table: the first row whose bounds hold is taken.

    Args:
        kernel: "layer" (hidden layers, forward and backward) or "ends" (outputs and input gradients, whose columns are
            the network's).
        precisions: those it is for.
        capabilities: (lowest, highest) compute capability as 10 major + minor, inclusive.
        tile: what to launch.
        reason: why.
    """

    kernel: str
    precisions: tuple[str, ...]
    capabilities: tuple[int, int]
    tile: Tile
    reason: str


_HALF = ("bfloat16", "float16")
_ANY = (80, 999)

TABLE: tuple[LaunchRow, ...] = (
    LaunchRow(
        "layer",
        _HALF,
        (90, 90),
        Tile(64, 64, 64, 4, 3, larger=((1024, 1, 2), (1536, 2, 2), (4096, 2, 4)), max_registers=255),
        "64 rows are one warpgroup's MMA height; 64 columns cut a layer of ten 512-wide members into 80 programs at "
        "64 rows. Of larger programs the largest that still fill half of the GPU: 64 x 128, 128 x 128, and 128 x 256, "
        "which read 1.3, 2 and 2.7 times fewer operand bytes; larger accumulators spill. 144 KiB in 3 stages.",
    ),
    LaunchRow(
        "layer",
        _HALF,
        _ANY,
        Tile(64, 128, 64, 8, 3),
        "64 rows are one warpgroup's MMA height on sm_90 and up; 128 columns cut a layer of ten 512-wide members into "
        "40 programs at 64 rows, and the epilogue of the backward, with two sums of the row, then fits 180 registers "
        "at 8 warps (4 warps spill); 72 KiB in 3 stages fits the 99 KiB of sm_86 and sm_120.",
    ),
    LaunchRow("layer", ("tf32",), _ANY, Tile(64, 128, 32, 8, 3), "As for half precision, with 4-byte operands."),
    LaunchRow(
        "layer",
        ("float32",),
        _ANY,
        Tile(32, 64, 16, 4, 2, max_registers=255),
        "No tensor cores in IEEE float32: the tile is bounded by registers of the FMA loop, not by shared memory.",
    ),
    LaunchRow(
        "ends",
        _HALF,
        _ANY,
        Tile(32, 16, 64, 4, 3),
        "Few columns: fewer rows a program spread a batch of 256 over 8 multiprocessors a member, and 256 columns of "
        "a long chunk still fit the registers.",
    ),
    LaunchRow("ends", ("tf32",), _ANY, Tile(32, 16, 32, 4, 3), "As for half precision, with 4-byte operands."),
    LaunchRow("ends", ("float32",), _ANY, Tile(16, 16, 16, 4, 2, max_registers=255), "As above, by the FMA loop."),
)

# the interpreter runs every operation as a numpy call: few, large tiles are fastest; shapes in tests are tiny
INTERPRETER_TILE = Tile(16, 32, 32, 1, 1)


@dataclass(frozen=True)
class LaunchTable:
    """Rows tried in order, before the built-in ones."""

    rows: tuple[LaunchRow, ...] = ()

    def tile(self, kernel: str, precision: str, capability: int) -> Tile:
        """The tile of a kernel; capability 0 stands for the interpreter.

        Raises:
            ValueError: where no row fits.
        """
        for row in (*self.rows, *TABLE):
            low, high = row.capabilities
            fits = low <= capability <= high or (capability == 0 and row in self.rows)
            if row.kernel == kernel and precision in row.precisions and fits:
                return row.tile
        if capability == 0:
            return INTERPRETER_TILE
        raise ValueError(f"no launch row for kernel {kernel!r}, precision {precision!r}, sm_{capability}.")

    def to_json(self) -> str:
        return json.dumps([asdict(row) for row in self.rows], indent=2)

    @staticmethod
    def from_json(text: str) -> LaunchTable:
        rows = []
        for values in json.loads(text):
            tile = values.pop("tile")
            tile = Tile(**{**tile, "larger": tuple(map(tuple, tile.get("larger", ())))})
            lists = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            rows.append(LaunchRow(tile=tile, **lists))  # type: ignore[arg-type]
        return LaunchTable(tuple(rows))


def tuned_path() -> Path:
    """Where `tune` writes: QPILOTS_TRITON_TABLE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qpilots_fast" / "triton_layers.json"
    return Path(os.environ.get("QPILOTS_TRITON_TABLE", default))


@lru_cache(maxsize=1)
def default_table() -> LaunchTable:
    """The tuned rows of this machine where there are any."""
    path = tuned_path()
    return LaunchTable.from_json(path.read_text()) if path.is_file() else LaunchTable()
