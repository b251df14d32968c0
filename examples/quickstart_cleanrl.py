"""CleanRL style, in one file: a behaviour-cloned flow, steered by the SoftQNetworks of a SAC-like critic update.

The networks are your own classes; only the three lines marked NEW are ours. Trains for --steps updates on Pendulum-v1.

    pip install . gymnasium && python examples/quickstart_cleanrl.py
"""

from __future__ import annotations

import argparse
import copy

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from qpilots_fast import SteeredSampler, Steering  # NEW


class Flow(nn.Module):
    """velocity(obs, noisy action, t), in place of CleanRL's Actor."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(obs_dim + action_dim + 1, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, action_dim)

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        h = F.relu(self.fc1(torch.cat([obs, x, t], 1)))
        return self.fc3(F.relu(self.fc2(h)))


class SoftQNetwork(nn.Module):
    def __init__(self, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(obs_dim + action_dim, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, 1)

    def forward(self, obs: Tensor, a: Tensor) -> Tensor:
        h = F.relu(self.fc1(torch.cat([obs, a], 1)))
        return self.fc3(F.relu(self.fc2(h)))


def collect(env: gym.Env, rng: np.random.Generator, count: int) -> tuple[Tensor, ...]:
    """(obs, action, reward, next obs) of a mediocre controller: damps, with noise."""
    rows, (obs, _) = [], env.reset(seed=0)
    high = env.action_space.high
    for _ in range(count):
        action = np.clip(-0.5 * obs[2:] + rng.normal(size=1), -high, high).astype(np.float32)
        after, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, [reward], after))
        obs = env.reset()[0] if terminated or truncated else after
    return tuple(torch.as_tensor(np.array(column), dtype=torch.float32) for column in zip(*rows))


def main(argv: list[str] | None = None) -> float:
    """Returns how much higher the critics value steered actions than the clone's own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    env = gym.make("Pendulum-v1")
    data = collect(env, np.random.default_rng(0), 1000)
    flow, qfs = Flow(3, 1), nn.ModuleList([SoftQNetwork(3, 1), SoftQNetwork(3, 1)])
    targets = copy.deepcopy(qfs)
    optimizer = optim.Adam([*flow.parameters(), *qfs.parameters()], lr=1e-3)
    low, high = env.action_space.low, env.action_space.high
    sampler = SteeredSampler(flow, qfs, Steering.qpilots_u(0.5), action_low=low, action_high=high)  # NEW
    for _ in range(steps):
        obs, actions, rewards, next_obs = batch(data)
        noise, t = torch.randn_like(actions), torch.rand(len(obs), 1)
        loss = (flow(obs, t * actions + (1 - t) * noise, t) - (actions - noise)).square().mean()
        with torch.no_grad():
            next_actions = sampler(next_obs)  # NEW: in place of actor.get_action(next_obs)
            next_q = torch.min(*[qf(next_obs, next_actions) for qf in targets])
        loss = loss + sum(F.mse_loss(qf(obs, actions), 0.1 * rewards + 0.95 * next_q) for qf in qfs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for kept, new in zip(targets.parameters(), qfs.parameters()):
            kept.data.lerp_(new.data, 0.005)
    obs, total = env.reset(seed=1)[0], 0.0
    for _ in range(200):
        obs, reward, *_ = env.step(sampler.act(obs))
        total += float(reward)
    unsteered = SteeredSampler(flow, None, Steering.unsteered(), action_low=low, action_high=high)
    some, seeds = data[0][:256], range(256)
    with torch.no_grad():
        q = [torch.min(*[qf(some, s(some, seeds=seeds)) for qf in qfs]).mean().item() for s in (unsteered, sampler)]
    print(f"return of a steered episode {total:.0f}; mean Q {q[0]:.3f} unsteered, {q[1]:.3f} steered")
    return q[1] - q[0]


def batch(data: tuple[Tensor, ...]) -> list[Tensor]:
    rows = torch.randint(len(data[0]), (128,))
    return [column[rows] for column in data]


if __name__ == "__main__":
    main()
