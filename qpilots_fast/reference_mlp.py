"""The reference's networks: ensembles of equal chains of Linears with explicit vector-Jacobian products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference_row_ops import KeepingPullback, run_chain
from .spec import BoundNetwork, NetworkSpec, Pullback

_OPERAND_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _StackedLayer:
    weight: Tensor  # [E, out, in]
    bias: Tensor | None  # [E, 1, out]
    norms: tuple[tuple[Tensor | None, Tensor | None], ...]  # weight and bias of each, [E, 1, out]


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
            norms = tuple((stack(norm.weight, vector=True), stack(norm.bias, vector=True)) for norm in layer.norms)
            self._layers.append(_StackedLayer(weight, stack(layer.bias, vector=True), norms))

    def _round(self, x: Tensor) -> Tensor:
        return x if self._operand_dtype is None else x.to(self._operand_dtype).to(self._dtype)

    def __call__(self, blocks: Sequence[Tensor]) -> tuple[Tensor, Pullback]:
        """Output [E, B, out], and the pullback of [E, B, out] to all input columns per member, [E, B, in].

        Args:
            blocks: as `NetworkSpec.ordered` gives them.
        """
        spec = self.spec
        columns = blocks[: len(blocks) - bool(spec.film_dim)]
        modulations = self._modulations(blocks[-1])
        h = torch.cat([block.to(self._dtype) for block in columns], dim=-1)
        h = h.expand(spec.num_members, *h.shape)
        kept: Tensor | None = None
        tape = []
        for layer, chain in zip(self._layers[:-1], spec.row_chains):
            film_of_layer = [next(modulations) for op in chain if op.name == "film"]
            h, kept, pullbacks = run_chain(chain, self._linear(h, layer), layer.norms, film_of_layer, kept)
            tape.append(pullbacks)
        return self._linear(h, self._layers[-1]), lambda d_output: self._pull_back(d_output, tape)

    def _modulations(self, film: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Scale and shift [B, H] of each "film", of all side by side [B, film_dim]."""
        at = 0
        for width, chain in zip(self.spec.hidden_dims, self.spec.row_chains):
            for _ in range(sum(op.name == "film" for op in chain)):
                scale, shift = film[:, at : at + width], film[:, at + width : at + 2 * width]
                yield scale.to(self._dtype), shift.to(self._dtype)
                at += 2 * width

    def _linear(self, h: Tensor, layer: _StackedLayer) -> Tensor:
        z = self._round(h) @ layer.weight.transpose(1, 2)
        return z if layer.bias is None else z + layer.bias

    def _pull_back(self, d_output: Tensor, tape: list[list[KeepingPullback]]) -> Tensor:
        d_h = self._round(d_output) @ self._layers[-1].weight
        d_kept: Tensor | None = None
        for layer, pullbacks in zip(reversed(self._layers[:-1]), reversed(tape)):
            for pull_back in reversed(pullbacks):
                d_h, d_kept = pull_back(d_h, d_kept)
            d_h = self._round(d_h) @ layer.weight
        return d_h
