"""What every kernel of layers does with a tile: products, a row's moments, columns, bounds."""
# No `from __future__ import annotations` here: the interpreter recognises constexpr parameters by their evaluated type.

import triton
import triton.language as tl


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
def _moments(stat_ptr, rows, capacity, eps, WIDTH: tl.constexpr, STAT_N: tl.constexpr):
    """(mean, 1 / std) of each row, from its column tiles' in order, by how far their means are from the first's."""
    # A loop, not unrolled here: Triton would make the moments anew in each layout of a tile that reads them.
    first = tl.load(stat_ptr + rows)
    spread = tl.load(stat_ptr + capacity + rows)
    apart = tl.zeros_like(first)
    square = tl.zeros_like(first)
    for start in range(STAT_N, WIDTH, STAT_N):
        stat_ptr += 2 * capacity
        count = STAT_N * 1.0 if WIDTH % STAT_N == 0 else tl.minimum(WIDTH - start, STAT_N).to(tl.float32)
        delta = tl.load(stat_ptr + rows) - first
        spread += tl.load(stat_ptr + capacity + rows)
        apart += count * delta
        square += count * delta * delta
    apart *= 1.0 / WIDTH
    # the difference keeps at least 1 / tiles of square
    return first + apart, tl.rsqrt(spread * (1.0 / WIDTH) + (square * (1.0 / WIDTH) - apart * apart) + eps)


@triton.jit
def _within(tile, offs_n, WIDTH: tl.constexpr, H_PAD: tl.constexpr):
    """A tile with zeros beyond a layer's columns, where it may have some there."""
    if WIDTH < H_PAD:
        tile = tl.where((offs_n < WIDTH)[None, :], tile, 0.0)
    return tile


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    parts = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))
