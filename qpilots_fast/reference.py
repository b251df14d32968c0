"""The method in readable PyTorch, with explicit vector-Jacobian products.

Nothing here needs autograd, so it runs under `torch.inference_mode()`, and in any dtype: in float64 it is the
oracle of every test. Symbols follow docs/method.md: x noisy actions, v velocity, a clean actions, g the gradient
of the steering objective, w_j the critics' weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .backends.base import BoundNetwork, RawSample
from .networks import time_features
from .spec import NetworkSpec
from .steering import Steering

Pullback = Callable[[Tensor], Tensor]
Time = TypeVar("Time", float, Tensor)

# ---------------------------------------------------------------- activations and LayerNorm

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def activation(z: Tensor, kind: str) -> Tensor:
    """act(z); kind is one of spec.ACTIVATIONS."""
    if kind == "gelu_tanh":
        return 0.5 * z * (1 + _gelu_tanh(z)[0])
    if kind == "gelu":
        return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    if kind == "relu":
        return z.clamp(min=0)
    if kind == "silu":
        return z * torch.sigmoid(z)
    if kind == "mish":
        return z * torch.tanh(_softplus(z))
    return torch.tanh(z)


def activation_derivative(z: Tensor, kind: str) -> Tensor:
    """d act / dz; at relu's kink, 0 as in PyTorch."""
    if kind == "gelu_tanh":
        tanh, slope = _gelu_tanh(z)
        return 0.5 * (1 + tanh) + 0.5 * z.clamp(-_FLAT, _FLAT) * slope
    if kind == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    if kind == "relu":
        return (z > 0).to(z.dtype)
    if kind == "silu":
        sigmoid = torch.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    if kind == "mish":
        tanh = torch.tanh(_softplus(z))
        return tanh + z * (1 - tanh * tanh) * torch.sigmoid(z)
    tanh = torch.tanh(z)
    return 1 - tanh * tanh


_FLAT = 100.0  # tanh is 1 in float64 long before: beyond, the derivative would only be infinity times zero


def _gelu_tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(u) and d tanh(u) / dz for u = sqrt(2/pi) (z + 0.044715 z^3)."""
    z = z.clamp(-_FLAT, _FLAT)
    tanh = torch.tanh(_SQRT_2_OVER_PI * (z + _GELU_CUBIC * z * z * z))
    return tanh, (1 - tanh * tanh) * _SQRT_2_OVER_PI * (1 + 3 * _GELU_CUBIC * z * z)


def _softplus(z: Tensor) -> Tensor:
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


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
        spec = self.spec
        h = torch.cat([block.to(self._dtype) for block in blocks], dim=-1)
        h = h.expand(spec.num_members, *h.shape)
        tape: list[tuple[Tensor, _Norm | None]] = []
        for layer, placement in zip(self._layers[:-1], spec.layer_norm):
            z = self._linear(h, layer)
            norm = None
            if placement == "pre":
                z, norm = layer_norm(z, layer.norm_weight, layer.norm_bias, spec.layer_norm_eps)
            h = activation(z, spec.activation)
            if placement == "post":
                h, norm = layer_norm(h, layer.norm_weight, layer.norm_bias, spec.layer_norm_eps)
            tape.append((z, norm))
        return self._linear(h, self._layers[-1]), lambda d_output: self._pull_back(d_output, tape)

    def _linear(self, h: Tensor, layer: _StackedLayer) -> Tensor:
        z = self._round(h) @ layer.weight.transpose(1, 2)
        return z if layer.bias is None else z + layer.bias

    def _pull_back(self, d_output: Tensor, tape: list[tuple[Tensor, _Norm | None]]) -> Tensor:
        d_h = self._round(d_output) @ self._layers[-1].weight
        rows = zip(reversed(self._layers[:-1]), reversed(self.spec.layer_norm), reversed(tape))
        for layer, placement, (z, norm) in rows:
            if placement == "post":
                assert norm is not None
                d_h = layer_norm_vjp(d_h, norm)
            d_z = d_h * activation_derivative(z, self.spec.activation)
            if placement == "pre":
                assert norm is not None
                d_z = layer_norm_vjp(d_z, norm)
            d_h = self._round(d_z) @ layer.weight
        return d_h


def time_block(spec: NetworkSpec, t: float | Tensor, batch_size: int, device: torch.device) -> Tensor:
    """Time features [B, time_embedding_dim], float64; t is a number or [B, 1]."""
    t = torch.as_tensor(t, dtype=torch.float64, device=device)
    features = time_features(t.reshape(-1, 1), spec.time_embedding, spec.time_embedding_dim)
    return features.expand(batch_size, -1)


def ordered_blocks(spec: NetworkSpec, named: dict[str, Tensor]) -> list[Tensor]:
    """The input blocks in the order of the first layer's columns."""
    return [named[block] for block in spec.input_order]


