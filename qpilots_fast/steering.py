"""How a sampler steers: one frozen dataclass whose settings span QPILOTS and its rivals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

from .times import Step

Estimate = Literal["noisy", "tweedie", "mfm", "glass"]
Jacobian = Literal["full", "identity"]
Clip = Literal["straight_through", "masked", "none"]
Aggregation = Literal["pessimistic", "mean", "min"]
Scale = Literal["norm_match", "absolute", "gaf"]
Selection = Literal["argmax", "softmax"]

ESTIMATES: tuple[str, ...] = ("noisy", "tweedie", "mfm", "glass")
JACOBIANS: tuple[str, ...] = ("full", "identity")
CLIPS: tuple[str, ...] = ("straight_through", "masked", "none")
AGGREGATIONS: tuple[str, ...] = ("pessimistic", "mean", "min")
SCALES: tuple[str, ...] = ("norm_match", "absolute", "gaf")
SELECTIONS: tuple[str, ...] = ("argmax", "softmax")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")


def check_number(name: str, value: object, low: float, *, strict: bool = False) -> None:
    """Raises TypeError or ValueError unless value is a finite number >= low (> low where strict)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected a number.")
    if not math.isfinite(value) or value < low or (strict and value == low):
        relation = ">" if strict else ">="
        raise ValueError(f"{name} is {value!r}; expected a finite number {relation} {low:g}.")


_LISTS = ("step_weights", "window", "steered_dims")


