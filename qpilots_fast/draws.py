"""The numbers that a call draws: from torch's generator or one given, or row by row from seeds."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .untraced import untraced

Seeds = Sequence[int] | Sequence[torch.Generator] | Tensor | np.ndarray


def drawn(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Tensor:
    """Standard normal numbers."""
    if generator is None:  # torch.compile cannot trace a generator, not even None, beside a symbolic size
        return torch.randn(shape, device=device, dtype=dtype)
    return torch.randn(shape, device=device, dtype=dtype, generator=generator)


def read_seeds(seeds: Any, rows: int) -> list[Any]:
    """One seed, or one generator, for each of a call's rows.

    Raises:
        TypeError: neither integers nor CPU generators. ValueError: not one a row.
    """
    if isinstance(seeds, (Tensor, np.ndarray)):
        seeds = seeds.reshape(-1).tolist()
    if not isinstance(seeds, Sequence) or isinstance(seeds, (str, bytes)):
        raise TypeError(f"seeds is {type(seeds).__name__}; expected one integer (or CPU generator) a row, e.g. [0, 1].")
    if len(seeds) != rows:
        raise ValueError(f"seeds has {len(seeds)} entries, the call {rows} rows; expected one a row.")
    return [seed if isinstance(seed, torch.Generator) else _read_seed(seed) for seed in seeds]


def _read_seed(seed: Any) -> int:
    if isinstance(seed, (bool, np.bool_)) or not hasattr(seed, "__index__"):
        raise TypeError(f"seeds has {seed!r} ({type(seed).__name__}); expected integers, or torch.Generators.")
    number = operator.index(seed)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seeds has {number}; expected integers of 64 bits.")
    return number


@untraced
def drawn_by_row(seeds: list[Any], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """For each shape a float32 CPU tensor [B, *shape]; row i's numbers follow from seed i alone, shape after shape.

    On the CPU whatever the device, so that a seed means the same everywhere; float32 whatever the sampler's dtype, so
    that it means the same in float64.
    """
    values = [torch.empty(len(seeds), math.prod(shape), dtype=torch.float32, device="cpu") for shape in shapes]
    one = torch.Generator(device="cpu")  # seeded anew for each row: making one a row costs more than the numbers
    for seed, *rows in zip(seeds, *(value.unbind(0) for value in values)):
        if isinstance(seed, torch.Generator):
            if seed.device.type != "cpu":
                raise ValueError(
                    f"seeds has a generator on {seed.device}; expected CPU generators (draws are made on the CPU and "
                    "moved, so that they are the same on every device), e.g. torch.Generator()."
                )
            generator = seed
        else:
            generator = one.manual_seed(seed)
        for row in rows:
            row.normal_(generator=generator)
    return [value.view(len(seeds), *shape) for value, shape in zip(values, shapes)]
