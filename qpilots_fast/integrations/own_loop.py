"""The critic's part in a framework's own loop, which hands over its velocities and goes on with steered ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..backends import Request
from ..bounds import as_operands, box_of, check_bounds
from ..callables import out_of_inference, run_outside_inference
from ..candidates import keep_one, side_by_side
from ..critic_outputs import ask_critic, check_layout
from ..evaluators import evaluators
from ..info import SampleInfo
from ..networks import PackableNetwork
from ..settings import read_setting
from ..spec import Pullback, RawSample, StepReport
from ..steering import Steering
from ..times import Step


def no_pullback(_: Tensor) -> Tensor:
    """Where jacobian="identity" asks for none."""
    raise AssertionError("this steering never pulls a gradient back through the flow")


class LoopSteering:
    """Steers the velocities of a loop that somebody else runs, and keeps what happened since it began.

    Args:
        owner: for messages.
        critic: as SteeredSampler's; a raw module runs as the callable that it is.
        steering: with estimate "tweedie" or "noisy", and no final steps.
        full_jacobian: whether the caller can pull gradients back through its flow.
        candidates: whether the caller samples several and hands them to `candidate` and `best`.
        action_low, action_high, critic_layout, backend: as SteeredSampler's.

    Raises:
        ValueError, TypeError: for steering that such a loop cannot follow.
    """

    def __init__(
        self,
        owner: str,
        critic: Any,
        steering: Steering,
        *,
        full_jacobian: bool,
        candidates: bool = False,
        action_low: Any = None,
        action_high: Any = None,
        critic_layout: str = "auto",
        backend: str = "auto",
    ) -> None:
        _check_steering(owner, steering, full_jacobian, candidates)
        if critic is None and steering.needs_critic:
            raise ValueError(
                f"{owner}: critic is None, but this steering asks one; expected (obs, actions) -> q_values."
            )
        check_layout(critic_layout)
        self.owner, self.steering = owner, steering
        self._critic = read_setting("critic", critic)
        self._bounds = read_setting("action_low", action_low), read_setting("action_high", action_high)
        check_bounds(*self._bounds)
        self._layout, self._backend = critic_layout, backend
        self._reports: list[StepReport] = []
        self._candidates: list[RawSample] = []
        self._q_values: Tensor | None = None
        self._schedule: tuple[Step, ...] = ()

    def begin(self, times: Sequence[float]) -> None:
        """A new loop whose K steps begin at these flow times, in [0, 1] and increasing."""
        self._schedule = self.steering.schedule(len(times), [*times, 1.0])
        self._reports, self._q_values = [], None

    def candidate(self, actions: Tensor) -> None:
        """Keeps what the loop that began last has made, [B, A] or [B, C, D]."""
        steps = StepReport(*map(torch.stack, zip(*self._reports)))
        self._candidates.append(RawSample(actions, steps))

    @torch.no_grad()
    def best(self, obs: Any) -> Tensor:
        """Of the candidates kept, the one of each row that the critic values most (see Steering.selection)."""
        made, self._candidates = self._candidates, []
        shape, rows = made[0].actions.shape, len(made[0].actions)
        q_values = run_outside_inference(
            lambda: [
                ask_critic(self._critic, out_of_inference(obs), out_of_inference(raw.actions), self._layout)
                for raw in made
            ]
        )
        draws = None
        if self.steering.selection == "softmax":
            draws = torch.randn(rows, len(made), device=made[0].actions.device)
        flat = side_by_side([RawSample(raw.actions.flatten(1), raw.report) for raw in made])
        chosen, self._q_values = keep_one(flat, torch.stack(q_values, -1).flatten(1), self.steering, draws)
        assert chosen.report is not None
        self._reports = [StepReport(*step) for step in zip(*chosen.report)]
        return chosen.actions.reshape(shape)

    @property
    def at_start(self) -> bool:
        """Whether the loop that began last has made no step."""
        return not self._reports

    @property
    def num_steps(self) -> int:
        """K of the loop that began last."""
        return len(self._schedule)

    def steers(self, k: int) -> bool:
        """Whether step k asks the critic."""
        return self._schedule[k].weight > 0

    def unsteered(self, like: Tensor) -> None:
        """Keeps the report of a step that asked no critic."""
        self._reports.append(reference.unsteered_report(like))

    def velocity(
        self, k: int, obs: Any, x: Tensor, v: Tensor, estimate: Tensor, pullback: Pullback = no_pullback
    ) -> Tensor:
        """The steered velocity of step k, in the shape of v.

        Args:
            obs: what the critic reads.
            x, v: noisy actions and velocity (toward data), [B, A] or [B, C, D], as a callable critic sees them.
            estimate: of the clean action, in the same shape.
            pullback: of rows [B, A] through the velocity to x, for jacobian="full".
        """
        steered, report = run_outside_inference(lambda: self._velocity(k, obs, x, v, estimate, pullback))
        self._reports.append(report)
        return steered

    def _velocity(
        self, k: int, obs: Any, x: Tensor, v: Tensor, estimate: Tensor, pullback: Pullback
    ) -> tuple[Tensor, StepReport]:
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        obs, *given = out_of_inference((obs, x, v, estimate))
        chunk = tuple(v.shape[1:])
        rows, velocity, at = (value.flatten(1).to(dtype) for value in given)
        self._check_obs(obs, at)
        packed = (self._critic.spec,) if isinstance(self._critic, PackableNetwork) else ()
        chosen = backends.choose(Request(self._backend, "float32", at.device, dtype, networks=packed)).backend
        net = evaluators(
            None, self._critic, None, self.steering, chosen, "float32", obs, self._layout,
            chunk if len(chunk) > 1 else None,  # type: ignore[arg-type]
        )  # fmt: skip
        bounds = as_operands(*box_of(*self._bounds, at.shape[1], chunk), at)
        at = rows if self.steering.estimate == "noisy" else at
        step = self._schedule[k]
        # the estimate is the caller's: a velocity of 0 leaves it as it is
        g, std = reference.steering_gradient(
            net, self.steering, at, torch.zeros_like(at), pullback, step.t, None, bounds
        )
        moved, report = reference.steer_velocity(velocity, g, self.steering, std, self.steering.alpha * step.weight)
        return moved.reshape(v.shape), report

    def _check_obs(self, obs: Any, rows: Tensor) -> None:
        if not isinstance(self._critic, PackableNetwork):
            return
        spec = self._critic.spec
        if rows.shape[1] != spec.action_dim:
            raise ValueError(
                f"{self.owner}: the critic reads {spec.action_dim} action dimensions, and the loop's actions have "
                f"{rows.shape[1]}; expected the same. A callable (obs, actions) can select some of them."
            )
        want = [len(rows), spec.obs_dim]
        if not isinstance(obs, Tensor) or list(obs.shape) != want:
            got = f"shape {list(obs.shape)}" if isinstance(obs, Tensor) else f"type {type(obs).__name__}"
            raise ValueError(f"{self.owner}: obs has {got}; expected a tensor {want}, a row for each of the loop's.")

    @property
    def info(self) -> SampleInfo | None:
        """The steps since the loop began (q_values None, but of a chosen candidate); None before the first."""
        return SampleInfo(self._q_values, *map(torch.stack, zip(*self._reports))) if self._reports else None


def _check_steering(owner: str, steering: Steering, full_jacobian: bool, candidates: bool) -> None:
    """Raises for steering that a framework's own loop cannot follow."""
    if not isinstance(steering, Steering):
        raise TypeError(f"{owner}: steering is {type(steering).__name__}; expected a qpilots_fast.Steering.")
    if steering.steers and steering.uses_posterior:
        raise ValueError(
            f"{owner}: estimate={steering.estimate!r} draws from a posterior, which this loop does not have; expected "
            "'tweedie' or 'noisy' (SteeredSampler takes draws)."
        )
    if steering.pulls_flow and not full_jacobian:
        raise ValueError(
            f"{owner}: jacobian='full' needs the network that made the velocity, and a scheduler is given its output "
            "alone; expected jacobian='identity', as in Steering.qpilots_u(jacobian='identity')."
        )
    for name, absent in (("num_candidates", 1), ("final_steps", 0)):
        if name == "num_candidates" and candidates:
            continue
        if getattr(steering, name) != absent:
            raise ValueError(
                f"{owner}: Steering.{name} is {getattr(steering, name)}, which is about finished actions; expected "
                f"{absent} (SteeredSampler does both)."
            )
