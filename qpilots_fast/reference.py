"""The method in readable PyTorch, with explicit vector-Jacobian products.

Nothing here needs autograd, so it runs under `torch.inference_mode()`, and in any dtype: in float64 it is the
oracle of every test. Symbols follow docs/method.md: x noisy actions, v velocity, a clean actions, g the gradient
of the steering objective, w_j the critics' weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from .bounds import Bounds
from .reference_mlp import ReferenceNetwork
from .spec import Pullback, RawSample, StepReport
from .steering import Steering
from .times import GlassCoefficients, Step, glass_coefficients

__all__ = [
    "Evaluators",
    "GlassCoefficients",
    "Pullback",
    "ReferenceNetwork",
    "aggregate",
    "clean_actions",
    "ensemble_std",
    "glass_coefficients",
    "glass_draw",
    "member_weights",
    "posterior_weights",
    "row_norm",
    "sample",
    "steer_velocity",
    "steered_mask",
    "steering_gradient",
    "unsteered_report",
]


_constants: dict[tuple[float, torch.dtype], Tensor] = {}
_CONSTANTS_KEPT = 1024


def _number(value: float, like: Tensor) -> Tensor | float:
    """A number as a factor or summand of a tensor: torch converts a Python number at every operation, which on a CPU
    costs more than the operation itself where rows are few."""
    if type(like) is not Tensor or not like.is_cpu:  # a fake tensor takes no real one beside it
        return value
    found = _constants.get((value, like.dtype))
    if found is None:
        if like.dtype not in (torch.float32, torch.float64) or len(_constants) == _CONSTANTS_KEPT:
            return value
        with torch.inference_mode(False):
            found = _constants[value, like.dtype] = torch.tensor(value, dtype=like.dtype, device="cpu")
    return found


# ---------------------------------------------------------------- one step, row by row


def clean_actions(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """Posterior mean E[x1 | x_t = x] = x + (1 - t) v (Tweedie's formula for the linear path)."""
    return x + (1 - t if isinstance(t, Tensor) else _number(1 - t, v)) * v


def member_weights(q_values: Tensor, aggregation: str, rho: float) -> Tensor:
    """w_j = d Qbar / d Q_j, [E, B]; sums to 1 for every aggregation.

    Pessimistic: 1/E - rho (Q_j - mean) / (E std), and 1/E where std = 0, where autodiff would give NaN.
    "min" shares evenly among tied minima.
    """
    count = q_values.shape[0]
    if aggregation == "mean" or count == 1:
        return torch.full_like(q_values, 1 / count)
    if aggregation == "min":
        lowest = (q_values == q_values.amin(0)).to(q_values.dtype)
        return lowest / lowest.sum(0)
    deviations = _deviations(q_values)
    std = _safe_sqrt(_mean(deviations.square()))
    one = _number(1.0, std)
    slope = deviations / torch.where(std == _number(0.0, std), one, std)
    return (one - _number(rho, std) * slope) / _number(count, std)


def _deviations(q_values: Tensor) -> Tensor:
    """Q_j - mean. Taken from Q_0 first: the mean of equal numbers need not round to them, but their differences are 0,
    and those of members that nearly agree are exact."""
    apart = q_values - q_values[:1]
    return apart - _mean(apart)


def _mean(x: Tensor) -> Tensor:
    """Over the members."""
    return x.sum(0) / _number(x.shape[0], x)


def ensemble_std(q_values: Tensor) -> Tensor:
    """Population std over the members, [B]; exactly 0 where they agree."""
    return _safe_sqrt(_mean(_deviations(q_values).square()))


def _safe_sqrt(x: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0, where autodiff of sqrt gives inf."""
    if not torch.is_grad_enabled():
        return x.sqrt()
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())


def aggregate(q_values: Tensor, aggregation: str, rho: float) -> Tensor:
    """Qbar [B] of q_values [E, B]: mean - rho * population std, mean, or min."""
    if aggregation == "min":
        return q_values.amin(0)
    mean = q_values.mean(0)
    return mean if aggregation == "mean" else mean - rho * ensemble_std(q_values)


def posterior_weights(q_values: Tensor, tau: float, scale: Tensor | float = 1.0) -> Tensor:
    """softmax_n(tau Qbar_n / scale), [N, B]: the draws' weights in the gradient of log mean exp(tau Qbar)."""
    return torch.softmax(tau * q_values / scale, dim=0)


def row_norm(x: Tensor) -> Tensor:
    """L2 norm of each row, [B, 1], without overflow or underflow in the squares."""
    peak = torch.linalg.vector_norm(x.detach(), math.inf, -1, keepdim=True)
    safe = peak.clamp(min=torch.finfo(x.dtype).tiny)  # rows of zeros; a row that is not finite gives NaN
    return safe * _safe_sqrt((x / safe).square().sum(-1, keepdim=True))


def steered_mask(steering: Steering, action_dim: int, like: Tensor) -> Tensor | None:
    """[A], 1 where the critic may move the action; None for all."""
    if steering.steered_dims is None:
        return None
    mask = torch.zeros(action_dim, dtype=like.dtype, device=like.device)
    mask[list(steering.steered_dims)] = 1
    return mask


@overload
def steer_velocity(
    v: Tensor,
    g: Tensor,
    steering: Steering,
    q_std: Tensor | None = ...,
    strength: float | Tensor | None = ...,
    report: Literal[True] = ...,
) -> tuple[Tensor, StepReport]: ...


@overload
def steer_velocity(
    v: Tensor, g: Tensor, steering: Steering, q_std: Tensor | None, strength: float | Tensor | None, report: bool
) -> tuple[Tensor, StepReport | None]: ...


def steer_velocity(
    v: Tensor,
    g: Tensor,
    steering: Steering,
    q_std: Tensor | None = None,
    strength: float | Tensor | None = None,
    report: bool = True,
) -> tuple[Tensor, StepReport | None]:
    """v' = v + scale * g, row by row; a row without a finite g, or behind the gate, keeps v.

    Args:
        v: velocity [B, A]. g: gradient of the steering objective [B, A].
        q_std: the critics' population std at the estimate [B], for scale="gaf" and max_disagreement.
        strength: in place of steering.alpha; a number or [B].
        report: whether to say what happened to each row.

    Returns:
        v' [B, A], and what happened to each row, [B], or None.
    """
    mask = steered_mask(steering, v.shape[-1], v)
    if mask is not None:
        g = torch.where(mask > 0, g, 0.0)
    strength = steering.alpha if strength is None else strength
    strength = strength.to(v).reshape(-1, 1) if isinstance(strength, Tensor) else _number(strength, v)
    infinity = _number(math.inf, g)
    scale: float | Tensor
    if steering.scale == "norm_match":
        v_norm, norm = row_norm(torch.stack((v if mask is None else v * mask, g))).unbind()
        scale, usable = strength * v_norm / (norm + _number(steering.eps, norm)), norm < infinity
    elif steering.scale == "absolute":
        norm = row_norm(g)
        scale, usable = strength, norm < infinity
    else:
        if q_std is None:
            raise ValueError("steer_velocity: q_std is None; scale='gaf' needs the critics' std at the estimate, [B].")
        norm = row_norm(g)
        damping = torch.exp(-steering.gaf_decay * q_std.unsqueeze(-1)).clamp(min=steering.gaf_min)
        clipped = (steering.max_grad_norm / torch.where(norm > 0, norm, 1.0)).clamp(max=1)
        scale = strength * damping * clipped / steering.gaf_beta
        usable = (norm < infinity) & damping.isfinite()
    moved, gated = usable, None
    if steering.max_disagreement is not None:
        if q_std is None:
            raise ValueError("steer_velocity: q_std is None; max_disagreement needs the critics' std, [B].")
        gated = usable & (q_std.unsqueeze(-1) > steering.max_disagreement)
        moved = usable & ~gated
    steered = torch.where(moved, v + scale * g, v)
    if not report:
        return steered, None
    std = torch.zeros_like(norm) if q_std is None else q_std.unsqueeze(-1)
    norm, std = (torch.where(usable, value, 0.0) for value in (norm, std))
    gated = torch.zeros_like(usable) if gated is None else gated
    return steered, StepReport(norm.squeeze(-1), ~usable.squeeze(-1), std.squeeze(-1), gated.squeeze(-1))


# ---------------------------------------------------------------- the K-step loop


# (x [B, A], t, eps [B, N, A] or None, bounds, whether the critics' std is asked for, and who is told the critic's own
# gradient [B or N B, A], if anybody) -> v, g and that std, as `steering_gradient` gives the last two
SteeredStep = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class Evaluators:
    """What the loop asks of the networks; obs is bound inside.

    flow(x, t): velocity [B, A] and the pullback of [B, A] to x.
    critic(a), or critic(a, t) where the steering has critic_time: q_values [E, B] and the pullback of member weights
    [E, B] to a.
    posterior(eps, x, t): a draw [B, A] and the pullback of [B, A] to x.
    velocity(x, t): flow's velocity alone, where no gradient is asked. None: flow tells it.
    steered: a steered step's velocity and gradient at once, in place of the first three. None: they tell it.
    """

    flow: Callable[[Tensor, float], tuple[Tensor, Pullback]]
    critic: Callable[..., tuple[Tensor, Pullback]] | None = None
    posterior: Callable[[Tensor, Tensor, float], tuple[Tensor, Pullback]] | None = None
    velocity: Callable[[Tensor, float], Tensor] | None = None
    steered: SteeredStep | None = None


def glass_draw(
    flow: Callable[[Tensor, float], tuple[Tensor, Pullback]], eps: Tensor, x: Tensor, t: float, num_steps: int
) -> tuple[Tensor, Pullback]:
    """A posterior draw by Euler steps of the GLASS flow of the base policy, and its pullback to x.

    The posterior velocity at inner time s and state xbar is w = c_x x + c_xbar xbar + c_v v(obs, x*, t*), with
    x* = p_x x + p_xbar xbar a sufficient statistic of the two observations (see `glass_coefficients`).
    """
    xbar = eps
    tape = []
    for index in range(num_steps):
        c = glass_coefficients(t, index / num_steps)
        v, pullback = flow(c.p_x * x + c.p_xbar * xbar, c.t_star)
        tape.append((c, pullback))
        xbar = xbar + (c.c_x * x + c.c_xbar * xbar + c.c_v * v) / num_steps

    def pull_back(d_xbar: Tensor) -> Tensor:
        d_x = torch.zeros_like(d_xbar)
        for c, pullback in reversed(tape):
            d_star = pullback(d_xbar * (c.c_v / num_steps))
            d_x = d_x + d_xbar * (c.c_x / num_steps) + c.p_x * d_star
            d_xbar = d_xbar * (1 + c.c_xbar / num_steps) + c.p_xbar * d_star
        return d_x

    return xbar, pull_back


def usable_gradient(g: Tensor, q_values: Tensor) -> Tensor:
    """g [B, A], and NaN in the rows where a value of q_values [..., B] is not finite, whatever its derivative says."""
    if _is_at_hand(q_values) and math.isfinite(q_values.sum().item()):
        return g  # a finite sum has finite terms
    peak = torch.linalg.vector_norm(q_values.flatten(0, -2), math.inf, 0)
    return g + (peak - peak).unsqueeze(-1)  # 0, or NaN where the peak is not finite


def _is_at_hand(x: Tensor) -> bool:
    """Whether Python may look at the values: a GPU's would stop its stream, a transformation's are not there."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _critic_gradient(
    critic: Callable[[Tensor], tuple[Tensor, Pullback]], a: Tensor, steering: Steering, bounds: Bounds
) -> tuple[Tensor, Tensor]:
    """d Qbar / d a at the (clipped) estimate, and q_values [E, B]."""
    q_values, pullback = critic(a if steering.clip == "none" else a.clamp(*bounds))
    d_a = usable_gradient(pullback(member_weights(q_values, steering.aggregation, steering.rho)), q_values)
    if steering.clip == "masked" and steering.jacobian == "full":
        low, high = bounds
        d_a = torch.where((a >= low) & (a <= high), d_a, 0.0)
    return d_a, q_values


def steering_gradient(
    net: Evaluators,
    steering: Steering,
    x: Tensor,
    v: Tensor,
    flow_pullback: Pullback,
    t: float | Tensor,
    eps: Tensor | None,
    bounds: Bounds,
    with_std: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """g [B, A], the gradient of the steering objective with respect to x, and the critics' std [B], or None.

    One estimate: g = tau (da/dx)^T dQbar/da. N draws (eps [B, N, A]): V = log mean_n exp(tau Qbar_n / scale),
    g = tau / scale sum_n softmax_n (da_n/dx)^T dQbar/da_n.
    """
    assert net.critic is not None
    if not steering.uses_posterior:
        a = x if steering.estimate == "noisy" else clean_actions(x, v, t)
        critic = (lambda a: net.critic(a, t)) if steering.critic_time else net.critic  # type: ignore[misc]
        d_a, q_values = _critic_gradient(critic, a, steering, bounds)
        if steering.pulls_flow:
            d_a = d_a + (1 - t) * flow_pullback(d_a)
        q_bar = aggregate(q_values, steering.aggregation, steering.rho) if steering.q_scale == "batch_std" else None
        return tilted(d_a, steering, q_bar), ensemble_std(q_values) if with_std else None
    assert eps is not None and isinstance(t, float)
    gradients, values, stds = [], [], []
    for n in range(steering.num_samples):
        if steering.estimate == "mfm":
            assert net.posterior is not None
            a, pullback = net.posterior(eps[:, n], x, t)
        else:
            a, pullback = glass_draw(net.flow, eps[:, n], x, t, steering.glass_steps)
        d_a, q_values = _critic_gradient(net.critic, a, steering, bounds)
        gradients.append(pullback(d_a))
        values.append(aggregate(q_values, steering.aggregation, steering.rho))
        if with_std:
            stds.append(ensemble_std(q_values))
    q_bar = torch.stack(values)
    weights = draw_weights(q_bar, steering)
    g = (weights.unsqueeze(-1) * torch.stack(gradients)).sum(0)
    return tilted(g, steering, q_bar), (weights * torch.stack(stds)).sum(0) if with_std else None


def draw_weights(q_bar: Tensor, steering: Steering) -> Tensor:
    """The weights [N, B] of draws with these values [N, B] in the gradient of log mean exp(tau Qbar)."""
    return posterior_weights(q_bar, steering.tau, _q_scale(q_bar, steering))


def tilted(g: Tensor, steering: Steering, q_bar: Tensor | None) -> Tensor:
    """g * tau / scale; q_bar [..., B] tells the scale where it is the batch's std."""
    scale = _q_scale(q_bar, steering)
    return g if steering.tau == 1 and isinstance(scale, float) and scale == 1 else g * steering.tau / scale


def _q_scale(q_bar: Tensor | None, steering: Steering) -> Tensor | float:
    if steering.q_scale == "batch_std":
        assert q_bar is not None
        finite = q_bar[q_bar.isfinite()]  # rows without a value must not reach the others through the std
        return _safe_sqrt((finite - finite.mean()).square().mean()) + 1e-6 if finite.numel() else 1.0
    return 1.0 if steering.q_scale is None else float(steering.q_scale)


def unsteered_report(like: Tensor) -> StepReport:
    """Of one step, [B], in which no row of like [B, ...] was steered."""
    zeros = like.new_zeros(len(like))
    return StepReport(zeros, zeros > 0, zeros, zeros > 0)


def sample(
    net: Evaluators,
    steering: Steering,
    schedule: Sequence[Step],
    noise: Tensor,
    posterior_noise: Tensor | None,
    bounds: Bounds,
    alpha: Tensor | None = None,
    report: bool = True,
) -> RawSample:
    """The K Euler steps of the schedule from noise [B, A].

    Args:
        posterior_noise: [K, B, N, A], where the steering takes draws. bounds: of the actions (low, high).
        alpha: [B], the strength of each row; None: steering.alpha.
        report: whether to say what happened at each step.
    """
    x = noise
    reports: list[StepReport | None] = [unsteered_report(noise) if report else None] * len(schedule)
    strength = steering.alpha if alpha is None else alpha
    with_std = report or steering.scale == "gaf" or steering.max_disagreement is not None
    for k, (t, dt, weight) in enumerate(schedule):
        if weight > 0:
            eps = None if posterior_noise is None else posterior_noise[k]
            if net.steered is not None:
                v, g, std = net.steered(x, t, eps, bounds, with_std)
            else:
                v, flow_pullback = net.flow(x, t)
                g, std = steering_gradient(net, steering, x, v, flow_pullback, t, eps, bounds, with_std)
            v, reports[k] = steer_velocity(v, g, steering, std, strength * weight, report)
        else:
            v = net.flow(x, t)[0] if net.velocity is None else net.velocity(x, t)
        x = x + _number(dt, v) * v
    stacked = StepReport(*map(torch.stack, zip(*reports))) if report else None
    return RawSample(x.clamp(*bounds), stacked)
