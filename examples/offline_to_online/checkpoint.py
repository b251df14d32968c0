"""A run's whole state in one safetensors file: networks, optimisers, generators, online rows, counters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .agents import Agent
from .tasks import ReplayBuffer


def save(path: Path, agent: Agent, buffer: ReplayBuffer, counters: dict[str, Any]) -> None:
    """Writes the state; an interrupted write leaves the previous file."""
    tensors: dict[str, Tensor] = {"generator": agent.generator.get_state(), "torch": torch.get_rng_state()}
    for name, network in agent.networks.items():
        tensors |= {f"network/{name}/{key}": value for key, value in network.state_dict().items()}
    for name, optimiser in agent.optimisers.items():
        for index, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{name}/{index}/{key}": value for key, value in state.items()}
    tensors |= {f"online/{key}": torch.from_numpy(value) for key, value in buffer.online_rows().items()}
    about = {
        "counters": json.dumps(counters),
        "config": agent.config.to_json(),
        "sampling": json.dumps(buffer.rng.bit_generator.state),
        "starts": json.dumps(buffer.starts[buffer.starts >= buffer.offline_size].tolist()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, temporary, about)
    os.replace(temporary, path)


def _fill(networks: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    for name, network in networks.items():
        prefix = f"network/{name}/"
        network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def load_networks(path: Path, networks: dict[str, nn.Module]) -> None:
    """Fills networks by their names in a run, whatever its settings."""
    _fill(networks, load_file(path))


def load(path: Path, agent: Agent, buffer: ReplayBuffer) -> dict[str, Any]:
    """Restores what `save` wrote and returns its counters.

    Raises:
        ValueError: if the file was written under other settings.
    """
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    written, asked = json.loads(about["config"]), json.loads(agent.config.to_json())
    free = {"offline_steps", "online_steps", "threads", "out", "tensorboard", "backend"}  # may change between runs
    differing = [key for key in asked if key not in free and written.get(key) != asked[key]]
    if differing:
        raise ValueError(f"{path} was written with other settings of {', '.join(differing)}; use another --out.")
    agent.generator.set_state(tensors["generator"])
    torch.set_rng_state(tensors["torch"])
    _fill(agent.networks, tensors)
    for name, optimiser in agent.optimisers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, *rest = key.split("/")
            if kind == "optimiser" and rest[0] == name:
                state.setdefault(int(rest[1]), {})[rest[2]] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    online: dict[str, np.ndarray] = {
        key.removeprefix("online/"): value.numpy() for key, value in tensors.items() if key.startswith("online/")
    }
    buffer.restore(online, json.loads(about["starts"]))
    buffer.rng.bit_generator.state = json.loads(about["sampling"])
    return json.loads(about["counters"])
