"""Users' callables as the reference loop asks them: recorded by autograd, a steered step as one graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .bounds import Bounds
from .callables import inference_tensor_error
from .critic_outputs import ask_critic
from .reference import SteeredStep
from .spec import Pullback
from .steering import Steering


def _checked(output: Any, shape: torch.Size, owner: str, signature: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"{owner} returned {type(output).__name__}; expected a Tensor from {signature}.")
    if output.shape != shape:
        raise ValueError(f"{owner} returned shape {list(output.shape)}; expected {list(shape)} from {signature}.")
    return output


def _times(t: float, like: Tensor) -> Tensor:
    return torch.full((like.shape[0], 1), t, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Called:
    """The networks of a sampler of which some are callables, with the obs of one call.

    What flow, critic and draw return has the dtype of the actions they are asked at, and is recorded by autograd where
    those require grad; there it raises where it does not depend on them differentiably.

    Args:
        flow, critic, posterior: callables are asked, packed networks here are not.
        layout: of the critic's output. known_as: the critic whose layout is remembered, where `critic` wraps it.
    """

    steering: Steering
    obs: Any
    flow: Any
    critic: Any = None
    posterior: Any = None
    layout: str = "auto"
    known_as: Any = None

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """[B, A]."""

        def ask() -> Tensor:
            return _checked(self.flow(self.obs, x, _times(t, x)), x.shape, "flow", "flow(obs, noisy_actions, t)")

        estimate = self.steering.estimate
        return self._recorded(ask, x, "flow", self.flow, f"estimate={estimate!r}, jacobian='full'")

    def q_values(self, a: Tensor, t: float | None = None) -> Tensor:
        """[E, B]; t where the critic reads it."""

        def ask() -> Tensor:
            return ask_critic(self.critic, self.obs, a, self.layout, t=t, known_as=self.known_as)

        return self._recorded(ask, a, "critic", self.critic, "steering")

    def draw(self, eps: Tensor, x: Tensor, t: float) -> Tensor:
        """[B, A]."""

        def ask() -> Tensor:
            drawn = self.posterior(self.obs, eps, x, _times(t, x))
            return _checked(drawn, x.shape, "posterior", "posterior(obs, xbar, noisy_actions, t)")

        return self._recorded(ask, x, "posterior", self.posterior, "estimate='mfm'")

    def _recorded(self, ask: Callable[[], Tensor], x: Tensor, owner: str, network: Any, needed_for: str) -> Tensor:
        try:
            output = ask()
        except RuntimeError as error:
            if "nference tensor" in str(error):
                raise inference_tensor_error(owner, network, error) from error
            raise
        if x.requires_grad and not output.requires_grad:
            raise _lost_gradient(owner, needed_for)
        return output if output.dtype == x.dtype else output.to(x.dtype)


def _lost_gradient(owner: str, needed_for: str) -> RuntimeError:
    return RuntimeError(
        f"{owner}'s output does not depend differentiably on its actions (was it detached, or computed under "
        f"no_grad?), but {needed_for} needs that gradient. Let autograd see the computation"
        + (", or use jacobian='identity'." if owner == "flow" else ".")
    )


# ---------------------------------------------------------------- one network, with its pullback


def with_pullback(function: Callable[[Tensor], Tensor], x: Tensor, owner: str = "flow") -> tuple[Tensor, Pullback]:
    """function(x), and its pullback to x, which may be asked once; that of a critic that ignores x raises."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = function(leaf)

    def pull_back(cotangent: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(output, leaf, cotangent, allow_unused=True)
        if gradient is not None:
            return gradient
        if owner == "critic":  # trained weights let its output require grad, whatever became of the actions
            raise _lost_gradient(owner, "steering")
        return torch.zeros_like(x)  # a flow, or draws, that do not follow x

    return output.detach(), pull_back


def called_flow(net: Called) -> Callable[[Tensor, float], tuple[Tensor, Pullback]]:
    if net.steering.pulls_flow or (net.steering.steers and net.steering.estimate == "glass"):
        return lambda x, t: with_pullback(lambda leaf: net.velocity(leaf, t), x)
    return lambda x, t: (net.velocity(x, t).detach(), _no_pullback)


def _no_pullback(_: Tensor) -> Tensor:
    raise AssertionError("this steering never pulls a gradient back through the flow")


def called_critic(net: Called) -> Callable[..., tuple[Tensor, Pullback]]:
    return lambda a, t=None: with_pullback(lambda leaf: net.q_values(leaf, t), a, "critic")


def called_posterior(net: Called) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Pullback]]:
    return lambda eps, x, t: with_pullback(lambda leaf: net.draw(eps, leaf, t), x)


