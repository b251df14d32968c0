"""The networks of a sampler as the reference loop asks them: on the reference, on a backend, or as users' callables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .backends.base import Backend

from .callables import inference_tensor_error
from .critic_outputs import ask_critic
from .networks import PackableNetwork
from .reference import Evaluators
from .reference_mlp import ReferenceNetwork
from .spec import BoundNetwork, BoundNetworks, NetworkSpec, Pullback
from .steering import Steering

# blocks -> output [E, B, out], and its pullback from [E, B, out] to some of the input columns, summed over members
NetworkCall = Callable[[Sequence[Tensor]], tuple[Tensor, Callable[[Tensor, slice], Tensor]]]


def compute_dtype(precision: str, *tensors: Tensor) -> torch.dtype:
    """float64 where the precision or any input says so, else float32 (also for 16-bit operand precisions)."""
    if precision == "float64" or any(tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


# ---------------------------------------------------------------- where a packed network runs


def reference_call(network: BoundNetwork, dtype: torch.dtype, precision: str) -> NetworkCall:
    """On the reference's MLP; differentiable by autograd too."""
    made = ReferenceNetwork(network, dtype, precision)

    def call(blocks: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor, slice], Tensor]]:
        output, pullback = made(blocks)
        return output, lambda d_output, columns: pullback(d_output)[..., columns].sum(0)

    return call


def backend_call(backend: Backend, network: BoundNetwork, precision: str) -> NetworkCall:
    """On a backend, packed once for the calls to come."""
    handle, moving = backend.prepare(network, precision), network.spec.input_order.index(network.spec.moving_block)

    def call(blocks: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor, slice], Tensor]]:
        dtype = compute_dtype("float32", blocks[moving])  # times are float64 in any call
        ready = [block.detach().to(dtype).contiguous() for block in blocks]
        return backend.forward(handle, ready, precision), lambda d_output, columns: backend.vjp(
            handle, ready, d_output.to(dtype).contiguous(), precision
        )[:, columns]

    return call


# ---------------------------------------------------------------- packed networks in the loop's words


def packed_flow(
    spec: NetworkSpec, call: NetworkCall, obs: Tensor
) -> Callable[[Tensor, float], tuple[Tensor, Pullback]]:
    def velocity(x: Tensor, t: float) -> tuple[Tensor, Pullback]:
        named = {"obs": obs.to(x.dtype), "noisy_actions": x, **spec.time_inputs(t, len(x), x.device)}
        v, pull_back = call(spec.ordered(named))
        return v[0].to(x.dtype), lambda d_v: pull_back(d_v.unsqueeze(0), spec.moving_columns).to(x.dtype)

    return velocity


def packed_critic(spec: NetworkSpec, call: NetworkCall, obs: Tensor) -> Callable[[Tensor], tuple[Tensor, Pullback]]:
    def values(a: Tensor) -> tuple[Tensor, Pullback]:
        output, pull_back = call(spec.ordered({"obs": obs.to(a.dtype), "actions": a}))
        q_values, head_back = spec.head(output.to(a.dtype))
        return q_values, lambda weights: pull_back(head_back(weights), spec.moving_columns).to(a.dtype)

    return values


def packed_posterior(
    spec: NetworkSpec, call: NetworkCall, obs: Tensor
) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Pullback]]:
    def draw(eps: Tensor, x: Tensor, t: float) -> tuple[Tensor, Pullback]:
        named = {"obs": obs.to(x.dtype), "xbar": eps, "noisy_actions": x, **spec.time_inputs(t, len(x), x.device)}
        vhat, pull_back = call(spec.ordered(named))
        return eps + vhat[0].to(x.dtype), lambda d_a: pull_back(d_a.unsqueeze(0), spec.moving_columns).to(x.dtype)

    return draw


