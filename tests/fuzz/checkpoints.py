"""Altered and cut-off checkpoints: each is read as it was written, or refused with the file named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from qpilots_fast import FlowMLP
from qpilots_fast.files import fill, read_tensors, write_tensors
from tests.fuzz.judge import Finding


@dataclass(frozen=True)
class Damage:
    """Bytes [at, at + len(new)) are written over, or, where new is empty, the file ends at `at`."""

    at: int
    new: bytes

    def applied(self, whole: bytes) -> bytes:
        return whole[: self.at] + (self.new + whole[self.at + len(self.new) :] if self.new else b"")


def written(path: Path) -> tuple[bytes, dict[str, Tensor]]:
    """A checkpoint of a small network, as bytes and tensors."""
    torch.manual_seed(0)
    tensors = FlowMLP(3, 2, (8, 8), layer_norm="post").state_dict()
    tensors["counts"] = torch.arange(5)
    write_tensors(path, tensors, {"config": "{}"})
    return path.read_bytes(), tensors


def damages(size: int) -> st.SearchStrategy[Damage]:
    """Cuts, and a few bytes anywhere, the header's first 8 (its length) more often."""
    at = st.one_of(st.integers(0, 7), st.integers(0, size - 1))
    return st.builds(Damage, at, st.binary(max_size=9))


def run(number: int, first_seed: int) -> int:
    """Reads this many damaged files; returns how many were refused.

    Raises:
        Finding: for the smallest damage found that is read as other numbers, or not refused by name.
    """
    refused = 0
    with TemporaryDirectory() as folder:
        path = Path(folder) / "flow.safetensors"
        whole, tensors = written(path)

        def one(damage: Damage) -> None:
            nonlocal refused
            refused += check(path, damage, whole, tensors)

        quiet = settings(max_examples=number, deadline=None, database=None)
        seed(first_seed)(quiet(given(damages(len(whole)))(one)))()
    return refused


def check(path: Path, damage: Damage, whole: bytes, tensors: dict[str, Tensor]) -> bool:
    """Whether the damaged file was refused.

    Raises:
        Finding: where it was read as something else, or refused without its name.
    """
    path.write_bytes(damage.applied(whole))
    try:
        found, _ = read_tensors(path)
        found.pop("counts", None)
        fill({"": FlowMLP(3, 2, (8, 8), layer_norm="post")}, found, path)
    except ValueError as error:
        if str(path) not in str(error) or len(str(error)) < len(str(path)) + 25:
            raise Finding(f"{damage} was refused as {error!r}") from error
        return True
    except Exception as error:
        raise Finding(f"{damage} ended in {error!r}") from error
    if any(not torch.equal(found[name], tensors[name]) for name in found):
        raise Finding(f"{damage} was read as other numbers")
    return False
