"""What becomes of finished actions: ascent steps on them, the critics' values of them, the choice among candidates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import backends, ops, reference
from .backends import Request
from .bounds import Bounds
from .callables import out_of_inference, run_outside_inference
from .candidates import as_rows, keep_one
from .chunks import in_chunks
from .critic_outputs import ask_critic
from .evaluators import evaluators
from .inputs import Inputs
from .networks import PackableNetwork
from .spec import RawSample, StepReport
from .steering import Steering

_ASKING = Steering(estimate="noisy", jacobian="identity")  # any that asks a critic


class Finish:
    """Asks one critic about finished actions [B n, A], n of them for each row of obs.

    Args:
        critic: packed or a callable; None: nobody is asked.
        layout: critic_layout of the sampler.
    """

    def __init__(self, critic: Any, steering: Steering, precision: str, backend: str, layout: str) -> None:
        # no dataclass: torch.compile cannot make a frozen one after a graph break
        self.critic, self.steering, self.layout = critic, steering, layout
        self.precision, self.backend = precision, backend

    def __call__(
        self, inputs: Inputs, raw: RawSample, bounds: Bounds, values_wanted: bool
    ) -> tuple[RawSample, Tensor | None]:
        """One action for each row of obs, and its q_values [E, B] where they are wanted."""
        several = inputs.noise.shape[1] > 1
        if self.critic is None:
            return raw, None
        if self.steering.final_steps:
            raw = RawSample(self._climbed(inputs, raw.actions, bounds), raw.report)
        if not several and not values_wanted:
            return raw, None
        q_values = self.values(inputs, raw.actions)
        return keep_one(raw, q_values, self.steering, inputs.selection) if several else (raw, q_values)

    def _packed_obs(self, inputs: Inputs) -> Tensor | None:
        """obs of every candidate, where the critic runs on a backend."""
        if isinstance(self.critic, PackableNetwork) and isinstance(inputs.obs, Tensor):
            return as_rows(inputs.obs, inputs.noise.shape[1])
        return None

    def values(self, inputs: Inputs, actions: Tensor) -> Tensor:
        """q_values [E, B n] at actions [B n, A]."""
        obs, count = self._packed_obs(inputs), inputs.noise.shape[1]
        if obs is not None:
            if torch.compiler.is_compiling():
                return ops.critic_values(obs, actions, self.critic, precision=self.precision, backend=self.backend)
            critic = self._evaluators(obs, actions, None).critic
            assert critic is not None
            return critic(actions)[0]
        shown = in_chunks("critic", self.critic, inputs.layout.chunk)
        t = 1.0 if self.steering.critic_time else None
        of_each = [
            ask_critic(shown, inputs.obs, actions[n::count], self.layout, t=t, known_as=self.critic)
            for n in range(count)
        ]
        return torch.stack(of_each, dim=-1).flatten(1).detach().to(actions.dtype)

    def _climbed(self, inputs: Inputs, actions: Tensor, bounds: Bounds) -> Tensor:
        """After the steering's final steps, each inside the bounds."""
        obs = self._packed_obs(inputs)
        if obs is not None and torch.compiler.is_compiling():
            return self._climbed_by_operator(obs, actions, bounds)
        if obs is not None:
            return self._climbed_here(_by_rows(self._evaluators(obs, actions, None)), actions, bounds)
        return run_outside_inference(lambda: self._climbed_by_autograd(inputs, actions, bounds))

    def _climbed_by_operator(self, obs: Tensor, actions: Tensor, bounds: Bounds) -> Tensor:
        at_rest = torch.zeros_like(actions)
        for _ in range(self.steering.final_steps):
            actions = ops.steer_step(
                actions, at_rest, 1.0, self.steering.final_step_size, obs=obs, critic=self.critic,
                steering=self.steering.ascent, precision=self.precision, backend=self.backend,
            ).clamp(*bounds)  # fmt: skip
        return actions

    def _climbed_by_autograd(self, inputs: Inputs, actions: Tensor, bounds: Bounds) -> Tensor:
        obs, actions, bounds = out_of_inference((inputs.obs, actions, bounds))
        net = self._evaluators(obs, actions, inputs.layout.chunk)
        each = actions.unflatten(0, (-1, inputs.noise.shape[1])).unbind(1)  # obs cannot be repeated: it may be anything
        return torch.stack([self._climbed_here(net, x, bounds) for x in each], 1).flatten(0, 1)

    def _climbed_here(self, net: reference.Evaluators, x: Tensor, bounds: Bounds) -> Tensor:
        ascent, at_rest = self.steering.ascent, torch.zeros_like(x)
        assert ascent is not None
        for _ in range(self.steering.final_steps):
            g, std = reference.steering_gradient(net, ascent, x, at_rest, lambda d: d, 1.0, None, bounds, False)
            pushed, _ = reference.steer_velocity(at_rest, g, ascent, std, None, False)
            x = (x + self.steering.final_step_size * pushed).clamp(*bounds)
        return x

    def _evaluators(self, obs: Any, like: Tensor, chunk: tuple[int, int] | None) -> reference.Evaluators:
        """The critic alone, as the reference asks it."""
        backend = backends.choose(Request(self.backend, self.precision, like.device, like.dtype)).backend
        asking = self.steering.ascent or _ASKING
        return evaluators(None, self.critic, None, asking, backend, self.precision, obs, self.layout, chunk)


def _by_rows(net: reference.Evaluators) -> reference.Evaluators:
    """The same, each row's members side by side in memory: torch then adds them up row by row, in one order in every
    batch, and not column by column, whose order depends on how many there are."""
    ask = net.critic
    assert ask is not None

    def critic(*arguments: Any) -> tuple[Tensor, Any]:
        values, pullback = ask(*arguments)
        return values.t().contiguous().t(), pullback

    return replace(net, critic=critic)


def empty_sample(critic: Any, noise: Tensor, num_steps: int) -> tuple[RawSample, Tensor | None]:
    """What a call of no rows returns, and its q_values."""
    members = critic.spec.num_members if isinstance(critic, PackableNetwork) else 1
    zeros = noise.new_empty(num_steps, 0)
    report = StepReport(zeros, zeros > 0, zeros, zeros > 0)
    return RawSample(noise[:, 0], report), None if critic is None else noise.new_empty(members, 0)
