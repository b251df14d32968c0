"""What LeRobot's and openpi's action experts share: `sample_actions` calls `denoise_step` at tau from 1 to 0.

Both are found by name on the object, so nothing of theirs is imported or edited: attributes of the instance stand
before the class's methods until the handle is removed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
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
        try:
            return critic(batch, actions if unnormalise is None else unnormalise(actions))
        except KeyError as error:
            if not isinstance(batch, dict) or error.args[0] in batch:
                raise
            raise KeyError(
                f"{owner}: the critic asks for {error}, and the batch that the policy was given has {list(batch)}; "
                "expected the critic to read some of these, or a batch with that key too: the policy passes it over."
            ) from error
        except RuntimeError as error:
            if "size" not in str(error) and "shape" not in str(error):
                raise
            raise ValueError(
                f"{owner}: the critic could not read actions {list(actions.shape)}: the batch, the steps of the whole "
                f"chunk, the robot's own dimensions ({error}). Expected a critic of these, or one that picks what it "
                "reads: lambda batch, a: critic(batch['observation.state'], a[:, :5].flatten(1))."
            ) from error

    return asked


def steer_expert(
    owner: str,
    policy: Any,
    model: Any,
    critic: Any,
    steering: Steering,
    *,
    action_low: Any,
    action_high: Any,
    critic_layout: str,
    default_steps: Callable[[], int],
) -> SteeringHandle:
    """Steers the velocities of model.denoise_step (noise - action, at timestep tau) in the loops of sample_actions.

    Real-time chunking, where the model has it on, guides the steered velocity: its processor calls denoise_step.

    Args:
        policy: what the handle is for. model: of it, with sample_actions and denoise_step.
        critic, steering: of `critic_of_actions` and `steering_of_dims`.
        action_low, action_high, critic_layout: as SteeredSampler's.
        default_steps: K where sample_actions is told none.
    """
    loop = LoopSteering(
        owner, critic, steering, full_jacobian=True, candidates=True, action_low=action_low, action_high=action_high,
        critic_layout=critic_layout,
    )  # fmt: skip
    handle = SteeringHandle(owner, policy, lambda: loop.info)
    sample, denoise = type(model).sample_actions.__get__(model), model.denoise_step  # a compiled one sees no steering
    of_sample, of_step = inspect.signature(sample), inspect.signature(denoise)
    prefix = _Prefix(handle, model) if steering.num_candidates > 1 else None

    @functools.wraps(sample)  # its signature
    def sample_actions(*arguments: Any, **named: Any) -> Any:
        bound = of_sample.bind(*arguments, **named)
        steps = bound.arguments.get("num_steps", bound.kwargs.get("num_steps"))
        count = default_steps() if steps is None else int(steps)
        times = [k / count for k in range(count)]
        if prefix is None:
            loop.begin(times)
            return sample(*arguments, **named)
        starts = _starts(owner, bound.arguments.get("noise"), steering.num_candidates)
        with prefix.kept():
            for start in starts:
                bound.arguments["noise"] = start
                loop.begin(times)
                loop.candidate(sample(*bound.args, **bound.kwargs))
        return loop.best(handle.batch)

    def denoise_step(*arguments: Any, **named: Any) -> Any:
        bound = of_step.bind(*arguments, **named)
        x, tau = bound.arguments["x_t"], float(bound.arguments["timestep"].reshape(-1)[0])
        k = min(max(round((1 - tau) * loop.num_steps), 0), loop.num_steps - 1)
        if loop.at_start and k > 0:
            raise ValueError(
                f"{owner}: the first step's timestep is {tau:g}; expected 1, the noise, as the loop's time is taken to "
                "run from 1 to 0. In a loop with another time, steer the velocity by ops.steer_step."
            )
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
    return handle


def _starts(owner: str, noise: Tensor | None, count: int) -> list[Tensor | None]:
    """The noise of each candidate; None: the model draws it."""
    if noise is None:
        return [None] * count
    if noise.ndim != 4 or noise.shape[1] != count:
        raise ValueError(
            f"{owner}: noise has shape {list(noise.shape)} and Steering.num_candidates is {count}; expected noise "
            f"[B, {count}, C, D], a start for each candidate, or None, from which the model draws them."
        )
    return list(noise.unbind(1))


class _Prefix:
    """What a model makes of images, language and state before its loop, once for all candidates of a chunk."""

    _EXPERTS = ("paligemma_with_expert", "vlm_with_expert")

    def __init__(self, handle: SteeringHandle, model: Any) -> None:
        self._made: dict[str, Any] | None = None
        self._make_once(handle, model, "embed_prefix", lambda named: True)
        for expert in (getattr(model, name, None) for name in self._EXPERTS):
            if expert is not None:  # called with [prefix, None] once, and [None, suffix] at each step
                self._make_once(handle, expert, "forward", lambda named: named["inputs_embeds"][1] is None)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """In here the prefix is made once."""
        self._made = {}
        try:
            yield
        finally:
            self._made = None

    def _make_once(
        self, handle: SteeringHandle, owner: Any, name: str, of_prefix: Callable[[dict[str, Any]], bool]
    ) -> None:
        method = getattr(owner, name)

        @functools.wraps(method)
        def asked(*arguments: Any, **named: Any) -> Any:
            if self._made is None or not of_prefix(named):
                return method(*arguments, **named)
            if name not in self._made:
                self._made[name] = method(*arguments, **named)
            return self._made[name]

        handle.put(owner, name, asked)
