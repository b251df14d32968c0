"""A diffusion policy's own sampling loop, steered by its scheduler: one line is new.

Nothing is trained: the network stands for yours. `examples/diffusers_cube` has a trained policy.

    pip install ".[diffusers]" && python examples/quickstart_diffusers.py
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import nn

from qpilots_fast import CriticEnsemble, Steering
from qpilots_fast.integrations.diffusers import steer_scheduler


def main() -> None:
    torch.manual_seed(0)
    obs_dim, action_dim, batch_size = 17, 6, 32
    network = nn.Sequential(nn.Linear(obs_dim + action_dim + 1, 64), nn.SiLU(), nn.Linear(64, action_dim))
    critic = CriticEnsemble(obs_dim, action_dim, num_critics=5, hidden_dims=(64, 64))
    obs, noise = torch.randn(batch_size, obs_dim), torch.randn(batch_size, action_dim)
    scheduler = DDIMScheduler(prediction_type="sample")
    steered = steer_scheduler(scheduler, critic, Steering.qpilots_u(alpha=0.5, jacobian="identity"))  # the new line

    @torch.no_grad()
    def sample(scheduler: DDIMScheduler) -> torch.Tensor:
        scheduler.set_timesteps(10)
        x = noise
        for timestep in scheduler.timesteps:
            output = network(torch.cat([obs, x, (timestep / 1000).expand(batch_size, 1)], dim=1))
            x = scheduler.step(output, timestep, x).prev_sample
        return x

    plain, better = sample(scheduler), sample(steered.set_obs(obs))
    print(f"plain Q = {critic(obs, plain).mean():+.4f}   steered Q = {critic(obs, better).mean():+.4f}")


if __name__ == "__main__":
    main()
