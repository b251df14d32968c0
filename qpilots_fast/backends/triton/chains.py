"""Chains of operations on the rows of a hidden layer (row_ops.py), and their pull-back; the products are layers.py's.

A program owns BLOCK_B whole rows of a member; they stay in registers from the first operation to the last. Planes
[E, capacity, H_PAD], as layers.py has them:

- rows, float32: z, which the product below wrote; in the pull-back d h, which the product above wrote.
- kept, float32: the rows that "keep" kept; in the pull-back what "add" has for them.
- h, operand format: what the next product reads; in the pull-back dz.
- save i, float32, of each operation but "keep" and "add": what its pull-back reads; slopes, xhat of a norm, p of a
  softmax.

rstd [operations, E, capacity], float32: 1 / std of the rows of norms. Vectors of the layer: c, the numbers (two of each
operation), and of operation i two more, gain and shift where it is a norm.
"""
# No `from __future__ import annotations` here: the interpreter recognises constexpr parameters by their evaluated type.

import triton
import triton.language as tl

from .activation import _activation, _activation_derivative
from .tiles import _clip


@triton.jit
def _is_low(z, offs_n, count, WIDTH: tl.constexpr):
    """1 where z is among the `count` smallest of its row, of equal ones the first, else 0; WIDTH^2 comparisons."""
    before = tl.zeros_like(z)
    for j in range(0, WIDTH):
        other = tl.sum(tl.where(offs_n == j, z, 0.0), axis=1)[:, None]
        before += tl.where((other < z) | ((other == z) & (j < offs_n)), 1.0, 0.0)
    return tl.where(before < count, 1.0, 0.0)


@triton.jit
def _value_slope(z, offs_n, number_ptr, OP: tl.constexpr, WIDTH: tl.constexpr):
    """(f(z), what a cotangent is multiplied by) of an operation that is no norm, softmax or modulation."""
    if OP == "leaky_relu":
        slope = tl.where(z > 0, 1.0, tl.load(number_ptr))
        value = z * slope
    elif OP == "clamp":
        low, high = tl.load(number_ptr), tl.load(number_ptr + 1)
        value = _clip(z, low, high)
        slope = tl.where((z < low) | (z > high), 0.0, 1.0)
    elif OP == "lowest":
        slope = _is_low(z, offs_n, tl.load(number_ptr), WIDTH)
        value = z * slope
    else:
        value = _activation(z, OP)
        slope = _activation_derivative(z, OP)
    return value, slope


@triton.jit
def _run_op(z, kept, save_ptr, vec_ptr, film_ptr, rstd_ptr, target, rows, offs_n, in_batch,
            OP: tl.constexpr, INDEX: tl.constexpr, WIDTH: tl.constexpr, H_PAD: tl.constexpr):  # fmt: skip
    """(z, kept) after operation INDEX; columns beyond the width hold anything."""
    within = offs_n < WIDTH
    mask = in_batch & within
    number_ptr = vec_ptr + H_PAD + 2 * INDEX
    vec_ptr += (2 + 2 * INDEX) * H_PAD
    if OP == "keep":
        kept = z
    elif OP == "add":
        z += kept
    elif OP == "film":
        scale = tl.load(film_ptr + offs_n, mask=mask, other=0.0)
        z = z * scale + tl.load(film_ptr + WIDTH + offs_n, mask=mask, other=0.0)
        tl.store(save_ptr + target, scale, mask=mask)
    elif OP == "softmax":
        z = tl.where(within, z, float("-inf"))
        z = tl.exp(z - tl.max(z, axis=1)[:, None])
        z = z / tl.sum(z, axis=1)[:, None]
        tl.store(save_ptr + target, z, mask=mask)
    elif OP == "layer_norm" or OP == "rms_norm":
        z = tl.where(within, z, 0.0)
        if OP == "layer_norm":
            z = tl.where(within, z - (tl.sum(z, axis=1) / WIDTH)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(z * z, axis=1) / WIDTH + tl.load(number_ptr))[:, None]
        z = z * rstd
        tl.store(save_ptr + target, z, mask=mask)
        tl.store(rstd_ptr + rows, rstd, mask=in_batch)
        gain = tl.load(vec_ptr + offs_n, mask=within, other=0.0)
        z = z * gain + tl.load(vec_ptr + H_PAD + offs_n, mask=within, other=0.0)
    elif OP != "none":
        z, slope = _value_slope(z, offs_n, number_ptr, OP, WIDTH)
        tl.store(save_ptr + target, slope, mask=mask)
    return z, kept


@triton.jit
def _pull_op(d, d_kept, save_ptr, vec_ptr, rstd_ptr, target, rows, offs_n, in_batch,
             OP: tl.constexpr, INDEX: tl.constexpr, WIDTH: tl.constexpr, H_PAD: tl.constexpr):  # fmt: skip
    """(d, d_kept) before operation INDEX, of those after it; columns of d beyond the width hold anything."""
    within = offs_n < WIDTH
    mask = in_batch & within
    if OP == "keep":
        d += d_kept
        d_kept = tl.zeros_like(d)
    elif OP == "add":
        d_kept += d
    elif OP == "softmax":
        p = tl.load(save_ptr + target, mask=mask, other=0.0)
        d = p * (d - tl.sum(p * d, axis=1)[:, None])
    elif OP == "layer_norm" or OP == "rms_norm":
        d *= tl.load(vec_ptr + (2 + 2 * INDEX) * H_PAD + offs_n, mask=within, other=0.0)
        xhat = tl.load(save_ptr + target, mask=mask, other=0.0)
        spread = xhat * (tl.sum(d * xhat, axis=1) / WIDTH)[:, None]
        if OP == "layer_norm":
            d -= (tl.sum(d, axis=1) / WIDTH)[:, None]
        d = tl.load(rstd_ptr + rows, mask=in_batch, other=0.0) * (d - spread)
    elif OP != "none":
        d *= tl.load(save_ptr + target, mask=mask, other=0.0)
    return d, d_kept


