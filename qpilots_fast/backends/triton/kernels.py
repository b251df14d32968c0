"""The four kernels: pack the weights, ask the critics, take a step, run one network. Design: docs/gpu.md.

All rows are float32. R = B N estimates ("draws") a step, N = 1 unless the estimate is mfm or glass; draw n of row b
is r = b N + n. Programs are persistent: program p takes tiles p, p + num_programs, ... and reuses one scratch.
"""
# No `from __future__ import annotations` here: the interpreter recognises constexpr parameters by their evaluated type.

import triton
import triton.language as tl

from .mlp import _input_gradient, _mlp_backward, _mlp_forward, _write_rows, _write_tile

PACK_FIELDS = tl.constexpr(12)


@triton.jit
def _pack_kernel(item_ptr, block_ptr, weights_ptr, vectors_ptr,
                 SOURCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One tile of one parameter into the packed buffers; the table of items says what and where.

    item_ptr [*, 12] int64: source address, row stride, column stride, columns, elements (the last row may be short),
    destination, its leading dimension, kind (0 weights, 1 vectors, 2 time bias), and for the time bias: address of the
    bias (0: none), of the features [T_count, features], of the column indices [features] int64, and features.
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
        # bias[h] + sum_j W[h, time column j] feature[time, j]; here row is the time and column is h
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
            tl.store(weights_ptr + target, value.to(weights_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(vectors_ptr + target, value, mask=mask)


@triton.jit
def _clip(x, low, high):
    """clamp that keeps NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _bounds(bounds_ptr, A_PAD: tl.constexpr):
    """(low, high) of the actions, [1, A_PAD] each; read where they are used: kept over a network they cost spills."""
    offs_a = tl.arange(0, A_PAD)
    return tl.load(bounds_ptr + offs_a)[None, :], tl.load(bounds_ptr + A_PAD + offs_a)[None, :]


# A caller's tensors are never specialised on alignment: of a rollout [T, S] only some rows obs[i : i + 1] are aligned,
# and the first one that is not would compile every kernel again, in the middle of a control loop.
@triton.jit(do_not_specialize=["num_rows", "num_draws", "num_tiles"], do_not_specialize_on_alignment=["obs_ptr"])
def _critic_kernel(obs_ptr, a_ptr, q_ptr, dq_ptr, w_ptr, vec_ptr, layer_ptr, h_ptr, z_ptr, stat_ptr,
                   bounds_ptr, num_rows, num_draws, num_tiles, norm_eps,
                   OBS_DIM: tl.constexpr, ACTION_DIM: tl.constexpr, COLUMN: tl.constexpr, A_PAD: tl.constexpr,
                   L: tl.constexpr, K0: tl.constexpr, H_PAD: tl.constexpr, LD: tl.constexpr, LDH: tl.constexpr,
                   OUT_ROWS: tl.constexpr, CLIP: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr,
                   DOT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """q [E, R] and dq = dQ_j / da [E, R, A] at the (clipped) estimates a [R, A].

    A tile is (member, row block), member slowest, so that programs that run together share a member's weights.
    """
    program = tl.program_id(0).to(tl.int64)
    h_ptr += program * (BLOCK_B * LDH)
    z_ptr += program * ((L + 1) * BLOCK_B * H_PAD)
    stat_ptr += program * (2 * L * BLOCK_B)
    row_blocks = tl.cdiv(num_rows, BLOCK_B)
    offs_b = tl.arange(0, BLOCK_B)
    offs_a = tl.arange(0, A_PAD)
    offs_o = tl.arange(0, OUT_ROWS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        member = (tile // row_blocks).to(tl.int64)
        rows = (tile % row_blocks).to(tl.int64) * BLOCK_B + offs_b
        mask_b = rows < num_rows
        mask_a = mask_b[:, None] & (offs_a < ACTION_DIM)[None, :]
        member_w = w_ptr + member * ((L * H_PAD + OUT_ROWS) * LD)
        member_vec = vec_ptr + member * (L * 3 * H_PAD + OUT_ROWS)
        _write_rows(h_ptr, obs_ptr, rows // num_draws, mask_b, OBS_DIM, K0, LDH, BLOCK_B, BLOCK_K)
        tl.debug_barrier()
        a = tl.load(a_ptr + rows[:, None] * ACTION_DIM + offs_a[None, :], mask=mask_a, other=0.0)
        if CLIP:
            low, high = _bounds(bounds_ptr, A_PAD)
            a = _clip(a, low, high)
        _write_tile(h_ptr, tl.where(mask_a, a, 0.0), COLUMN, LDH, BLOCK_B, A_PAD)
        out = _mlp_forward(h_ptr, z_ptr, stat_ptr, member_w, member_vec, member_vec, layer_ptr, norm_eps,
                           L, H_PAD, LD, LDH, OUT_ROWS, ACT, NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
        q = tl.sum(tl.where((offs_o == 0)[None, :], out, 0.0), axis=1)
        tl.store(q_ptr + member * num_rows + rows, q, mask=mask_b)
        _mlp_backward(h_ptr, z_ptr, stat_ptr, member_w, member_vec, layer_ptr, L, H_PAD, LD, LDH,
                      True, ACT, NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
        d_a = _input_gradient(h_ptr, member_w, layer_ptr, COLUMN, LD, LDH, DOT, BLOCK_B, A_PAD, BLOCK_K)
        target = dq_ptr + (member * num_rows + rows)[:, None] * ACTION_DIM + offs_a[None, :]
        tl.store(target, d_a, mask=mask_a)
        tl.debug_barrier()


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
def _pull_back(cotangent, h_ptr, z_ptr, stat_ptr, w_ptr, vec_ptr, layer_ptr, column,
               A_PAD: tl.constexpr, L: tl.constexpr, H_PAD: tl.constexpr, LD: tl.constexpr, LDH: tl.constexpr,
               OUT_ROWS: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr,
               BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The cotangent [BLOCK_B, A_PAD] of the last _mlp_forward pulled back to the A_PAD inputs from column on."""
    # rows are scaled to peak 1 first: linear, and a half-precision operand then neither overflows nor vanishes
    peak = tl.max(tl.abs(cotangent), axis=1)
    safe = tl.where((peak > 0.0) & (peak < float("inf")), peak, 1.0)[:, None]
    _write_tile(h_ptr, cotangent / safe, 0, LDH, BLOCK_B, A_PAD)
    for c in range(A_PAD, OUT_ROWS, A_PAD):
        _write_tile(h_ptr, tl.zeros_like(cotangent), c, LDH, BLOCK_B, A_PAD)
    _mlp_backward(h_ptr, z_ptr, stat_ptr, w_ptr, vec_ptr, layer_ptr, L, H_PAD, LD, LDH,
                  False, ACT, NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
    d_input = _input_gradient(h_ptr, w_ptr, layer_ptr, column, LD, LDH, DOT, BLOCK_B, A_PAD, BLOCK_K)
    tl.debug_barrier()
    return d_input * safe


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


@triton.jit(do_not_specialize=["num_rows", "num_draws", "rows_per_tile", "num_tiles", "step", "flow_begin", "flow_end",
                               "plain_end"],
            do_not_specialize_on_alignment=["x_in_ptr", "obs_ptr", "eps_ptr", "alpha_ptr"])  # fmt: skip
def _step_kernel(x_in_ptr, x_out_ptr, v_ptr, a_ptr, q_ptr, dq_ptr, q_bar_ptr, q_std_ptr, gx_ptr, xbar_ptr,
                 obs_ptr, eps_ptr,
                 flow_w_ptr, flow_vec_ptr, flow_bias_ptr, flow_layer_ptr,
                 posterior_w_ptr, posterior_vec_ptr, posterior_bias_ptr, posterior_layer_ptr,
                 h_ptr, z_ptr, stat_ptr, schedule_ptr, glass_ptr, dims_ptr, bounds_ptr, alpha_ptr, norm_ptr,
                 nonfinite_ptr, row_std_ptr, gated_ptr,
                 num_rows, num_draws, rows_per_tile, num_tiles, step, flow_begin, flow_end, plain_end,
                 gain, rho, tilt, floor, max_grad_norm, gaf_decay, gaf_min, max_disagreement,
                 flow_norm_eps, posterior_norm_eps,
                 STEER: tl.constexpr, PROPOSE: tl.constexpr, FLOW: tl.constexpr, RECOMPUTE: tl.constexpr,
                 ESTIMATE: tl.constexpr,
                 FULL: tl.constexpr, MASKED: tl.constexpr, AGG: tl.constexpr, SCALE: tl.constexpr,
                 E: tl.constexpr, GLASS_STEPS: tl.constexpr, NUM_STEPS: tl.constexpr,
                 OBS_DIM: tl.constexpr, ACTION_DIM: tl.constexpr, COLUMN: tl.constexpr, A_PAD: tl.constexpr,
                 LDH: tl.constexpr, Z_SIZE: tl.constexpr, STAT_SIZE: tl.constexpr,
                 FLOW_L: tl.constexpr, FLOW_K0: tl.constexpr, FLOW_H: tl.constexpr, FLOW_LD: tl.constexpr,
                 FLOW_ACT: tl.constexpr, FLOW_NORM: tl.constexpr,
                 POSTERIOR_L: tl.constexpr, POSTERIOR_K0: tl.constexpr, POSTERIOR_H: tl.constexpr,
                 POSTERIOR_LD: tl.constexpr,
                 POSTERIOR_ACT: tl.constexpr, POSTERIOR_NORM: tl.constexpr,
                 OUT_ROWS: tl.constexpr, DOT: tl.constexpr,
                 BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """STEER: finishes step `step` from the critics' answers. PROPOSE: runs the flow at step flow_end - 1 and writes the
    estimates that the critics see next. FLOW: unsteered steps in [flow_begin, plain_end) are taken on the way.

    schedule_ptr [K, 3]: 1 - t_k, dt_k, weight_k. alpha_ptr [B]: each row's strength.
    bounds_ptr [2, A_PAD]: of the actions, low and high.
    glass_ptr [K, GLASS_STEPS, 5]: p_x, p_xbar, then c_x, c_xbar, c_v over GLASS_STEPS.
    flow_bias_ptr [K (+ K GLASS_STEPS), H_PAD]: first-layer bias with that time's columns folded in.
    RECOMPUTE: the scratch holds another tile's activations by now, so each pull-back is preceded by its forward.
    """
    program = tl.program_id(0).to(tl.int64)
    h_ptr += program * (BLOCK_B * LDH)
    z_ptr += program * Z_SIZE
    stat_ptr += program * STAT_SIZE
    offs_b = tl.arange(0, BLOCK_B)
    offs_a = tl.arange(0, A_PAD)
    dims = tl.load(dims_ptr + offs_a)[None, :]
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        rows = tile * rows_per_tile.to(tl.int64) + offs_b
        mask_b = (offs_b < rows_per_tile) & (rows < num_rows)
        mask_a = mask_b[:, None] & (offs_a < ACTION_DIM)[None, :]
        element = rows[:, None] * ACTION_DIM + offs_a[None, :]
        x = tl.load(x_in_ptr + element, mask=mask_a, other=0.0)
        num_virtual = rows_per_tile * num_draws  # draws of this tile, taken BLOCK_B at a time
        first_draw = tile * num_virtual.to(tl.int64)
        total_draws = num_rows * num_draws

        if STEER:
            v = tl.load(v_ptr + element, mask=mask_a, other=0.0)
            std = tl.zeros((BLOCK_B,), dtype=tl.float32)
            if ESTIMATE == "noisy" or ESTIMATE == "tweedie":
                g, std = _critic_gradient(q_ptr, dq_ptr, a_ptr, rows, mask_b, num_rows, rho, bounds_ptr,
                                          E, ACTION_DIM, A_PAD, AGG, MASKED)  # fmt: skip
                if ESTIMATE == "tweedie" and FULL:
                    if RECOMPUTE:
                        _write_rows(h_ptr, obs_ptr, rows, mask_b, OBS_DIM, FLOW_K0, LDH, BLOCK_B, BLOCK_K)
                        tl.debug_barrier()
                        _write_tile(h_ptr, x, COLUMN, LDH, BLOCK_B, A_PAD)
                        _mlp_forward(h_ptr, z_ptr, stat_ptr, flow_w_ptr, flow_vec_ptr, flow_bias_ptr + step * FLOW_H,
                                     flow_layer_ptr, flow_norm_eps, FLOW_L, FLOW_H, FLOW_LD, LDH, A_PAD,
                                     FLOW_ACT, FLOW_NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
                    through_flow = _pull_back(g, h_ptr, z_ptr, stat_ptr, flow_w_ptr, flow_vec_ptr, flow_layer_ptr,
                                              COLUMN, A_PAD, FLOW_L, FLOW_H, FLOW_LD, LDH, OUT_ROWS, FLOW_ACT,
                                              FLOW_NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
                    g += tl.load(schedule_ptr + 3 * step) * through_flow
            else:
                for c in range(0, num_virtual, BLOCK_B):
                    draws = first_draw + c + offs_b
                    mask_d = (c + offs_b < num_virtual) & (draws < total_draws)
                    q_bar, _, draw_std, _, _ = _aggregate(q_ptr, draws, mask_d, total_draws, rho, E, AGG)
                    tl.store(q_bar_ptr + draws, q_bar, mask=mask_d)
                tl.debug_barrier()
                for c in range(0, num_virtual, BLOCK_B):
                    draws = first_draw + c + offs_b
                    mask_d = (c + offs_b < num_virtual) & (draws < total_draws)
                    mask_da = mask_d[:, None] & (offs_a < ACTION_DIM)[None, :]
                    of_row = draws // num_draws
                    of_draw = draws[:, None] * ACTION_DIM + offs_a[None, :]
                    # softmax_n(tilt Qbar_n) over the siblings of each draw
                    peak = tilt * tl.load(q_bar_ptr + of_row * num_draws, mask=mask_d, other=0.0)
                    for n in range(1, num_draws):
                        sibling = tl.load(q_bar_ptr + of_row * num_draws + n, mask=mask_d, other=0.0)
                        peak = tl.maximum(peak, tilt * sibling)
                    total = tl.zeros((BLOCK_B,), dtype=tl.float32)
                    for n in range(0, num_draws):
                        sibling = tl.load(q_bar_ptr + of_row * num_draws + n, mask=mask_d, other=0.0)
                        total += tl.exp(tilt * sibling - peak)
                    weight = tl.exp(tilt * tl.load(q_bar_ptr + draws, mask=mask_d, other=0.0) - peak) / total
                    d_a, draw_std = _critic_gradient(q_ptr, dq_ptr, a_ptr, draws, mask_d, total_draws, rho, bounds_ptr,
                                                     E, ACTION_DIM, A_PAD, AGG, MASKED)  # fmt: skip
                    d_a *= weight[:, None]
                    tl.store(q_std_ptr + draws, weight * draw_std, mask=mask_d)
                    draw_x = tl.load(x_in_ptr + of_row[:, None] * ACTION_DIM + offs_a[None, :], mask=mask_da, other=0.0)
                    if ESTIMATE == "mfm":
                        if RECOMPUTE:
                            eps = tl.load(eps_ptr + step.to(tl.int64) * total_draws * ACTION_DIM + of_draw,
                                          mask=mask_da, other=0.0)  # fmt: skip
                            _write_rows(h_ptr, obs_ptr, of_row, mask_d, OBS_DIM, POSTERIOR_K0, LDH, BLOCK_B, BLOCK_K)
                            tl.debug_barrier()
                            _write_tile(h_ptr, draw_x, COLUMN, LDH, BLOCK_B, A_PAD)
                            _write_tile(h_ptr, eps, COLUMN + A_PAD, LDH, BLOCK_B, A_PAD)
                            _mlp_forward(h_ptr, z_ptr, stat_ptr, posterior_w_ptr, posterior_vec_ptr,
                                         posterior_bias_ptr + step * POSTERIOR_H,
                                         posterior_layer_ptr, posterior_norm_eps,
                                         POSTERIOR_L, POSTERIOR_H, POSTERIOR_LD, LDH, A_PAD,
                                         POSTERIOR_ACT, POSTERIOR_NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
                        d_x = _pull_back(d_a, h_ptr, z_ptr, stat_ptr, posterior_w_ptr, posterior_vec_ptr,
                                         posterior_layer_ptr, COLUMN, A_PAD,
                                         POSTERIOR_L, POSTERIOR_H, POSTERIOR_LD, LDH, OUT_ROWS, POSTERIOR_ACT,
                                         POSTERIOR_NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
                    else:
                        d_x = tl.zeros((BLOCK_B, A_PAD), dtype=tl.float32)
                        for back in range(0, GLASS_STEPS):
                            inner = GLASS_STEPS - 1 - back
                            coefficients = glass_ptr + (step * GLASS_STEPS + inner) * 5
                            p_x = tl.load(coefficients)
                            p_xbar = tl.load(coefficients + 1)
                            xbar = tl.load(xbar_ptr + inner * total_draws.to(tl.int64) * ACTION_DIM + of_draw,
                                           mask=mask_da, other=0.0)  # fmt: skip
                            time = NUM_STEPS + step * GLASS_STEPS + inner
                            _write_rows(h_ptr, obs_ptr, of_row, mask_d, OBS_DIM, FLOW_K0, LDH, BLOCK_B, BLOCK_K)
                            tl.debug_barrier()
                            _write_tile(h_ptr, p_x * draw_x + p_xbar * xbar, COLUMN, LDH, BLOCK_B, A_PAD)
                            _mlp_forward(h_ptr, z_ptr, stat_ptr, flow_w_ptr, flow_vec_ptr,
                                         flow_bias_ptr + time * FLOW_H,
                                         flow_layer_ptr, flow_norm_eps, FLOW_L, FLOW_H, FLOW_LD, LDH, A_PAD,
                                         FLOW_ACT, FLOW_NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
                            d_star = _pull_back(tl.load(coefficients + 4) * d_a, h_ptr, z_ptr, stat_ptr, flow_w_ptr,
                                                flow_vec_ptr, flow_layer_ptr, COLUMN, A_PAD, FLOW_L, FLOW_H, FLOW_LD,
                                                LDH, OUT_ROWS, FLOW_ACT, FLOW_NORM, DOT,
                                                BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
                            d_x += tl.load(coefficients + 2) * d_a + p_x * d_star
                            d_a += tl.load(coefficients + 3) * d_a + p_xbar * d_star
                    tl.store(gx_ptr + of_draw, d_x, mask=mask_da)
                tl.debug_barrier()
                g = tl.zeros((BLOCK_B, A_PAD), dtype=tl.float32)
                for n in range(0, num_draws):
                    draws = rows * num_draws + n
                    of_draw = draws[:, None] * ACTION_DIM + offs_a[None, :]
                    g += tl.load(gx_ptr + of_draw, mask=mask_a, other=0.0)
                    std += tl.load(q_std_ptr + draws, mask=mask_b, other=0.0)
            alpha = tl.load(alpha_ptr + rows, mask=mask_b, other=0.0) * tl.load(schedule_ptr + 3 * step + 2)
            v, norm, usable, gated = _steer_velocity(v, tilt * g, std, dims, alpha, gain, floor, max_grad_norm,
                                                     gaf_decay, gaf_min, max_disagreement, SCALE)  # fmt: skip
            x += tl.load(schedule_ptr + 3 * step + 1) * v
            tl.store(norm_ptr + step * num_rows + rows, norm, mask=mask_b)
            tl.store(nonfinite_ptr + step * num_rows + rows, tl.where(usable, 0, 1).to(tl.int8), mask=mask_b)
            tl.store(row_std_ptr + step * num_rows + rows, tl.where(usable, std, 0.0), mask=mask_b)
            tl.store(gated_ptr + step * num_rows + rows, tl.where(gated, 1, 0).to(tl.int8), mask=mask_b)

        if FLOW:
            v = tl.zeros((BLOCK_B, A_PAD), dtype=tl.float32)
            for k in range(flow_begin, flow_end):
                _write_rows(h_ptr, obs_ptr, rows, mask_b, OBS_DIM, FLOW_K0, LDH, BLOCK_B, BLOCK_K)
                tl.debug_barrier()
                _write_tile(h_ptr, x, COLUMN, LDH, BLOCK_B, A_PAD)
                v = _mlp_forward(h_ptr, z_ptr, stat_ptr, flow_w_ptr, flow_vec_ptr, flow_bias_ptr + k * FLOW_H,
                                 flow_layer_ptr, flow_norm_eps, FLOW_L, FLOW_H, FLOW_LD, LDH, A_PAD,
                                 FLOW_ACT, FLOW_NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
                x = tl.where(k < plain_end, x + tl.load(schedule_ptr + 3 * k + 1) * v, x)

        if PROPOSE:
            tl.store(x_out_ptr + element, x, mask=mask_a)
            tl.store(v_ptr + element, v, mask=mask_a)
            proposed = flow_end - 1
            if ESTIMATE == "noisy":
                tl.store(a_ptr + element, x, mask=mask_a)
            elif ESTIMATE == "tweedie":
                tl.store(a_ptr + element, x + tl.load(schedule_ptr + 3 * proposed) * v, mask=mask_a)
            else:
                tl.debug_barrier()
                for c in range(0, num_virtual, BLOCK_B):
                    draws = first_draw + c + offs_b
                    mask_d = (c + offs_b < num_virtual) & (draws < total_draws)
                    mask_da = mask_d[:, None] & (offs_a < ACTION_DIM)[None, :]
                    of_row = draws // num_draws
                    of_draw = draws[:, None] * ACTION_DIM + offs_a[None, :]
                    draw_x = tl.load(
                        x_out_ptr + of_row[:, None] * ACTION_DIM + offs_a[None, :], mask=mask_da, other=0.0
                    )
                    xbar = tl.load(eps_ptr + proposed.to(tl.int64) * total_draws * ACTION_DIM + of_draw,
                                   mask=mask_da, other=0.0)  # fmt: skip
                    if ESTIMATE == "mfm":
                        _write_rows(h_ptr, obs_ptr, of_row, mask_d, OBS_DIM, POSTERIOR_K0, LDH, BLOCK_B, BLOCK_K)
                        tl.debug_barrier()
                        _write_tile(h_ptr, draw_x, COLUMN, LDH, BLOCK_B, A_PAD)
                        _write_tile(h_ptr, xbar, COLUMN + A_PAD, LDH, BLOCK_B, A_PAD)
                        xbar += _mlp_forward(h_ptr, z_ptr, stat_ptr, posterior_w_ptr, posterior_vec_ptr,
                                             posterior_bias_ptr + proposed * POSTERIOR_H,
                                             posterior_layer_ptr, posterior_norm_eps,
                                             POSTERIOR_L, POSTERIOR_H, POSTERIOR_LD, LDH, A_PAD,
                                             POSTERIOR_ACT, POSTERIOR_NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
                    else:
                        for inner in range(0, GLASS_STEPS):
                            coefficients = glass_ptr + (proposed * GLASS_STEPS + inner) * 5
                            tl.store(
                                xbar_ptr + inner * total_draws.to(tl.int64) * ACTION_DIM + of_draw, xbar, mask=mask_da
                            )
                            x_star = tl.load(coefficients) * draw_x + tl.load(coefficients + 1) * xbar
                            time = NUM_STEPS + proposed * GLASS_STEPS + inner
                            _write_rows(h_ptr, obs_ptr, of_row, mask_d, OBS_DIM, FLOW_K0, LDH, BLOCK_B, BLOCK_K)
                            tl.debug_barrier()
                            _write_tile(h_ptr, x_star, COLUMN, LDH, BLOCK_B, A_PAD)
                            v_star = _mlp_forward(h_ptr, z_ptr, stat_ptr, flow_w_ptr, flow_vec_ptr,
                                                  flow_bias_ptr + time * FLOW_H, flow_layer_ptr, flow_norm_eps,
                                                  FLOW_L, FLOW_H, FLOW_LD, LDH, A_PAD,
                                                  FLOW_ACT, FLOW_NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
                            xbar += tl.load(coefficients + 2) * draw_x + tl.load(coefficients + 3) * xbar
                            xbar += tl.load(coefficients + 4) * v_star
                    tl.store(a_ptr + of_draw, xbar, mask=mask_da)
        else:
            low, high = _bounds(bounds_ptr, A_PAD)
            tl.store(x_out_ptr + element, _clip(x, low, high), mask=mask_a)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"], do_not_specialize_on_alignment=["cotangent_ptr"])
def _network_kernel(in_ptr, cotangent_ptr, out_ptr, w_ptr, vec_ptr, layer_ptr, h_ptr, z_ptr, stat_ptr,
                    num_rows, num_tiles, norm_eps,
                    IN_DIM: tl.constexpr, OUT_DIM: tl.constexpr, OUT_PAD: tl.constexpr, VJP: tl.constexpr,
                    L: tl.constexpr, K0: tl.constexpr, H_PAD: tl.constexpr, LD: tl.constexpr, LDH: tl.constexpr,
                    OUT_ROWS: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr,
                    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """in [B, IN_DIM] to the output [E, B, OUT_DIM], or (VJP) cotangent [E, B, OUT_DIM] to d_in [E, B, IN_DIM]."""
    program = tl.program_id(0).to(tl.int64)
    h_ptr += program * (BLOCK_B * LDH)
    z_ptr += program * ((L + 1) * BLOCK_B * H_PAD)
    stat_ptr += program * (2 * L * BLOCK_B)
    row_blocks = tl.cdiv(num_rows, BLOCK_B)
    offs_b = tl.arange(0, BLOCK_B)
    offs_o = tl.arange(0, OUT_PAD)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        member = (tile // row_blocks).to(tl.int64)
        rows = (tile % row_blocks).to(tl.int64) * BLOCK_B + offs_b
        mask_b = rows < num_rows
        mask_o = mask_b[:, None] & (offs_o < OUT_DIM)[None, :]
        member_w = w_ptr + member * ((L * H_PAD + OUT_ROWS) * LD)
        member_vec = vec_ptr + member * (L * 3 * H_PAD + OUT_ROWS)
        of_output = (member * num_rows + rows)[:, None] * OUT_DIM + offs_o[None, :]
        _write_rows(h_ptr, in_ptr, rows, mask_b, IN_DIM, K0, LDH, BLOCK_B, BLOCK_K)
        out = _mlp_forward(h_ptr, z_ptr, stat_ptr, member_w, member_vec, member_vec, layer_ptr, norm_eps,
                           L, H_PAD, LD, LDH, OUT_PAD, ACT, NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
        if VJP:
            d_out = tl.load(cotangent_ptr + of_output, mask=mask_o, other=0.0)
            peak = tl.max(tl.abs(d_out), axis=1)
            safe = tl.where((peak > 0.0) & (peak < float("inf")), peak, 1.0)[:, None]
            _write_tile(h_ptr, d_out / safe, 0, LDH, BLOCK_B, OUT_PAD)
            for c in range(OUT_PAD, OUT_ROWS, OUT_PAD):
                _write_tile(h_ptr, tl.zeros_like(d_out), c, LDH, BLOCK_B, OUT_PAD)
            _mlp_backward(h_ptr, z_ptr, stat_ptr, member_w, member_vec, layer_ptr, L, H_PAD, LD, LDH,
                          False, ACT, NORM, DOT, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
            for c in range(0, K0, BLOCK_K):
                d_in = _input_gradient(h_ptr, member_w, layer_ptr, c, LD, LDH, DOT, BLOCK_B, BLOCK_K, BLOCK_K)
                target = out_ptr + (member * num_rows + rows)[:, None] * IN_DIM + c + offs_k[None, :]
                tl.store(target, d_in * safe, mask=mask_b[:, None] & (c + offs_k < IN_DIM)[None, :])
        else:
            tl.store(out_ptr + of_output, out, mask=mask_o)
        tl.debug_barrier()
