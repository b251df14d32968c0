"""One layer of all members of a network a launch: forward, its pull-back, and the ends of both.

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

Vectors of one layer, float32: c (b where the layer below has no "post" norm), u, gain, shift, H_PAD each; of the
output: c, u. Weights of one layer [H_PAD, LD] as in torch, [out, in].
"""
# No `from __future__ import annotations` here: the interpreter recognises constexpr parameters by their evaluated type.

import triton
import triton.language as tl

from .activation import _activation, _activation_derivative


@triton.jit
def _dot(a, b, acc, DOT: tl.constexpr):
    if DOT == "emulated":  # the interpreter multiplies bfloat16 bit patterns as integers
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=DOT)
    return acc


@triton.jit
def _clip(x, low, high):
    """clamp that keeps NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _row_peak(cotangent_ptr, rows, in_batch, OUT_DIM: tl.constexpr, OUT_PAD: tl.constexpr, BLOCK_O: tl.constexpr):
    """[rows, 1]: the largest magnitude of each row of [*, OUT_DIM] where it is positive and finite, else 1."""
    peak = tl.zeros_like(rows).to(tl.float32)
    for o in tl.range(0, OUT_PAD, BLOCK_O, num_stages=1):
        offs_o = o + tl.arange(0, BLOCK_O)
        mask = in_batch & (offs_o < OUT_DIM)[None, :]
        value = tl.load(cotangent_ptr + rows[:, None] * OUT_DIM + offs_o[None, :], mask=mask, other=0.0)
        peak = tl.maximum(peak, tl.max(tl.abs(value), axis=1))
    return tl.where((peak > 0.0) & (peak < float("inf")), peak, 1.0)[:, None]


@triton.jit
def _moments(stat_ptr, rows, capacity, width, eps, STAT_N: tl.constexpr):
    """(mean, 1 / std) of each row, from its column tiles' in order (Chan's merge)."""
    mean = tl.load(stat_ptr + rows)
    spread = tl.load(stat_ptr + capacity + rows)
    for start in range(STAT_N, width, STAT_N):
        stat_ptr += 2 * capacity
        count = tl.minimum(width - start, STAT_N).to(tl.float32)
        before = tl.minimum(start, width).to(tl.float32)
        share = count / (before + count)
        delta = tl.load(stat_ptr + rows) - mean
        spread += tl.load(stat_ptr + capacity + rows) + delta * delta * share * before
        mean += delta * share
    return mean, tl.rsqrt(spread / width + eps)


@triton.jit
def _totals(sum_ptr, rows, capacity, width, STAT_N: tl.constexpr):
    """Both sums of each row, from its column tiles' in order."""
    first = tl.load(sum_ptr + rows)
    second = tl.load(sum_ptr + capacity + rows)
    for _ in range(STAT_N, width, STAT_N):
        sum_ptr += 2 * capacity
        first += tl.load(sum_ptr + rows)
        second += tl.load(sum_ptr + capacity + rows)
    return first, second


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
def _product_from_above(acc, d_ptr, z_ptr, stat_ptr, sum_ptr, w_ptr, c_ptr, rows, capacity, depth, width, norm_eps,
                        H_PAD: tl.constexpr, LD: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
                        STAT_N: tl.constexpr, DOT: tl.constexpr,
                        BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """(acc + dz @ W over the layer above, and SUMS: those of dz u and dz (z - c)); pointers are that layer's."""
    offs_k = tl.arange(0, BLOCK_K)
    offs_a = tl.arange(0, BLOCK_B)[:, None] * H_PAD + offs_k[None, :]
    offs_w = offs_k[:, None] * LD + tl.arange(0, BLOCK_N)[None, :]
    first = tl.zeros((BLOCK_B,), dtype=tl.float32)
    second = tl.zeros((BLOCK_B,), dtype=tl.float32)
    if NORM == "pre":
        mean, rstd = _moments(stat_ptr, rows, capacity, width, norm_eps, STAT_N)
        d_mean, d_spread = _totals(sum_ptr, rows, capacity, width, STAT_N)
        d_mean = d_mean / width
        d_spread = d_spread / width
    for k in range(0, depth, BLOCK_K):
        d = tl.load(d_ptr + k + offs_a)
        if NORM == "pre":
            z = tl.load(z_ptr + k + offs_a).to(tl.float32)
            xhat = (z - mean[:, None]) * rstd[:, None]
            dz = rstd[:, None] * (d.to(tl.float32) - d_mean[:, None] - xhat * d_spread[:, None])
            d = tl.where((k + offs_k < width)[None, :], dz, 0.0).to(w_ptr.dtype.element_ty)
            if SUMS:
                dz = d.to(tl.float32)
                first += tl.sum(dz * tl.load(c_ptr + H_PAD + k + offs_k)[None, :], axis=1)
                second += tl.sum(dz * (z - tl.load(c_ptr + k + offs_k)[None, :]), axis=1)
        acc = _dot(d, tl.load(w_ptr + k * LD + offs_w), acc, DOT)
    return acc, first, second


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    parts = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def _keep_columns(acc, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column, rows, capacity, width,
                  H_PAD: tl.constexpr, BELOW_NORM: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
                  STAT_N: tl.constexpr):  # fmt: skip
    """z, y and stat of STAT_N columns of a product; pointers are a program's member and rows."""
    offs_n = column + tl.arange(0, STAT_N)
    if BELOW_NORM == "fold":
        acc = rstd[:, None] * (acc - mean[:, None] * tl.load(u_ptr + offs_n)[None, :])
    z = acc + tl.load(bias_ptr + offs_n)[None, :]
    within = (offs_n < width)[None, :]
    target = tl.arange(0, acc.shape[0])[:, None] * H_PAD + offs_n[None, :]
    kept = tl.where(within, z, 0.0).to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + target, kept)
    if NORM != "pre":
        kept = tl.where(within, _activation(z, ACT), 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + target, kept)
    if NORM != "none":
        # of what was kept: its reader multiplies that
        value = kept.to(tl.float32)
        count = tl.minimum(tl.maximum(width - column, 1), STAT_N).to(tl.float32)
        tile_mean = tl.sum(value, axis=1) / count
        deviation = tl.where(within, value - tile_mean[:, None], 0.0)
        stat_ptr += column // STAT_N * 2 * capacity
        tl.store(stat_ptr + rows, tile_mean)
        tl.store(stat_ptr + capacity + rows, tl.sum(deviation * deviation, axis=1))


