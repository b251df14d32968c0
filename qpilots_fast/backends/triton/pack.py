"""Parameters into the packed layout, wherever they lie: what is copied, and what is folded with a LayerNorm."""
# No `from __future__ import annotations` here: the interpreter recognises constexpr parameters by their evaluated type.

import triton
import triton.language as tl

PACK_FIELDS = tl.constexpr(12)


@triton.jit
def _pack_kernel(item_ptr, block_ptr, weights_ptr, vectors_ptr,
                 SOURCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One tile of one parameter into the packed buffers; the table of items says what and where.

    item_ptr [*, 12] int64: source address, row stride, column stride, columns, elements (the last row may be short),
    destination, its leading dimension, kind (0 weights, 1 vectors, 2 bias of constant columns). Then, for weights:
    address of a factor (0: none); for the bias, whose row t is bias + W[:, indices] features[t]: addresses of the bias
    (0: none), of the features [rows, features] and of the column indices [features] int64, and features.
    block_ptr [grid, 3] int64: item, first row, first column.
    """
    block_ptr += 3 * tl.program_id(0)
    item = item_ptr + tl.load(block_ptr) * PACK_FIELDS
    row = tl.load(block_ptr + 1) + tl.arange(0, ROWS)[:, None] + tl.zeros((1, COLUMNS), dtype=tl.int64)
    column = tl.load(block_ptr + 2) + tl.arange(0, COLUMNS)[None, :] + tl.zeros((ROWS, 1), dtype=tl.int64)
    source = tl.load(item).to(tl.pointer_type(SOURCE))
    row_stride = tl.load(item + 1)
    column_stride = tl.load(item + 2)
    columns = tl.load(item + 3)
    mask = (column < columns) & (row * columns + column < tl.load(item + 4))
    target = tl.load(item + 5) + row * tl.load(item + 6) + column
    kind = tl.load(item + 7)
    if kind == 2:
        # bias[h] + sum_j W[h, column j] feature[t, j]; here row is t and column is h
        bias = tl.load(item + 8).to(tl.pointer_type(SOURCE))
        features = tl.load(item + 9).to(tl.pointer_type(tl.float32))
        indices = tl.load(item + 10).to(tl.pointer_type(tl.int64))
        num_features = tl.load(item + 11)
        has_bias = tl.zeros_like(column) + tl.load(item + 8) != 0
        total = tl.load(bias + column, mask=mask & has_bias, other=0.0).to(tl.float32)
        for j in range(0, num_features):
            w = tl.load(source + column * row_stride + tl.load(indices + j) * column_stride, mask=mask, other=0.0)
            total += w.to(tl.float32) * tl.load(features + row * num_features + j, mask=mask, other=0.0)
        tl.store(vectors_ptr + target, total, mask=mask)
    else:
        value = tl.load(source + row * row_stride + column * column_stride, mask=mask, other=0.0).to(tl.float32)
        if kind == 0:
            has_factor = tl.load(item + 8) != 0
            value *= tl.load(tl.load(item + 8).to(tl.pointer_type(tl.float32)), mask=has_factor, other=1.0)
            tl.store(weights_ptr + target, value.to(weights_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(vectors_ptr + target, value, mask=mask)


FOLD_FIELDS = tl.constexpr(12)


@triton.jit
def _fold_kernel(item_ptr, block_ptr, weights_ptr, vectors_ptr,
                 SOURCE: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """ROWS rows of a weight above a "post" LayerNorm (see layers.py), and their c and u; runs after the pack kernel.

    item_ptr [*, 12] int64: source address, row stride, column stride, rows, columns, destination, its leading
    dimension, places among the vectors of c, of u, of gain and of shift, and whether c holds a bias.
    block_ptr [grid, 2] int64: item, first row. SCALE: the gain goes into the packed weight.
    """
    block_ptr += 2 * tl.program_id(0)
    item = item_ptr + tl.load(block_ptr) * FOLD_FIELDS
    row = tl.load(block_ptr + 1) + tl.arange(0, ROWS)
    source = tl.load(item).to(tl.pointer_type(SOURCE)) + row[:, None] * tl.load(item + 1)
    column_stride = tl.load(item + 2)
    in_rows = row < tl.load(item + 3)
    columns = tl.load(item + 4)
    target = weights_ptr + tl.load(item + 5) + row[:, None] * tl.load(item + 6)
    c_ptr = vectors_ptr + tl.load(item + 7)
    gain_ptr = vectors_ptr + tl.load(item + 9)
    shift_ptr = vectors_ptr + tl.load(item + 10)
    c = tl.load(c_ptr + row, mask=in_rows & (row * 0 + tl.load(item + 11) != 0), other=0.0)
    u = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS).to(tl.int64)
        mask = in_rows[:, None] & (column < columns)[None, :]
        w = tl.load(source + column[None, :] * column_stride, mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + column, mask=column < columns, other=0.0)[None, :]
        c += tl.sum(w * tl.load(shift_ptr + column, mask=column < columns, other=0.0)[None, :], axis=1)
        if SCALE:
            packed = (w * gain).to(weights_ptr.dtype.element_ty)
            u += tl.sum(packed.to(tl.float32), axis=1)
        else:
            packed = w.to(weights_ptr.dtype.element_ty)
            u += tl.sum(packed.to(tl.float32) * gain, axis=1)
        tl.store(target + column[None, :], packed, mask=mask)
    tl.store(c_ptr + row, c, mask=in_rows)
    tl.store(vectors_ptr + tl.load(item + 8) + row, u, mask=in_rows)
