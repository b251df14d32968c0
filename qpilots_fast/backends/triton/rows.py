"""What happens to whole rows of actions between the networks: the critics combined, the update, and GLASS draws.

Rows are float32 [*, ACTION_DIM]; a program owns BLOCK_B of them. R = B N estimates ("draws") a step, N = 1 unless the
estimate is mfm or glass; draw n of row b is r = b N + n.
"""
# No `from __future__ import annotations` here: the interpreter recognises constexpr parameters by their evaluated type.

import triton
import triton.language as tl

from .tiles import _clip


@triton.jit
def _bounds(bounds_ptr, A_PAD: tl.constexpr):
    """(low, high) of the actions, [1, A_PAD] each."""
    offs_a = tl.arange(0, A_PAD)
    return tl.load(bounds_ptr + offs_a)[None, :], tl.load(bounds_ptr + A_PAD + offs_a)[None, :]


@triton.jit
def _aggregate(q_ptr, rows, mask_b, num_rows, rho, E: tl.constexpr, AGG: tl.constexpr):
    """(Qbar, mean - Q_0, population std, minimum, all finite) of q [E, num_rows] at the given rows.

    Deviations are taken from Q_0, so that members that agree give exactly 0.
    """
    first = tl.load(q_ptr + rows, mask=mask_b, other=0.0)
    mean = tl.zeros_like(first)
    lowest = first
    finite = tl.abs(first) < float("inf")
    for e in range(1, E):
        q = tl.load(q_ptr + e * num_rows + rows, mask=mask_b, other=0.0)
        mean += q - first
        lowest = tl.minimum(lowest, q)
        finite = finite & (tl.abs(q) < float("inf"))
    mean = mean / E
    spread = tl.zeros_like(mean)
    for e in range(0, E):
        deviation = (tl.load(q_ptr + e * num_rows + rows, mask=mask_b, other=0.0) - first) - mean
        spread += deviation * deviation
    std = tl.sqrt(spread / E)
    if AGG == "pessimistic":
        q_bar = (first + mean) - rho * std
    elif AGG == "mean":
        q_bar = first + mean
    else:
        q_bar = lowest
    return tl.where(finite, q_bar, float("nan")), mean, std, lowest, finite


@triton.jit
def _critic_gradient(q_ptr, dq_ptr, a_ptr, rows, mask_b, num_rows, rho, bounds_ptr,
                     E: tl.constexpr, ACTION_DIM: tl.constexpr, A_PAD: tl.constexpr, AGG: tl.constexpr,
                     MASKED: tl.constexpr):  # fmt: skip
    """(d Qbar / d a [rows, A_PAD], std of the members): sum_j w_j dQ_j/da, NaN where a member has no finite value."""
    _, mean, std, lowest, finite = _aggregate(q_ptr, rows, mask_b, num_rows, rho, E, AGG)
    offs_a = tl.arange(0, A_PAD)
    mask_a = mask_b[:, None] & (offs_a < ACTION_DIM)[None, :]
    element = rows[:, None] * ACTION_DIM + offs_a[None, :]
    ties = tl.zeros_like(mean)
    if AGG == "min":
        for e in range(0, E):
            q = tl.load(q_ptr + e * num_rows + rows, mask=mask_b, other=0.0)
            ties += tl.where(q == lowest, 1.0, 0.0)
    first = tl.load(q_ptr + rows, mask=mask_b, other=0.0)
    d_a = tl.load(dq_ptr + element, mask=mask_a, other=0.0) * 0.0
    for e in range(0, E):
        q = tl.load(q_ptr + e * num_rows + rows, mask=mask_b, other=0.0)
        if AGG == "pessimistic":
            # w_j = 1/E - rho (Q_j - mean) / (E std)
            apart = (q - first) - mean
            weight = (1.0 - tl.where(std == 0.0, 0.0, rho * apart / tl.where(std == 0.0, 1.0, std))) / E
        elif AGG == "mean":
            weight = tl.zeros_like(mean) + 1.0 / E
        else:
            weight = tl.where(q == lowest, 1.0, 0.0) / ties
        dq = tl.load(dq_ptr + e * num_rows * ACTION_DIM + element, mask=mask_a, other=0.0)
        d_a += weight[:, None] * dq
    d_a = tl.where(finite[:, None], d_a, float("nan"))
    if MASKED:
        a = tl.load(a_ptr + element, mask=mask_a, other=0.0)
        low, high = _bounds(bounds_ptr, A_PAD)
        d_a = tl.where((a >= low) & (a <= high), d_a, 0.0)
    return tl.where(mask_a, d_a, 0.0), std


