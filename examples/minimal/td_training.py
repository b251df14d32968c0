"""Train critics against the steered policy: the sampler is the inner loop of `td_loss`.

Toy data, one-step episodes: reward -|a - goal|^2, behaviour actions uniform. The critics learn the reward, and
steering moves the flow's actions toward the goal.
"""

from __future__ import annotations

import copy

import torch

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering
from qpilots_fast.objectives import flow_matching_loss, polyak_update, td_loss


def main(num_updates: int = 120) -> float:
    torch.manual_seed(0)
    obs_dim, action_dim, batch_size = 3, 2, 64
    goal = torch.tensor([0.6, -0.4])
    flow = FlowMLP(obs_dim, action_dim, hidden_dims=(32, 32))
    critic = CriticEnsemble(obs_dim, action_dim, num_critics=3, hidden_dims=(32, 32))
    target = copy.deepcopy(critic).requires_grad_(False)
    box = dict(action_low=-1.0, action_high=1.0)
    sampler = SteeredSampler(flow, target, Steering.qpilots_u(alpha=0.5), **box)  # sees each update of flow and target
    optimizer = torch.optim.Adam([*flow.parameters(), *critic.parameters()], lr=1e-2)

    for update in range(num_updates):
        obs, next_obs = torch.rand(batch_size, obs_dim), torch.rand(batch_size, obs_dim)
        actions = 2 * torch.rand(batch_size, action_dim) - 1
        rewards = -(actions - goal).square().sum(-1)
        discounts = torch.where(torch.rand(batch_size) < 0.5, 0.0, 0.9)  # 0 ends an episode
        loss_q = td_loss(critic, target, obs, actions, rewards, discounts, next_obs, sampler=sampler)
        loss_flow = flow_matching_loss(flow, obs, actions)
        optimizer.zero_grad()
        (loss_q + loss_flow).backward()
        optimizer.step()
        polyak_update(target, critic, rate=0.05)
        if update % 40 == 39:
            print(f"update {update + 1:4d}   critic loss {loss_q.item():.3f}   flow loss {loss_flow.item():.3f}")

    obs, noise = torch.rand(256, obs_dim), torch.randn(256, action_dim)
    plain = SteeredSampler(flow, None, Steering.unsteered(), **box)(obs, noise)
    distance = [(a - goal).norm(dim=-1).mean().item() for a in (plain, sampler(obs, noise))]
    print(f"mean distance to the goal: plain {distance[0]:.3f}, steered {distance[1]:.3f}")
    return distance[0] - distance[1]


if __name__ == "__main__":
    main()
