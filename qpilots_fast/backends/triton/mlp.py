"""The MLP of every network, forward and input VJP, as Triton device functions: written once, specialised by constexpr.

A program owns BLOCK_B rows. Its activations live in a scratch of its own (small enough to stay in L2), because a
row's whole hidden vector fits neither in registers nor in shared memory at useful sizes:

- h [BLOCK_B, LDH]           operand dtype: what the next product reads (inputs, hidden, deltas)
- z [L + 1, BLOCK_B, H_PAD]  pre-activations, in the operand's format (it halves this traffic for 16-bit operands); slot
                             l + 1 is free by the time the backward needs d_hidden of layer l
- stat [2, L, BLOCK_B]       float32: mean and reciprocal std of each LayerNorm

Weights of one member, operand dtype, leading dimension LD: L blocks [H_PAD, LD] ([out, in] as in torch), then
[OUT_ROWS, LD]. Vectors of one member, float32: L blocks [3, H_PAD] (bias, LayerNorm weight, LayerNorm bias), then
[OUT_ROWS] output bias.
layer_ptr [L + 1, 4] int32: true width, norm placement (0 none, 1 pre, 2 post), depth of the forward product (padded
inputs), depth of the backward product (padded width of the next layer, 0 for dQ = 1); the last row is
the output's. Loop bounds read from it rather than constants
keep the compiler from unrolling the elementwise passes, which would spill.
Padding columns that a product reads are written as zeros, so uninitialised scratch never reaches a result.

A layer is a product with a bare epilogue, so that its accumulator may be wide, then elementwise passes over narrow
tiles: LayerNorm in the epilogue of a wide tile spills on every target.
The barriers order the program's own global writes before its own later reads.
"""
# No `from __future__ import annotations` here: the interpreter recognises constexpr parameters by their evaluated type.

import triton
import triton.language as tl


@triton.jit
def _activation(z, ACT: tl.constexpr):
    if ACT == "gelu_tanh":
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
    else:
        tl.static_assert(ACT == "tanh")
        h = 2.0 * tl.sigmoid(2.0 * z) - 1.0
    return h


@triton.jit
def _activation_derivative(z, ACT: tl.constexpr):
    if ACT == "gelu_tanh":
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
    else:
        tl.static_assert(ACT == "tanh")
        s = 2.0 * tl.sigmoid(2.0 * z) - 1.0
        d = 1.0 - s * s
    return d


@triton.jit
def _product(a_ptr, LDA: tl.constexpr, b_ptr, STRIDE_BK: tl.constexpr, STRIDE_BN: tl.constexpr, depth,
             BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """a [BLOCK_B, depth] @ b [depth, BLOCK_N], float32; depth is a multiple of BLOCK_K (0 gives zeros)."""
    offs_b = tl.arange(0, BLOCK_B)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # scalar base plus a 32-bit offset tile: half the registers of a tile of pointers
    offs_a = offs_b[:, None] * LDA + offs_k[None, :]
    offs_w = offs_k[:, None] * STRIDE_BK + offs_n[None, :] * STRIDE_BN
    acc = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    for k in range(0, depth, BLOCK_K):
        a = tl.load(a_ptr + k + offs_a)
        b = tl.load(b_ptr + k * STRIDE_BK + offs_w)
        if DOT == "emulated":  # the interpreter multiplies bfloat16 bit patterns as integers
            acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc, input_precision=DOT)
    return acc


@triton.jit
def _layer_norm_input(z, is_pre, ACT: tl.constexpr, NORM: tl.constexpr):
    if NORM == "post":
        y = _activation(z, ACT)
    elif NORM == "mixed":
        y = tl.where(is_pre, z, _activation(z, ACT))
    else:
        y = z
    return y


