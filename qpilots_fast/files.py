"""Files that are there whole or not at all, and checkpoints that are checked when they are read."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# of the checkpoints that `write_tensors` writes; a file without one is of before there was a number
SCHEMA = 1
_SCHEMA, _DIGESTS = "schema", "crc32"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write what shall stand at path; it is put there at once when the block ends, and never in part.

    Where the block raises, or the process dies, what was at path before stays. Missing folders are made.

    Raises:
        OSError: where the disk does not take it; the message names path, the reason and what to do.
    """
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        number = getattr(error, "errno", None)
        reason = error if number is None else os.strerror(number)
        raise OSError(
            f"{path} could not be written ({reason}); what was there before is unchanged. Expected a folder that can "
            "be written to, with room for it: free some space or name another folder, and run this again."
        ) from error
    finally:
        try:
            new.unlink(missing_ok=True)
        except OSError:  # a folder that is no folder has no such file either
            pass


def write_text(path: Path, text: str) -> None:
    """The text as UTF-8, whole or not at all."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_figure(path: Path, figure: Any, dpi: int) -> None:
    """matplotlib's figure as PNG, whole or not at all."""
    with replacing(path) as new:
        figure.savefig(new, dpi=dpi, format="png")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """A safetensors file with the schema's number and a checksum of every tensor in its metadata, beside `about`."""
    from safetensors.torch import save_file

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digests = json.dumps({name: _digest(tensor) for name, tensor in kept.items()})
    with replacing(path) as new:
        save_file(kept, new, {**(about or {}), _SCHEMA: str(SCHEMA), _DIGESTS: digests})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and what else it says.

    Raises:
        ValueError: where it is none or is cut off, is of a newer schema, or a tensor is not what was written, or has
            values that are not finite; the message names the file and the tensor.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file; expected a .safetensors file.")
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); expected a whole file, as it was written. Was it cut "
            "off in copying? Copy it again."
        ) from None
    schema = about.get(_SCHEMA, str(SCHEMA))
    if schema != str(SCHEMA):
        raise ValueError(
            f"{path} has schema {schema}; expected {SCHEMA}, which this version of qpilots_fast reads. Install the "
            "version that wrote it."
        )
    digests = _read_digests(path, about)
    for name, tensor in tensors.items():
        if digests is not None and digests.get(name) != _digest(tensor):
            raise ValueError(f"{path}: {name} is not what was written (its checksum differs); copy the file again.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{path}: {name} has {count} values that are not finite; expected finite numbers. Take an earlier "
                "checkpoint (did the training diverge?)."
            )
    if digests is not None and digests.keys() != tensors.keys():
        missing = sorted(digests.keys() - tensors.keys())
        raise ValueError(f"{path} lacks {', '.join(missing)}, which was written to it; copy the file again.")
    return tensors, about


def fill(networks: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Each network's parameters and buffers from the tensors whose names begin with its prefix, as float32.

    Args:
        networks: by prefix, "flow." for one. path: what the tensors were read from, for the message.

    Raises:
        ValueError: where a tensor is missing or has another shape; no network is changed then.
    """
    states = {
        prefix: {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in networks
    }
    for prefix, network in networks.items():
        wanted, found = network.state_dict(), states[prefix]
        for name in [*wanted, *(name for name in found if name not in wanted)]:
            shapes = [None if name not in state else list(state[name].shape) for state in (found, wanted)]
            if shapes[0] != shapes[1]:
                got, expected = ("none" if shape is None else f"one of shape {shape}" for shape in shapes)
                raise ValueError(
                    f"{path} has {got} for {prefix}{name}; expected {expected}, as this {type(network).__name__} has "
                    "it. Was it written for a network of other sizes?"
                )
    for prefix, network in networks.items():
        network.load_state_dict(states[prefix])


def optimiser_tensors(prefix: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser remembers of each parameter, as `<prefix><index>/<name>`."""
    state = optimiser.state_dict()["state"]
    return {f"{prefix}{index}/{name}": value for index, values in state.items() for name, value in values.items()}


def fill_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """The state that `optimiser_tensors` gave; learning rates and the like stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            index, name = key.removeprefix(prefix).split("/")
            state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _read_digests(path: Path, about: dict[str, str]) -> dict[str, int] | None:
    """The checksums that were written, by tensor; None for a file without them."""
    if _DIGESTS not in about:
        return None
    try:
        return dict(json.loads(about[_DIGESTS]))
    except (TypeError, ValueError):
        raise ValueError(f"{path}: its checksums are not what was written; copy the file again.") from None


def _digest(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
