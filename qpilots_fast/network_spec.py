"""What a network is, as plain hashable data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .row_ops import Chain, RowOp, check_chains, plain_layer
from .times import column_of, time_features

Pullback = Callable[[Tensor], Tensor]

Kind = Literal["flow", "critic", "meta_flow_map"]
NormPlacement = Literal["pre", "post"] | None
TimeEmbedding = Literal["raw", "sinusoidal", "fourier", "module"]  # "module": computed by the network's own module

KINDS: tuple[str, ...] = ("flow", "critic", "meta_flow_map")
TIME_EMBEDDINGS: dict[str, int] = {"raw": 1, "sinusoidal": 16, "fourier": 64}  # name -> default width

# the input columns of each kind, in the order our own modules concatenate them
INPUT_ORDER: dict[str, tuple[str, ...]] = {
    "flow": ("obs", "noisy_actions", "t"),
    "critic": ("obs", "actions"),
    "meta_flow_map": ("obs", "xbar", "noisy_actions", "t", "s", "u"),
}
# the input columns that move while a call runs, and so are differentiated
MOVING_BLOCK: dict[str, str] = {"flow": "noisy_actions", "critic": "actions", "meta_flow_map": "noisy_actions"}
POSTERIOR_DRAW = {"s": 0.0, "u": 1.0}  # a posterior draw is X_{0,1}(eps; t, x): one call of the map


@dataclass(frozen=True)
class NetworkSpec:
    """An MLP, or an ensemble of equal MLPs, by its shape.

    Hidden layer l: Linear, then layer_norm[l] = None: activation; "pre": LayerNorm, activation; "post":
    activation, LayerNorm. A last Linear follows without activation. The input columns are the blocks
    named in input_order.

    Other structures have chains, one a hidden layer: what is done to the rows of that Linear's output, in this order.
    Residual blocks are "keep" and "add", a distribution's expectation is "softmax" before a last Linear of its support.
    activation and layer_norm say nothing then; chains that they could say become these.

    Some blocks may be columns that the network's own module computes (`OwnColumns`, which a BoundNetwork has then):
    the times where time_embedding is "module", those of s and u then empty, since the map is asked at s = 0, u = 1; the
    observations where obs_columns is their number; the critic's actions where action_columns are the indices of the
    flow's action dimensions that they are affine maps of.
    """

    kind: Kind
    obs_dim: int
    action_dim: int
    hidden_dims: tuple[int, ...]
    activation: str = "gelu_tanh"
    layer_norm: tuple[NormPlacement, ...] = ()
    layer_norm_eps: float = 1e-6
    time_embedding: TimeEmbedding = "raw"
    time_embedding_dim: int = 1
    num_members: int = 1
    input_order: tuple[str, ...] = ()
    # which parameters exist and how flat_parameters lists them: one [E, ...] tensor each, or E tensors
    biases: tuple[bool, ...] = ()
    norm_weight: bool = True
    norm_bias: bool = True
    stacked: bool = False
    obs_columns: int | None = None
    action_columns: tuple[int, ...] | None = None
    chains: tuple[Chain, ...] = ()

    def __post_init__(self) -> None:
        if self.chains:
            check_chains(self.chains, self.hidden_dims)
            self._set_plain()
        if not self.biases:
            object.__setattr__(self, "biases", (True,) * (len(self.hidden_dims) + 1))
        if not self.layer_norm:
            object.__setattr__(self, "layer_norm", (None,) * len(self.hidden_dims))
        if not self.input_order:
            object.__setattr__(self, "input_order", INPUT_ORDER[self.kind])
        object.__setattr__(self, "json", json.dumps(asdict(self), sort_keys=True))

    json: ClassVar[str]  # this spec as text, ready before torch.compile traces through

    def _set_plain(self) -> None:
        """Says by activation and layer_norm what can be said so."""
        layers = [plain_layer(chain) for chain in self.chains]
        plain = [layer for layer in layers if layer is not None]
        norms = {norm for *_, norm in plain if norm is not None}
        if len(plain) < len(layers) or len(norms) > 1 or len({activation for activation, *_ in plain}) > 1:
            return
        fields: dict[str, Any] = {"chains": (), "activation": plain[0][0], "layer_norm": tuple(p for _, p, _ in plain)}
        for norm in norms:
            fields |= {"layer_norm_eps": norm.numbers[0], "norm_weight": norm.weight, "norm_bias": norm.bias}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @cached_property
    def row_chains(self) -> tuple[Chain, ...]:
        """What is done to the rows of each hidden Linear's output, whichever way the spec says it."""
        if self.chains:
            return self.chains
        activation = RowOp(self.activation)
        norm = RowOp("layer_norm", (self.layer_norm_eps,), self.norm_weight, self.norm_bias)
        of = {None: (activation,), "pre": (norm, activation), "post": (activation, norm)}
        return tuple(of[placement] for placement in self.layer_norm)

    @property
    def film_dim(self) -> int:
        """Numbers that the "film" operations read at a flow time: scale and shift of each layer's, in order."""
        return sum(
            2 * width * sum(op.name == "film" for op in chain) for width, chain in zip(self.hidden_dims, self.chains)
        )

    def block_dim(self, block: str) -> int:
        """Columns of one input block."""
        if block == "obs":
            return self.obs_dim if self.obs_columns is None else self.obs_columns
        if block in POSTERIOR_DRAW and self.time_embedding == "module":
            return 0
        if block == "actions" and self.action_columns is not None:
            return len(self.action_columns)
        return self.time_embedding_dim if block in ("t", "s", "u") else self.action_dim

    @property
    def own_columns(self) -> str | None:
        """Which of its columns its own module computes, in words; None where it computes none."""
        own = {
            "obs": self.obs_columns is not None,
            "times": self.time_embedding == "module",
            "actions": self.action_columns is not None,
            "film": self.film_dim > 0,
        }
        named = " and ".join(name for name, is_own in own.items() if is_own)
        return f"the {self.kind}'s own module computes its columns of {named}" if named else None

    @cached_property
    def block_slices(self) -> dict[str, slice]:
        """Where each block sits among the first layer's columns."""
        slices, start = {}, 0
        for block in self.input_order:
            slices[block] = slice(start, start + self.block_dim(block))
            start += self.block_dim(block)
        return slices

    @property
    def input_dim(self) -> int:
        return sum(self.block_dim(block) for block in self.input_order)

    @property
    def output_dim(self) -> int:
        return 1 if self.kind == "critic" else self.action_dim

    @property
    def layer_dims(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of every Linear, the last one included."""
        widths = (self.input_dim, *self.hidden_dims, self.output_dim)
        return tuple(pairwise(widths))

    @cached_property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of `flat_parameters`, in its order."""
        lead, copies = ((self.num_members,), 1) if self.stacked else ((), self.num_members)
        shapes: list[tuple[int, ...]] = []
        for index, (fan_in, fan_out) in enumerate(self.layer_dims):
            ops = self.row_chains[index] if index < len(self.hidden_dims) else ()
            vectors = self.biases[index] + sum(op.weight + op.bias for op in ops)
            shapes += [(*lead, fan_out, fan_in)] * copies + [(*lead, fan_out)] * (copies * vectors)
        return tuple(shapes)

    @property
    def moving_block(self) -> str:
        return MOVING_BLOCK[self.kind]

    @property
    def moving_columns(self) -> slice:
        """The first layer's columns of the actions that move while a call runs."""
        return self.block_slices[self.moving_block]

    def embed_time(self, t: float | Tensor, batch_size: int, device: torch.device) -> Tensor:
        """One embedded time block [B, time_embedding_dim], float64; t is a number or [B, 1].

        Not of time_embedding "module": `BoundNetwork.time_inputs` has these too.
        """
        if self.time_embedding == "module":
            raise ValueError(f"{self.own_columns}; ask the BoundNetwork for them.")
        at = torch.as_tensor(t, dtype=torch.float64, device=device).reshape(-1, 1)
        return time_features(at, self.time_embedding, self.time_embedding_dim).expand(batch_size, -1)

    def time_inputs(self, t: float | Tensor, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """Every embedded time block at flow time t, by name, as `embed_time` gives them."""
        at = {"t": t, **POSTERIOR_DRAW}
        return {name: self.embed_time(at[name], batch_size, device) for name in self.input_order if name in at}

    def time_rows(self, times: Sequence[float]) -> dict[str, Tensor]:
        """The embedded time blocks at each of these flow times: [len(times), time_embedding_dim], float64, CPU."""
        at = column_of(times)
        return self.time_inputs(at, len(times), at.device)

    def ordered(self, named: dict[str, Tensor]) -> list[Tensor]:
        """The input blocks in the order of the first layer's columns; last, where it has any, those of "film"."""
        return [named[block] for block in (*self.input_order, *(("film",) if self.film_dim else ()))]

    def head(self, output: Tensor) -> tuple[Tensor, Pullback]:
        """q_values [E, B] of a critic's output [E, B, out], and the pullback of [E, B] to the output."""
        return output.squeeze(-1), lambda d_values: d_values.unsqueeze(-1)


def network_from_dict(values: dict | None) -> NetworkSpec | None:
    """A spec from the fields that `NetworkSpec.json` has; None of None."""
    if values is None:
        return None
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    fields["chains"] = tuple(tuple(RowOp.of(op) for op in chain) for chain in fields["chains"])
    return NetworkSpec(**fields)


@lru_cache(maxsize=256)
def network_spec_from_json(text: str) -> NetworkSpec:
    spec = network_from_dict(json.loads(text))
    assert spec is not None
    return spec
