"""What an entry of the zoo is, and the sizes that all of them share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

S, A = 7, 4  # widths of observations and actions
H = int(os.environ.get("QPILOTS_ZOO_WIDTH", "16"))  # of hidden rows; the table of the documents is measured at 256


@dataclass(frozen=True, eq=False)
class Entry:
    """A network in the shape of one of a public codebase.

    Args:
        codebase, name: where such a network stands, and its class there.
        kind: "critic" or "flow". build: the module.
        refused: a part of the reason, where it does not pack; empty where it does.
        hints: of from_module.
    """

    codebase: str
    name: str
    kind: str
    build: Callable[[], nn.Module]
    refused: str = ""
    hints: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.codebase} {self.name}"


def mlp(
    width_in: int, width_out: int, act: Callable[[], nn.Module] = nn.ReLU, layers: int = 2, norm: str = ""
) -> nn.Sequential:
    """Linears with the activation between them; norm: "pre" or "post", a LayerNorm before or after it."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts.append(nn.Linear(width_in, H))
        parts += [nn.LayerNorm(H), act()] if norm == "pre" else [act(), *([nn.LayerNorm(H)] if norm == "post" else [])]
        width_in = H
    return nn.Sequential(*parts, nn.Linear(width_in, width_out))
