"""What stands between two Linears, as data: a chain of operations on the rows of a hidden layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .activations import ACTIVATIONS


class RowOpKind(NamedTuple):
    """One row of the table of operations; z is a row [H], and so is the result."""

    numbers: int  # how many numbers it takes
    has_weight: bool = False  # whether it may have a weight [H], and a bias
    has_bias: bool = False


# the order is that of QPILOTS_ROW_OPS in csrc/include/qpilots/types.h; "activation" stands for every row of ACTIVATIONS
ROW_OPS: dict[str, RowOpKind] = {
    "activation": RowOpKind(0),
    "leaky_relu": RowOpKind(1),  # z where z > 0, else slope z; (slope,)
    "clamp": RowOpKind(2),  # min(max(z, low), high); (low, high); the derivative is 1 on the bounds, as PyTorch's
    "layer_norm": RowOpKind(1, True, True),  # (z - mean) / sqrt(var + eps) weight + bias; (eps,)
    "rms_norm": RowOpKind(1, True, True),  # z / sqrt(mean(z^2) + eps) weight + bias; (eps,)
    "softmax": RowOpKind(0),  # over the row
    "lowest": RowOpKind(1),  # z where it is among the k smallest of the row, else 0; (k,)
    "keep": RowOpKind(0),  # the row as it is, kept for the next "add"
    "add": RowOpKind(0),  # z + the row kept last
    "film": RowOpKind(0),  # z scale + shift, both [H], functions of the flow time alone
}
ROW_OP_NAMES = (*(name for name in ROW_OPS if name != "activation"), *ACTIVATIONS)


class RowOp(NamedTuple):
    """One operation of a chain.

    Args:
        name: of ROW_OPS, or of ACTIVATIONS.
        numbers: what the name's row in ROW_OPS says.
        weight, bias: whether it has them; a norm's own parameters, [H] of each member.
    """

    name: str
    numbers: tuple[float, ...] = ()
    weight: bool = False
    bias: bool = False

    @property
    def kind(self) -> str:
        """Its row in ROW_OPS."""
        return "activation" if self.name in ACTIVATIONS else self.name

    @property
    def is_norm(self) -> bool:
        return ROW_OPS[self.kind].has_weight

    @staticmethod
    def of(entry: Sequence) -> RowOp:
        """From a sequence, as JSON gives it."""
        name, numbers, weight, bias = entry
        return RowOp(name, tuple(numbers), weight, bias)


Chain = tuple[RowOp, ...]


def check_chains(chains: Sequence[Chain], widths: Sequence[int]) -> None:
    """Raises ValueError for chains that no network can have.

    Args:
        chains: one a hidden layer. widths: of these layers.
    """
    if len(chains) != len(widths):
        raise ValueError(f"chains has {len(chains)} entries; expected one for each of the {len(widths)} hidden layers.")
    kept: int | None = None
    for layer, (chain, width) in enumerate(zip(chains, widths)):
        for op in chain:
            if op.name not in ROW_OP_NAMES:
                raise ValueError(f"chains[{layer}] has {op.name!r}; expected one of {', '.join(ROW_OP_NAMES)}.")
            kind = ROW_OPS[op.kind]
            if len(op.numbers) != kind.numbers or op.weight > kind.has_weight or op.bias > kind.has_bias:
                raise ValueError(
                    f"chains[{layer}] has {op}; expected {kind.numbers} numbers, and only a norm's parameters."
                )
            if op.name == "keep":
                kept = width
            if op.name == "add" and kept != width:
                was = "none was kept" if kept is None else f"the row kept last has {kept} numbers"
                raise ValueError(f"chains[{layer}] adds a row to its {width} numbers, but {was}; expected as many.")
            if op.name == "lowest" and not 1 <= op.numbers[0] <= width:
                raise ValueError(f"chains[{layer}] has {op}; expected a number from 1 to the layer's width {width}.")


def plain_layer(chain: Chain) -> tuple[str, str | None, RowOp | None] | None:
    """(activation, where its LayerNorm stands, that norm) of a chain that is an activation and at most one LayerNorm.

    None for any other chain.
    """
    norms = [op for op in chain if op.name == "layer_norm"]
    if len(chain) != 1 + len(norms) or len(norms) > 1:
        return None
    activations = [op for op in chain if op.name in ACTIVATIONS]
    if len(activations) != 1:
        return None
    if not norms:
        return activations[0].name, None, None
    return activations[0].name, "pre" if chain[0] is norms[0] else "post", norms[0]