@triton.jit
def _row_norm(g):
    """L2 norm of each row without overflow or underflow in the squares; not finite where g is not."""
    peak = tl.max(tl.abs(g), axis=1)
    safe = tl.where((peak > 0.0) & (peak < float("inf")), peak, 1.0)
    scaled = g / safe[:, None]
    return safe * tl.sqrt(tl.sum(scaled * scaled, axis=1))


@triton.jit
def _steer_velocity(v, g, std, dims, alpha, gain, floor, max_grad_norm, gaf_decay, gaf_min, max_disagreement,
                    SCALE: tl.constexpr):  # fmt: skip
    """(v + scale g, norm of g, usable, gated); a row keeps v where g is not finite (norm 0) or the critics disagree.

    alpha: [rows], each row's strength at this step; gain: 1 / gaf_beta.
    """
    g = tl.where(dims > 0.0, g, 0.0)
    norm = _row_norm(g)
    usable = norm < float("inf")
    if SCALE == "norm_match":
        scale = alpha * _row_norm(v * dims) / (norm + floor)
    elif SCALE == "absolute":
        scale = alpha
    else:
        damping = tl.exp(-gaf_decay * std)
        usable = usable & (damping < float("inf"))
        clipped = tl.minimum(max_grad_norm / tl.where(norm > 0.0, norm, 1.0), 1.0)
        scale = gain * alpha * tl.maximum(damping, gaf_min) * clipped
    gated = usable & (std > max_disagreement)
    steered = v + tl.where((usable & ~gated)[:, None], scale[:, None] * g, 0.0)
    return steered, tl.where(usable, norm, 0.0), usable, gated


