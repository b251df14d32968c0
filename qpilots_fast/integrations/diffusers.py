"""Schedulers of diffusers whose steps are steered: drop-in `.step`, with the scheduler's own grid and clip.

FlowMatchEulerDiscrete's velocity is noise - action at sigma = 1 - t. DDIM's and DDPM's predicted noise e is the drift
-e of xbar = x / alpha per unit of -sigma / alpha (docs/method.md, "Diffusion policies"): steered, it is
e - alpha ||e|| / (||g|| + eps) g, with g taken at the scheduler's own clean estimate, clipped as its config says.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..info import SampleInfo
from ..steering import Steering
from .diffusion import clean_of, noise_of, prediction_of
from .own_loop import LoopSteering

_OWNER = "steer_scheduler"


def steer_scheduler(
    scheduler: Any,
    critic: Any,
    steering: Steering,
    *,
    obs: Any = None,
    action_low: Any = -1.0,
    action_high: Any = 1.0,
    critic_layout: str = "auto",
    backend: str = "auto",
) -> Any:
    """A copy of the scheduler whose `.step` is steered; everything else is the scheduler's own.

    At the first of the timesteps a step is the scheduler's (unless steer_first_step or step_weights say otherwise), and
    at alpha = 0 all are, bitwise.

    Args:
        scheduler: FlowMatchEulerDiscreteScheduler (any grid: shifted, Karras, ...), DDIMScheduler or DDPMScheduler.
        critic: CriticEnsemble, `from_module(...)`, or any (obs, actions) -> q_values that SteeredSampler reads, at
            actions in the shape of the samples, [B, A] or [B, C, D].
        steering: with jacobian="identity" (a scheduler sees no network), estimate "tweedie" or "noisy". steered_dims
            index the flattened sample.
        obs: what the critic reads, in all loops; or `scheduler.set_obs(obs)` before each.
        action_low: lower bounds of the estimates that the critic sees, where the steering clips them; the samples
            are clipped as the scheduler says alone.
        action_high: the upper bounds of the same.
        critic_layout: as SteeredSampler's.
        backend: as SteeredSampler's.

    Returns:
        the steered scheduler, an instance of the scheduler's class, with `set_obs(obs)`, and with `info`, a SampleInfo
        of the steps since the first timestep.

    Raises:
        TypeError: for other schedulers.
        ValueError: for steering that a scheduler cannot follow; in `.step`, for timesteps outside the grid.
    """
    bases = (FlowMatchEulerDiscreteScheduler, DDIMScheduler, DDPMScheduler)
    if isinstance(scheduler, _SteeredStep) or not isinstance(scheduler, bases):
        name = "already steered" if isinstance(scheduler, _SteeredStep) else type(scheduler).__name__
        raise TypeError(
            f"{_OWNER}: scheduler is {name}; expected {', '.join(base.__name__ for base in bases)}. Before another "
            "solver's step, steer the velocity: ops.steer_velocity(sample, velocity, sigma, obs=obs, critic=critic, "
            "convention='noise_at_one')."
        )
    if getattr(scheduler.config, "invert_sigmas", False):
        raise ValueError(f"{_OWNER}: the scheduler has invert_sigmas=True; expected sigmas from 1 (noise) to 0.")
    steered = _bare(type(scheduler))
    vars(steered).update(vars(scheduler))
    steered._steering = LoopSteering(
        _OWNER, critic, steering, full_jacobian=False, action_low=action_low, action_high=action_high,
        critic_layout=critic_layout, backend=backend,
    )  # fmt: skip
    steered._grid, steered._obs = None, obs
    return steered


class _SteeredStep:
    """What the classes of steered schedulers have before their own base."""

    config: Any
    timesteps: Tensor
    _steering: LoopSteering
    _grid: Tensor | None  # the timesteps that the steering's schedule was made for
    _obs: Any

    def set_obs(self, obs: Any) -> Any:
        """Sets what the critic reads from now on; returns the scheduler."""
        self._obs = obs
        return self

    @property
    def info(self) -> SampleInfo | None:
        """What happened at the steps since the first timestep."""
        return self._steering.info

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *arguments: Any, **named: Any) -> Any:
        """The scheduler's own step, from the steered model output."""
        if self._steering.steering.steers:
            model_output = self._steered_output(model_output, timestep, sample, arguments, named)
        return super().step(model_output, timestep, sample, *arguments, **named)  # type: ignore[misc]

    def _steered_output(
        self, output: Tensor, timestep: Any, sample: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor:
        k = self._position(timestep)
        if k >= len(self.timesteps):
            return output  # past the end, as the scheduler will say
        if k == 0 or self._grid is not self.timesteps:
            self._grid = self.timesteps
            self._steering.begin(self._flow_times())
        if not self._steering.steers(k):
            self._steering.unsteered(sample)
            return output
        if self._obs is None:
            raise ValueError(
                f"{_OWNER}: no obs is given for the critic; call scheduler.set_obs(obs) before the loop, or give "
                "steer_scheduler(..., obs=obs)."
            )
        return self._push(k, output, timestep, sample, arguments, named)

    def _position(self, timestep: Any) -> int:
        """The index of a timestep in the grid."""
        at = timestep.to(self.timesteps.device) if isinstance(timestep, Tensor) else timestep
        found = (self.timesteps == at).nonzero().flatten().tolist()
        if not found:
            raise ValueError(
                f"{_OWNER}: timestep is {timestep}; expected one of scheduler.timesteps, as steering goes by the place "
                "in the grid."
            )
        return found[0]

    def _flow_times(self) -> list[float]:
        """t of every timestep, in this package's convention."""
        raise NotImplementedError

    def _push(
        self, k: int, output: Tensor, timestep: Any, sample: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor:
        """The model output that says the steered velocity."""
        raise NotImplementedError

    def __reduce_ex__(self, _: Any) -> Any:
        return _bare, (type(self).__bases__[-1],), self.__dict__


class _SteeredFlow(_SteeredStep):
    """FlowMatchEulerDiscrete: the model output is noise - action."""

    step_index: int | None
    begin_index: int | None
    sigmas: Tensor

    def _position(self, timestep: Any) -> int:
        known = self.begin_index if self.step_index is None else self.step_index
        return super()._position(timestep) if known is None else known

    def _flow_times(self) -> list[float]:
        return [min(max(1 - sigma, 0.0), 1.0) for sigma in self.sigmas[:-1].tolist()]

    def _push(
        self, k: int, output: Tensor, timestep: Any, sample: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor:
        if named.get("per_token_timesteps") is not None or any(value is not None for value in arguments[5:6]):
            raise ValueError(
                f"{_OWNER}: per_token_timesteps is given; expected None in a steered step (ops.steer_step takes a time "
                "for each token)."
            )
        x = sample.to(torch.float32)  # as the scheduler's own step has it
        v = -output.to(x.dtype)
        estimate = x + self.sigmas[k].to(x.device) * v
        steered = -self._steering.velocity(k, self._obs, x, v, estimate)
        return steered.to(output.dtype)


class _SteeredNoise(_SteeredStep):
    """DDIM and DDPM: the model output says the noise e, of which -e is the drift toward data."""

    alphas_cumprod: Tensor

    def _levels(self, timesteps: Any) -> list[tuple[float, float]]:
        """(alpha, sigma) at timesteps."""
        table = self.alphas_cumprod[torch.as_tensor(timesteps).to(self.alphas_cumprod.device)].double().reshape(-1)
        return [(a**0.5, max(1 - a, 0.0) ** 0.5) for a in table.tolist()]

    def _flow_times(self) -> list[float]:
        return [alpha / (alpha + sigma) for alpha, sigma in self._levels(self.timesteps)]

    def _push(
        self, k: int, output: Tensor, timestep: Any, sample: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor:
        config, prediction = self.config, prediction_of(_OWNER, self.config.prediction_type)
        alpha, sigma = self._levels(timestep)[0]
        if alpha == 0:
            raise ValueError(
                f"{_OWNER}: timestep {timestep} is pure noise (alpha = 0), where the clean estimate does not depend on "
                "the sample; expected steer_first_step=False, and no weight of step_weights for it."
            )
        predicted, rest = output, None
        if output.shape[1] != sample.shape[1]:  # a learned variance beside the prediction
            predicted, rest = output.split([sample.shape[1], output.shape[1] - sample.shape[1]], dim=1)
        dtype = torch.float64 if predicted.dtype == torch.float64 else torch.float32
        x, said = sample.to(dtype), predicted.to(dtype)
        noise, clean = noise_of(prediction, said, x, alpha, sigma), clean_of(prediction, said, x, alpha, sigma)
        if config.thresholding:
            clean = self._threshold_sample(clean)  # type: ignore[attr-defined]
        elif config.clip_sample:
            clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range)
        pushed = -self._steering.velocity(k, self._obs, x, -noise, clean) - noise
        # d output / d e, x held: 1, -sigma / alpha for the clean action, 1 / alpha for v = alpha e - sigma x1
        factor = {"epsilon": 1.0, "clean": -sigma / alpha, "v": 1 / alpha}[prediction]
        steered = (said + factor * pushed).to(output.dtype)
        return steered if rest is None else torch.cat([steered, rest], dim=1)


@cache
def _steered_class(base: Any) -> Any:
    """base with steered steps."""
    mixin = _SteeredFlow if issubclass(base, FlowMatchEulerDiscreteScheduler) else _SteeredNoise
    return type(f"Steered{base.__name__}", (mixin, base), {})


def _bare(base: Any) -> Any:
    """An empty steered scheduler, for copies and pickles."""
    made = _steered_class(base)
    return made.__new__(made)
