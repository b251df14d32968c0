"""The generalist's weights on disk, in bfloat16, checked when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ...files import fill, read_tensors, write_tensors
from .critics import GeneralistCritics
from .instructions import ASSETS
from .policy import GeneralistConfig, GeneralistPolicy

Network = TypeVar("Network", bound=nn.Module)


def save(network: nn.Module, path: Path) -> None:
    """Writes the network's tensors, whole or not at all."""
    write_tensors(path, {name: value.to(torch.bfloat16) for name, value in network.state_dict().items()})


def _load(network: Network, path: Path) -> Network:
    tensors, _ = read_tensors(path)
    fill({"": network}, tensors, path)
    return network.requires_grad_(False).eval()


def load_policy(folder: Path = ASSETS) -> GeneralistPolicy:
    """The frozen policy of policy.safetensors, in float32."""
    return _load(GeneralistPolicy(GeneralistConfig()), folder / "policy.safetensors")


def load_critics(folder: Path = ASSETS) -> GeneralistCritics:
    """The frozen critics of critics.safetensors, in float32."""
    return _load(GeneralistCritics(), folder / "critics.safetensors")
