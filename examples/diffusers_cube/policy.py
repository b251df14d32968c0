"""A diffusion policy for OGBench cube-single, as diffusers users write one: a UNet, and a loop around a scheduler."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from qpilots_fast.demo.ogbench_cube import ACTION_DIM, CHUNK, STATE_DIM

from .unet import ConditionalUnet1D

WEIGHTS = Path(__file__).parent / "weights.safetensors"
HORIZON = 8  # steps that are predicted, of which the first CHUNK = 5 are executed
STEP_WIDTH = ACTION_DIM // CHUNK  # numbers of one step's action
TRAINING_STEPS, SAMPLING_STEPS = 100, 10


def new_network() -> ConditionalUnet1D:
    """Reads the normalised state, and not the goal: the policy knows no task."""
    return ConditionalUnet1D(STATE_DIM, STEP_WIDTH)


def new_scheduler() -> DDIMScheduler:
    """Chi et al.'s: squared cosine, epsilon, clean actions clipped to [-1, 1]."""
    return DDIMScheduler(num_train_timesteps=TRAINING_STEPS, beta_schedule="squaredcos_cap_v2")


@torch.no_grad()
def sample(
    network: ConditionalUnet1D, scheduler: DDIMScheduler, state: Tensor, noise: Tensor, steps: int = SAMPLING_STEPS
) -> Tensor:
    """Actions [B, HORIZON, STEP_WIDTH] of states [B, S], from noise of the same shape."""
    scheduler.set_timesteps(steps)
    x = noise
    for step in scheduler.timesteps:
        x = scheduler.step(network(x, step.expand(len(x)), state), step, x).prev_sample
    return x


def save(network: ConditionalUnet1D, path: Path) -> None:
    """Writes the weights in bfloat16."""
    save_file({name: value.to(torch.bfloat16).contiguous() for name, value in network.state_dict().items()}, path)


def load(path: Path = WEIGHTS) -> ConditionalUnet1D:
    """Reads what `save` wrote, in float32."""
    network = new_network().eval().requires_grad_(False)
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return network