# ---------------------------------------------------------------- one step, row by row


def clean_actions(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """Posterior mean E[x1 | x_t = x] = x + (1 - t) v (Tweedie's formula for the linear path)."""
    return x + (1 - t) * v


def member_weights(q_values: Tensor, aggregation: str, rho: float) -> Tensor:
    """w_j = d Qbar / d Q_j, [E, B]; sums to 1 for every aggregation.

    Pessimistic: 1/E - rho (Q_j - mean) / (E std), and 1/E where std = 0, where autodiff would give NaN.
    "min" shares evenly among tied minima.
    """
    count = q_values.shape[0]
    if aggregation == "mean":
        return torch.full_like(q_values, 1 / count)
    if aggregation == "min":
        lowest = (q_values == q_values.amin(0)).to(q_values.dtype)
        return lowest / lowest.sum(0)
    std = ensemble_std(q_values)
    slope = (q_values - q_values.mean(0)) / torch.where(std == 0, torch.ones_like(std), std)
    return (1 - rho * slope) / count


def ensemble_std(q_values: Tensor) -> Tensor:
    """Population std over the members, [B]."""
    return _safe_sqrt((q_values - q_values.mean(0)).square().mean(0))


def _safe_sqrt(x: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0, where autodiff of sqrt gives inf."""
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())


def aggregate(q_values: Tensor, aggregation: str, rho: float) -> Tensor:
    """Qbar [B] of q_values [E, B]: mean - rho * population std, mean, or min."""
    if aggregation == "min":
        return q_values.amin(0)
    mean = q_values.mean(0)
    return mean if aggregation == "mean" else mean - rho * ensemble_std(q_values)


def posterior_weights(q_values: Tensor, tau: float, scale: Tensor | float = 1.0) -> Tensor:
    """softmax_n(tau Qbar_n / scale), [N, B]: the draws' weights in the gradient of log mean exp(tau Qbar)."""
    return torch.softmax(tau * q_values / scale, dim=0)


def row_norm(x: Tensor) -> Tensor:
    """L2 norm of each row, [B, 1], without overflow or underflow in the squares."""
    peak = x.detach().abs().amax(-1, keepdim=True)
    safe = torch.where((peak > 0) & peak.isfinite(), peak, torch.ones_like(peak))
    return safe * _safe_sqrt((x / safe).square().sum(-1, keepdim=True))


def steered_mask(steering: Steering, action_dim: int, like: Tensor) -> Tensor | None:
    """[A], 1 where the critic may move the action; None for all."""
    if steering.steered_dims is None:
        return None
    mask = torch.zeros(action_dim, dtype=like.dtype, device=like.device)
    mask[list(steering.steered_dims)] = 1
    return mask


def steer_velocity(
    v: Tensor, g: Tensor, steering: Steering, q_std: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """v' = v + scale * g, row by row.

    Args:
        v: velocity [B, A]. g: gradient of the steering objective [B, A].
        q_std: the critics' population std at the estimate [B], for scale="gaf".

    Returns:
        v' [B, A]; norm of g over the steered dims [B] (0 where not finite); rows whose g was not finite [B].
    """
    mask = steered_mask(steering, v.shape[-1], v)
    if mask is not None:
        g = torch.where(mask > 0, g, torch.zeros_like(g))
    norm = row_norm(g)
    finite = g.isfinite().all(-1, keepdim=True) & norm.isfinite()
    if steering.scale == "norm_match":
        scale = steering.alpha * row_norm(v if mask is None else v * mask) / (norm + steering.eps)
    elif steering.scale == "absolute":
        scale = torch.full_like(norm, steering.alpha)
    else:
        if q_std is None:
            raise ValueError("steer_velocity: q_std is None; scale='gaf' needs the critics' std at the estimate, [B].")
        damping = torch.exp(-steering.gaf_decay * q_std.unsqueeze(-1)).clamp(min=steering.gaf_min)
        clipped = (steering.max_grad_norm / torch.where(norm > 0, norm, torch.ones_like(norm))).clamp(max=1)
        scale = steering.alpha * damping * clipped / steering.gaf_beta
        finite = finite & damping.isfinite()
    steered = v + torch.where(finite, scale * g, torch.zeros_like(g))
    norm = torch.where(finite, norm, torch.zeros_like(norm))
    return steered, norm.squeeze(-1), ~finite.squeeze(-1)


# ---------------------------------------------------------------- the K-step loop


@dataclass(frozen=True)
class Evaluators:
    """What the loop asks of the networks; obs is bound inside.

    flow(x, t): velocity [B, A] and the pullback of [B, A] to x.
    critic(a): q_values [E, B] and the pullback of member weights [E, B] to a.
    posterior(eps, x, t): a draw [B, A] and the pullback of [B, A] to x.
    """

    flow: Callable[[Tensor, float], tuple[Tensor, Pullback]]
    critic: Callable[[Tensor], tuple[Tensor, Pullback]] | None = None
    posterior: Callable[[Tensor, Tensor, float], tuple[Tensor, Pullback]] | None = None


def glass_draw(
    flow: Callable[[Tensor, float], tuple[Tensor, Pullback]], eps: Tensor, x: Tensor, t: float, num_steps: int
) -> tuple[Tensor, Pullback]:
    """A posterior draw by Euler steps of the GLASS flow of the base policy, and its pullback to x.

    The posterior velocity at inner time s and state xbar is w = c_x x + c_xbar xbar + c_v v(obs, x*, t*), with
    x* = p_x x + p_xbar xbar a sufficient statistic of the two observations (see `glass_coefficients`).
    """
    xbar = eps
    tape = []
    for index in range(num_steps):
        c = glass_coefficients(t, index / num_steps)
        v, pullback = flow(c.p_x * x + c.p_xbar * xbar, c.t_star)
        tape.append((c, pullback))
        xbar = xbar + (c.c_x * x + c.c_xbar * xbar + c.c_v * v) / num_steps

    def pull_back(d_xbar: Tensor) -> Tensor:
        d_x = torch.zeros_like(d_xbar)
        for c, pullback in reversed(tape):
            d_star = pullback(d_xbar * (c.c_v / num_steps))
            d_x = d_x + d_xbar * (c.c_x / num_steps) + c.p_x * d_star
            d_xbar = d_xbar * (1 + c.c_xbar / num_steps) + c.p_xbar * d_star
        return d_x

    return xbar, pull_back


@dataclass(frozen=True)
class GlassCoefficients(Generic[Time]):
    """w = c_x x + c_xbar xbar + c_v v(p_x x + p_xbar xbar, t_star)."""

    p_x: Time
    p_xbar: Time
    t_star: Time
    c_x: Time
    c_xbar: Time
    c_v: Time


def glass_coefficients(t: Time, s: Time) -> GlassCoefficients[Time]:
    """Coefficients of the GLASS posterior velocity at outer time t and inner time s, in its non-singular form.

    Two noisy looks at x1, x = t x1 + (1-t) e and xbar = s x1 + (1-s) e0, combine by precision into one look at
    time t* = h/(h+g) with h = sqrt(p^2+q^2), p = t(1-s), q = s(1-t), g = (1-t)(1-s).

    t and s are two numbers, or two tensors of one shape; both are held at or below 1 - 1e-4.
    """
    latest = 1 - 1e-4
    if isinstance(t, Tensor):
        t, s = t.clamp(max=latest), s.clamp(max=latest)
    else:
        t, s = min(t, latest), min(s, latest)
    p, q, g = t * (1 - s), s * (1 - t), (1 - t) * (1 - s)
    if isinstance(p, Tensor):
        h = torch.hypot(p, q)
        positive = torch.where(h > 0, h, torch.ones_like(h))
        a, b = p / positive, torch.where(h > 0, q / positive, torch.ones_like(h))
    else:
        h = math.hypot(p, q)
        a, b = (p / h, q / h) if h > 0 else (0.0, 1.0)
    total = h + g
    return GlassCoefficients(
        p_x=a * (1 - s) / total,
        p_xbar=b * (1 - t) / total,
        t_star=h / total,
        c_x=a / total,
        c_xbar=((1 - t) * (b - 1) - t * a) / total,
        c_v=(1 - t) / total,
    )


def _critic_gradient(
    critic: Callable[[Tensor], tuple[Tensor, Pullback]], a: Tensor, steering: Steering, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """d Qbar / d a at the (clipped) estimate, Qbar [B], and the critics' std [B]."""
    q_values, pullback = critic(a if steering.clip == "none" else a.clamp(low, high))
    d_a = pullback(member_weights(q_values, steering.aggregation, steering.rho))
    # a critic without a finite value has no usable gradient, whatever its derivative says
    d_a = torch.where(q_values.isfinite().all(0).unsqueeze(-1), d_a, torch.full_like(d_a, math.nan))
    if steering.clip == "masked" and steering.jacobian == "full":
        d_a = torch.where((a >= low) & (a <= high), d_a, torch.zeros_like(d_a))
    return d_a, aggregate(q_values, steering.aggregation, steering.rho), ensemble_std(q_values)


def steering_gradient(
    net: Evaluators,
    steering: Steering,
    x: Tensor,
    v: Tensor,
    flow_pullback: Pullback,
    t: float | Tensor,
    eps: Tensor | None,
    bounds: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """g [B, A], the gradient of the steering objective with respect to x, and the critics' std [B].

    One estimate: g = tau (da/dx)^T dQbar/da. N draws (eps [B, N, A]): V = log mean_n exp(tau Qbar_n / scale),
    g = tau / scale sum_n softmax_n (da_n/dx)^T dQbar/da_n.
    """
    assert net.critic is not None
    if not steering.uses_posterior:
        a = x if steering.estimate == "noisy" else clean_actions(x, v, t)
        d_a, q_bar, std = _critic_gradient(net.critic, a, steering, *bounds)
        if steering.estimate == "tweedie" and steering.jacobian == "full":
            d_a = d_a + (1 - t) * flow_pullback(d_a)
        return d_a * steering.tau / _q_scale(q_bar, steering), std
    assert eps is not None and isinstance(t, float)
    gradients, values, stds = [], [], []
    for n in range(steering.num_samples):
        if steering.estimate == "mfm":
            assert net.posterior is not None
            a, pullback = net.posterior(eps[:, n], x, t)
        else:
            a, pullback = glass_draw(net.flow, eps[:, n], x, t, steering.glass_steps)
        d_a, q_bar, std = _critic_gradient(net.critic, a, steering, *bounds)
        gradients.append(pullback(d_a))
        values.append(q_bar)
        stds.append(std)
    q = torch.stack(values)
    scale = _q_scale(q, steering)
    weights = posterior_weights(q, steering.tau, scale)
    g = (weights.unsqueeze(-1) * torch.stack(gradients)).sum(0)
    return g * steering.tau / scale, (weights * torch.stack(stds)).sum(0)


def _q_scale(q_bar: Tensor, steering: Steering) -> Tensor | float:
    if steering.q_scale == "batch_std":
        finite = q_bar[q_bar.isfinite()]  # rows without a value must not reach the others through the std
        return _safe_sqrt((finite - finite.mean()).square().mean()) + 1e-6 if finite.numel() else 1.0
    return 1.0 if steering.q_scale is None else steering.q_scale


def sample(
    net: Evaluators,
    steering: Steering,
    num_steps: int,
    noise: Tensor,
    posterior_noise: Tensor | None,
    bounds: tuple[float, float],
) -> RawSample:
    """The K Euler steps from noise [B, A]; posterior_noise [K, B, N, A]; bounds of the actions (low, high)."""
    x = noise
    no_norm = noise.new_zeros(noise.shape[0])
    all_finite = torch.zeros(noise.shape[0], dtype=torch.bool, device=noise.device)
    norms, nonfinite = [no_norm] * num_steps, [all_finite] * num_steps
    for k in range(num_steps):
        t = k / num_steps
        v, flow_pullback = net.flow(x, t)
        if steering.steers and (k > 0 or steering.steer_first_step):
            eps = None if posterior_noise is None else posterior_noise[k]
            g, std = steering_gradient(net, steering, x, v, flow_pullback, t, eps, bounds)
            v, norms[k], nonfinite[k] = steer_velocity(v, g, steering, std)
        x = x + v / num_steps
    return RawSample(x.clamp(*bounds), torch.stack(norms), torch.stack(nonfinite))
