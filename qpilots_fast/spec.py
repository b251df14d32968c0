"""What a network and a sampler are, as plain hashable data: the only description that backends read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

from torch import Tensor

from .steering import Steering

Kind = Literal["flow", "critic", "meta_flow_map"]
NormPlacement = Literal["pre", "post"] | None
TimeEmbedding = Literal["raw", "sinusoidal", "fourier"]

KINDS: tuple[str, ...] = ("flow", "critic", "meta_flow_map")
ACTIVATIONS: tuple[str, ...] = ("gelu_tanh", "gelu", "relu", "silu", "mish", "tanh")
TIME_EMBEDDINGS: dict[str, int] = {"raw": 1, "sinusoidal": 16, "fourier": 64}  # name -> default width
PRECISIONS: tuple[str, ...] = ("float32", "bfloat16", "float16", "tf32", "float64")

# the input columns of each kind, in the order our own modules concatenate them
INPUT_ORDER: dict[str, tuple[str, ...]] = {
    "flow": ("obs", "noisy_actions", "t"),
    "critic": ("obs", "actions"),
    "meta_flow_map": ("obs", "xbar", "noisy_actions", "t", "s", "u"),
}


@dataclass(frozen=True)
class NetworkSpec:
    """An MLP, or an ensemble of equal MLPs, by its shape.

    Hidden layer l: Linear, then layer_norm[l] = None: activation; "pre": LayerNorm, activation; "post":
    activation, LayerNorm. A last Linear follows without activation. The input columns are the blocks
    named in input_order.
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

    def __post_init__(self) -> None:
        if not self.biases:
            object.__setattr__(self, "biases", (True,) * (len(self.hidden_dims) + 1))
        if not self.layer_norm:
            object.__setattr__(self, "layer_norm", (None,) * len(self.hidden_dims))
        if not self.input_order:
            object.__setattr__(self, "input_order", INPUT_ORDER[self.kind])
        object.__setattr__(self, "json", json.dumps(asdict(self), sort_keys=True))

    json: ClassVar[str]  # this spec as text, ready before torch.compile traces through

    def block_dim(self, block: str) -> int:
        """Columns of one input block."""
        if block == "obs":
            return self.obs_dim
        return self.time_embedding_dim if block in ("t", "s", "u") else self.action_dim

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


@dataclass(frozen=True)
class LayerParameters:
    """One Linear of every member, with its LayerNorm: views of live parameters, never copies.

    weight: E tensors [out, in], any strides. bias, norm_weight, norm_bias: E tensors [out], or None.
    """

    weight: tuple[Tensor, ...]
    bias: tuple[Tensor, ...] | None
    norm_weight: tuple[Tensor, ...] | None = None
    norm_bias: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class SamplerSpec:
    """Everything about a sampling call that is not a tensor. Hashable; converts to and from JSON."""

    flow: NetworkSpec
    critic: NetworkSpec | None
    posterior: NetworkSpec | None
    steering: Steering = field(default_factory=Steering)
    num_steps: int = 10
    precision: str = "float32"
    action_low: float = -1.0
    action_high: float = 1.0

    json: ClassVar[str]  # this spec as text, ready before torch.compile traces through

    def __post_init__(self) -> None:
        object.__setattr__(self, "json", json.dumps(asdict(self), sort_keys=True))

    @staticmethod
    def from_json(text: str) -> SamplerSpec:
        return _sampler_spec_from_json(text)


def _network_from_dict(values: dict | None) -> NetworkSpec | None:
    if values is None:
        return None
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return NetworkSpec(**fields)


@lru_cache(maxsize=256)
def network_spec_from_json(text: str) -> NetworkSpec:
    spec = _network_from_dict(json.loads(text))
    assert spec is not None
    return spec


@lru_cache(maxsize=256)
def _sampler_spec_from_json(text: str) -> SamplerSpec:
    values = json.loads(text)
    steering = Steering.from_json(json.dumps(values.pop("steering")))
    networks = {name: _network_from_dict(values.pop(name)) for name in ("flow", "critic", "posterior")}
    return SamplerSpec(**networks, steering=steering, **values)  # type: ignore[arg-type]
