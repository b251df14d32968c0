"""Activations and their derivatives, elementwise.

NAME_approx is NAME by the hardware's tanh, one instruction with a relative error of 2^-11 (PTX: tanh.approx), for
bfloat16 operands, which are rounded by 2^-9 afterwards.
"""
# No `from __future__ import annotations` here: the interpreter recognises constexpr parameters by their evaluated type.

import triton
import triton.language as tl


@triton.jit
def _tanh_approx(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _activation(z, ACT: tl.constexpr):
    if ACT == "gelu_tanh_approx":
        # as in the derivative below, which shares what is in both
        h = z * (0.5 + 0.5 * _tanh_approx(z * (0.7978845608028654 + 0.035677408136300125 * (z * z))))
    elif ACT == "silu_approx":
        half = 0.5 * z
        h = half + half * _tanh_approx(half)
    elif ACT == "tanh_approx":
        h = _tanh_approx(z)
    elif ACT == "gelu_tanh":
        # 0.5 z (1 + tanh(u)) = z sigmoid(2u): no cancellation
        h = z * tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
    elif ACT == "gelu":
        h = 0.5 * z * (1.0 + tl.erf(0.7071067811865476 * z))
    elif ACT == "relu":
        h = tl.where(z <= 0, 0.0, z)  # keeps NaN
    elif ACT == "silu":
        h = z * tl.sigmoid(z)
    elif ACT == "mish":
        # tanh(softplus(z)) = n / (n + 2), n = e^z (e^z + 2)
        e = tl.exp(tl.minimum(z, 20.0))
        n = e * (e + 2.0)
        h = z * (n / (n + 2.0))
    elif ACT == "elu":
        c = tl.where(z > 0, 0.0, z)  # keeps NaN
        # e^c - 1 by its series near 0, where the difference cancels
        near = c * (1.0 + c * (0.5 + c * (1 / 6 + c * (1 / 24 + c * (1 / 120 + c * (1 / 720))))))
        h = tl.where(z > 0, z, tl.where(c < -0.34, tl.exp(c) - 1.0, near))
    elif ACT == "selu":
        c = tl.where(z > 0, 0.0, z)
        near = c * (1.0 + c * (0.5 + c * (1 / 6 + c * (1 / 24 + c * (1 / 120 + c * (1 / 720))))))
        below = tl.where(c < -0.34, tl.exp(c) - 1.0, near)
        h = tl.where(z > 0, 1.0507009873554805 * z, 1.7580993408473766 * below)
    elif ACT == "softplus":
        # log(1 + w) = 2 atanh(w / (2 + w)), w = e^-|z|, by its series
        w = tl.exp(-tl.abs(z))
        s = w / (2.0 + w)
        q = s * s
        p = 1 / 3 + q * (0.2 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15))))))
        h = tl.where(z > 0, z, 0.0) + 2.0 * (s + s * q * p)
    elif ACT == "sigmoid":
        h = tl.sigmoid(z)
    elif ACT == "symexp":
        m = tl.minimum(tl.abs(z), 88.0)
        near = m * (1.0 + m * (0.5 + m * (1 / 6 + m * (1 / 24 + m * (1 / 120 + m * (1 / 720))))))
        grown = tl.where(m < 0.34, near, tl.exp(m) - 1.0)
        h = tl.where(z < 0, -grown, grown)
    else:
        tl.static_assert(ACT == "tanh")
        h = 2.0 * tl.sigmoid(2.0 * z) - 1.0
    return h


@triton.jit
def _activation_derivative(z, ACT: tl.constexpr):
    if ACT == "gelu_tanh_approx":
        # tanh' = 4 s (1 - s) of s = (1 + tanh) / 2
        square = z * z
        s = 0.5 + 0.5 * _tanh_approx(z * (0.7978845608028654 + 0.035677408136300125 * square))
        h = z * s
        d = s + (h - h * s) * (1.5957691216057308 + 0.21406444881780075 * square)
    elif ACT == "silu_approx":
        half = 0.5 * z
        t = _tanh_approx(half)
        d = 0.5 + 0.5 * t + 0.5 * half * (1.0 - t * t)
    elif ACT == "tanh_approx":
        t = _tanh_approx(z)
        d = 1.0 - t * t
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
        d = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACT == "gelu":
        d = 0.5 * (1.0 + tl.erf(0.7071067811865476 * z)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "relu":
        d = tl.where(z > 0, 1.0, 0.0)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        d = s + z * s * (1.0 - s)
    elif ACT == "mish":
        e = tl.exp(tl.minimum(z, 20.0))
        n = e * (e + 2.0)
        r = n / (n + 2.0)
        d = r + z * (1.0 - r * r) * tl.sigmoid(z)
    elif ACT == "elu":
        d = tl.exp(tl.where(z > 0, 0.0, z))
    elif ACT == "selu":
        d = tl.where(z > 0, 1.0507009873554805, 1.7580993408473766 * tl.exp(tl.where(z > 0, 0.0, z)))
    elif ACT == "softplus":
        d = tl.sigmoid(z)
    elif ACT == "sigmoid":
        s = tl.sigmoid(z)
        d = s * (1.0 - s)
    elif ACT == "symexp":
        d = tl.exp(tl.minimum(tl.abs(z), 88.0))
    else:
        tl.static_assert(ACT == "tanh")
        s = 2.0 * tl.sigmoid(2.0 * z) - 1.0
        d = 1.0 - s * s
    return d
