"""The generalist's weights on disk, in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from .critics import GeneralistCritics
from .instructions import ASSETS
from .policy import GeneralistConfig, GeneralistPolicy

Network = TypeVar("Network", bound=nn.Module)


def save(network: nn.Module, path: Path) -> None:
    """Writes the network's tensors."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(torch.bfloat16).contiguous() for name, value in network.state_dict().items()}, path)


def _load(network: Network, path: Path) -> Network:
    from safetensors.torch import load_file

    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return network.requires_grad_(False).eval()


def load_policy(folder: Path = ASSETS) -> GeneralistPolicy:
    """The frozen policy of policy.safetensors, in float32."""
    return _load(GeneralistPolicy(GeneralistConfig()), folder / "policy.safetensors")


def load_critics(folder: Path = ASSETS) -> GeneralistCritics:
    """The frozen critics of critics.safetensors, in float32."""
    return _load(GeneralistCritics(), folder / "critics.safetensors")
