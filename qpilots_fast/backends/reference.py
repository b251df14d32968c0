"""The reference maths as a backend: plain PyTorch, any device, any dtype."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluators import compute_dtype, reference_evaluators
from ..reference import ReferenceNetwork, sample
from ..spec import BoundNetworks, RawSample, SamplerSpec
from .base import Backend, Call, Footprint
from .counts import count_flops, count_weights


class ReferenceBackend(Backend):
    """Readable, unfused; what every other backend is compared with."""

    name = "reference"
    runs_chains = True
    precisions = ("float32", "bfloat16", "float16", "float64")

    def unavailable_reason(self) -> str | None:
        return None

    def refusal(self, spec: SamplerSpec, device: torch.device) -> str | None:
        return self.network_refusal(spec.precision, device)

    def pack(self, spec: SamplerSpec, networks: BoundNetworks) -> Any:
        return copy.deepcopy(networks)

    @torch.no_grad()
    def sample(self, call: Call) -> RawSample:
        spec, networks = call.spec, call.networks if call.packed is None else call.packed
        dtype = compute_dtype(spec.precision, call.obs, call.noise)
        with torch.autocast(call.noise.device.type, enabled=False):  # the precision is the spec's
            net = reference_evaluators(networks, call.obs.to(dtype), dtype, spec.precision)
            eps = None if call.posterior_noise is None else call.posterior_noise.to(dtype)
            alpha = None if call.alpha is None else call.alpha.to(dtype)
            noise = call.noise.to(dtype)
            bounds = spec.bounds(noise)
            return sample(net, spec.steering, spec.schedule, noise, eps, bounds, alpha, call.return_info)

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
        networks = spec.networks.values()
        widest, depth = max(max(n.hidden_dims) for n in networks), max(len(n.hidden_dims) for n in networks)
        members = max(n.num_members for n in networks)
        return Footprint(
            launches=0,
            flops=count_flops(spec, batch_size),
            weight_bytes=weight_bytes,
            traffic_bytes=weight_bytes * 2 * spec.num_steps,
            workspace_bytes=3 * depth * members * batch_size * widest * element,
            floor_s=None,
            notes=("unfused PyTorch: launches are not counted, the workspace is an estimate of the saved activations",),
        )