# ---------------------------------------------------------------- a steered step as one graph


def one_graph(net: Called, velocity: Callable[[Tensor, float], Tensor]) -> SteeredStep:
    """Steered steps whose gradient passes through callables alone: one recording and one backward a step.

    The critics' weights are the explicit ones of the reference, which are right where members agree; so autograd
    records nothing between the critics' values and the objective.

    Args:
        velocity: the flow's, where the gradient does not pass through it at x itself.
    """
    steering = net.steering

    def step(
        x: Tensor, t: float, eps: Tensor | None, bounds: Bounds, with_std: bool,
        look: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        v = None if steering.estimate == "tweedie" else velocity(x, t)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            if v is None:
                recorded = net.velocity(leaf, t)
                v = recorded.detach()
                estimates = [reference.clean_actions(leaf, recorded, t)]
            else:
                assert eps is not None
                estimates = [_draw(net, eps_n, leaf, t) for eps_n in eps.unbind(1)]
            estimates = [_clipped(a, steering, bounds) for a in estimates]
            values = [net.q_values(a) for a in estimates]
        q_values = [value.detach() for value in values]
        of_step = torch.stack(q_values, 1) if steering.uses_posterior else q_values[0]  # [E, N, B] or [E, B]
        weights = reference.member_weights(of_step, steering.aggregation, steering.rho)
        std = reference.ensemble_std(of_step) if with_std else None
        q_bar = None
        if steering.uses_posterior or steering.q_scale == "batch_std":
            q_bar = reference.aggregate(of_step, steering.aggregation, steering.rho)
        cotangents = [weights]
        if steering.uses_posterior:
            assert q_bar is not None
            of_draws = reference.draw_weights(q_bar, steering)
            cotangents = list((of_draws * weights).unbind(1))
            std = None if std is None else (of_draws * std).sum(0)
        at_x, *at_estimates = torch.autograd.grad(values, [leaf, *estimates], cotangents, allow_unused=True)
        if all(gradient is None for gradient in at_estimates):
            raise _lost_gradient("critic", "steering")
        g = torch.zeros_like(x) if at_x is None else at_x  # draws that do not follow x
        if look:
            look(torch.cat([gradient for gradient in at_estimates if gradient is not None]))
        return v, reference.tilted(reference.usable_gradient(g, of_step), steering, q_bar), std

    return step


def _draw(net: Called, eps: Tensor, x: Tensor, t: float) -> Tensor:
    """A posterior draw [B, A], recorded; one that `_clipped` may write to."""
    if net.steering.estimate == "mfm":
        drawn = net.draw(eps, x, t)
        # the callable may hold what it returned, or autograd for its derivative
        return drawn.clone() if net.steering.clip == "straight_through" else drawn
    flow = lambda at, time: (net.velocity(at, time), _no_pullback)  # noqa: E731
    return reference.glass_draw(flow, eps, x, t, net.steering.glass_steps)[0]


def _clipped(a: Tensor, steering: Steering, bounds: Bounds) -> Tensor:
    """a inside the bounds, with the gradient that the steering asks for; "straight_through" writes to a."""
    if steering.clip == "masked":
        return a.clamp(*bounds)
    if steering.clip == "straight_through":
        a.detach().clamp_(*bounds)  # unseen by autograd: its gradient stays the identity
    return a
