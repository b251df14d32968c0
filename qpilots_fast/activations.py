"""The activations: PyTorch's function for training, and value and derivative in explicit float64-safe form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
_LARGEST = 88.0  # e^88 is finite in float32
_FLAT = 100.0  # tanh is 1 in float64 long before: beyond, the derivative would only be infinity times zero

Function = Callable[[Tensor], Tensor]


class Activation(NamedTuple):
    """One row of the table; the kernels' formulas are in csrc/include/qpilots/activation.h and triton/activation.py."""

    function: Function  # as users' modules call it
    value: Function
    derivative: Function


def _gelu_gate(z: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(u) and d tanh(u) / dz for u = sqrt(2/pi) (z + 0.044715 z^3)."""
    z = z.clamp(-_FLAT, _FLAT)
    tanh = torch.tanh(_SQRT_2_OVER_PI * (z + _GELU_CUBIC * z * z * z))
    return tanh, (1 - tanh * tanh) * _SQRT_2_OVER_PI * (1 + 3 * _GELU_CUBIC * z * z)


def _gelu_tanh_derivative(z: Tensor) -> Tensor:
    tanh, slope = _gelu_gate(z)
    return 0.5 * (1 + tanh) + 0.5 * z.clamp(-_FLAT, _FLAT) * slope


def _gelu_derivative(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density


def _silu_derivative(z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


def _softplus(z: Tensor) -> Tensor:
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


def _mish_derivative(z: Tensor) -> Tensor:
    tanh = torch.tanh(_softplus(z))
    return tanh + z * (1 - tanh * tanh) * torch.sigmoid(z)


def _tanh_derivative(z: Tensor) -> Tensor:
    tanh = torch.tanh(z)
    return 1 - tanh * tanh


def symexp(z: Tensor) -> Tensor:
    return torch.sign(z) * torch.expm1(z.abs())


# in the order of QPILOTS_ACTIVATIONS in csrc/include/qpilots/types.h
ACTIVATIONS: dict[str, Activation] = {
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"), lambda z: 0.5 * z * (1 + _gelu_gate(z)[0]), _gelu_tanh_derivative
    ),
    "gelu": Activation(F.gelu, lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))), _gelu_derivative),
    "relu": Activation(F.relu, lambda z: z.clamp(min=0), lambda z: (z > 0).to(z.dtype)),  # 0 at the kink, as PyTorch
    "silu": Activation(F.silu, lambda z: z * torch.sigmoid(z), _silu_derivative),
    "mish": Activation(F.mish, lambda z: z * torch.tanh(_softplus(z)), _mish_derivative),
    "tanh": Activation(torch.tanh, torch.tanh, _tanh_derivative),
    "elu": Activation(
        F.elu, lambda z: torch.where(z > 0, z, torch.expm1(z.clamp(max=0))), lambda z: torch.exp(z.clamp(max=0))
    ),
    "selu": Activation(
        F.selu,
        lambda z: _SELU_SCALE * torch.where(z > 0, z, _SELU_ALPHA * torch.expm1(z.clamp(max=0))),
        lambda z: _SELU_SCALE * torch.where(z > 0, torch.ones_like(z), _SELU_ALPHA * torch.exp(z.clamp(max=0))),
    ),
    "softplus": Activation(F.softplus, _softplus, torch.sigmoid),
    "sigmoid": Activation(torch.sigmoid, torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z)),
    # sign(z) (e^|z| - 1), what a value in symlog units is; e^|z| ends at e^88
    "symexp": Activation(
        symexp, lambda z: symexp(z.clamp(-_LARGEST, _LARGEST)), lambda z: torch.exp(z.abs().clamp(max=_LARGEST))
    ),
}