def plain(value: Any, listed: bool = False) -> Any:
    """Numbers of numpy and torch as Python's; the entries of a list, range, array or tensor as a tuple."""
    if listed and (isinstance(value, (list, range)) or getattr(value, "ndim", 0) == 1):
        value = tuple(value)
    if listed and isinstance(value, tuple):
        return tuple(plain(entry) for entry in value)
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _check_count(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Steering.{name} is {value!r} ({type(value).__name__}); expected an integer.")
    if value < low:
        raise ValueError(f"Steering.{name} is {value}; expected at least {low}.")


@dataclass(frozen=True)
class Steering:
    """v' = v + scale(v, g) g at every denoising step; g is the critic's gradient at a clean estimate.

    Prefer the named constructors and `dataclasses.replace` for variations.

    Args:
        alpha: strength of the steering, >= 0; 0 never calls the critic inside the loop. With
            ``scale="norm_match"`` it is the ratio of the added term to the velocity (QPILOTS); with
            ``"absolute"`` it is the weight w of ``v + w g`` (QGF).
        estimate: the clean-action estimate at which the critic is asked: ``"noisy"`` (x itself),
            ``"tweedie"`` (x + (1 - t) v), ``"mfm"`` (posterior draws of a learned meta flow map) or
            ``"glass"`` (posterior draws by inner Euler steps of the base flow; no training).
        jacobian: ``"full"`` pulls the gradient back through the estimate; ``"identity"`` does not.
        clip: of the estimate to the action bounds before the critic: ``"straight_through"`` (identity
            gradient), ``"masked"`` (zero gradient outside, as autodiff of a clamp) or ``"none"``.
            With ``jacobian="identity"``, "masked" and "straight_through" both take the gradient at the
            clipped point (QGF).
        aggregation: of the E critics: ``"pessimistic"`` (mean - rho * population std), ``"mean"``, ``"min"``.
        rho: pessimism, >= 0.
        tau: tilt temperature, > 0; multiplies Q inside exp(tau Q). Cancels under norm match for one estimate.
        scale: ``"norm_match"``, ``"absolute"`` or ``"gaf"`` (alpha * m * clip_norm(g, max_grad_norm) / gaf_beta,
            m = max(gaf_min, exp(-gaf_decay * std_Q))).
        steer_first_step: whether step k = 0 (pure noise) is steered.
        step_weights: K numbers >= 0 that multiply alpha step by step, the first included whatever steer_first_step
            says. A step of weight 0 asks no critic. None: 1 at every step.
        window: (t_from, t_until), short for weight 1 at the steps with t_from <= t_k < t_until and 0 elsewhere;
            steer_first_step keeps its rule. Not together with step_weights.
        max_disagreement: a row whose critics' population std at the estimate exceeds this follows the base flow for
            that step (`SampleInfo.gated` counts them); `calibrate_gate` finds the number from data. None: no gate.
        num_samples: N posterior draws (mfm, glass), >= 1.
        glass_steps: m inner Euler steps of the "glass" estimate, >= 1; m = 1 equals tweedie in its one draw.
        q_scale: what Q is divided by before exp(tau Q): None, "batch_std" (the std of the aggregated Q over
            the whole batch and draws, so rows are no longer independent) or a positive number.
        num_candidates: n actions drawn per observation, of which one is returned.
        candidate_aggregation: the critics' aggregation Qbar that ranks the candidates.
        selection: ``"argmax"`` (the candidate with the highest Qbar) or ``"softmax"`` (drawn with p proportional to
            exp(Qbar / selection_temperature), from the call's generator or the row's seed).
        selection_temperature: in units of Q, > 0.
        final_steps: gradient steps on the finished action, x <- clip(x + final_step_size dQbar/da(obs, x)) with
            `aggregation`, also at alpha = 0 (QGF's grad_step; policy-agnostic RL). Before candidates are ranked.
        final_step_size: positive, in actions squared over Q; the gradient is not scaled.
        critic_time: the critic is Q(obs, a, t), t [B, 1], trained on noised actions; for estimate="noisy" and callable
            critics. Finished actions are valued at t = 1.
        eps: added to the gradient's norm in the norm match, > 0.
        steered_dims: action dimensions that the critic may move, as sorted distinct indices; None means all.
            Norms and gradients see only these; the rest follow the base flow.
        max_grad_norm: of ``scale="gaf"``, > 0: where the gradient's norm is clipped.
        gaf_beta: of ``scale="gaf"``, > 0, its divisor.
        gaf_decay: of ``scale="gaf"``, >= 0, per unit of Q: how fast disagreement damps.
        gaf_min: of ``scale="gaf"``, >= 0, the least damping factor.

    Raises:
        ValueError, TypeError: at construction, for any value outside its range.
    """

    alpha: float = 0.2
    estimate: Estimate = "tweedie"
    jacobian: Jacobian = "full"
    clip: Clip = "straight_through"
    aggregation: Aggregation = "pessimistic"
    rho: float = 0.5
    tau: float = 1.0
    scale: Scale = "norm_match"
    steer_first_step: bool = False
    step_weights: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None
    max_disagreement: float | None = None
    num_samples: int = 1
    glass_steps: int = 2
    q_scale: float | Literal["batch_std"] | None = None
    num_candidates: int = 1
    candidate_aggregation: Aggregation = "mean"
    selection: Selection = "argmax"
    selection_temperature: float = 1.0
    final_steps: int = 0
    final_step_size: float = 0.01
    critic_time: bool = False
    eps: float = 1e-8
    steered_dims: tuple[int, ...] | None = None
    max_grad_norm: float = 1.0
    gaf_beta: float = 1.0
    gaf_decay: float = 1.0
    gaf_min: float = 0.1

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, plain(value, name in _LISTS))
        check_choice("Steering.estimate", self.estimate, ESTIMATES)
        check_choice("Steering.jacobian", self.jacobian, JACOBIANS)
        check_choice("Steering.clip", self.clip, CLIPS)
        check_choice("Steering.aggregation", self.aggregation, AGGREGATIONS)
        check_choice("Steering.candidate_aggregation", self.candidate_aggregation, AGGREGATIONS)
        check_choice("Steering.scale", self.scale, SCALES)
        check_choice("Steering.selection", self.selection, SELECTIONS)
        for name in ("alpha", "rho", "gaf_decay", "gaf_min"):
            check_number(f"Steering.{name}", getattr(self, name), 0.0)
        for name in ("tau", "eps", "max_grad_norm", "gaf_beta", "selection_temperature", "final_step_size"):
            check_number(f"Steering.{name}", getattr(self, name), 0.0, strict=True)
        for name in ("num_samples", "num_candidates", "glass_steps"):
            _check_count(name, getattr(self, name), 1)
        _check_count("final_steps", self.final_steps, 0)
        for name in ("steer_first_step", "critic_time"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Steering.{name} is {getattr(self, name)!r}; expected True or False.")
        if self.critic_time and self.estimate != "noisy":
            raise ValueError(
                f"Steering.critic_time=True with estimate={self.estimate!r}; expected 'noisy', where the critic is "
                "asked at the noised action itself."
            )
        if self.q_scale is not None and self.q_scale != "batch_std":
            check_number("Steering.q_scale", self.q_scale, 0.0, strict=True)
        if self.max_disagreement is not None:
            check_number("Steering.max_disagreement", self.max_disagreement, 0.0)
        if self.num_samples > 1 and not self.uses_posterior:
            raise ValueError(
                f"Steering.num_samples is {self.num_samples} with estimate={self.estimate!r}, which has one estimate "
                "a step; expected num_samples=1, or estimate 'mfm' or 'glass'."
            )
        if self.uses_posterior and self.jacobian == "identity":
            raise ValueError(
                f"Steering.jacobian='identity' is not defined for estimate={self.estimate!r}, whose draws depend on x "
                "only through the map; expected jacobian='full'."
            )
        if self.steered_dims is not None:
            dims = self.steered_dims
            if (
                not isinstance(dims, tuple)
                or not dims
                or any(isinstance(d, bool) or not isinstance(d, int) for d in dims)
            ):
                raise TypeError(f"Steering.steered_dims is {dims!r}; expected a non-empty tuple of integers, or None.")
            if list(dims) != sorted(set(dims)) or dims[0] < 0:
                raise ValueError(f"Steering.steered_dims is {dims!r}; expected sorted, distinct indices >= 0.")
        self._check_weights()
        object.__setattr__(self, "json", json.dumps(asdict(self), sort_keys=True))
        object.__setattr__(self, "ascent", self._ascent() if self.final_steps else None)

    def _ascent(self) -> Steering:
        return Steering(
            alpha=1.0, estimate="noisy", jacobian="identity", clip="none", aggregation=self.aggregation, rho=self.rho,
            scale="absolute", steer_first_step=True, steered_dims=self.steered_dims, critic_time=self.critic_time,
        )  # fmt: skip

    def _check_weights(self) -> None:
        for name, count in (("step_weights", "K"), ("window", "2")):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, tuple) or not value):
                raise TypeError(f"Steering.{name} is {value!r}; expected a tuple of {count} numbers, or None.")
            for number in value or ():
                check_number(f"Steering.{name} entry", number, 0.0)
        if self.window is not None and (len(self.window) != 2 or not self.window[0] < self.window[1]):
            raise ValueError(f"Steering.window is {self.window!r}; expected (t_from, t_until), 0 <= t_from < t_until.")
        if self.window is not None and self.step_weights is not None:
            raise ValueError(
                "Steering got both window and step_weights; expected one of them (a window is short for 0s and 1s)."
            )

    # ready before torch.compile traces through
    json: ClassVar[str]  # these settings as text
    ascent: ClassVar[Steering | None]  # one final step, as a steered step of length final_step_size from velocity 0

    @classmethod
    def from_json(cls, text: str) -> Steering:
        """The settings that `json` was written from."""
        return _from_json(text)

    @property
    def uses_posterior(self) -> bool:
        """Whether each step asks the critic at num_samples posterior draws rather than one point."""
        return self.estimate in ("mfm", "glass")

    @property
    def steers(self) -> bool:
        """Whether the critic moves the velocity at all."""
        return self.alpha > 0 and (self.step_weights is None or any(weight > 0 for weight in self.step_weights))

    @property
    def needs_critic(self) -> bool:
        """Whether a call asks the critic at all: in the loop, or about finished actions."""
        return self.steers or self.num_candidates > 1 or self.final_steps > 0

    @property
    def draws_posterior(self) -> bool:
        """Whether steered steps take posterior draws."""
        return self.steers and self.uses_posterior

    @property
    def pulls_flow(self) -> bool:
        """Whether steered steps pull the gradient back through the flow at its own (x, t)."""
        return self.steers and self.estimate == "tweedie" and self.jacobian == "full"

    def asks(self, network: str) -> bool:
        """Whether the loop's steps ask the "flow", the "critic" or the "posterior" network."""
        return network == "flow" or (self.steers and (network == "critic" or self.estimate == "mfm"))

    def schedule(self, num_steps: int, time_grid: Sequence[float] | None = None) -> tuple[Step, ...]:
        """Every step of a call: when it starts, how long it is, and how strongly it is steered.

        Args:
            num_steps: K.
            time_grid: K + 1 increasing times from 0 to 1; None: k / K.

        Raises:
            ValueError: where step_weights are not K.
        """
        if self.step_weights is not None and len(self.step_weights) != num_steps:
            raise ValueError(
                f"Steering.step_weights has {len(self.step_weights)} entries, the call {num_steps} steps; expected one "
                "for each."
            )
        times = [k / num_steps for k in range(num_steps)] if time_grid is None else list(time_grid)[:-1]
        lengths = [1 / num_steps] * num_steps if time_grid is None else [b - a for a, b in pairwise(time_grid)]
        begin, end = self.window or (0.0, math.inf)
        weights = self.step_weights or [
            float(begin <= t < end and (k > 0 or self.steer_first_step)) for k, t in enumerate(times)
        ]
        return tuple(Step(t, dt, weight * self.steers) for t, dt, weight in zip(times, lengths, weights))

    @classmethod
    def qpilots_u(cls, alpha: float = 0.2, rho: float = 0.5, jacobian: Jacobian = "full") -> Steering:
        """QPILOTS-U: one posterior-mean estimate a step, pessimistic ensemble, norm match (arXiv 2606.14801)."""
        return cls(alpha=alpha, rho=rho, jacobian=jacobian)

    @classmethod
    def qpilots_m(cls, alpha: float = 0.2, rho: float = 0.5, num_samples: int = 4, tau: float = 1.0) -> Steering:
        """QPILOTS-M: num_samples draws of a meta flow map, weighted by softmax(tau Q) (arXiv 2606.14801)."""
        return cls(alpha=alpha, rho=rho, estimate="mfm", num_samples=num_samples, tau=tau)

    @classmethod
    def qgf(cls, weight: float, aggregation: Aggregation = "min", jacobian: Jacobian = "identity") -> Steering:
        """QGF ("identity") and QGF-Jacobian ("full"): v + weight * g, every step steered (arXiv 2606.11087)."""
        return cls(
            alpha=weight,
            aggregation=aggregation,
            jacobian=jacobian,
            clip="masked",
            scale="absolute",
            steer_first_step=True,
            candidate_aggregation=aggregation,
        )

    @classmethod
    def noisy(cls, weight: float, aggregation: Aggregation = "mean") -> Steering:
        """Noisy-gradient baseline (CGQL / QFQL style): the critic is asked at the noisy action itself."""
        return cls(
            alpha=weight, estimate="noisy", jacobian="identity", clip="none", aggregation=aggregation,
            scale="absolute", steer_first_step=True,
        )  # fmt: skip

    @classmethod
    def gaf(
        cls,
        strength: float = 1.0,
        beta: float = 1.0,
        max_grad_norm: float = 1.0,
        decay: float = 1.0,
        floor: float = 0.1,
    ) -> Steering:
        """GAF: clipped gradient of the ensemble mean, damped where the critics disagree."""
        return cls(
            alpha=strength, jacobian="identity", clip="none", aggregation="mean", scale="gaf", steer_first_step=True,
            max_grad_norm=max_grad_norm, gaf_beta=beta, gaf_decay=decay, gaf_min=floor,
        )  # fmt: skip

    @classmethod
    def best_of_n(cls, n: int, aggregation: Aggregation = "mean") -> Steering:
        """n plain samples of the flow, of which the one with the highest value is kept (IFQL takes n = 32)."""
        return cls(alpha=0.0, num_candidates=n, candidate_aggregation=aggregation)

    @classmethod
    def unsteered(cls) -> Steering:
        """The base policy: plain Euler integration of the flow, no critic."""
        return cls(alpha=0.0)


@lru_cache(maxsize=256)
def _from_json(text: str) -> Steering:
    values: dict[str, Any] = json.loads(text)
    listed = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Steering(**{**values, **listed})
