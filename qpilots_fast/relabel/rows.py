"""The rows of a data set, by number: an .npz file, a Parquet file, or a folder of Parquet files."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ACTION_KEYS = ("actions", "action")

# of rows that cannot be read, by position among those asked for: why
Reasons = dict[int, str]


class Source(Protocol):
    """Columns of rows 0 to num_rows - 1, in one order for all who open the same data."""

    num_rows: int
    columns: tuple[str, ...]

    def shape_of(self, key: str) -> tuple[int, ...]:
        """Of one row: of the whole column, or, where rows may differ, of the first row that has one."""

    def read(self, key: str, start: int, stop: int, shape: tuple[int, ...]) -> tuple[np.ndarray, Reasons]:
        """Rows start to stop - 1 of a column.

        Returns:
            values [stop - start, *shape], any numbers where a row has a reason, and the reasons.
        """


def open_source(path: Path, obs_key: str) -> Source:
    """Whatever path holds, with a column of that name.

    Raises:
        ValueError: where it holds no such data, or no rows.
    """
    source: Source | None = None
    if path.suffix == ".npz" and path.is_file():
        source = NpzSource(path, obs_key)
    elif path.is_dir() or (path.suffix in (".parquet", ".pq") and path.is_file()):
        source = ParquetSource(path)
    if source is not None:
        if obs_key not in source.columns:
            raise ValueError(
                f"{path} has no column {obs_key}, it has {', '.join(source.columns)}; name the observations' by "
                "--obs-key."
            )
        if not source.num_rows:
            raise ValueError(f"{path} has no rows; expected at least one.")
        return source
    got = "does not exist" if not path.exists() else "is none of them"
    raise ValueError(f"--data is {path}, which {got}; expected an .npz file, a .parquet file, or a folder of these.")


def parquet_files(path: Path) -> list[Path]:
    """The file, or all files of a folder by name, without those that begin with _ or . (as Parquet readers do)."""
    if path.is_file():
        return [path]
    found = [f for f in path.rglob("*") if f.suffix in (".parquet", ".pq") and f.is_file()]
    return sorted(f for f in found if not any(part[0] in "_." for part in f.relative_to(path).parts))


def fingerprint(path: Path) -> list[list[Any]]:
    """[name, bytes, time of the last change in ns] of each file: what tells that the data is what it was."""
    files = parquet_files(path) if path.is_dir() else [path]
    stats = [(f.relative_to(path).as_posix() if f != path else f.name, f.stat()) for f in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


class NpzSource:
    """The arrays of an .npz file; those that numpy.savez wrote are mapped, not read (savez_compressed's are read)."""

    def __init__(self, path: Path, obs_key: str) -> None:
        self._path = path
        self._arrays: dict[str, np.ndarray] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name[: -len(".npy")] for name in archive.namelist() if name.endswith(".npy")]
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"--data is {path}, which cannot be read as .npz ({error}).") from None
        self.columns = tuple(names)
        obs = self._array(obs_key) if obs_key in names else np.empty(0)
        self.num_rows = len(obs) if obs.ndim else 0

    def shape_of(self, key: str) -> tuple[int, ...]:
        array = self._array(key)
        if array.ndim < 2:
            raise ValueError(f"{key} in {self._path} has shape {list(array.shape)}; expected [N, width].")
        if len(array) != self.num_rows:
            raise ValueError(f"{key} in {self._path} has {len(array)} rows; expected {self.num_rows}, as the others.")
        return array.shape[1:]

    def read(self, key: str, start: int, stop: int, shape: tuple[int, ...]) -> tuple[np.ndarray, Reasons]:
        if self.shape_of(key) != shape:  # all rows alike: no row's fault
            raise ValueError(
                f"{key} in {self._path} is {list(self.shape_of(key))} a row; expected {list(shape)}, what the sampler "
                "reads."
            )
        values = np.array(self._array(key)[start:stop])
        return values, _not_finite(key, values)

    def _array(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            self._arrays[key] = _mapped(self._path, key)
            if self._arrays[key].dtype.kind not in "fiub":
                raise ValueError(f"{key} in {self._path} is {self._arrays[key].dtype}; expected numbers.")
        return self._arrays[key]


def _mapped(path: Path, key: str) -> np.ndarray:
    """An array of an .npz file: mapped where it is stored as it is, so that workers share one copy; else read."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = archive.getinfo(f"{key}.npy")
        file.seek(entry.header_offset)
        head = file.read(30)  # a zip file's local header, whose last two numbers are the lengths of what follows
        file.seek(int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little"), 1)
        if entry.compress_type == zipfile.ZIP_STORED:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(file)
            if not dtype.hasobject and math.prod(shape) > 0:
                return np.memmap(path, dtype, "r", file.tell(), shape, "F" if by_columns else "C")
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[key]


@dataclass(frozen=True)
class _Group:
    """A row group of a file, and the number of its first row."""

    file: Path
    index: int
    first: int
    rows: int


class ParquetSource:
    """Lists of numbers in Parquet files, read by row groups; the last group read is kept for the next rows."""

    def __init__(self, path: Path) -> None:
        from pyarrow import ArrowException, parquet

        self._path, self._groups = path, list[_Group]()
        self._kept: tuple[tuple[_Group, str], Any] | None = None
        schema, first = None, 0
        for file in parquet_files(path):
            try:
                metadata = parquet.read_metadata(file)
            except (OSError, ArrowException) as error:
                raise ValueError(f"{file} cannot be read as Parquet ({error}).") from None
            names = metadata.schema.to_arrow_schema().names
            if schema not in (None, names):
                raise ValueError(f"{file} has columns {names}; expected {schema}, those of the files before it.")
            schema = names
            for index in range(metadata.num_row_groups):
                rows = metadata.row_group(index).num_rows
                self._groups.append(_Group(file, index, first, rows))
                first += rows
        if schema is None:
            raise ValueError(f"--data is {path}, a folder without .parquet files; expected at least one.")
        self.columns, self.num_rows = tuple(schema), first

    def shape_of(self, key: str) -> tuple[int, ...]:
        for group in self._groups:
            for value in self._column(group, key):
                if value.is_valid:
                    shape = np.shape(value.as_py())
                    if not shape:
                        raise ValueError(f"{key} in {self._path} is {value.type}; expected lists of numbers.")
                    return shape
        raise ValueError(f"{key} in {self._path} is null in every row; expected lists of numbers.")

    def read(self, key: str, start: int, stop: int, shape: tuple[int, ...]) -> tuple[np.ndarray, Reasons]:
        import pyarrow

        pieces = []
        for group in self._groups:
            low, high = max(start, group.first), min(stop, group.first + group.rows)
            if low < high:
                pieces.append(self._column(group, key)[low - group.first : high - group.first])
        column = pyarrow.concat_arrays([piece for chunked in pieces for piece in chunked.chunks])
        values, reasons = _dense(key, column, shape)
        for row, reason in _not_finite(key, values).items():
            reasons.setdefault(row, reason)
        return values, reasons

    def _column(self, group: _Group, key: str) -> Any:
        from pyarrow import parquet

        wanted = (group, key)
        if self._kept is None or self._kept[0] != wanted:
            with parquet.ParquetFile(group.file) as file:
                column = file.read_row_group(group.index, columns=[key])[key]
            if hasattr(column.type, "storage_type"):  # a tensor column: lists beneath
                column = column.cast(column.type.storage_type)
            self._kept = (wanted, column)
        return self._kept[1]


def _dense(key: str, column: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, Reasons]:
    """Lists, however nested, as an array [n, *shape]; 0 where a row has a reason."""
    import pyarrow.compute as pc
    from pyarrow import types

    null = column.is_null().to_numpy(zero_copy_only=False)
    reasons = {int(row): f"{key} is null" for row in np.flatnonzero(null)}
    if not shape:
        if not (types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type)):
            raise ValueError(f"{key} holds {column.type}; expected numbers.")
        filled = pc.fill_null(column, False if types.is_boolean(column.type) else 0)
        return filled.to_numpy(zero_copy_only=False), reasons
    if not (types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type)):
        raise ValueError(f"{key} holds {column.type}; expected lists of numbers, {len(shape)} deep.")
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero((lengths != shape[0]) & ~null):
        reasons[int(row)] = f"{key} has width {lengths[row]}; expected {shape[0]}"
    whole = np.flatnonzero(lengths == shape[0])
    inner, inside = _dense(key, column.take(whole).flatten(), shape[1:])
    for position, reason in inside.items():
        reasons.setdefault(int(whole[position // shape[0]]), reason.replace("is null", "holds a null"))
    values = np.zeros((len(column), *shape), inner.dtype)
    values[whole] = inner.reshape(len(whole), *shape)
    return values, reasons


def _not_finite(key: str, values: np.ndarray) -> Reasons:
    if values.dtype.kind != "f":
        return {}
    finite = np.isfinite(values).reshape(len(values), -1)
    return {int(row): f"{key} has {(~finite[row]).sum()} non-finite values" for row in np.flatnonzero(~finite.all(1))}