def reference_evaluators(networks: BoundNetworks, obs: Tensor, dtype: torch.dtype, precision: str) -> Evaluators:
    """All networks on the reference's MLPs, obs [B, S] bound."""

    def made(network: BoundNetwork, evaluator: Any) -> Any:
        return evaluator(network.spec, reference_call(network, dtype, precision), obs)

    return Evaluators(
        made(networks.flow, packed_flow),
        None if networks.critic is None else made(networks.critic, packed_critic),
        None if networks.posterior is None else made(networks.posterior, packed_posterior),
    )


# ---------------------------------------------------------------- users' callables


def _checked(output: Any, shape: torch.Size, owner: str, signature: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"{owner} returned {type(output).__name__}; expected a Tensor from {signature}.")
    if output.shape != shape:
        raise ValueError(f"{owner} returned shape {list(output.shape)}; expected {list(shape)} from {signature}.")
    return output


def _differentiable(
    function: Callable[[Tensor], Tensor], x: Tensor, owner: str, network: Any, needed_for: str
) -> tuple[Tensor, Pullback]:
    """function(x) and its pullback, recorded by autograd."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        try:
            output = function(leaf)
        except RuntimeError as error:
            if "nference tensor" in str(error):
                raise inference_tensor_error(owner, network, error) from error
            raise
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


def _times(t: float, like: Tensor) -> Tensor:
    return torch.full((len(like), 1), t, dtype=like.dtype, device=like.device)


def callable_flow(flow: Any, steering: Steering, obs: Any) -> Callable[[Tensor, float], tuple[Tensor, Pullback]]:
    needs_gradient = steering.pulls_flow or (steering.steers and steering.estimate == "glass")

    def velocity(x: Tensor, t: float) -> tuple[Tensor, Pullback]:
        def at(leaf: Tensor) -> Tensor:
            output = flow(obs, leaf, _times(t, leaf))
            return _checked(output, x.shape, "flow", "flow(obs, noisy_actions, t)")

        if needs_gradient:
            return _differentiable(at, x, "flow", flow, f"estimate={steering.estimate!r}, jacobian='full'")
        return at(x).detach().to(x.dtype), _no_pullback

    return velocity


def callable_critic(critic: Any, obs: Any, layout: str) -> Callable[..., tuple[Tensor, Pullback]]:
    def values(a: Tensor, t: float | None = None) -> tuple[Tensor, Pullback]:
        def at(leaf: Tensor) -> Tensor:
            return ask_critic(critic, obs, leaf, layout, t=t)

        return _differentiable(at, a, "critic", critic, "steering")

    return values


def callable_posterior(posterior: Any, obs: Any) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Pullback]]:
    def draw(eps: Tensor, x: Tensor, t: float) -> tuple[Tensor, Pullback]:
        def at(leaf: Tensor) -> Tensor:
            drawn = posterior(obs, eps, leaf, _times(t, leaf))
            return _checked(drawn, x.shape, "posterior", "posterior(obs, xbar, noisy_actions, t)")

        return _differentiable(at, x, "posterior", posterior, "estimate='mfm'")

    return draw


# ---------------------------------------------------------------- any mixture of both


def evaluators(
    flow: Any, critic: Any, posterior: Any, steering: Steering, backend: Backend, precision: str, obs: Any,
    critic_layout: str = "auto",
) -> Evaluators:  # fmt: skip
    """Packed networks run on a backend and callables in PyTorch; obs may be any object that the callables read."""

    def made(network: Any, packed: Any, own: Callable[[], Any]) -> Any:
        if not isinstance(network, PackableNetwork):
            return own()
        if not isinstance(obs, Tensor):
            raise TypeError(
                f"obs is {type(obs).__name__}; {type(network).__name__} needs a Tensor [B, {network.spec.obs_dim}]: "
                "give a callable that reads your obs, or a tensor."
            )
        return packed(network.spec, backend_call(backend, network.bound(), precision), obs)

    asked = steering.asks
    return Evaluators(
        made(flow, packed_flow, lambda: callable_flow(flow, steering, obs)),
        made(critic, packed_critic, lambda: callable_critic(critic, obs, critic_layout)) if asked("critic") else None,
        made(posterior, packed_posterior, lambda: callable_posterior(posterior, obs)) if asked("posterior") else None,
    )
