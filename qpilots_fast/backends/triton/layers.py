"""One layer of all members of a network a launch, forward, and the output; deltas.py has the pull-back.

A program owns (member, BLOCK_B rows, BLOCK_N columns). Everything elementwise happens in the product's epilogue, so
that between two products a value is written once and read once. LayerNorm needs sums over a row, which no program sees
whole: each writes those of its columns, and the programs of the next launch merge them in a fixed order.

Planes [E, capacity, H_PAD], operand format, capacity a multiple of BLOCK_B; columns beyond a layer's width are zeros:

- z: pre-activations. y: activations, which is what the next product reads; a "pre" layer has none, its reader takes z.
- d: what the backward hands down: dz of a layer, or, where its norm is "pre", d_xhat of its normalised values.

Tables of column tiles [E, tiles, 2, capacity], float32: stat, the mean of the tile's columns and their sum of squared
deviations; sums, the two row sums that a LayerNorm's pull-back needs.

Norms, with xhat = (value - mean) / std of a row: "pre" h = act(gain xhat(z) + shift), "post" h = gain xhat(y) + shift,
which the reader's product makes on load, or "fold": as "post", with the gain in the reader's weights W' = W gain, so
that

    W h + b = (W' y - mean u) / std + c,  u = W' 1,  c = W shift + b  [D]

needs two numbers a row and no pass. For "post" and "fold" alike the sums of the pull-back are known before its product:
sum_i d_xhat_i = sum_o dz_o u_o and sum_i d_xhat_i xhat_i = sum_o dz_o (z_o - c_o), o over the layer above [D].

A layer whose norm is "chain" leaves its z, in float32 and alone, to the kernel of chains.py, which makes the plane y of
it; the pull-back leaves it d of that y, in float32, and d becomes dz there.

Vectors of one layer, float32: c (b where the layer below has no "post" norm), u, gain, shift, H_PAD each; of the
output: c, u. Weights of one layer [H_PAD, LD] as in torch, [out, in].
"""
# No `from __future__ import annotations` here: the interpreter recognises constexpr parameters by their evaluated type.

import triton
import triton.language as tl

from .activation import _activation
from .tiles import _clip, _dot, _halves, _moments, _within


@triton.jit
def _product_from_below(acc, below_ptr, w_ptr, gain_ptr, mean, rstd, depth,
                        H_PAD: tl.constexpr, LD: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, DOT: tl.constexpr,
                        BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """acc + h @ W^T over the layer below, of which below_ptr is the plane y ("pre": z); "post" leaves out its shift."""
    offs_k = tl.arange(0, BLOCK_K)
    offs_a = tl.arange(0, BLOCK_B)[:, None] * H_PAD + offs_k[None, :]
    offs_w = offs_k[:, None] + tl.arange(0, BLOCK_N)[None, :] * LD
    for k in range(0, depth, BLOCK_K):
        a = tl.load(below_ptr + k + offs_a)
        if NORM == "post" or NORM == "pre":
            gain = tl.load(gain_ptr + k + offs_k)[None, :]
            h = (a.to(tl.float32) - mean[:, None]) * rstd[:, None] * gain
            if NORM == "pre":  # the shift of "post" is in c
                h = _activation(h + tl.load(gain_ptr + H_PAD + k + offs_k)[None, :], ACT)
            a = h.to(w_ptr.dtype.element_ty)
        acc = _dot(a, tl.load(w_ptr + k + offs_w), acc, DOT)
    return acc


@triton.jit
def _keep_columns(acc, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column, rows, capacity,
                  WIDTH: tl.constexpr, H_PAD: tl.constexpr, BELOW_NORM: tl.constexpr, NORM: tl.constexpr,
                  ACT: tl.constexpr, STAT_N: tl.constexpr):  # fmt: skip
    """z, y and stat of STAT_N columns of a product; pointers are a program's member and rows."""
    offs_n = column + tl.arange(0, STAT_N)
    if BELOW_NORM == "fold":
        acc = rstd[:, None] * (acc - mean[:, None] * tl.load(u_ptr + offs_n)[None, :])
    z = acc + tl.load(bias_ptr + offs_n)[None, :]
    target = tl.arange(0, acc.shape[0])[:, None] * H_PAD + offs_n[None, :]
    kept = _within(z, offs_n, WIDTH, H_PAD).to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + target, kept)
    if NORM != "pre" and NORM != "chain":
        kept = _within(_activation(z, ACT), offs_n, WIDTH, H_PAD).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + target, kept)
    if NORM != "none" and NORM != "chain":
        # of what was kept: its reader multiplies that
        value = kept.to(tl.float32)
        if WIDTH % STAT_N == 0:
            tile_mean = tl.sum(value, axis=1) * (1.0 / STAT_N)
        else:
            count = tl.minimum(tl.maximum(WIDTH - column, 1), STAT_N).to(tl.float32)
            tile_mean = tl.sum(value, axis=1) / count
        deviation = _within(value - tile_mean[:, None], offs_n, WIDTH, H_PAD)
        stat_ptr += column // STAT_N * 2 * capacity
        tl.store(stat_ptr + rows, tile_mean)
        tl.store(stat_ptr + capacity + rows, tl.sum(deviation * deviation, axis=1))


