"""openpi's PyTorch policies, steered without editing them. Nothing of openpi is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..steering import Steering
from .action_expert import SteeringHandle, critic_of_actions, steer_expert, steering_of_dims

_OWNER = "openpi.steer"


def steer(
    policy: Any,
    critic: Callable[[Any, Tensor], Any] | None,
    steering: Steering,
    *,
    action_dim: int,
    steered_dims: Sequence[int] | None = None,
    units: str = "normalised",
    unnormalise: Callable[[Tensor], Tensor] | None = None,
    action_low: Any = None,
    action_high: Any = None,
    critic_layout: str = "auto",
) -> SteeringHandle:
    """From now on `infer` of this policy, or `sample_actions` of this model, returns steered actions.

    Written against openpi's PI0Pytorch by the names that it uses (sample_actions, denoise_step, config.action_horizon
    and config.action_dim), and tested on a stand-in with the same loop: openpi itself was not run. A compiled
    `sample_actions` runs uncompiled while it is steered.

    Args:
        policy: openpi's Policy around a PyTorch model, or that model.
        critic: (observation, actions [B, C, action_dim]) -> q_values; observation is what sample_actions is given.
        action_dim: the robot's own action width, the first of the padded dimensions.
        steering: as `lerobot.steer`'s.
        steered_dims: as `lerobot.steer`'s.
        units: as `lerobot.steer`'s.
        unnormalise: as `lerobot.steer`'s.
        action_low: as `lerobot.steer`'s.
        action_high: as `lerobot.steer`'s.
        critic_layout: as `lerobot.steer`'s.

    Returns:
        a handle with `info` and `remove()`.

    Raises:
        TypeError, ValueError: for other policies, and steering that such a loop cannot follow.
    """
    model = getattr(policy, "_model", policy)
    if not (hasattr(model, "denoise_step") and hasattr(model, "sample_actions")):
        raise TypeError(
            f"{_OWNER}: policy is {type(policy).__name__}; expected openpi's Policy around a PyTorch model, or that "
            "model, with sample_actions and denoise_step (JAX models are not steered)."
        )
    shape = (model.config.action_horizon, model.config.action_dim)
    if not 1 <= action_dim <= shape[1]:
        raise ValueError(f"{_OWNER}: action_dim is {action_dim}; expected 1 to {shape[1]}, the model's padded width.")
    steering = steering_of_dims(_OWNER, steering, steered_dims, shape, action_dim)
    asked = critic_of_actions(_OWNER, critic, action_dim, units, unnormalise)
    handle = steer_expert(
        _OWNER, policy, model, asked, steering, action_low=action_low, action_high=action_high,
        critic_layout=critic_layout, default_steps=lambda: 10,  # of openpi's sample_actions
    )  # fmt: skip
    handle.watch(model, "sample_actions", "observation", steering.pulls_flow)
    if hasattr(policy, "_sample_actions"):  # bound when the policy was made
        handle.put(policy, "_sample_actions", model.sample_actions)
    return handle
