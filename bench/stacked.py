"""Networks as a careful PyTorch user would hold them for inference: stacked, transposed, split, frozen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qpilots_fast.activations import ACTIVATIONS
from qpilots_fast.spec import BoundNetwork


class StackedNetwork:
    """An MLP ([in, out] weights, addmm) or an ensemble ([E, in, out] weights, baddbmm), made for repeated calls.

    The first layer is kept as one matrix per input block, so that what does not change between steps is
    multiplied once; the rows of the time embedding are multiplied at set-up.

    Args:
        network: spec and parameters; copied.
        num_steps: K, for the time columns.
        dtype: of weights and activations.
    """

    def __init__(self, network: BoundNetwork, num_steps: int, dtype: torch.dtype) -> None:
        self.spec = spec = network.spec
        self.dtype = dtype
        self.ensemble = spec.kind == "critic"
        weights = [self._matrix(layer.weight) for layer in network.layers]
        # an absent bias is a zero row: addmm and baddbmm add it at no cost
        self.biases = [
            self._row(layer.bias or tuple(w.new_zeros(w.shape[0]) for w in layer.weight)) for layer in network.layers
        ]
        self.norms = [
            [tuple(None if vector is None else self._row(vector) for vector in norm) for norm in layer.norms]
            for layer in network.layers
        ]
        self.weights = weights[1:]  # of the layers after the first
        columns = spec.block_slices
        self.first = {block: weights[0][..., part, :].contiguous() for block, part in columns.items()}  # [.., d, H]
        self.time = self._time_table(network, num_steps)

    def _matrix(self, members: tuple[Tensor, ...]) -> Tensor:
        stacked = torch.stack(members).transpose(1, 2).to(self.dtype).contiguous()
        return stacked if self.ensemble else stacked[0]

    def _row(self, members: tuple[Tensor, ...]) -> Tensor:
        stacked = torch.stack(members).unsqueeze(1).to(self.dtype)
        return stacked if self.ensemble else stacked[0]

    def _time_table(self, network: BoundNetwork, num_steps: int) -> Tensor | None:
        """[K, 1, H]: the first layer's time columns at each step, with s = 0 and u = 1 for a meta flow map."""
        spec = network.spec
        if "t" not in spec.block_slices:
            return None
        first = network.layers[0].weight[0]
        table = first.new_zeros(num_steps, spec.hidden_dims[0], dtype=torch.float64)
        for block, features in network.time_rows([k / num_steps for k in range(num_steps)]).items():
            table = table + features.to(first.device) @ first[:, spec.block_slices[block]].double().T
        return table.unsqueeze(1).to(self.dtype)

    def linear(self, bias: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        """bias + h @ weight."""
        if self.ensemble:
            return torch.baddbmm(bias, h.expand(weight.shape[0], -1, -1), weight)
        return torch.addmm(bias, h, weight)

    def fixed(self, block: str, rows: Tensor) -> Tensor:
        """The first layer's share of an input that stays the same over the call, bias included: [.., B, H]."""
        return self.linear(self.biases[0], rows.to(self.dtype), self.first[block])

    def rest(self, z: Tensor) -> Tensor:
        """Everything after the first layer's product z [.., B, H]; returns [.., B, out]."""
        kept: Tensor | None = None
        for index, chain in enumerate(self.spec.row_chains):
            norms = iter(self.norms[index])
            for op in chain:
                if op.name == "keep":
                    kept = z
                elif op.name == "add":
                    assert kept is not None
                    z = z + kept
                elif op.kind == "layer_norm":
                    z = self._normalise(z, *next(norms), op.numbers[0])
                elif op.name == "softmax":
                    z = z.softmax(-1)
                elif op.kind == "activation":
                    z = ACTIVATIONS[op.name].function(z)
                else:
                    raise ValueError(
                        f"the peers have no {op.name!r}; expected activations, layer_norm, blocks, softmax."
                    )
            z = self.linear(self.biases[index + 1], z, self.weights[index])
        return z

    def _normalise(self, z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        width = z.shape[-1:]
        if not self.ensemble:
            vectors = (None if vector is None else vector[0] for vector in (weight, bias))
            return F.layer_norm(z, width, *vectors, eps)
        z = F.layer_norm(z, width, eps=eps)  # members differ in scale and shift
        if weight is not None and bias is not None:
            return torch.addcmul(bias, z, weight)
        z = z if weight is None else z * weight
        return z if bias is None else z + bias