@triton.jit
def _keep(acc, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column, rows, capacity,
          WIDTH: tl.constexpr, H_PAD: tl.constexpr, BELOW_NORM: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
          STAT_N: tl.constexpr):  # fmt: skip
    """z, y and stat of a product's columns, STAT_N at a time; pointers are a program's member and rows."""
    if acc.shape[1] == STAT_N:
        _keep_columns(acc, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column, rows, capacity,
                      WIDTH, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
    else:  # halves, or quarters; no recursion, which Triton 3.2 lacks
        left, right = _halves(acc)
        if acc.shape[1] == 2 * STAT_N:
            _keep_columns(left, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column, rows,
                          capacity, WIDTH, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
            _keep_columns(right, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column + STAT_N,
                          rows, capacity, WIDTH, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
        else:
            tl.static_assert(acc.shape[1] == 4 * STAT_N)
            first, second = _halves(left)
            third, fourth = _halves(right)
            _keep_columns(first, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column, rows,
                          capacity, WIDTH, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
            _keep_columns(second, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column + STAT_N,
                          rows, capacity, WIDTH, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
            _keep_columns(third, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column + 2 * STAT_N,
                          rows, capacity, WIDTH, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
            _keep_columns(fourth, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column +
                          3 * STAT_N, rows, capacity, WIDTH, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip


# A caller's tensors are never specialised on alignment: of a rollout [T, S] only some rows obs[i : i + 1] are aligned,
# and the first one that is not would compile every kernel again, in the middle of a control loop.
@triton.jit(do_not_specialize=["num_rows", "num_draws", "capacity", "depth"],
            do_not_specialize_on_alignment=["obs_ptr", "x_ptr", "xbar_ptr"])  # fmt: skip
def _layer_kernel(obs_ptr, x_ptr, xbar_ptr, bounds_ptr, below_ptr, below_stat_ptr, w_ptr, vec_ptr, bias_ptr,
                  z_ptr, y_ptr, stat_ptr, num_rows, num_draws, capacity, depth, norm_eps,
                  BELOW_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
                  FIRST: tl.constexpr, OBS_DIM: tl.constexpr, ACTION_DIM: tl.constexpr, COLUMN: tl.constexpr,
                  A_PAD: tl.constexpr, BLOCKS: tl.constexpr, CLIP: tl.constexpr, BIAS_STRIDE: tl.constexpr,
                  W_STRIDE: tl.constexpr, VEC_STRIDE: tl.constexpr, H_PAD: tl.constexpr, LD: tl.constexpr,
                  BELOW_NORM: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, DOT: tl.constexpr,
                  STAT_N: tl.constexpr,
                  BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A hidden layer's z, y (not where its norm is "pre" or "chain") and stat (where it has a norm).

    FIRST: its inputs are rows of float32: obs [*, OBS_DIM], of which row r // num_draws belongs to row r, at packed
    column 0; then BLOCKS blocks [*, ACTION_DIM] from COLUMN on, A_PAD apart: x, and xbar [num_rows, ACTION_DIM] beside
    an x that the draws of a row share. CLIP: x into the bounds [2, A_PAD]. bias_ptr: c, or the first bias of a time.
    """
    member = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    plane = (member * capacity + tl.program_id(1) * BLOCK_B) * H_PAD
    offs_n = tl.arange(0, BLOCK_N)
    w_ptr += member * W_STRIDE + column * LD
    vec_ptr += member * VEC_STRIDE
    mean = tl.zeros((BLOCK_B,), dtype=tl.float32)
    rstd = mean
    acc = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    if FIRST:
        of_row = (rows // num_draws).to(tl.int64)
        in_batch = (rows < num_rows)[:, None]
        offs_k = tl.arange(0, BLOCK_K)
        offs_w = offs_k[:, None] + offs_n[None, :] * LD
        for k in tl.range(0, OBS_DIM, BLOCK_K, num_stages=1):
            mask = in_batch & (k + offs_k < OBS_DIM)[None, :]
            a = tl.load(obs_ptr + of_row[:, None] * OBS_DIM + k + offs_k[None, :], mask=mask, other=0.0)
            acc = _dot(a.to(w_ptr.dtype.element_ty), tl.load(w_ptr + k + offs_w), acc, DOT)
        BLOCK_A: tl.constexpr = A_PAD if A_PAD < BLOCK_K else BLOCK_K
        offs_a = tl.arange(0, BLOCK_A)
        offs_w = COLUMN + offs_a[:, None] + offs_n[None, :] * LD
        for block in tl.static_range(BLOCKS):
            source_ptr = x_ptr
            of_block = rows.to(tl.int64)
            if block == 1:
                source_ptr = xbar_ptr
            elif BLOCKS == 2:
                of_block = of_row
            for k in tl.range(0, A_PAD, BLOCK_A, num_stages=1):
                mask = in_batch & (k + offs_a < ACTION_DIM)[None, :]
                a = tl.load(source_ptr + of_block[:, None] * ACTION_DIM + k + offs_a[None, :], mask=mask, other=0.0)
                if CLIP:
                    low = tl.load(bounds_ptr + k + offs_a)[None, :]
                    a = tl.where(mask, _clip(a, low, tl.load(bounds_ptr + A_PAD + k + offs_a)[None, :]), 0.0)
                w = tl.load(w_ptr + block * A_PAD + k + offs_w)
                acc = _dot(a.to(w_ptr.dtype.element_ty), w, acc, DOT)
    else:
        if BELOW_NORM != "none":
            below_stat_ptr += member * (H_PAD // STAT_N) * 2 * capacity
            mean, rstd = _moments(below_stat_ptr, rows, capacity, norm_eps, BELOW_WIDTH, STAT_N)
        acc = _product_from_below(acc, below_ptr + plane, w_ptr, vec_ptr - 2 * H_PAD, mean, rstd, depth, H_PAD, LD,
                                  BELOW_NORM, ACT, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
    tiles = member * (H_PAD // STAT_N) * 2 * capacity
    _keep(acc, mean, rstd, bias_ptr + member * BIAS_STRIDE, vec_ptr + H_PAD, z_ptr + plane, y_ptr + plane,
          stat_ptr + tiles, column, rows, capacity, WIDTH, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "capacity", "depth"],
            do_not_specialize_on_alignment=["add_ptr"])  # fmt: skip
def _output_kernel(below_ptr, stat_ptr, w_ptr, vec_ptr, add_ptr, out_ptr, sum_ptr,
                   num_rows, capacity, depth, norm_eps, scale, WIDTH: tl.constexpr,
                   OUT_DIM: tl.constexpr, OUT_ROWS: tl.constexpr, ADD: tl.constexpr,
                   W_STRIDE: tl.constexpr, VEC_STRIDE: tl.constexpr, H_PAD: tl.constexpr, LD: tl.constexpr,
                   BELOW_NORM: tl.constexpr, ACT: tl.constexpr, DOT: tl.constexpr, STAT_N: tl.constexpr,
                   BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The network's output [E, num_rows, OUT_DIM], float32, in one column tile. ADD: and add + scale output in sum."""
    member = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_B
    rows = first + tl.arange(0, BLOCK_B)
    offs_n = tl.arange(0, BLOCK_N)
    vec_ptr += member * VEC_STRIDE
    mean = tl.zeros((BLOCK_B,), dtype=tl.float32)
    rstd = mean
    if BELOW_NORM != "none":
        stat_ptr += member * (H_PAD // STAT_N) * 2 * capacity
        mean, rstd = _moments(stat_ptr, rows, capacity, norm_eps, WIDTH, STAT_N)
    out = _product_from_below(tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32),
                              below_ptr + (member * capacity + first) * H_PAD, w_ptr + member * W_STRIDE,
                              vec_ptr - 2 * H_PAD, mean, rstd, depth, H_PAD, LD, BELOW_NORM, ACT, DOT,
                              BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
    if BELOW_NORM == "fold":
        out = rstd[:, None] * (out - mean[:, None] * tl.load(vec_ptr + OUT_ROWS + offs_n)[None, :])
    out += tl.load(vec_ptr + offs_n)[None, :]
    mask = (rows < num_rows)[:, None] & (offs_n < OUT_DIM)[None, :]
    target = (member * num_rows + rows)[:, None] * OUT_DIM + offs_n[None, :]
    tl.store(out_ptr + target, out, mask=mask)
    if ADD:
        tl.store(sum_ptr + target, tl.load(add_ptr + target, mask=mask, other=0.0) + scale * out, mask=mask)
