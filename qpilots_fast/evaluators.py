"""The networks of a sampler as the reference loop asks them: on the reference, on a backend, or as users' callables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .backends.base import Backend

from .chunks import in_chunks
from .networks import PackableNetwork
from .recorded import Called, called_critic, called_flow, called_posterior, one_graph
from .reference import Evaluators
from .reference_mlp import ReferenceNetwork
from .spec import BoundNetwork, BoundNetworks, Pullback
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
    handle, moving = (
        backend.prepare(network.trunk, precision),
        network.spec.input_order.index(network.spec.moving_block),
    )

    def call(blocks: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor, slice], Tensor]]:
        dtype = compute_dtype(precision, blocks[moving])  # times are float64 in any call
        ready = [block.detach().to(dtype).contiguous() for block in blocks]
        return backend.forward(handle, ready, precision), lambda d_output, columns: backend.vjp(
            handle, ready, d_output.to(dtype).contiguous(), precision
        )[:, columns]

    return call


# ---------------------------------------------------------------- packed networks in the loop's words


def packed_flow(
    network: BoundNetwork, call: NetworkCall, obs: Tensor
) -> Callable[[Tensor, float], tuple[Tensor, Pullback]]:
    spec, seen = network.spec, network.obs_input(obs)

    def velocity(x: Tensor, t: float) -> tuple[Tensor, Pullback]:
        named = {"obs": seen.to(x.dtype), "noisy_actions": x, **network.time_inputs(t, len(x), x.device)}
        v, pull_back = call(spec.ordered(named))
        return v[0].to(x.dtype), lambda d_v: pull_back(d_v.unsqueeze(0), spec.moving_columns).to(x.dtype)

    return velocity


def packed_critic(network: BoundNetwork, call: NetworkCall, obs: Tensor) -> Callable[[Tensor], tuple[Tensor, Pullback]]:
    spec, seen = network.spec, network.obs_input(obs)

    def values(a: Tensor) -> tuple[Tensor, Pullback]:
        mapped = network.action_map(a)
        output, pull_back = call(spec.ordered({"obs": seen.to(a.dtype), "actions": a if mapped is None else mapped(a)}))
        q_values, head_back = spec.head(output.to(a.dtype))

        def pulled(weights: Tensor) -> Tensor:
            d_columns = pull_back(head_back(weights), spec.moving_columns).to(a.dtype)
            return d_columns if mapped is None else mapped.pull_back(d_columns, a.shape[1])

        return q_values, pulled

    return values


def packed_posterior(
    network: BoundNetwork, call: NetworkCall, obs: Tensor
) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Pullback]]:
    spec, seen = network.spec, network.obs_input(obs)

    def draw(eps: Tensor, x: Tensor, t: float) -> tuple[Tensor, Pullback]:
        named = {"obs": seen.to(x.dtype), "xbar": eps, "noisy_actions": x, **network.time_inputs(t, len(x), x.device)}
        vhat, pull_back = call(spec.ordered(named))
        return eps + vhat[0].to(x.dtype), lambda d_a: pull_back(d_a.unsqueeze(0), spec.moving_columns).to(x.dtype)

    return draw


def reference_evaluators(networks: BoundNetworks, obs: Tensor, dtype: torch.dtype, precision: str) -> Evaluators:
    """All networks on the reference's MLPs, obs [B, S] bound."""

    def made(network: BoundNetwork, evaluator: Any) -> Any:
        return evaluator(network, reference_call(network, dtype, precision), obs)

    return Evaluators(
        made(networks.flow, packed_flow),
        None if networks.critic is None else made(networks.critic, packed_critic),
        None if networks.posterior is None else made(networks.posterior, packed_posterior),
    )


# ---------------------------------------------------------------- any mixture with users' callables


def evaluators(
    flow: Any, critic: Any, posterior: Any, steering: Steering, backend: Backend, precision: str, obs: Any,
    critic_layout: str = "auto", chunk: tuple[int, int] | None = None,
) -> Evaluators:  # fmt: skip
    """Packed networks run on a backend and callables in PyTorch; obs may be any object that the callables read.

    Args:
        chunk: [C, D] where callables are shown chunks.
    """
    given = {"flow": flow, "critic": critic, "posterior": posterior}
    shown = {name: in_chunks(name, network, chunk) for name, network in given.items()}
    called = Called(steering, obs, **shown, layout=critic_layout, known_as=critic)

    def made(network: Any, packed: Any, own: Callable[[Called], Any]) -> Any:
        if not isinstance(network, PackableNetwork):
            return own(called)
        if not isinstance(obs, Tensor):
            raise TypeError(
                f"obs is {type(obs).__name__}; {type(network).__name__} needs a Tensor [B, {network.spec.obs_dim}]: "
                "give a callable that reads your obs, or a tensor."
            )
        bound = network.bound()
        return packed(bound, backend_call(backend, bound, precision), obs)

    flow_of_step = made(flow, packed_flow, called_flow)
    velocity = None if isinstance(flow, PackableNetwork) else lambda x, t: called.velocity(x, t).detach()
    through = {"tweedie": (flow, critic), "mfm": (posterior, critic), "glass": (flow, critic)}.get(steering.estimate)
    steered = None
    if through is not None and steering.steers and steering.jacobian == "full":
        if not any(isinstance(network, PackableNetwork) for network in through):
            steered = one_graph(called, velocity or (lambda x, t: flow_of_step(x, t)[0]))
    return Evaluators(
        flow_of_step,
        made(critic, packed_critic, called_critic) if steering.asks("critic") else None,
        made(posterior, packed_posterior, called_posterior) if steering.asks("posterior") else None,
        velocity,
        steered,
    )
