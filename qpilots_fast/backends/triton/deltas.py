"""The pull-back of one layer of all members of a network a launch; planes, norms and their sums as in layers.py."""
# No `from __future__ import annotations` here: the interpreter recognises constexpr parameters by their evaluated type.

import triton
import triton.language as tl

from .activation import _activation, _activation_derivative
from .tiles import _dot, _halves, _moments, _within


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
def _totals(sum_ptr, rows, capacity, WIDTH: tl.constexpr, STAT_N: tl.constexpr):
    """Both sums of each row, from its column tiles' in order."""
    first = tl.load(sum_ptr + rows)
    second = tl.load(sum_ptr + capacity + rows)
    for _ in range(STAT_N, WIDTH, STAT_N):
        sum_ptr += 2 * capacity
        first += tl.load(sum_ptr + rows)
        second += tl.load(sum_ptr + capacity + rows)
    return first, second


@triton.jit
def _product_from_above(acc, d_ptr, z_ptr, stat_ptr, sum_ptr, w_ptr, c_ptr, rows, capacity, depth, norm_eps,
                        WIDTH: tl.constexpr, H_PAD: tl.constexpr, LD: tl.constexpr, NORM: tl.constexpr,
                        SUMS: tl.constexpr, STAT_N: tl.constexpr, DOT: tl.constexpr,
                        BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """(acc + dz @ W over the layer above, and SUMS: those of dz u and dz (z - c)); pointers are that layer's."""
    offs_k = tl.arange(0, BLOCK_K)
    offs_a = tl.arange(0, BLOCK_B)[:, None] * H_PAD + offs_k[None, :]
    offs_w = offs_k[:, None] * LD + tl.arange(0, BLOCK_N)[None, :]
    first = tl.zeros((BLOCK_B,), dtype=tl.float32)
    second = tl.zeros((BLOCK_B,), dtype=tl.float32)
    if NORM == "pre":
        mean, rstd = _moments(stat_ptr, rows, capacity, norm_eps, WIDTH, STAT_N)
        d_mean, d_spread = _totals(sum_ptr, rows, capacity, WIDTH, STAT_N)
        d_mean *= 1.0 / WIDTH
        d_spread *= 1.0 / WIDTH
    for k in range(0, depth, BLOCK_K):
        d = tl.load(d_ptr + k + offs_a)
        if NORM == "pre":
            z = tl.load(z_ptr + k + offs_a).to(tl.float32)
            xhat = (z - mean[:, None]) * rstd[:, None]
            dz = rstd[:, None] * (d.to(tl.float32) - d_mean[:, None] - xhat * d_spread[:, None])
            d = tl.where((k + offs_k < WIDTH)[None, :], dz, 0.0).to(w_ptr.dtype.element_ty)
            if SUMS:
                dz = d.to(tl.float32)
                first += tl.sum(dz * tl.load(c_ptr + H_PAD + k + offs_k)[None, :], axis=1)
                second += tl.sum(dz * (z - tl.load(c_ptr + k + offs_k)[None, :]), axis=1)
        acc = _dot(d, tl.load(w_ptr + k * LD + offs_w), acc, DOT)
    return acc, first, second


@triton.jit
def _pull_columns(acc, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column, rows, capacity,
                  WIDTH: tl.constexpr, H_PAD: tl.constexpr, NORM: tl.constexpr, BELOW_NORM: tl.constexpr,
                  ACT: tl.constexpr, STAT_N: tl.constexpr):  # fmt: skip
    """d and sums of STAT_N columns of a product; pointers are a program's member and rows."""
    offs_n = column + tl.arange(0, STAT_N)
    target = tl.arange(0, acc.shape[0])[:, None] * H_PAD + offs_n[None, :]
    if NORM != "chain":
        z = tl.load(z_ptr + target).to(tl.float32)
    if NORM == "post" or NORM == "pre":
        gain = tl.load(vec_ptr + 2 * H_PAD + offs_n)[None, :]
    if NORM == "post" or NORM == "fold":
        if NORM == "post":
            acc *= gain
        # rstd (acc - d_mean - xhat d_spread), with what is of the row alone taken together
        slope = -rstd * rstd * d_spread
        level = -rstd * d_mean - mean * slope
        acc = acc * rstd[:, None] + (_activation(z, ACT) * slope[:, None] + level[:, None])
        acc *= _activation_derivative(z, ACT)
    elif NORM == "pre":
        xhat = (z - mean[:, None]) * rstd[:, None]
        shift = tl.load(vec_ptr + 3 * H_PAD + offs_n)[None, :]
        acc *= _activation_derivative(xhat * gain + shift, ACT) * gain
    elif NORM == "none":
        acc *= _activation_derivative(z, ACT)
    d = _within(acc, offs_n, WIDTH, H_PAD).to(d_ptr.dtype.element_ty)
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
def _pull(acc, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column, rows, capacity,
          WIDTH: tl.constexpr, H_PAD: tl.constexpr, NORM: tl.constexpr, BELOW_NORM: tl.constexpr, ACT: tl.constexpr,
          STAT_N: tl.constexpr):  # fmt: skip
    """d and sums of a product's columns, STAT_N at a time; pointers are a program's member and rows."""
    if acc.shape[1] == STAT_N:
        _pull_columns(acc, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column, rows,
                      capacity, WIDTH, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
    else:  # halves, or quarters; no recursion, which Triton 3.2 lacks
        left, right = _halves(acc)
        if acc.shape[1] == 2 * STAT_N:
            _pull_columns(left, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column,
                          rows, capacity, WIDTH, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
            _pull_columns(right, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column +
                          STAT_N, rows, capacity, WIDTH, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
        else:
            tl.static_assert(acc.shape[1] == 4 * STAT_N)
            first, second = _halves(left)
            third, fourth = _halves(right)
            _pull_columns(first, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column,
                          rows, capacity, WIDTH, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
            _pull_columns(second, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column +
                          STAT_N, rows, capacity, WIDTH, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
            _pull_columns(third, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column +
                          2 * STAT_N, rows, capacity, WIDTH, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip
            _pull_columns(fourth, mean, rstd, d_mean, d_spread, z_ptr, d_ptr, sum_ptr, vec_ptr, column +
                          3 * STAT_N, rows, capacity, WIDTH, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "capacity", "depth"],
            do_not_specialize_on_alignment=["cotangent_ptr"])  # fmt: skip
def _delta_kernel(cotangent_ptr, out_ptr, above_ptr, above_z_ptr, above_stat_ptr, above_sum_ptr,
                  w_ptr, above_vec_ptr, vec_ptr, z_ptr, stat_ptr, d_ptr, sum_ptr,
                  num_rows, capacity, depth, norm_eps, ABOVE_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
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
            above_vec_ptr, rows, capacity, depth, norm_eps, ABOVE_WIDTH, H_PAD, LD, ABOVE_NORM, SUMS, STAT_N, DOT,
            BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if NORMED and not SUMS:
            d_mean, d_spread = _totals(above_sum_ptr + tiles, rows, capacity, ABOVE_WIDTH, STAT_N)
    mean = d_mean
    rstd = d_mean
    if NORM != "none" and NORM != "chain":
        mean, rstd = _moments(stat_ptr + tiles, rows, capacity, norm_eps, WIDTH, STAT_N)
    d_mean *= 1.0 / WIDTH
    d_spread *= 1.0 / WIDTH
    _pull(acc, mean, rstd, d_mean, d_spread, z_ptr + plane, d_ptr + plane, sum_ptr + tiles, vec_ptr, column, rows,
          capacity, WIDTH, H_PAD, NORM, BELOW_NORM, ACT, STAT_N)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "capacity", "depth"],
            do_not_specialize_on_alignment=["cotangent_ptr"])  # fmt: skip
def _input_gradient_kernel(cotangent_ptr, d_ptr, z_ptr, stat_ptr, sum_ptr, w_ptr, out_ptr,
                           num_rows, capacity, depth, norm_eps, WIDTH: tl.constexpr,
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
        w_ptr + member * W_STRIDE + column, w_ptr, rows, capacity, depth, norm_eps, WIDTH, H_PAD, LD, NORM, False,
        STAT_N, DOT, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    in_batch = (rows < num_rows)[:, None]
    if RESCALE:
        BLOCK_O: tl.constexpr = OUT_PAD if OUT_PAD < BLOCK_K else BLOCK_K
        acc *= _row_peak(cotangent_ptr, member * num_rows + rows, in_batch, OUT_DIM, OUT_PAD, BLOCK_O)
    target = (member * num_rows + rows)[:, None] * COLUMNS + offs_n[None, :]
    tl.store(out_ptr + target, acc, mask=in_batch & (offs_n < COLUMNS)[None, :])
