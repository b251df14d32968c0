"""Networks that are the user's own callables, evaluated for the reference loop by PyTorch autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends.base import Backend
from .networks import PackableNetwork
from .reference import Evaluators, Pullback, ordered_blocks, time_block
from .spec import NetworkSpec
from .steering import Steering


def _checked(output: Any, shape: tuple[int | None, ...], owner: str, signature: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"{owner} returned {type(output).__name__}; expected a Tensor from {signature}.")
    if output.ndim != len(shape) or any(want is not None and got != want for got, want in zip(output.shape, shape)):
        expected = "[" + ", ".join("E" if want is None else str(want) for want in shape) + "]"
        raise ValueError(f"{owner} returned shape {list(output.shape)}; expected {expected} from {signature}.")
    return output


def _differentiable(
    function: Callable[[Tensor], Tensor], x: Tensor, owner: str, needed_for: str
) -> tuple[Tensor, Pullback]:
    """function(x) and its pullback, recorded by autograd."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{owner} is your own callable, and {needed_for} needs its gradient from autograd, which "
            "torch.inference_mode() turns off for good. Call the sampler under torch.no_grad() instead, or give a "
            "network that runs without autograd (FlowMLP, CriticEnsemble, MetaFlowMap or from_module(...))"
            + (", or use jacobian='identity'." if owner == "flow" else ".")
        )
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        output = function(leaf)
    if not output.requires_grad:
        raise RuntimeError(
            f"{owner}'s output does not depend differentiably on its actions (was it detached, or computed under "
            f"no_grad?), but {needed_for} needs that gradient. Let autograd see the computation"
            + (", or use jacobian='identity'." if owner == "flow" else ".")
        )

    def pull_back(cotangent: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(output, leaf, cotangent.to(output.dtype), allow_unused=True, retain_graph=True)
        return torch.zeros_like(x) if grad is None else grad.to(x.dtype)

    return output.detach().to(x.dtype), pull_back


def _no_pullback(_: Tensor) -> Tensor:
    raise AssertionError("this steering never pulls a gradient back through the flow")


def _needs_flow_gradient(steering: Steering) -> bool:
    through_estimate = steering.estimate == "tweedie" and steering.jacobian == "full"
    return steering.steers and (through_estimate or steering.estimate == "glass")


def composite_evaluators(
    flow: Any, critic: Any, posterior: Any, steering: Steering, backend: Backend, precision: str, obs: Any
) -> Evaluators:
    """Evaluators in which packed networks run on a backend and callables in PyTorch; obs may be any object."""

    def packed(network: PackableNetwork) -> tuple[NetworkSpec, Any]:
        if not isinstance(obs, Tensor):
            raise TypeError(
                f"obs is {type(obs).__name__}; {type(network).__name__} needs a Tensor [B, {network.spec.obs_dim}]: "
                "give a callable that reads your obs, or a tensor."
            )
        return network.spec, backend.prepare(network.bound(), precision)

    def run(spec: NetworkSpec, handle: Any, named: dict[str, Tensor], moving: str) -> tuple[Tensor, Pullback]:
        like = named[moving]
        blocks = [block.to(like.dtype).contiguous() for block in ordered_blocks(spec, named)]
        columns = spec.block_slices[moving]
        return (
            backend.forward(handle, blocks, precision).to(like.dtype),
            lambda cotangent: backend.vjp(handle, blocks, cotangent.contiguous(), precision)[:, columns].to(like.dtype),
        )

    def flow_evaluator() -> Callable[[Tensor, float], tuple[Tensor, Pullback]]:
        if isinstance(flow, PackableNetwork):
            spec, handle = packed(flow)

            def run_flow(x: Tensor, t: float) -> tuple[Tensor, Pullback]:
                named = {"obs": obs, "noisy_actions": x, "t": time_block(spec, t, len(x), x.device)}
                v, pullback = run(spec, handle, named, "noisy_actions")
                return v[0], lambda d_v: pullback(d_v.unsqueeze(0))

            return run_flow
        needs_gradient = _needs_flow_gradient(steering)

        def call_flow(x: Tensor, t: float) -> tuple[Tensor, Pullback]:
            def velocity(at: Tensor) -> Tensor:
                times = torch.full((len(at), 1), t, dtype=at.dtype, device=at.device)
                return _checked(flow(obs, at, times), tuple(x.shape), "flow", "flow(obs, noisy_actions, t)")

            if needs_gradient:
                return _differentiable(velocity, x, "flow", f"estimate={steering.estimate!r}, jacobian='full'")
            return velocity(x).detach().to(x.dtype), _no_pullback

        return call_flow

    def critic_evaluator() -> Callable[[Tensor], tuple[Tensor, Pullback]]:
        if isinstance(critic, PackableNetwork):
            spec, handle = packed(critic)

            def run_critic(a: Tensor) -> tuple[Tensor, Pullback]:
                q, pullback = run(spec, handle, {"obs": obs, "actions": a}, "actions")
                return q.squeeze(-1), lambda weights: pullback(weights.unsqueeze(-1))

            return run_critic

        def call_critic(a: Tensor) -> tuple[Tensor, Pullback]:
            def values(at: Tensor) -> Tensor:
                return _checked(critic(obs, at), (None, len(at)), "critic", "critic(obs, actions)")

            return _differentiable(values, a, "critic", "steering")

        return call_critic

    def posterior_evaluator() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Pullback]]:
        if isinstance(posterior, PackableNetwork):
            spec, handle = packed(posterior)

            def run_posterior(eps: Tensor, x: Tensor, t: float) -> tuple[Tensor, Pullback]:
                times = {name: time_block(spec, at, len(x), x.device) for name, at in zip("tsu", (t, 0.0, 1.0))}
                vhat, pullback = run(
                    spec, handle, {"obs": obs, "xbar": eps, "noisy_actions": x, **times}, "noisy_actions"
                )
                return eps + vhat[0], lambda d_a: pullback(d_a.unsqueeze(0))

            return run_posterior

        def call_posterior(eps: Tensor, x: Tensor, t: float) -> tuple[Tensor, Pullback]:
            def draw(at: Tensor) -> Tensor:
                times = torch.full((len(at), 1), t, dtype=at.dtype, device=at.device)
                drawn = posterior(obs, eps, at, times)
                return _checked(drawn, tuple(x.shape), "posterior", "posterior(obs, xbar, noisy_actions, t)")

            return _differentiable(draw, x, "posterior", "estimate='mfm'")

        return call_posterior

    return Evaluators(
        flow_evaluator(),
        critic_evaluator() if steering.steers else None,
        posterior_evaluator() if steering.steers and steering.estimate == "mfm" else None,
    )
