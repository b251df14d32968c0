"""stable-baselines3's SAC critics, steering a behaviour-cloned flow: two lines are ours.

SAC trains for --steps environment steps; the flow then imitates its replay buffer.

    pip install . stable-baselines3 && python examples/quickstart_sb3.py
"""

from __future__ import annotations

import argparse

import torch
from stable_baselines3 import SAC
from torch.optim import Adam

from qpilots_fast import FlowMLP, SteeredSampler, Steering, objectives


def main(argv: list[str] | None = None) -> float:
    """Returns how much higher SAC's critics value steered actions than the clone's own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args(argv).steps
    model = SAC("MlpPolicy", "Pendulum-v1", learning_starts=100, policy_kwargs={"net_arch": [64, 64]}, seed=0)
    model.learn(steps)

    flow = FlowMLP(obs_dim=3, action_dim=1, hidden_dims=(64, 64))
    optimiser = Adam(flow.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = model.replay_buffer.sample(128)
        loss = objectives.flow_matching_loss(flow, batch.observations, batch.actions)  # actions scaled to [-1, 1]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    sampler = SteeredSampler(flow, model.critic, Steering.qpilots_u(0.5), action_low=-1.0, action_high=1.0)
    env = model.get_env()
    obs, total = env.reset(), 0.0
    for _ in range(200):
        obs, reward, *_ = env.step(model.policy.unscale_action(sampler.act(obs)))  # in place of model.predict(obs)
        total += float(reward[0])
    unsteered = SteeredSampler(flow, None, Steering.unsteered(), action_low=-1.0, action_high=1.0)
    some, seeds = model.replay_buffer.sample(256).observations, range(256)
    with torch.no_grad():
        q = [torch.cat(model.critic(some, s(some, seeds=seeds)), 1).mean().item() for s in (unsteered, sampler)]
    print(f"return of a steered episode {total:.0f}; mean Q {q[0]:.3f} unsteered, {q[1]:.3f} steered")
    return q[1] - q[0]


if __name__ == "__main__":
    main()
