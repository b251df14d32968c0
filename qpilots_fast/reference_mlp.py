"""The reference's networks: LayerNorm and MLP ensembles with explicit vector-Jacobian products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .spec import BoundNetwork, NetworkSpec, Pullback


@dataclass(frozen=True)
class _Norm:
    """What LayerNorm's pullback needs."""

    normalised: Tensor
    inverse_std: Tensor
    weight: Tensor | None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, _Norm]:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, population variance."""
    centred = x - x.mean(-1, keepdim=True)
    inverse_std = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalised = centred * inverse_std
    y = normalised if weight is None else normalised * weight
    return (y if bias is None else y + bias), _Norm(normalised, inverse_std, weight)


def layer_norm_vjp(d_y: Tensor, norm: _Norm) -> Tensor:
    """d_x = inverse_std * (h - mean(h) - normalised * mean(h * normalised)), h = d_y * weight."""
    h = d_y if norm.weight is None else d_y * norm.weight
    projection = (h * norm.normalised).mean(-1, keepdim=True)
    return norm.inverse_std * (h - h.mean(-1, keepdim=True) - norm.normalised * projection)


# ---------------------------------------------------------------- networks

_OPERAND_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _StackedLayer:
    weight: Tensor  # [E, out, in]
    bias: Tensor | None  # [E, 1, out]
    norm_weight: Tensor | None
    norm_bias: Tensor | None


class ReferenceNetwork:
    """A bound network made ready for one call: members stacked, in the computing dtype.

    Args:
        network: spec and live parameters.
        dtype: of state and accumulation.
        precision: "bfloat16" and "float16" round weights and the inputs of every product to that format.
    """

    def __init__(self, network: BoundNetwork, dtype: torch.dtype, precision: str = "float32") -> None:
        self.spec: NetworkSpec = network.spec
        self._operand_dtype = _OPERAND_DTYPES.get(precision)
        self._dtype = dtype

        def stack(members: tuple[Tensor, ...] | None, *, vector: bool) -> Tensor | None:
            if members is None:
                return None
            stacked = torch.stack(members).to(dtype)
            return stacked.unsqueeze(1) if vector else self._round(stacked)

        self._layers = []
        for layer in network.layers:
            weight = stack(layer.weight, vector=False)
            assert weight is not None
            vectors = (stack(p, vector=True) for p in (layer.bias, layer.norm_weight, layer.norm_bias))
            self._layers.append(_StackedLayer(weight, *vectors))

    def _round(self, x: Tensor) -> Tensor:
        return x if self._operand_dtype is None else x.to(self._operand_dtype).to(self._dtype)

    def __call__(self, blocks: Sequence[Tensor]) -> tuple[Tensor, Pullback]:
        """Output [E, B, out], and the pullback of [E, B, out] to all input columns per member, [E, B, in]."""
        spec, act = self.spec, ACTIVATIONS[self.spec.activation]
        h = torch.cat([block.to(self._dtype) for block in blocks], dim=-1)
        h = h.expand(spec.num_members, *h.shape)
        tape: list[tuple[Tensor, _Norm | None]] = []
        for layer, placement in zip(self._layers[:-1], spec.layer_norm):
            z = self._linear(h, layer)
            norm = None
            if placement == "pre":
                z, norm = layer_norm(z, layer.norm_weight, layer.norm_bias, spec.layer_norm_eps)
            h = act.value(z)
            if placement == "post":
                h, norm = layer_norm(h, layer.norm_weight, layer.norm_bias, spec.layer_norm_eps)
            tape.append((z, norm))
        return self._linear(h, self._layers[-1]), lambda d_output: self._pull_back(d_output, tape)

    def _linear(self, h: Tensor, layer: _StackedLayer) -> Tensor:
        z = self._round(h) @ layer.weight.transpose(1, 2)
        return z if layer.bias is None else z + layer.bias

    def _pull_back(self, d_output: Tensor, tape: list[tuple[Tensor, _Norm | None]]) -> Tensor:
        d_h, act = self._round(d_output) @ self._layers[-1].weight, ACTIVATIONS[self.spec.activation]
        rows = zip(reversed(self._layers[:-1]), reversed(self.spec.layer_norm), reversed(tape))
        for layer, placement, (z, norm) in rows:
            if placement == "post":
                assert norm is not None
                d_h = layer_norm_vjp(d_h, norm)
            d_z = d_h * act.derivative(z)
            if placement == "pre":
                assert norm is not None
                d_z = layer_norm_vjp(d_z, norm)
            d_h = self._round(d_z) @ layer.weight
        return d_h
