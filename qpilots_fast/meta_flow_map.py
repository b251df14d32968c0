"""Training the auxiliary network of QPILOTS-M: a Meta Flow Map distilled from the frozen base policy.

The teacher is the base policy itself: its GLASS velocity transports noise to draws of x1 | x_t = x exactly, so nothing
but the policy and data enter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .steering import check_choice, check_number
from .times import glass_coefficients

CONSISTENCIES: tuple[str, ...] = ("eulerian", "semigroup")

Velocity = Callable[[Any, Tensor, Tensor], Tensor]


class AverageVelocity(Protocol):
    """A network that can be trained here: MetaFlowMap, or any module with this method."""

    def average_velocity(
        self, obs: Any, xbar: Tensor, noisy_actions: Tensor, t: Tensor, s: Tensor, u: Tensor
    ) -> Tensor:
        """vhat [B, A], with X_{s,u}(xbar; t, x) = xbar + (u - s) vhat."""


def glass_velocity(flow: Velocity, obs: Any, xbar: Tensor, noisy_actions: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Posterior velocity w = E[x1 - e0 | xbar_s = xbar, x_t = x] of the base flow, from one call of it.

    Integrated from xbar ~ N(0, I) at s = 0 to s = 1 it yields exact draws of x1 | x_t = x (GLASS flows; Meta Flow
    Maps, arXiv 2601.14430). The coefficients are `reference.glass_coefficients`, finite on all of [0, 1]^2; t and s
    are held at or below 1 - 1e-4.

    Args:
        flow: (obs, noisy_actions [B, A], t [B, 1]) -> velocity [B, A].
        obs: [B, S], or whatever the flow reads.
        xbar: inner state [B, A] at inner time s, s x1 + (1-s) e0.
        noisy_actions: x [B, A] at outer time t, t x1 + (1-t) e.
        t, s: [B, 1], in [0, 1].

    Returns:
        w [B, A].
    """
    dtype = xbar.dtype
    c = glass_coefficients(t.double(), s.double())
    point = c.p_x.to(dtype) * noisy_actions + c.p_xbar.to(dtype) * xbar
    v = flow(obs, point, c.t_star.to(dtype))
    return c.c_x.to(dtype) * noisy_actions + c.c_xbar.to(dtype) * xbar + c.c_v.to(dtype) * v


