"""What LeRobot's and openpi's action experts share: `sample_actions` calls `denoise_step` at tau from 1 to 0.

Both are found by name on the object, so nothing of theirs is imported or edited: attributes of the instance stand
before the class's methods until the handle is removed.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..callables import out_of_inference
from ..info import SampleInfo
from ..networks import PackableNetwork
from ..recorded import with_pullback
from ..steering import Steering
from .own_loop import LoopSteering

_steered: weakref.WeakSet[Any] = weakref.WeakSet()


class SteeringHandle:
    """A policy that is steered until `remove()`.

    Args:
        policy: what was steered.
        told: what happened in the last chunk.
    """

    def __init__(self, owner: str, policy: Any, told: Callable[[], SampleInfo | None]) -> None:
        if policy in _steered:
            raise ValueError(f"{owner}: the policy is already steered; call remove() of the earlier handle first.")
        _steered.add(policy)
        self._policy, self._told = policy, told
        self._before: list[tuple[Any, str, Any]] = []
        self.batch: Any = None  # what the policy was last given
        self._depth = 0

    @property
    def info(self) -> SampleInfo | None:
        """What happened at each step of the last chunk, [K, B] (q_values None); None before the first."""
        return self._told()

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of the instance until `remove()`."""
        self._before.append((owner, name, vars(owner).get(name, _ABSENT)))
        vars(owner)[name] = value

    def watch(self, owner: Any, name: str, argument: str, outside_inference: bool) -> None:
        """Remembers what a method is given as that argument, for the critic."""
        method = getattr(owner, name)
        signature = inspect.signature(method)

        def watched(*arguments: Any, **named: Any) -> Any:
            if self._depth == 0:
                bound = signature.bind(*arguments, **named).arguments
                self.batch = dict(bound[argument]) if isinstance(bound[argument], dict) else bound[argument]
            self._depth += 1
            try:
                if outside_inference and torch.is_inference_mode_enabled():  # autograd passes through the network
                    with torch.inference_mode(False), torch.no_grad():
                        arguments, named = out_of_inference((arguments, named))
                        self.batch = out_of_inference(self.batch)
                        return method(*arguments, **named)
                return method(*arguments, **named)
            finally:
                self._depth -= 1

        self.put(owner, name, watched)

    def remove(self) -> None:
        """Restores the policy as it was. Actions that it has queued stay; its own reset() empties the queue."""
        for owner, name, value in reversed(self._before):
            if value is _ABSENT:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = value
        self._before.clear()
        _steered.discard(self._policy)


_ABSENT = object()


def steering_of_dims(
    owner: str, steering: Steering, dims: Sequence[int] | None, shape: tuple[int, int], real: int
) -> Steering:
    """The steering, with indices of the last axis as those of the flattened chunk.

    Args:
        dims: None: all real ones. shape: (C, padded width). real: width of the policy's actions.
    """
    if steering.steered_dims is not None:
        raise ValueError(
            f"{owner}: Steering.steered_dims is {steering.steered_dims}; expected None: {owner} has an argument "
            "steered_dims of its own, indices of an action's dimensions."
        )
    chosen = tuple(range(real)) if dims is None else tuple(dims)
    if not chosen or not all(isinstance(d, int) and 0 <= d < real for d in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"{owner}: steered_dims is {dims}; expected distinct indices below {real}, the action's width."
        )
    steps, width = shape
    return replace(steering, steered_dims=tuple(k * width + d for k in range(steps) for d in sorted(chosen)))


def critic_of_actions(owner: str, critic: Any, real: int, units: str, unnormalise: Any) -> Any:
    """(batch, padded chunk [B, C, D]) -> q_values, of a critic of the real dimensions in the units that it reads."""
    if critic is None:
        return None
    if isinstance(critic, PackableNetwork) or not callable(critic):
        raise TypeError(
            f"{owner}: critic is {type(critic).__name__}; expected a callable (batch, actions [B, C, {real}]) -> "
            "q_values, which takes what it needs out of the policy's batch: lambda batch, a: "
            "critic(batch['observation.state'], a.flatten(1))."
        )
    if units not in ("normalised", "environment"):
        raise ValueError(f"{owner}: units is {units!r}; expected 'normalised' or 'environment'.")
    if (units == "environment") != (unnormalise is not None):
        raise ValueError(
            f"{owner}: units is {units!r} and unnormalise {'given' if unnormalise is not None else 'None'}; expected "
            "units='environment' together with unnormalise, a differentiable function of actions in the policy's units "
            "(the policy's postprocessor), or neither."
        )

    def asked(batch: Any, chunk: Tensor) -> Any:
        actions = chunk[..., :real]
        return critic(batch, actions if unnormalise is None else unnormalise(actions))

    return asked


def steer_expert(handle: SteeringHandle, model: Any, loop: LoopSteering, default_steps: Callable[[], int]) -> None:
    """Steers the velocities of model.denoise_step (noise - action, at timestep tau) in the loops of sample_actions."""
    sample, denoise = type(model).sample_actions.__get__(model), model.denoise_step  # a compiled one sees no steering
    of_sample, of_step = inspect.signature(sample), inspect.signature(denoise)

    @functools.wraps(sample)  # its signature
    def sample_actions(*arguments: Any, **named: Any) -> Any:
        bound = of_sample.bind(*arguments, **named)
        steps = bound.arguments.get("num_steps", bound.kwargs.get("num_steps"))
        count = default_steps() if steps is None else int(steps)
        loop.begin([k / count for k in range(count)])
        return sample(*arguments, **named)

    def denoise_step(*arguments: Any, **named: Any) -> Any:
        bound = of_step.bind(*arguments, **named)
        x, tau = bound.arguments["x_t"], float(bound.arguments["timestep"].reshape(-1)[0])
        k = min(max(round((1 - tau) * loop.num_steps), 0), loop.num_steps - 1)
        if not loop.steers(k):
            loop.unsteered(x)
            return denoise(*arguments, **named)
        if not loop.steering.pulls_flow:
            u = denoise(*arguments, **named)
            return -loop.velocity(k, handle.batch, x, -u, x - tau * u)

        def towards_data(at: Tensor) -> Tensor:
            bound.arguments["x_t"] = at
            return -denoise(*bound.args, **bound.kwargs)

        v, pull_back = with_pullback(towards_data, x)
        rows = lambda d_v: pull_back(d_v.reshape(v.shape).to(v.dtype)).flatten(1)  # noqa: E731
        return -loop.velocity(k, handle.batch, x, v, x + tau * v, rows)

    handle.put(model, "sample_actions", sample_actions)
    handle.put(model, "denoise_step", denoise_step)