@triton.jit
def _keep(acc, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column, rows, capacity, width,
          H_PAD: tl.constexpr, BELOW_NORM: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
          STAT_N: tl.constexpr):  # fmt: skip
    """z, y and stat of a product's columns, STAT_N at a time; pointers are a program's member and rows."""
    if acc.shape[1] == STAT_N:
        _keep_columns(acc, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column, rows, capacity,
                      width, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
    else:  # halves, or quarters; no recursion, which Triton 3.2 lacks
        left, right = _halves(acc)
        if acc.shape[1] == 2 * STAT_N:
            _keep_columns(left, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column, rows,
                          capacity, width, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
            _keep_columns(right, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column + STAT_N,
                          rows, capacity, width, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
        else:
            tl.static_assert(acc.shape[1] == 4 * STAT_N)
            first, second = _halves(left)
            third, fourth = _halves(right)
            _keep_columns(first, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column, rows,
                          capacity, width, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
            _keep_columns(second, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column + STAT_N,
                          rows, capacity, width, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
            _keep_columns(third, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column + 2 * STAT_N,
                          rows, capacity, width, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip
            _keep_columns(fourth, mean, rstd, bias_ptr, u_ptr, z_ptr, y_ptr, stat_ptr, column +
                          3 * STAT_N, rows, capacity, width, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip


# A caller's tensors are never specialised on alignment: of a rollout [T, S] only some rows obs[i : i + 1] are aligned,
# and the first one that is not would compile every kernel again, in the middle of a control loop.
@triton.jit(do_not_specialize=["num_rows", "num_draws", "capacity", "depth", "below_width", "width"],
            do_not_specialize_on_alignment=["obs_ptr", "x_ptr", "xbar_ptr"])  # fmt: skip
def _layer_kernel(obs_ptr, x_ptr, xbar_ptr, bounds_ptr, below_ptr, below_stat_ptr, w_ptr, vec_ptr, bias_ptr,
                  z_ptr, y_ptr, stat_ptr, num_rows, num_draws, capacity, depth, below_width, width, norm_eps,
                  FIRST: tl.constexpr, OBS_DIM: tl.constexpr, ACTION_DIM: tl.constexpr, COLUMN: tl.constexpr,
                  A_PAD: tl.constexpr, BLOCKS: tl.constexpr, CLIP: tl.constexpr, BIAS_STRIDE: tl.constexpr,
                  W_STRIDE: tl.constexpr, VEC_STRIDE: tl.constexpr, H_PAD: tl.constexpr, LD: tl.constexpr,
                  BELOW_NORM: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, DOT: tl.constexpr,
                  STAT_N: tl.constexpr,
                  BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A hidden layer's z, y (not where its norm is "pre") and stat (where it has a norm).

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
            mean, rstd = _moments(below_stat_ptr, rows, capacity, below_width, norm_eps, STAT_N)
        acc = _product_from_below(acc, below_ptr + plane, w_ptr, vec_ptr - 2 * H_PAD, mean, rstd, depth, H_PAD, LD,
                                  BELOW_NORM, ACT, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
    tiles = member * (H_PAD // STAT_N) * 2 * capacity
    _keep(acc, mean, rstd, bias_ptr + member * BIAS_STRIDE, vec_ptr + H_PAD, z_ptr + plane, y_ptr + plane,
          stat_ptr + tiles, column, rows, capacity, width, H_PAD, BELOW_NORM, NORM, ACT, STAT_N)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "capacity", "depth", "width"],
            do_not_specialize_on_alignment=["add_ptr"])  # fmt: skip
def _output_kernel(below_ptr, stat_ptr, w_ptr, vec_ptr, add_ptr, out_ptr, sum_ptr,
                   num_rows, capacity, depth, width, norm_eps, scale,
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
        mean, rstd = _moments(stat_ptr, rows, capacity, width, norm_eps, STAT_N)
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


@triton.jit
def _pull_columns(acc, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column, rows, capacity, width,
                  H_PAD: tl.constexpr, NORM: tl.constexpr, BELOW_NORM: tl.constexpr, ACT: tl.constexpr,
                  STAT_N: tl.constexpr):  # fmt: skip
    """d and sums of STAT_N columns of a product; pointers are a program's member and rows."""
    offs_n = column + tl.arange(0, STAT_N)
    target = tl.arange(0, acc.shape[0])[:, None] * H_PAD + offs_n[None, :]
    z = tl.load(z_ptr + target).to(tl.float32)
    if NORM == "post" or NORM == "pre":
        gain = tl.load(vec_ptr + 2 * H_PAD + offs_n)[None, :]
    if NORM == "post" or NORM == "fold":
        if NORM == "post":
            acc *= gain
        # d_mean + xhat d_spread, with what is of the row alone taken together
        slope = rstd * d_spread
        level = d_mean - mean * slope
        acc = rstd[:, None] * (acc - (level[:, None] + slope[:, None] * _activation(z, ACT)))
        acc *= _activation_derivative(z, ACT)
    elif NORM == "pre":
        xhat = (z - mean[:, None]) * rstd[:, None]
        shift = tl.load(vec_ptr + 3 * H_PAD + offs_n)[None, :]
        acc *= _activation_derivative(xhat * gain + shift, ACT) * gain
    else:
        acc *= _activation_derivative(z, ACT)
    d = tl.where((offs_n < width)[None, :], acc, 0.0).to(d_ptr.dtype.element_ty)
    tl.store(d_ptr + target, d)
    d = d.to(tl.float32)
    sum_ptr += column // STAT_N * 2 * capacity
    if NORM == "pre":
        tl.store(sum_ptr + rows, tl.sum(d, axis=1))
        tl.store(sum_ptr + capacity + rows, tl.sum(d * xhat, axis=1))
    elif BELOW_NORM == "post" or BELOW_NORM == "fold":
        tl.store(sum_ptr + rows, tl.sum(d * tl.load(vec_ptr + H_PAD + offs_n)[None, :], axis=1))
        apart = z - tl.load(vec_ptr + offs_n)[None, :]
        tl.store(sum_ptr + capacity + rows, tl.sum(d * apart, axis=1))


@triton.jit
def _pull(acc, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column, rows, capacity, width,
          H_PAD: tl.constexpr, NORM: tl.constexpr, BELOW_NORM: tl.constexpr, ACT: tl.constexpr,
          STAT_N: tl.constexpr):  # fmt: skip
    """d and sums of a product's columns, STAT_N at a time; pointers are a program's member and rows."""
    if acc.shape[1] == STAT_N:
        _pull_columns(acc, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column, rows,
                      capacity, width, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
    else:  # halves, or quarters; no recursion, which Triton 3.2 lacks
        left, right = _halves(acc)
        if acc.shape[1] == 2 * STAT_N:
            _pull_columns(left, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column,
                          rows, capacity, width, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
            _pull_columns(right, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column +
                          STAT_N, rows, capacity, width, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
        else:
            tl.static_assert(acc.shape[1] == 4 * STAT_N)
            first, second = _halves(left)
            third, fourth = _halves(right)
            _pull_columns(first, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column,
                          rows, capacity, width, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
            _pull_columns(second, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column +
                          STAT_N, rows, capacity, width, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
            _pull_columns(third, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column +
                          2 * STAT_N, rows, capacity, width, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
            _pull_columns(fourth, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column +
                          3 * STAT_N, rows, capacity, width, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "capacity", "depth", "above_width", "width"],
            do_not_specialize_on_alignment=["cotangent_ptr"])  # fmt: skip
def _delta_kernel(cotangent_ptr, out_ptr, above_ptr, above_z_ptr, above_stat_ptr, above_sum_ptr,
                  w_ptr, above_vec_ptr, vec_ptr, z_ptr, stat_ptr, d_ptr, sum_ptr,
                  num_rows, capacity, depth, above_width, width, norm_eps,
                  TOP: tl.constexpr, OUT_DIM: tl.constexpr, OUT_PAD: tl.constexpr, OUT_ROWS: tl.constexpr,
                  W_STRIDE: tl.constexpr, VEC_STRIDE: tl.constexpr, H_PAD: tl.constexpr, LD: tl.constexpr,
                  ABOVE_NORM: tl.constexpr, NORM: tl.constexpr, BELOW_NORM: tl.constexpr, ACT: tl.constexpr,
                  DOT: tl.constexpr, STAT_N: tl.constexpr,
                  BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """d of a hidden layer from the one above, and the sums that are needed for its norm ("pre") or the one below.

    TOP: "none"; "rows": above is the output with the cotangent [E, num_rows, OUT_DIM], scaled to peak 1 row by row, so
    that a half-precision operand neither overflows nor vanishes (the pull-back is linear); "ones": dQ = 1.
    """
    member = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N
    first_row = tl.program_id(1) * BLOCK_B
    rows = first_row + tl.arange(0, BLOCK_B)
    plane = (member * capacity + first_row) * H_PAD
    tiles = member * (H_PAD // STAT_N) * 2 * capacity
    offs_n = tl.arange(0, BLOCK_N)
    w_ptr += member * W_STRIDE + column
    vec_ptr += member * VEC_STRIDE
    above_vec_ptr += member * VEC_STRIDE
    acc = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    d_mean = tl.zeros((BLOCK_B,), dtype=tl.float32)
    d_spread = tl.zeros((BLOCK_B,), dtype=tl.float32)
    NORMED: tl.constexpr = NORM == "post" or NORM == "fold"
    if TOP == "ones":
        acc += tl.load(w_ptr + offs_n).to(tl.float32)[None, :]
        if NORMED:
            d_mean += tl.load(above_vec_ptr + OUT_ROWS)
            q = tl.load(out_ptr + member * num_rows + rows, mask=rows < num_rows, other=0.0)
            d_spread = q - tl.load(above_vec_ptr)
    elif TOP == "rows":
        BLOCK_O: tl.constexpr = OUT_PAD if OUT_PAD < BLOCK_K else BLOCK_K
        in_batch = (rows < num_rows)[:, None]
        of_member = member * num_rows + rows
        peak = _row_peak(cotangent_ptr, of_member, in_batch, OUT_DIM, OUT_PAD, BLOCK_O)
        for o in tl.range(0, OUT_PAD, BLOCK_O, num_stages=1):
            offs_o = o + tl.arange(0, BLOCK_O)
            mask = in_batch & (offs_o < OUT_DIM)[None, :]
            source = of_member[:, None] * OUT_DIM + offs_o[None, :]
            d_out = (tl.load(cotangent_ptr + source, mask=mask, other=0.0) / peak).to(w_ptr.dtype.element_ty)
            if NORMED:
                d = d_out.to(tl.float32)
                d_mean += tl.sum(d * tl.load(above_vec_ptr + OUT_ROWS + offs_o)[None, :], axis=1)
                apart = tl.load(out_ptr + source, mask=mask, other=0.0) - tl.load(above_vec_ptr + offs_o)[None, :]
                d_spread += tl.sum(d * apart, axis=1)
            acc = _dot(d_out, tl.load(w_ptr + offs_o[:, None] * LD + offs_n[None, :]), acc, DOT)
    else:
        SUMS: tl.constexpr = NORMED and ABOVE_NORM == "pre"
        acc, d_mean, d_spread = _product_from_above(
            acc, above_ptr + plane, above_z_ptr + plane, above_stat_ptr + tiles, above_sum_ptr + tiles, w_ptr,
            above_vec_ptr, rows, capacity, depth, above_width, norm_eps, H_PAD, LD, ABOVE_NORM, SUMS, STAT_N, DOT,
            BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if NORMED and not SUMS:
            d_mean, d_spread = _totals(above_sum_ptr + tiles, rows, capacity, above_width, STAT_N)
    mean = d_mean
    rstd = d_mean
    if NORM != "none":
        mean, rstd = _moments(stat_ptr + tiles, rows, capacity, width, norm_eps, STAT_N)
    d_mean = d_mean / width
    d_spread = d_spread / width
    _pull(acc, mean, rstd, d_mean, d_spread, z_ptr + plane, d_ptr + plane, sum_ptr + tiles, vec_ptr, column, rows,
          capacity, width, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "capacity", "depth", "width"],
            do_not_specialize_on_alignment=["cotangent_ptr"])  # fmt: skip
def _input_gradient_kernel(cotangent_ptr, d_ptr, z_ptr, stat_ptr, sum_ptr, w_ptr, out_ptr,
                           num_rows, capacity, depth, width, norm_eps,
                           RESCALE: tl.constexpr, OUT_DIM: tl.constexpr, OUT_PAD: tl.constexpr, COLUMNS: tl.constexpr,
                           W_STRIDE: tl.constexpr, H_PAD: tl.constexpr, LD: tl.constexpr, NORM: tl.constexpr,
                           DOT: tl.constexpr, STAT_N: tl.constexpr,
                           BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """[E, num_rows, COLUMNS], float32: the first layer's d times the columns of its weights that w_ptr begins with.

    RESCALE: the cotangent [E, num_rows, OUT_DIM] was scaled to peak 1 (_delta_kernel).
    """
    member = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N
    first = tl.program_id(1) * BLOCK_B
    rows = first + tl.arange(0, BLOCK_B)
    plane = (member * capacity + first) * H_PAD
    tiles = member * (H_PAD // STAT_N) * 2 * capacity
    offs_n = column + tl.arange(0, BLOCK_N)
    acc, _, _ = _product_from_above(
        tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32), d_ptr + plane, z_ptr + plane, stat_ptr + tiles, sum_ptr + tiles,
        w_ptr + member * W_STRIDE + column, w_ptr, rows, capacity, depth, width, norm_eps, H_PAD, LD, NORM, False,
        STAT_N, DOT, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    in_batch = (rows < num_rows)[:, None]
    if RESCALE:
        BLOCK_O: tl.constexpr = OUT_PAD if OUT_PAD < BLOCK_K else BLOCK_K
        acc *= _row_peak(cotangent_ptr, member * num_rows + rows, in_batch, OUT_DIM, OUT_PAD, BLOCK_O)
    target = (member * num_rows + rows)[:, None] * COLUMNS + offs_n[None, :]
    tl.store(out_ptr + target, acc, mask=in_batch & (offs_n < COLUMNS)[None, :])
