"""What was made, on disk: one Parquet file a part, each whole or not there, and a manifest of what they belong to."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing, write_text

COLUMNS = ("row_id", "actions", "q_before", "q_after")


@dataclass(frozen=True)
class Part:
    """Rows start to stop - 1 of the data."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Relabelled:
    """A part's rows. columns: row_id [n], actions [n, A] or [n, C, D], q_before [n], q_after [n], each None where no
    row is left; set_aside: reasons by row_id."""

    columns: list[np.ndarray | None]
    set_aside: dict[int, str]


def parts_of(num_rows: int, part_rows: int) -> list[Part]:
    """All parts of a data set, the last one shorter."""
    starts = range(0, num_rows, part_rows)
    return [Part(index, start, min(start + part_rows, num_rows)) for index, start in enumerate(starts)]


class Store:
    """The folder --out, or, where --out is a .parquet file, the folder beside it until that file is joined.

    Parquet readers pass over the manifest, whose name begins with _.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.one_file = out.suffix in (".parquet", ".pq")
        self.folder = out.with_name(out.name + ".parts") if self.one_file else out
        self.set_aside = out.with_name((out.stem if self.one_file else out.name) + ".set_aside.parquet")
        self._manifest = self.folder / "_manifest.json"
        self._sampler = self.folder / "_sampler.txt"

    # ------------------------------------------------------------ what the parts belong to

    def begin(self, told: dict[str, Any]) -> dict[str, Any]:
        """The manifest: told, on the first run; on a later one what the first wrote, compared with told.

        Raises:
            ValueError: where --out is in use for something else.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out is {self.out}, a file; expected a folder, or a new file that ends in .parquet.")
        if self._manifest.exists():
            found = self._told()
            for name, value in told.items():
                if found.get(name) != value:
                    raise ValueError(
                        f"{self.out} was begun with {name} = {found.get(name)}, now it is {value}; expected the same, "
                        "so that all rows are made alike. Take another --out, or remove this one."
                    )
            return found
        if self.one_file and self.out.exists():
            raise ValueError(f"--out is {self.out}, which exists and is not ours; expected a new file.")
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"--out is {self.out}, a folder with other files in it; expected a new or an empty one.")
        write_text(self._manifest, json.dumps(told, indent=1))
        return told

    def _told(self) -> dict[str, Any]:
        """The manifest as it stands."""
        try:
            return dict(json.loads(self._manifest.read_text(encoding="utf-8")))
        except (TypeError, ValueError):
            raise ValueError(
                f"{self._manifest} is not what was written; expected a whole JSON object. Take another --out, or "
                f"remove {self.folder}."
            ) from None

    def part_rows(self) -> int | None:
        """How many rows a part has, as an earlier run chose; None before the first."""
        return int(self._told()["part_rows"]) if self._manifest.exists() else None

    def claim_sampler(self, fingerprint: str, function: str) -> None:
        """Says that this sampler makes all parts; the first worker to say so is right.

        Raises:
            ValueError: for another sampler than the first.
        """
        claim = self._sampler.with_name(f".{self._sampler.name}.{uuid.uuid4().hex}.tmp")
        claim.write_text(fingerprint)
        try:
            os.link(claim, self._sampler)  # fails where another was first, also over a network
        except FileExistsError:
            first = self._sampler.read_text()
            if first != fingerprint:
                raise ValueError(
                    f"{function}() returned another sampler here (weights or settings {fingerprint[:12]}) than where "
                    f"{self.out} was begun ({first[:12]}); expected the same in every process and run: load a "
                    "checkpoint, or call torch.manual_seed first. For a new sampler take another --out."
                ) from None
        finally:
            claim.unlink()

    # ------------------------------------------------------------ parts

    def path(self, part: Part) -> Path:
        return self.folder / f"part-{part.index:08d}.parquet"

    def has(self, part: Part) -> bool:
        return self.path(part).exists()

    def write(self, part: Part, made: Relabelled) -> None:
        """The part's file: whole, or none where the process dies."""
        import pyarrow as pa
        from pyarrow import parquet

        row_id, actions, *values = made.columns
        arrays = {} if row_id is None else {"row_id": pa.array(row_id), "actions": _lists(actions)}
        arrays |= {name: pa.array(value) for name, value in zip(COLUMNS[2:], values) if value is not None}
        table = pa.table(arrays).replace_schema_metadata({"set_aside": json.dumps(list(made.set_aside.items()))})
        with replacing(self.path(part)) as path:
            parquet.write_table(table, path)

    def finish(self, parts: list[Part], manifest: dict[str, Any]) -> dict[str, Any]:
        """Checks that every row is there once, made or set aside, writes the rows set aside, joins a single file.

        Raises:
            ValueError: where a part is not what it should be; it is removed, so that the next run makes it again.
        """
        import pyarrow as pa
        from pyarrow import parquet

        aside: dict[int, str] = {}
        for part in parts:
            aside |= self._check(part)
        if aside:
            table = pa.table({"row_id": pa.array(list(aside), pa.int64()), "reason": pa.array(list(aside.values()))})
            with replacing(self.set_aside) as path:
                parquet.write_table(table, path)
        files = [f for f in map(self.path, parts) if parquet.read_metadata(f).num_columns]
        if self.one_file and files:
            with replacing(self.out) as path:
                _join(files, path)
        rows = parts[-1].stop
        manifest = {**manifest, "complete": True, "relabelled": rows - len(aside), "set_aside": len(aside)}
        write_text(self._manifest, json.dumps(manifest, indent=1))
        for left in [*self.folder.glob(".*.tmp"), *(map(self.path, parts) if self.one_file else ())]:
            left.unlink(missing_ok=True)
        for part in () if self.one_file else parts:  # a part of no rows has no columns, which readers stumble over
            if self.path(part) not in files:
                self.path(part).unlink()
        return manifest

    def _check(self, part: Part) -> dict[int, str]:
        """The rows set aside of a part whose rows are all there, once."""
        from pyarrow import parquet

        path = self.path(part)
        with parquet.ParquetFile(path) as file:
            aside = {int(row): reason for row, reason in json.loads(file.schema_arrow.metadata[b"set_aside"])}
            made = file.read(["row_id"])["row_id"].to_numpy() if file.metadata.num_columns else np.empty(0, np.int64)
        found = np.sort(np.concatenate([made, np.fromiter(aside, np.int64)]))
        if not np.array_equal(found, np.arange(part.start, part.stop)):
            path.unlink()
            raise ValueError(
                f"{path} had {len(found)} rows, not {part.start} to {part.stop - 1} once each, and was removed; run "
                "the command again to make it anew."
            )
        return aside


def _lists(actions: np.ndarray | None) -> Any:
    """[n, A] as lists of fixed size, chunks [n, C, D] as lists of lists."""
    import pyarrow as pa

    assert actions is not None
    values = pa.array(actions.reshape(-1))
    for size in reversed(actions.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    return values


def _join(files: list[Path], out: Path) -> None:
    """The parts one after the other, one row group each."""
    from pyarrow import parquet

    writer = None
    for file in files:
        table = parquet.read_table(file).replace_schema_metadata()
        writer = writer or parquet.ParquetWriter(out, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
