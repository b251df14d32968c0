"""Steer one of LeRobot's policies by your critic, without editing it: two lines are new.

The policy is a small random diffusion policy; pi0, pi0.5 and SmolVLA are steered by the same two lines.

    pip install ".[lerobot]" && python examples/quickstart_lerobot.py
"""

from __future__ import annotations

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

from qpilots_fast import CriticEnsemble, Steering
from qpilots_fast.integrations.lerobot import steer

STATE_DIM, ACTION_DIM, HORIZON = 5, 4, 8


def make_policy() -> DiffusionPolicy:
    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (3,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        horizon=HORIZON, n_action_steps=4, down_dims=(16, 32), n_groups=4, diffusion_step_embed_dim=16,
        noise_scheduler_type="DDIM", num_inference_steps=10, device="cpu",
    )  # fmt: skip
    return DiffusionPolicy(config).eval()


def main() -> None:
    torch.manual_seed(0)
    policy = make_policy()
    ensemble = CriticEnsemble(STATE_DIM, HORIZON * ACTION_DIM, num_critics=5, hidden_dims=(64, 64))
    batch = {"observation.state": torch.randn(2, STATE_DIM), "observation.environment_state": torch.randn(2, 3)}

    def first_action() -> torch.Tensor:
        torch.manual_seed(1)
        policy.reset()
        with torch.inference_mode():
            return policy.select_action(dict(batch))

    plain = first_action()
    critic = lambda batch, actions: ensemble(batch["observation.state"], actions.flatten(1))  # noqa: E731
    handle = steer(policy, critic, Steering.qpilots_u(alpha=0.5, jacobian="identity"))
    steered = first_action()
    moved, info = (steered - plain).norm(dim=1).mean().item(), handle.info
    print(f"steered actions moved by {moved:.3f}; steps {len(info.gradient_norms)}, bad rows {info.nonfinite_count}")
    handle.remove()
    assert torch.equal(first_action(), plain)


if __name__ == "__main__":
    main()
