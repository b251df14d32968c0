"""Steer a flow by the critics of a TorchRL loss, inside a TorchRL collector: three lines are new.

Networks are random; only the critics are trained, for a moment.

    pip install ".[torchrl]" && python examples/quickstart_torchrl.py
"""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import PendulumEnv
from torchrl.envs.transforms import CatTensors, Compose, TransformedEnv, UnsqueezeTransform
from torchrl.modules import MLP, Actor, ValueOperator
from torchrl.objectives import SoftUpdate, TD3Loss

from qpilots_fast import SteeredSampler, Steering
from qpilots_fast.integrations.torchrl import SteeredPolicy, from_torchrl

OBS_DIM, ACTION_DIM = 2, 1


class Velocity(nn.Module):
    """(observation, noisy action, time) -> velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP(OBS_DIM + ACTION_DIM + 1, ACTION_DIM, num_cells=[64, 64], activation_class=nn.SiLU)

    def forward(self, obs: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([obs, x, t], -1))


class Q(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = MLP(OBS_DIM + ACTION_DIM, 1, num_cells=[64, 64], activation_class=nn.ReLU)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([obs, action], -1))


def main() -> None:
    torch.manual_seed(0)
    columns = UnsqueezeTransform(-1, in_keys=["th", "thdot"], out_keys=["angle", "speed"])
    env = TransformedEnv(PendulumEnv(), Compose(columns, CatTensors(["angle", "speed"], "observation")))
    spec = env.action_spec
    flow = TensorDictModule(Velocity(), in_keys=["observation", "noisy_action", "time"], out_keys=["velocity"])
    critic = ValueOperator(Q(), in_keys=["observation", "action"])
    loss = TD3Loss(Actor(nn.Linear(OBS_DIM, ACTION_DIM), spec=spec), critic, action_spec=spec, num_qvalue_nets=5)
    optimiser = torch.optim.Adam(loss.qvalue_network_params.parameters(), lr=1e-3)

    targets = SoftUpdate(loss, tau=0.005)
    networks = from_torchrl(flow, critic=loss)
    low, high = spec.space.low, spec.space.high
    sampler = SteeredSampler(networks.flow, networks.critic, Steering.qpilots_u(0.3), action_low=low, action_high=high)
    collector = Collector(env, SteeredPolicy(sampler), frames_per_batch=50, total_frames=150)
    for data in collector:  # the next batch is steered by the critics as they are then
        loss(data)["loss_qvalue"].backward()
        optimiser.step()
        optimiser.zero_grad()
        targets.step()
        reward = data["next", "reward"].mean().item()
        print(f"{data.numel()} frames, mean reward {reward:+.2f}, mean action {data['action'].mean().item():+.2f}")
    collector.shutdown()


if __name__ == "__main__":
    main()
