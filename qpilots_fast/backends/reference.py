"""The reference maths as a backend: plain PyTorch, any device, any dtype."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import Evaluators, Pullback, ReferenceNetwork, ordered_blocks, sample, time_block
from ..spec import SamplerSpec
from .base import Backend, BoundNetworks, Footprint, RawSample
from .counts import count_flops, count_weights


def compute_dtype(precision: str, *tensors: Tensor) -> torch.dtype:
    """float64 where the precision or any input says so, else float32 (also for 16-bit operand precisions)."""
    if precision == "float64" or any(tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


def evaluators(
    spec: SamplerSpec, networks: BoundNetworks, obs: Tensor, dtype: torch.dtype, precision: str
) -> Evaluators:
    """The networks of a sampler as the reference loop wants them, with obs [B, S] bound."""
    flow = ReferenceNetwork(networks.flow, dtype, precision)
    critic = None if networks.critic is None else ReferenceNetwork(networks.critic, dtype, precision)
    posterior = None if networks.posterior is None else ReferenceNetwork(networks.posterior, dtype, precision)

    def columns(network: ReferenceNetwork, block: str, pullback: Pullback) -> Pullback:
        part = network.spec.block_slices[block]
        return lambda d_output: pullback(d_output)[..., part].sum(0)

    def velocity(x: Tensor, t: float) -> tuple[Tensor, Pullback]:
        times = time_block(flow.spec, t, len(x), x.device)
        v, pullback = flow(ordered_blocks(flow.spec, {"obs": obs, "noisy_actions": x, "t": times}))
        back = columns(flow, "noisy_actions", pullback)
        return v[0], lambda d_v: back(d_v.unsqueeze(0))

    def values(a: Tensor) -> tuple[Tensor, Pullback]:
        assert critic is not None
        q, pullback = critic(ordered_blocks(critic.spec, {"obs": obs, "actions": a}))
        back = columns(critic, "actions", pullback)
        return q.squeeze(-1), lambda weights: back(weights.unsqueeze(-1))

    def draw(eps: Tensor, x: Tensor, t: float) -> tuple[Tensor, Pullback]:
        assert posterior is not None
        times = {name: time_block(posterior.spec, at, len(x), x.device) for name, at in zip("tsu", (t, 0.0, 1.0))}
        blocks = {"obs": obs, "xbar": eps, "noisy_actions": x, **times}
        vhat, pullback = posterior(ordered_blocks(posterior.spec, blocks))
        back = columns(posterior, "noisy_actions", pullback)
        return eps + vhat[0], lambda d_a: back(d_a.unsqueeze(0))

    return Evaluators(velocity, values if critic else None, draw if posterior else None)


class ReferenceBackend(Backend):
    """Readable, unfused; what every other backend is compared with."""

    name = "reference"
    precisions = ("float32", "bfloat16", "float16", "float64")

    def unavailable_reason(self) -> str | None:
        return None

    def refusal(self, spec: SamplerSpec, device: torch.device) -> str | None:
        if spec.precision not in self.precisions:
            return f"precision {spec.precision!r} is not one of {', '.join(self.precisions)}"
        return None

    def pack(self, spec: SamplerSpec, networks: BoundNetworks) -> Any:
        return copy.deepcopy(networks)

    @torch.no_grad()
    def sample(
        self,
        spec: SamplerSpec,
        networks: BoundNetworks,
        obs: Tensor,
        noise: Tensor,
        posterior_noise: Tensor | None,
        *,
        packed: Any = None,
        return_info: bool = False,
    ) -> RawSample:
        dtype = compute_dtype(spec.precision, obs, noise)
        with torch.autocast(noise.device.type, enabled=False):  # the precision is the spec's
            return self._sample(spec, networks if packed is None else packed, obs, noise, posterior_noise, dtype)

    def _sample(
        self,
        spec: SamplerSpec,
        networks: BoundNetworks,
        obs: Tensor,
        noise: Tensor,
        posterior_noise: Tensor | None,
        dtype: torch.dtype,
    ) -> RawSample:
        net = evaluators(spec, networks, obs.to(dtype), dtype, spec.precision)
        eps = None if posterior_noise is None else posterior_noise.to(dtype)
        return sample(net, spec.steering, spec.num_steps, noise.to(dtype), eps, (spec.action_low, spec.action_high))

    def forward(self, network: Any, blocks: Sequence[Tensor], precision: str) -> Tensor:
        with torch.autocast(blocks[0].device.type, enabled=False):
            return ReferenceNetwork(network, compute_dtype(precision, *blocks), precision)(blocks)[0]

    def vjp(self, network: Any, blocks: Sequence[Tensor], cotangent: Tensor, precision: str) -> Tensor:
        with torch.autocast(blocks[0].device.type, enabled=False):
            _, pullback = ReferenceNetwork(network, compute_dtype(precision, *blocks), precision)(blocks)
            return pullback(cotangent).sum(0)

    def footprint(self, spec: SamplerSpec, batch_size: int) -> Footprint:
        element = 8 if spec.precision == "float64" else 4
        weight_bytes = count_weights(spec) * element
        widest = max(max(n.hidden_dims) for n in (spec.flow, spec.critic, spec.posterior) if n is not None)
        members = spec.critic.num_members if spec.critic else 1
        depth = max(len(n.hidden_dims) for n in (spec.flow, spec.critic, spec.posterior) if n is not None)
        return Footprint(
            launches=0,
            flops=count_flops(spec, batch_size),
            weight_bytes=weight_bytes,
            traffic_bytes=weight_bytes * 2 * spec.num_steps,
            workspace_bytes=3 * depth * members * batch_size * widest * element,
            floor_s=None,
            notes=("unfused PyTorch: launches are not counted, the workspace is an estimate of the saved activations",),
        )