@triton.jit(do_not_specialize=["num_rows", "capacity"],
            do_not_specialize_on_alignment=["film_ptr"])  # fmt: skip
def _chain_kernel(rows_ptr, kept_ptr, h_ptr, vec_ptr, film_ptr, rstd_ptr,
                  save0_ptr, save1_ptr, save2_ptr, save3_ptr, save4_ptr, save5_ptr,
                  num_rows, capacity,
                  OP0: tl.constexpr, OP1: tl.constexpr, OP2: tl.constexpr, OP3: tl.constexpr, OP4: tl.constexpr,
                  OP5: tl.constexpr, LOADS: tl.constexpr, STORES: tl.constexpr, PULL: tl.constexpr,
                  WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VEC_STRIDE: tl.constexpr, FILM_STRIDE: tl.constexpr,
                  H_PAD: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """h from z by the operations OP0 to OP5 ("none": no more); PULL: dz from d h, by the last of them first.

    LOADS, STORES: whether kept is read first and written last. COLUMNS: of h that are written, zeros beyond the WIDTH.
    film_ptr: scale and shift [WIDTH] of each row, FILM_STRIDE apart (0: the same for all).
    """
    member = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    offs_n = tl.arange(0, BLOCK_W)[None, :]
    in_batch = rows < num_rows
    within = offs_n < WIDTH
    target = (member * capacity + rows) * H_PAD + offs_n
    vec_ptr += member * VEC_STRIDE
    film_ptr += rows * FILM_STRIDE  # [BLOCK_B, 1]
    rstd_ptr += member * capacity
    step = tl.num_programs(1).to(tl.int64) * capacity
    z = tl.load(rows_ptr + target, mask=in_batch & within, other=0.0)
    kept = tl.zeros_like(z)
    if LOADS:
        kept = tl.load(kept_ptr + target, mask=in_batch & within, other=0.0)
    if PULL:
        z, kept = _pull_op(z, kept, save5_ptr, vec_ptr, rstd_ptr + 5 * step, target, rows, offs_n, in_batch,
                           OP5, 5, WIDTH, H_PAD)  # fmt: skip
        z, kept = _pull_op(z, kept, save4_ptr, vec_ptr, rstd_ptr + 4 * step, target, rows, offs_n, in_batch,
                           OP4, 4, WIDTH, H_PAD)  # fmt: skip
        z, kept = _pull_op(z, kept, save3_ptr, vec_ptr, rstd_ptr + 3 * step, target, rows, offs_n, in_batch,
                           OP3, 3, WIDTH, H_PAD)  # fmt: skip
        z, kept = _pull_op(z, kept, save2_ptr, vec_ptr, rstd_ptr + 2 * step, target, rows, offs_n, in_batch,
                           OP2, 2, WIDTH, H_PAD)  # fmt: skip
        z, kept = _pull_op(z, kept, save1_ptr, vec_ptr, rstd_ptr + 1 * step, target, rows, offs_n, in_batch,
                           OP1, 1, WIDTH, H_PAD)  # fmt: skip
        z, kept = _pull_op(z, kept, save0_ptr, vec_ptr, rstd_ptr + 0 * step, target, rows, offs_n, in_batch,
                           OP0, 0, WIDTH, H_PAD)  # fmt: skip
    else:
        z, kept = _run_op(z, kept, save0_ptr, vec_ptr, film_ptr, rstd_ptr + 0 * step, target, rows, offs_n, in_batch,
                          OP0, 0, WIDTH, H_PAD)  # fmt: skip
        z, kept = _run_op(z, kept, save1_ptr, vec_ptr, film_ptr, rstd_ptr + 1 * step, target, rows, offs_n, in_batch,
                          OP1, 1, WIDTH, H_PAD)  # fmt: skip
        z, kept = _run_op(z, kept, save2_ptr, vec_ptr, film_ptr, rstd_ptr + 2 * step, target, rows, offs_n, in_batch,
                          OP2, 2, WIDTH, H_PAD)  # fmt: skip
        z, kept = _run_op(z, kept, save3_ptr, vec_ptr, film_ptr, rstd_ptr + 3 * step, target, rows, offs_n, in_batch,
                          OP3, 3, WIDTH, H_PAD)  # fmt: skip
        z, kept = _run_op(z, kept, save4_ptr, vec_ptr, film_ptr, rstd_ptr + 4 * step, target, rows, offs_n, in_batch,
                          OP4, 4, WIDTH, H_PAD)  # fmt: skip
        z, kept = _run_op(z, kept, save5_ptr, vec_ptr, film_ptr, rstd_ptr + 5 * step, target, rows, offs_n, in_batch,
                          OP5, 5, WIDTH, H_PAD)  # fmt: skip
    if STORES:
        tl.store(kept_ptr + target, kept, mask=in_batch & within)
    h = tl.where(within, z, 0.0).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + target, h, mask=in_batch & (offs_n < COLUMNS))