@triton.jit
def _mlp_forward(h_ptr, z_ptr, stat_ptr, w_ptr, vec_ptr, first_bias_ptr, layer_ptr, norm_eps,
                 L: tl.constexpr, H_PAD: tl.constexpr, LD: tl.constexpr, LDH: tl.constexpr,
                 OUT_PAD: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr,
                 BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Output [BLOCK_B, OUT_PAD] of the network whose padded inputs are in h; leaves z and stat for the backward."""
    offs_b = tl.arange(0, BLOCK_B)
    offs_n = tl.arange(0, BLOCK_N)
    offs_z = offs_b[:, None] * H_PAD + offs_n[None, :]
    BLOCK_E: tl.constexpr = BLOCK_N if BLOCK_N < 64 else 64  # elementwise passes: a wider tile only costs registers
    offs_e = tl.arange(0, BLOCK_E)
    offs_ze = offs_b[:, None] * H_PAD + offs_e[None, :]
    offs_he = offs_b[:, None] * LDH + offs_e[None, :]
    tl.debug_barrier()
    for layer in range(L):
        width = tl.load(layer_ptr + 4 * layer)
        placement = tl.load(layer_ptr + 4 * layer + 1)
        depth = tl.load(layer_ptr + 4 * layer + 2)
        end = tl.load(layer_ptr + 4 * layer + 6)  # depth of the next forward product: this width, padded
        is_pre = placement == 1
        layer_w = w_ptr + layer * (H_PAD * LD)
        layer_z = z_ptr + layer * (BLOCK_B * H_PAD)
        gain_ptr = vec_ptr + layer * (3 * H_PAD) + H_PAD
        bias_ptr = tl.where(layer == 0, first_bias_ptr, gain_ptr - H_PAD)
        for n in range(0, end, BLOCK_N):
            acc = _product(h_ptr, LDH, layer_w + n * LD, 1, LD, depth, BLOCK_B, BLOCK_N, BLOCK_K, DOT)
            acc += tl.load(bias_ptr + n + offs_n)[None, :]
            tl.store(layer_z + n + offs_z, acc.to(z_ptr.dtype.element_ty))
        tl.debug_barrier()
        mean = tl.zeros((BLOCK_B,), dtype=tl.float32)
        spread = tl.zeros((BLOCK_B,), dtype=tl.float32)  # sum of squared deviations
        if NORM != "none":
            for n in range(0, end, BLOCK_E):
                # Chan's merge of this tile's mean and spread into the row's
                y = _layer_norm_input(tl.load(layer_z + n + offs_ze).to(tl.float32), is_pre, ACT, NORM)
                mask_e = (n + offs_e < width)[None, :]
                count = tl.minimum(tl.maximum(width - n, 0), BLOCK_E).to(tl.float32)
                tile_mean = tl.sum(tl.where(mask_e, y, 0.0), axis=1) / tl.maximum(count, 1.0)
                deviation = tl.where(mask_e, y - tile_mean[:, None], 0.0)
                before = tl.minimum(n, width).to(tl.float32)
                share = count / (before + count)
                delta = tile_mean - mean
                spread += tl.sum(deviation * deviation, axis=1) + delta * delta * share * before
                mean += delta * share
        rstd = tl.rsqrt(spread / width + norm_eps)
        if NORM == "mixed":
            mean = tl.where(placement == 0, 0.0, mean)
            rstd = tl.where(placement == 0, 1.0, rstd)
        if NORM != "none":
            tl.store(stat_ptr + layer * BLOCK_B + offs_b, mean)
            tl.store(stat_ptr + (L + layer) * BLOCK_B + offs_b, rstd)
        for n in range(0, end, BLOCK_E):
            hidden = tl.load(layer_z + n + offs_ze).to(tl.float32)
            if NORM == "none":
                hidden = _activation(hidden, ACT)
            else:
                y = _layer_norm_input(hidden, is_pre, ACT, NORM)
                hidden = (y - mean[:, None]) * rstd[:, None]
                hidden *= tl.load(gain_ptr + n + offs_e)[None, :]
                hidden += tl.load(gain_ptr + H_PAD + n + offs_e)[None, :]
                if NORM == "pre":
                    hidden = _activation(hidden, ACT)
                elif NORM == "mixed":
                    hidden = tl.where(is_pre, _activation(hidden, ACT), hidden)
            hidden = tl.where((n + offs_e < width)[None, :], hidden, 0.0)
            tl.store(h_ptr + n + offs_he, hidden.to(h_ptr.dtype.element_ty))
        tl.debug_barrier()
    depth = tl.load(layer_ptr + 4 * L + 2)
    out = _product(h_ptr, LDH, w_ptr + L * (H_PAD * LD), 1, LD, depth, BLOCK_B, OUT_PAD, BLOCK_K, DOT)
    out += tl.load(vec_ptr + L * (3 * H_PAD) + tl.arange(0, OUT_PAD))[None, :]
    tl.debug_barrier()
    return out


@triton.jit
def _through_norm(d_hidden, z, mean, rstd, gain, shift, is_pre, ACT: tl.constexpr, NORM: tl.constexpr):
    """d_hidden pulled back to the normalised values, and those values: (d_xhat, xhat)."""
    xhat = (_layer_norm_input(z, is_pre, ACT, NORM) - mean[:, None]) * rstd[:, None]
    if NORM == "pre":
        d_hidden = d_hidden * _activation_derivative(xhat * gain + shift, ACT)
    elif NORM == "mixed":
        d_hidden = tl.where(is_pre, d_hidden * _activation_derivative(xhat * gain + shift, ACT), d_hidden)
    return d_hidden * gain, xhat


@triton.jit
def _mlp_backward(h_ptr, z_ptr, stat_ptr, w_ptr, vec_ptr, layer_ptr,
                  L: tl.constexpr, H_PAD: tl.constexpr, LD: tl.constexpr, LDH: tl.constexpr,
                  ONES: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr,
                  BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Deltas of the first layer into h, from the padded cotangent in h (ONES: from dQ = 1, h is not read).

    Needs z and stat of this network's last _mlp_forward. Follow with _input_gradient.
    """
    offs_b = tl.arange(0, BLOCK_B)
    offs_n = tl.arange(0, BLOCK_N)
    offs_z = offs_b[:, None] * H_PAD + offs_n[None, :]
    BLOCK_E: tl.constexpr = BLOCK_N if BLOCK_N < 64 else 64  # elementwise passes: a wider tile only costs registers
    offs_e = tl.arange(0, BLOCK_E)
    offs_ze = offs_b[:, None] * H_PAD + offs_e[None, :]
    offs_he = offs_b[:, None] * LDH + offs_e[None, :]
    tl.debug_barrier()
    for i in range(L):
        layer = L - 1 - i
        width = tl.load(layer_ptr + 4 * layer)
        placement = tl.load(layer_ptr + 4 * layer + 1)
        depth = tl.load(layer_ptr + 4 * layer + 3)
        end = tl.load(layer_ptr + 4 * layer + 6)
        is_pre = placement == 1
        next_w = w_ptr + (layer + 1) * (H_PAD * LD)
        layer_z = z_ptr + layer * (BLOCK_B * H_PAD)
        layer_d = layer_z + BLOCK_B * H_PAD  # slot layer + 1: its z has been used up
        gain_ptr = vec_ptr + layer * (3 * H_PAD) + H_PAD
        mean = tl.zeros((BLOCK_B,), dtype=tl.float32)
        rstd = mean
        d_mean = mean  # sums over the row that LayerNorm's VJP needs
        d_spread = mean
        if NORM != "none":
            mean = tl.load(stat_ptr + layer * BLOCK_B + offs_b)
            rstd = tl.load(stat_ptr + (L + layer) * BLOCK_B + offs_b)
        for n in range(0, end, BLOCK_N):
            d_hidden = _product(h_ptr, LDH, next_w + n, LD, 1, depth, BLOCK_B, BLOCK_N, BLOCK_K, DOT)
            if ONES:
                row = tl.load(w_ptr + L * (H_PAD * LD) + n + offs_n).to(tl.float32)
                d_hidden += tl.where(i == 0, row, 0.0)[None, :]
            tl.store(layer_d + n + offs_z, d_hidden.to(z_ptr.dtype.element_ty))
        tl.debug_barrier()
        if NORM != "none":
            for n in range(0, end, BLOCK_E):
                d_hidden = tl.load(layer_d + n + offs_ze).to(tl.float32)
                z = tl.load(layer_z + n + offs_ze).to(tl.float32)
                gain = tl.load(gain_ptr + n + offs_e)[None, :]
                shift = tl.load(gain_ptr + H_PAD + n + offs_e)[None, :]
                d_xhat, xhat = _through_norm(d_hidden, z, mean, rstd, gain, shift, is_pre, ACT, NORM)
                d_mean += tl.sum(d_xhat, axis=1)
                d_spread += tl.sum(d_xhat * xhat, axis=1)
        if NORM == "mixed":
            d_mean = tl.where(placement == 0, 0.0, d_mean)
            d_spread = tl.where(placement == 0, 0.0, d_spread)
        d_mean = d_mean / width
        d_spread = d_spread / width
        for n in range(0, end, BLOCK_E):
            d_hidden = tl.load(layer_d + n + offs_ze).to(tl.float32)
            z = tl.load(layer_z + n + offs_ze).to(tl.float32)
            if NORM == "none":
                d_z = d_hidden * _activation_derivative(z, ACT)
            else:
                gain = tl.load(gain_ptr + n + offs_e)[None, :]
                shift = tl.load(gain_ptr + H_PAD + n + offs_e)[None, :]
                d_xhat, xhat = _through_norm(d_hidden, z, mean, rstd, gain, shift, is_pre, ACT, NORM)
                d_z = rstd[:, None] * (d_xhat - d_mean[:, None] - xhat * d_spread[:, None])
                if NORM == "post":
                    d_z *= _activation_derivative(z, ACT)
                elif NORM == "mixed":
                    d_z = tl.where(is_pre, d_z, d_z * _activation_derivative(z, ACT))
            d_z = tl.where((n + offs_e < width)[None, :], d_z, 0.0)
            tl.store(h_ptr + n + offs_he, d_z.to(h_ptr.dtype.element_ty))
        tl.debug_barrier()


@triton.jit
def _input_gradient(h_ptr, w_ptr, layer_ptr, column, LD: tl.constexpr, LDH: tl.constexpr, DOT: tl.constexpr,
                    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """First-layer deltas in h times the first layer's columns [column, column + BLOCK_C): [BLOCK_B, BLOCK_C]."""
    depth = tl.load(layer_ptr + 6)
    return _product(h_ptr, LDH, w_ptr + column, LD, 1, depth, BLOCK_B, BLOCK_C, BLOCK_K, DOT)


@triton.jit
def _write_rows(h_ptr, src_ptr, rows, mask_b, SRC_DIM: tl.constexpr, WIDTH: tl.constexpr, LDH: tl.constexpr,
                BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """src [*, SRC_DIM] at the given rows into columns [0, WIDTH) of h; zeros from SRC_DIM on and in masked rows."""
    offs_b = tl.arange(0, BLOCK_B)
    offs_c = tl.arange(0, BLOCK_C)
    for c in range(0, WIDTH, BLOCK_C):
        mask = mask_b[:, None] & (c + offs_c < SRC_DIM)[None, :]
        tile = tl.load(src_ptr + rows[:, None] * SRC_DIM + c + offs_c[None, :], mask=mask, other=0.0)
        tl.store(h_ptr + c + (offs_b[:, None] * LDH + offs_c[None, :]), tile.to(h_ptr.dtype.element_ty))


@triton.jit
def _write_tile(h_ptr, tile, column, LDH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """tile [BLOCK_B, BLOCK_C] into columns [column, column + BLOCK_C) of h."""
    offs = tl.arange(0, BLOCK_B)[:, None] * LDH + tl.arange(0, BLOCK_C)[None, :]
    tl.store(h_ptr + column + offs, tile.to(h_ptr.dtype.element_ty))
