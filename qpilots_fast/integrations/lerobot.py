"""LeRobot's policies, steered without editing them: pi0, pi0.5, SmolVLA and the diffusion policy.

The action experts (pi0, pi0.5, SmolVLA) are flows whose time runs from 1 to 0 with u = noise - action, 32 wide with
padding; the diffusion policy is a DDIM or DDPM scheduler around a UNet. Nothing of lerobot is imported: what is needed
is found on the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..callables import out_of_inference
from ..steering import Steering
from .action_expert import SteeringHandle, critic_of_actions, steer_expert, steering_of_dims

_OWNER = "lerobot.steer"


def steer(
    policy: Any,
    critic: Callable[[Any, Tensor], Any] | None,
    steering: Steering,
    *,
    steered_dims: Sequence[int] | None = None,
    units: str = "normalised",
    unnormalise: Callable[[Tensor], Tensor] | None = None,
    action_low: Any = None,
    action_high: Any = None,
    critic_layout: str = "auto",
) -> SteeringHandle:
    """From now on `select_action` and `predict_action_chunk` of this policy return steered actions.

    Loop, cache, padding and queue are the policy's own; at alpha = 0, and at the first step, so are its numbers,
    bitwise. Works under `torch.inference_mode()`. A compiled `sample_actions` runs uncompiled while it is steered.
    Real-time chunking guides the steered velocities, as it guides the policy's own.

    With `num_candidates` = n the loop runs n times for one prefix (images, language, state), and each row keeps the
    chunk that the critic values most. Each starts at its own noise; where noise is given, it is [B, n, C, D].

    Args:
        policy: PI0Policy, PI05Policy, SmolVLAPolicy or DiffusionPolicy.
        critic: (batch, actions [B, C, real]) -> q_values in any layout that SteeredSampler reads; batch is what the
            policy was given, C the whole chunk (the diffusion policy's horizon), real the robot's action width.
        steering: with estimate "tweedie" or "noisy"; jacobian="full" pulls the gradient back through the action
            expert, and is refused for the diffusion policy, whose scheduler sees no network, as are candidates.
        steered_dims: indices of an action's dimensions that may move; None: all real ones. The padding is the policy's.
        units: of the actions that the critic reads: "normalised", as the policy makes them, or "environment".
        unnormalise: actions in the policy's units -> the environment's, differentiable (the policy's postprocessor).
        action_low: lower bounds in the policy's units of the estimates that the critic sees, where the steering clips
            them: a number or one for each real or padded dimension. None: no clip, as for z-scored actions. The
            policy's own actions are not clipped.
        action_high: the upper bounds of the same.
        critic_layout: as SteeredSampler's.

    Returns:
        a handle with `info` (a SampleInfo of the last chunk, with q_values where candidates were ranked) and
        `remove()`, which restores the policy. Remove it before the policy is copied or saved whole. Actions queued
        before stay queued: `policy.reset()`.

    Raises:
        TypeError, ValueError: for other policies, and steering that such a loop cannot follow.
    """
    model, diffusion = getattr(policy, "model", None), getattr(policy, "diffusion", None)
    if hasattr(model, "denoise_step") and hasattr(model, "sample_actions"):
        kind, shape = "expert", (policy.config.chunk_size, policy.config.max_action_dim)
    elif hasattr(diffusion, "noise_scheduler"):
        kind, shape = "diffusion", (policy.config.horizon, policy.config.action_feature.shape[0])
    else:
        raise TypeError(
            f"{_OWNER}: policy is {type(policy).__name__}; expected PI0Policy, PI05Policy or SmolVLAPolicy (a .model "
            "with denoise_step and sample_actions), or DiffusionPolicy (a .diffusion with noise_scheduler)."
        )
    real = policy.config.action_feature.shape[0]
    steering = steering_of_dims(_OWNER, steering, steered_dims, shape, real)
    asked = critic_of_actions(_OWNER, critic, real, units, unnormalise)
    if kind == "diffusion":
        return _steer_diffusion(policy, asked, steering, action_low, action_high, critic_layout)
    steps = "num_inference_steps" if hasattr(policy.config, "num_inference_steps") else "num_steps"
    handle = steer_expert(
        _OWNER, policy, model, asked, steering, action_low=action_low, action_high=action_high,
        critic_layout=critic_layout, default_steps=lambda: getattr(policy.config, steps),
    )  # fmt: skip
    _watch(handle, policy, steering.pulls_flow)
    return handle


def _watch(handle: SteeringHandle, policy: Any, outside_inference: bool) -> None:
    for name in ("select_action", "predict_action_chunk"):
        handle.watch(policy, name, "batch", outside_inference)


def _steer_diffusion(
    policy: Any, critic: Any, steering: Steering, low: Any, high: Any, critic_layout: str
) -> SteeringHandle:
    from .diffusers import steer_scheduler  # LeRobot's diffusion policy has diffusers

    # obs is looked up when the critic is asked: the scheduler is given none
    latest = critic and (lambda _, chunk: critic(out_of_inference(handle.batch), chunk))
    scheduler = steer_scheduler(
        policy.diffusion.noise_scheduler, latest, steering, obs=_OWNER, action_low=low, action_high=high,
        critic_layout=critic_layout,
    )  # fmt: skip
    handle: SteeringHandle = SteeringHandle(_OWNER, policy, lambda: scheduler.info)
    handle.put(policy.diffusion, "noise_scheduler", scheduler)
    _watch(handle, policy, False)
    return handle
