"""Build a flow policy and a critic ensemble, sample actions, steer them. Nothing is trained here."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering, from_module

BOUNDS = {"action_low": -1.0, "action_high": 1.0}  # or an environment's action_space.low and .high


def main() -> None:
    torch.manual_seed(0)
    obs_dim, action_dim, batch_size = 17, 6, 32
    flow = FlowMLP(obs_dim, action_dim, hidden_dims=(64, 64))
    critic = CriticEnsemble(obs_dim, action_dim, num_critics=5, hidden_dims=(64, 64))
    obs, noise = torch.randn(batch_size, obs_dim), torch.randn(batch_size, action_dim)

    def value(actions: torch.Tensor) -> float:
        return critic(obs, actions).mean().item()

    plain = SteeredSampler(flow, None, Steering.unsteered(), **BOUNDS)(obs, noise)
    print(f"plain flow      Q = {value(plain):+.4f}")
    for alpha in (0.1, 0.3, 1.0):
        sampler = SteeredSampler(flow, critic, Steering.qpilots_u(alpha=alpha), **BOUNDS)
        actions, info = sampler(obs, noise, return_info=True)
        moved = (actions - plain).norm(dim=-1).mean().item()
        print(f"alpha = {alpha:<8} Q = {value(actions):+.4f}   moved by {moved:.3f}   bad rows {info.nonfinite_count}")

    # variations are settings: no Jacobian of the flow, and only the first three dimensions steered
    steering = replace(Steering.qpilots_u(alpha=1.0, jacobian="identity"), steered_dims=(0, 1, 2))
    partial = SteeredSampler(flow, critic, steering, **BOUNDS)(obs, noise)
    assert not torch.equal(partial[:, :3], plain[:, :3])

    # your own modules: recognised, checked by numbers, and run packed
    own = nn.Sequential(nn.Linear(obs_dim + action_dim, 64), nn.ReLU(), nn.Linear(64, 1))
    twin = nn.Sequential(nn.Linear(obs_dim + action_dim, 64), nn.ReLU(), nn.Linear(64, 1))
    double_q = from_module([own, twin], kind="critic", obs_dim=obs_dim, action_dim=action_dim)
    sampler = SteeredSampler(flow, double_q, Steering.qgf(weight=0.5), **BOUNDS)
    print(f"your own critics, as {double_q.spec.num_members} members: actions {list(sampler(obs, noise).shape)}")
    print(sampler.explain(batch_size))
    action = sampler.warm_up().act(obs[0].numpy())  # what an environment loop calls: numpy in, numpy out
    print(f"one action for env.step: {action.dtype} {list(action.shape)}")


if __name__ == "__main__":
    main()