@triton.jit(do_not_specialize=["num_rows", "num_draws"], do_not_specialize_on_alignment=["a_ptr"])
def _combine_kernel(q_ptr, dq_ptr, a_ptr, bounds_ptr, d_a_ptr, std_ptr, num_rows, num_draws, rho, tilt,
                    DRAWS: tl.constexpr, E: tl.constexpr, ACTION_DIM: tl.constexpr, A_PAD: tl.constexpr,
                    AGG: tl.constexpr, MASKED: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """d Qbar / d a [R, ACTION_DIM] and the members' std [R] of q [E, R] and dq [E, R, ACTION_DIM].

    DRAWS: both times the draw's weight, softmax_n(tilt Qbar_n) over the num_draws of its row.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = rows < num_rows
    d_a, std = _critic_gradient(q_ptr, dq_ptr, a_ptr, rows, mask_b, num_rows, rho, bounds_ptr,
                                E, ACTION_DIM, A_PAD, AGG, MASKED)  # fmt: skip
    if DRAWS:
        first = rows // num_draws * num_draws
        own, _, _, _, _ = _aggregate(q_ptr, rows, mask_b, num_rows, rho, E, AGG)
        peak = own
        for n in range(0, num_draws):
            sibling, _, _, _, _ = _aggregate(q_ptr, first + n, mask_b, num_rows, rho, E, AGG)
            peak = tl.maximum(peak, sibling)
        total = tl.zeros((BLOCK_B,), dtype=tl.float32)
        for n in range(0, num_draws):
            sibling, _, _, _, _ = _aggregate(q_ptr, first + n, mask_b, num_rows, rho, E, AGG)
            total += tl.exp(tilt * sibling - tilt * peak)
        weight = tl.exp(tilt * own - tilt * peak) / total
        d_a *= weight[:, None]
        std *= weight
    offs_a = tl.arange(0, A_PAD)
    target = rows[:, None] * ACTION_DIM + offs_a[None, :]
    tl.store(d_a_ptr + target, d_a, mask=mask_b[:, None] & (offs_a < ACTION_DIM)[None, :])
    tl.store(std_ptr + rows, std, mask=mask_b)


@triton.jit(do_not_specialize=["num_rows", "num_draws", "step", "report_at"],
            do_not_specialize_on_alignment=["x_ptr", "out_ptr", "alpha_ptr"])  # fmt: skip
def _update_kernel(x_ptr, v_ptr, g_ptr, through_ptr, std_ptr, out_ptr, schedule_ptr, dims_ptr, bounds_ptr, alpha_ptr,
                   norm_ptr, nonfinite_ptr, row_std_ptr, gated_ptr, num_rows, num_draws, step, report_at,
                   gain, tilt, floor, max_grad_norm, gaf_decay, gaf_min, max_disagreement,
                   STEER: tl.constexpr, THROUGH: tl.constexpr, LAST: tl.constexpr, SCALE: tl.constexpr,
                   ACTION_DIM: tl.constexpr, A_PAD: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """The Euler step of x [B, ACTION_DIM] along v, into out. LAST: clipped into the bounds [2, A_PAD].

    STEER: v is steered first, by the sum over a row's num_draws of g [R, ACTION_DIM] (THROUGH: plus 1 - t times its
    pull-back through the flow) at std [R], and the report's rows of this step are written, from report_at on.
    schedule_ptr [K, 3]: 1 - t_k, dt_k, weight_k. alpha_ptr [B]: each row's strength.
    """
    offs_a = tl.arange(0, A_PAD)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = rows < num_rows
    mask_a = mask_b[:, None] & (offs_a < ACTION_DIM)[None, :]
    element = rows[:, None] * ACTION_DIM + offs_a[None, :]
    x = tl.load(x_ptr + element, mask=mask_a, other=0.0)
    v = tl.load(v_ptr + element, mask=mask_a, other=0.0)
    schedule_ptr += 3 * step
    if STEER:
        g = tl.zeros((BLOCK_B, A_PAD), dtype=tl.float32)
        std = tl.zeros((BLOCK_B,), dtype=tl.float32)
        for n in range(0, num_draws):
            draws = rows * num_draws + n
            g += tl.load(g_ptr + draws[:, None] * ACTION_DIM + offs_a[None, :], mask=mask_a, other=0.0)
            std += tl.load(std_ptr + draws, mask=mask_b, other=0.0)
        if THROUGH:
            g += tl.load(schedule_ptr) * tl.load(through_ptr + element, mask=mask_a, other=0.0)
        alpha = tl.load(alpha_ptr + rows, mask=mask_b, other=0.0) * tl.load(schedule_ptr + 2)
        dims = tl.load(dims_ptr + offs_a)[None, :]
        v, norm, usable, gated = _steer_velocity(v, tilt * g, std, dims, alpha, gain, floor, max_grad_norm,
                                                 gaf_decay, gaf_min, max_disagreement, SCALE)  # fmt: skip
        tl.store(norm_ptr + report_at + rows, norm, mask=mask_b)
        tl.store(nonfinite_ptr + report_at + rows, tl.where(usable, 0, 1).to(tl.int8), mask=mask_b)
        tl.store(row_std_ptr + report_at + rows, tl.where(usable, std, 0.0), mask=mask_b)
        tl.store(gated_ptr + report_at + rows, tl.where(gated, 1, 0).to(tl.int8), mask=mask_b)
    x += tl.load(schedule_ptr + 1) * v
    if LAST:
        low, high = _bounds(bounds_ptr, A_PAD)
        x = _clip(x, low, high)
    tl.store(out_ptr + element, x, mask=mask_a)


@triton.jit(do_not_specialize=["num_rows", "num_draws", "index"], do_not_specialize_on_alignment=["x_ptr", "from_ptr"])
def _glass_draw_kernel(x_ptr, from_ptr, v_ptr, to_ptr, star_ptr, glass_ptr, num_rows, num_draws, index,
                       MOVE: tl.constexpr, ASK: tl.constexpr, ACTION_DIM: tl.constexpr, A_PAD: tl.constexpr,
                       BLOCK_B: tl.constexpr):  # fmt: skip
    """MOVE: an inner step of GLASS draws, xbar [R, ACTION_DIM] from `from` along v = v*. ASK: star, the x* of the next.

    x [B, ACTION_DIM]. glass_ptr [*, 5]: p_x, p_xbar, then c_x, c_xbar, c_v over the number of inner steps; index: the
    row of the next inner step, after that of this one.
    """
    offs_a = tl.arange(0, A_PAD)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = (rows < num_rows)[:, None] & (offs_a < ACTION_DIM)[None, :]
    element = rows[:, None] * ACTION_DIM + offs_a[None, :]
    x = tl.load(x_ptr + (rows // num_draws)[:, None] * ACTION_DIM + offs_a[None, :], mask=mask, other=0.0)
    xbar = tl.load(from_ptr + element, mask=mask, other=0.0)
    glass_ptr += 5 * index
    if MOVE:
        xbar += tl.load(glass_ptr - 3) * x + tl.load(glass_ptr - 2) * xbar
        xbar += tl.load(glass_ptr - 1) * tl.load(v_ptr + element, mask=mask, other=0.0)
        tl.store(to_ptr + element, xbar, mask=mask)
    if ASK:
        tl.store(star_ptr + element, tl.load(glass_ptr) * x + tl.load(glass_ptr + 1) * xbar, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "index"])
def _glass_pull_kernel(d_xbar_ptr, d_star_ptr, d_x_ptr, cotangent_ptr, glass_ptr, num_rows, index,
                       MOVE: tl.constexpr, ASK: tl.constexpr, ACTION_DIM: tl.constexpr, A_PAD: tl.constexpr,
                       BLOCK_B: tl.constexpr):  # fmt: skip
    """The pull-back of _glass_draw_kernel's inner steps, last one first; all [R, ACTION_DIM].

    MOVE: d_x and d_xbar through inner step index + 1, whose flow answered d_star. ASK: the cotangent of the flow at
    inner step index.
    """
    offs_a = tl.arange(0, A_PAD)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = (rows < num_rows)[:, None] & (offs_a < ACTION_DIM)[None, :]
    element = rows[:, None] * ACTION_DIM + offs_a[None, :]
    d_xbar = tl.load(d_xbar_ptr + element, mask=mask, other=0.0)
    glass_ptr += 5 * index
    if MOVE:
        d_star = tl.load(d_star_ptr + element, mask=mask, other=0.0)
        d_x = tl.load(d_x_ptr + element, mask=mask, other=0.0)
        d_x += tl.load(glass_ptr + 7) * d_xbar + tl.load(glass_ptr + 5) * d_star
        d_xbar += tl.load(glass_ptr + 8) * d_xbar + tl.load(glass_ptr + 6) * d_star
        tl.store(d_x_ptr + element, d_x, mask=mask)
        tl.store(d_xbar_ptr + element, d_xbar, mask=mask)
    else:
        tl.store(d_x_ptr + element, tl.zeros_like(d_xbar), mask=mask)
    if ASK:
        tl.store(cotangent_ptr + element, tl.load(glass_ptr + 4) * d_xbar, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "row_stride", "column_stride"],
            do_not_specialize_on_alignment=["x_ptr", "v_ptr", "t_ptr", "out_ptr"])  # fmt: skip
def _clean_actions_kernel(x_ptr, v_ptr, t_ptr, out_ptr, num_rows, row_stride, column_stride,
                          ACTION_DIM: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """x + (1 - t) v [num_rows, ACTION_DIM]; t at any strides, 0 where it is shared."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = (rows < num_rows)[:, None] & (offs_a < ACTION_DIM)[None, :]
    element = rows[:, None] * ACTION_DIM + offs_a[None, :]
    t = tl.load(t_ptr + rows[:, None] * row_stride + offs_a[None, :] * column_stride, mask=mask, other=0.0)
    x = tl.load(x_ptr + element, mask=mask, other=0.0)
    tl.store(out_ptr + element, x + (1.0 - t) * tl.load(v_ptr + element, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["num_rows"],
            do_not_specialize_on_alignment=["x_ptr", "v_ptr", "g_ptr", "std_ptr"])  # fmt: skip
def _steer_step_kernel(x_ptr, v_ptr, g_ptr, std_ptr, dims_ptr, out_ptr, norm_ptr, nonfinite_ptr, num_rows, dt, alpha,
                       gain, floor, max_grad_norm, gaf_decay, gaf_min, max_disagreement,
                       STD: tl.constexpr, SCALE: tl.constexpr, ACTION_DIM: tl.constexpr, A_PAD: tl.constexpr,
                       BLOCK_B: tl.constexpr):  # fmt: skip
    """x + dt times v steered by g [num_rows, ACTION_DIM]; norms of g, rows whose g is not finite. STD: std is given."""
    offs_a = tl.arange(0, A_PAD)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = rows < num_rows
    mask_a = mask_b[:, None] & (offs_a < ACTION_DIM)[None, :]
    element = rows[:, None] * ACTION_DIM + offs_a[None, :]
    std = tl.zeros((BLOCK_B,), dtype=tl.float32)
    if STD:
        std = tl.load(std_ptr + rows, mask=mask_b, other=0.0)
    dims = tl.load(dims_ptr + offs_a, mask=offs_a < ACTION_DIM, other=0.0)[None, :]
    v, norm, usable, _ = _steer_velocity(
        tl.load(v_ptr + element, mask=mask_a, other=0.0), tl.load(g_ptr + element, mask=mask_a, other=0.0), std, dims,
        tl.zeros((BLOCK_B,), dtype=tl.float32) + alpha, gain, floor, max_grad_norm, gaf_decay, gaf_min,
        max_disagreement, SCALE,
    )  # fmt: skip
    x = tl.load(x_ptr + element, mask=mask_a, other=0.0)
    tl.store(out_ptr + element, x + dt * v, mask=mask_a)
    tl.store(norm_ptr + rows, norm, mask=mask_b)
    tl.store(nonfinite_ptr + rows, tl.where(usable, 0, 1).to(tl.int8), mask=mask_b)
