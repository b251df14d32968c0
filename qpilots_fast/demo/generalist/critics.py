"""The critics that steer the generalist: ten MLPs over state, instruction and the chunk's real actions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...networks import CriticEnsemble
from .instructions import EMBEDDING_DIM
from .policy import ACTION_DIM, CHUNK, PARTS, features

OBS_DIM = sum(PARTS) + EMBEDDING_DIM
NUM_CRITICS = 10
HIDDEN_DIMS = (128, 128)


def critic_obs(batch: dict[str, Tensor]) -> Tensor:
    """What the critics see of a batch: the policy's features of the state, and the instruction, [B, OBS_DIM]."""
    language = batch["observation.language"] * EMBEDDING_DIM**0.5
    return torch.cat([features(batch["observation.state"]), language], -1)


class GeneralistCritics(nn.Module):
    """(batch, actions [B, C, 4]) -> q_values [E, B]: how soon the frozen policy succeeds after this chunk, 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.ensemble = CriticEnsemble(OBS_DIM, CHUNK * ACTION_DIM, NUM_CRITICS, HIDDEN_DIMS)

    def forward(self, batch: dict[str, Tensor], actions: Tensor) -> Tensor:
        return self.ensemble(critic_obs(batch), actions.flatten(1))