def meta_flow_map_loss(
    posterior: AverageVelocity, flow: Velocity, obs: Any, actions: Tensor, *, consistency: str = "eulerian",
    slow: AverageVelocity | None = None, diagonal_weight: float = 1.0, consistency_weight: float = 0.5,
    zero_time_probability: float = 0.1, endpoint_fraction: float = 0.05, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Distils the posterior draws of a frozen flow into X_{s,u}(xbar; t, x) = xbar + (u-s) vhat(obs, s, u, xbar, t, x).

    x = t x1 + (1-t) e with t = U^2 (0 with probability zero_time_probability); xbar_s = s x1 + (1-s) e0. With w the
    flow's `glass_velocity` and sg the stop-gradient, the loss is diagonal_weight * diagonal + consistency_weight *
    consistency:

        diagonal:     || vhat(s, s, xbar_s) - sg[w(s, xbar_s)] ||^2,  s ~ U(0, 1)
        consistency:  || vhat(s, u, xbar_s) - sg[target] ||^2,  s <= u two sorted uniforms
          eulerian:   target = w + (u-s) d vhat(s, u, xbar_s), the derivative along (ds, du, dxbar) = (1, 0, w)
          semigroup:  target = c vhat(s, r, xbar_s) + (1-c) vhat(r, u, X_{s,r}(xbar_s)),  r = s + c (u-s), c ~ U(0, 1)

    Both consistencies have the same solution. The Eulerian one needs forward-mode derivatives of the network
    (torch.func.jvp) and is awkward with sinusoidal times, whose derivative is of order 1e4: prefer "semigroup" there.

    Args:
        posterior: MetaFlowMap, or any module with `average_velocity`; gradients flow here only.
        flow: frozen base policy, (obs, noisy_actions [B, A], t [B, 1]) -> velocity [B, A]; called without gradient.
        obs: [B, S], or whatever both networks read.
        actions: x1 [B, A], in the sampler's bounds; draws of the policy itself will do where no data is at hand.
        consistency: "eulerian" (Meta Flow Maps' default) or "semigroup".
        slow: a slow copy of posterior (see `objectives.polyak_update`) whose vhat makes the consistency targets; None
            takes posterior's own.
        diagonal_weight: 0 or more.
        consistency_weight: 0 or more.
        zero_time_probability: in [0, 1], the share of rows at t = 0 exactly.
        endpoint_fraction: in [0, 1], the share of consistency rows at (s, u) = (0, 1), the only pair that steering
            asks for.
        generator: of all draws, on actions' device.

    Returns:
        A scalar: each term is a mean over rows and action dimensions.

    Raises:
        ValueError: for an unknown consistency, a weight or fraction out of range, actions that are not [B, A] with
            B >= 1, or obs with another number of rows.
        TypeError: for a posterior without `average_velocity`.
    """
    _check_arguments(posterior, slow, obs, actions, consistency, zero_time_probability, endpoint_fraction)
    check_number("meta_flow_map_loss: diagonal_weight", diagonal_weight, 0.0)
    check_number("meta_flow_map_loss: consistency_weight", consistency_weight, 0.0)

    def uniform() -> Tensor:
        return torch.rand(len(actions), 1, generator=generator, dtype=actions.dtype, device=actions.device)

    def noisy(time: Tensor) -> Tensor:
        noise = torch.randn(actions.shape, generator=generator, dtype=actions.dtype, device=actions.device)
        return time * actions + (1 - time) * noise

    with torch.no_grad():
        t = torch.where(uniform() < zero_time_probability, 0.0, uniform().square())
        x = noisy(t)
        s_diagonal, first, second = uniform(), uniform(), uniform()
        at_ends = uniform() < endpoint_fraction
        s = torch.where(at_ends, 0.0, torch.minimum(first, second))
        u = torch.where(at_ends, 1.0, torch.maximum(first, second))
        xbar_diagonal, xbar = noisy(s_diagonal), noisy(s)
        w_diagonal = glass_velocity(flow, obs, xbar_diagonal, x, t, s_diagonal)
        teacher = posterior if slow is None else slow
        if consistency == "eulerian":
            w = glass_velocity(flow, obs, xbar, x, t, s)
            target = _eulerian_target(teacher, obs, xbar, x, t, s, u, w)
        else:
            target = _semigroup_target(teacher, obs, xbar, x, t, s, u, uniform())
    diagonal = posterior.average_velocity(obs, xbar_diagonal, x, t, s_diagonal, s_diagonal) - w_diagonal
    off_diagonal = posterior.average_velocity(obs, xbar, x, t, s, u) - target
    return diagonal_weight * diagonal.square().mean() + consistency_weight * off_diagonal.square().mean()


def _eulerian_target(
    network: AverageVelocity, obs: Any, xbar: Tensor, x: Tensor, t: Tensor, s: Tensor, u: Tensor, w: Tensor
) -> Tensor:
    """w + (u-s) (d/ds + w . d/dxbar) vhat: what X_{s,u}(xbar_s) = const along the posterior flow asks of vhat."""

    def average_velocity(xbar: Tensor, s: Tensor) -> Tensor:
        return network.average_velocity(obs, xbar, x, t, s, u)

    derivative = torch.func.jvp(average_velocity, (xbar, s), (w, torch.ones_like(s)))[1]
    return w + (u - s) * derivative


def _semigroup_target(
    network: AverageVelocity, obs: Any, xbar: Tensor, x: Tensor, t: Tensor, s: Tensor, u: Tensor, c: Tensor
) -> Tensor:
    """c vhat(s, r) + (1-c) vhat(r, u) at r = s + c (u-s): what X_{s,u} = X_{r,u} o X_{s,r} asks of vhat."""
    r = s + c * (u - s)
    first = network.average_velocity(obs, xbar, x, t, s, r)
    return c * first + (1 - c) * network.average_velocity(obs, xbar + (r - s) * first, x, t, r, u)


def _check_arguments(
    posterior: Any, slow: Any, obs: Any, actions: Tensor, consistency: str, zero_time: float, endpoint: float
) -> None:
    owner = "meta_flow_map_loss"
    check_choice(f"{owner}: consistency", consistency, CONSISTENCIES)
    for name, network in (("posterior", posterior), ("slow", slow)):
        if not (callable(getattr(network, "average_velocity", None)) or (name == "slow" and network is None)):
            raise TypeError(
                f"{owner}: {name} is {type(network).__name__}, which has no average_velocity(obs, xbar, noisy_actions, "
                "t, s, u); expected a MetaFlowMap or a module with that method."
            )
    for name, value in (("zero_time_probability", zero_time), ("endpoint_fraction", endpoint)):
        check_number(f"{owner}: {name}", value, 0.0)
        if value > 1:
            raise ValueError(f"{owner}: {name} is {value!r}; expected a number in [0, 1].")
    if actions.ndim != 2 or not len(actions):
        raise ValueError(f"{owner}: actions has shape {tuple(actions.shape)}; expected [B, A] with B >= 1.")
    if isinstance(obs, Tensor) and obs.shape[:1] != actions.shape[:1]:
        raise ValueError(
            f"{owner}: obs has shape {tuple(obs.shape)} beside actions {tuple(actions.shape)}; expected the same "
            "number of rows."
        )
