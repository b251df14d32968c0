"""Shape example: an action expert with openpi's calling convention, steered. The expert is a small stand-in.

It shows signatures and shapes only: tau runs from 1 (noise) to 0, the network predicts e - a, a chunk of 10 actions
is padded from 7 to 32 wide, and the observation is an object of several parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, SteeredSampler, Steering
from qpilots_fast.integrations import ReversedTimeFlow, real_dims

CHUNK, PADDED, REAL = 10, 32, 7


@dataclass
class Observation:
    prefix: Tensor  # [B, 64], stands for the vision-language prefix (its KV cache, in a real model)
    state: Tensor  # [B, 12], what the critics read


class StandInExpert(nn.Module):
    """denoise_step(prefix, x_t [B, C, 32], tau [B]) -> e - a [B, C, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards, self.prefix, self.outwards = nn.Linear(PADDED, 64), nn.Linear(65, 64), nn.Linear(64, PADDED)

    def denoise_step(self, prefix: Tensor, x_t: Tensor, tau: Tensor) -> Tensor:
        context = self.prefix(torch.cat([prefix, tau[:, None]], -1)).unsqueeze(1)
        return self.outwards(torch.tanh(self.inwards(x_t) + context))


def main() -> None:
    torch.manual_seed(0)
    batch_size = 4
    obs = Observation(torch.randn(batch_size, 64), torch.randn(batch_size, 12))
    expert = StandInExpert()
    dims = real_dims(CHUNK, PADDED, REAL)
    critics = CriticEnsemble(12, len(dims), num_critics=3, hidden_dims=(64, 64))  # trained on the real dimensions

    flow = ReversedTimeFlow(
        expert, chunk_shape=(CHUNK, PADDED), call=lambda m, obs, x, tau: m.denoise_step(obs.prefix, x, tau)
    )
    steering = replace(Steering.qpilots_u(alpha=0.5), steered_dims=dims)  # jacobian="identity" spares the backward
    critic = lambda obs, actions: critics(obs.state, actions[:, list(dims)])  # noqa: E731
    sampler = SteeredSampler(flow, critic, steering, action_low=-1.0, action_high=1.0)
    noise = torch.randn(batch_size, CHUNK * PADDED)
    chunk = sampler(obs, noise).unflatten(1, (CHUNK, PADDED))[..., :REAL]
    print(f"steered chunks {list(chunk.shape)}, first action {[round(a, 3) for a in chunk[0, 0].tolist()]}")


if __name__ == "__main__":
    main()
