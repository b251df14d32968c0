"""A run's whole state in one safetensors file: networks, optimisers, generators, online rows, counters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qpilots_fast.files import fill, fill_optimiser, optimiser_tensors, read_tensors, write_tensors

from .agents import Agent
from .tasks import ReplayBuffer


def save(path: Path, agent: Agent, buffer: ReplayBuffer, counters: dict[str, Any]) -> None:
    """Writes the state; an interrupted write leaves the previous file."""
    tensors: dict[str, Tensor] = {"generator": agent.generator.get_state(), "torch": torch.get_rng_state()}
    for name, network in agent.networks.items():
        tensors |= {f"network/{name}/{key}": value for key, value in network.state_dict().items()}
    for name, optimiser in agent.optimisers.items():
        tensors |= optimiser_tensors(f"optimiser/{name}/", optimiser)
    tensors |= {f"online/{key}": torch.from_numpy(value) for key, value in buffer.online_rows().items()}
    about = {
        "counters": json.dumps(counters),
        "config": agent.config.to_json(),
        "sampling": json.dumps(buffer.rng.bit_generator.state),
        "starts": json.dumps(buffer.starts[buffer.starts >= buffer.offline_size].tolist()),
    }
    write_tensors(path, tensors, about)


def load_networks(path: Path, networks: dict[str, nn.Module]) -> None:
    """Fills networks by their names in a run, whatever its settings.

    Raises:
        ValueError: where the file lacks one, or has it in another shape.
    """
    fill({f"network/{name}/": network for name, network in networks.items()}, read_tensors(path)[0], path)


def load(path: Path, agent: Agent, buffer: ReplayBuffer) -> dict[str, Any]:
    """Restores what `save` wrote and returns its counters.

    Raises:
        ValueError: if the file was written under other settings, or is not what was written.
    """
    tensors, about = read_tensors(path)
    written, asked = json.loads(about["config"]), json.loads(agent.config.to_json())
    free = {"offline_steps", "online_steps", "threads", "out", "tensorboard", "backend"}  # may change between runs
    differing = [key for key in asked if key not in free and written.get(key) != asked[key]]
    if differing:
        raise ValueError(f"{path} was written with other settings of {', '.join(differing)}; use another --out.")
    agent.generator.set_state(tensors["generator"])
    torch.set_rng_state(tensors["torch"])
    fill({f"network/{name}/": network for name, network in agent.networks.items()}, tensors, path)
    for name, optimiser in agent.optimisers.items():
        fill_optimiser(optimiser, tensors, f"optimiser/{name}/")
    online: dict[str, np.ndarray] = {
        key.removeprefix("online/"): value.numpy() for key, value in tensors.items() if key.startswith("online/")
    }
    buffer.restore(online, json.loads(about["starts"]))
    buffer.rng.bit_generator.state = json.loads(about["sampling"])
    return json.loads(about["counters"])
