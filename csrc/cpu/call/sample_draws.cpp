// Posterior draws: the meta flow map's and GLASS flows' estimates of a step, and their way back to x.
#include <cstring>

#include "call/sample_run.h"

namespace qpilots::cpu {

// a_n = eps_n + vhat(obs, eps_n, x, t, 0, 1); W_x x is computed once for the N draws.
void SampleRun::estimate_posterior(int k, RowRange rows, const Worker& w) {
  const Network& posterior = *plan_.posterior;
  const FormatKernels& fk = posterior.fk();
  const Team& team = w.team;
  const std::ptrdiff_t operand_pitch = w.scratch.pitch * fk.a_bytes, first = posterior.first_padded();
  {
    const int begin = team.begin(rows.count()), end = team.end(rows.count());
    fk.to_operand({end - begin, pitch_, row(x_, rows.begin + begin), pitch_, nullptr, nullptr,
                   w.scratch.operand[0] + begin * operand_pitch, operand_pitch});
    for (int r = begin; r < end; ++r) w.scratch.init[r] = posterior_base_ + (rows.begin + r) * first;
    team.wait();
    const Block& block = posterior.input(kX);
    fk.forward({&block, arenas_[2] + block.offset, team.begin(block.panels), team.end(block.panels),
                w.scratch.operand[0], operand_pitch, rows.count(), w.scratch.init, posterior_time_ + k * first,
                posterior_x_ + rows.begin * first, first});
    team.wait();
  }
  for_draw_rows(rows, [&](RowRange draws) {
    const int begin = team.begin(draws.count()), end = team.end(draws.count());
    for (int r = begin; r < end; ++r) {
      const int i = draws.begin + r;
      w.scratch.init[r] = posterior_x_ + (i / draws_) * first;
      std::memset(row(a_, i), 0, sizeof(float) * pitch_);
      std::memcpy(row(a_, i), draw_noise(k, i), sizeof(float) * plan_.action_dim);
    }
    fk.to_operand({end - begin, pitch_, row(a_, draws.begin + begin), pitch_, nullptr, nullptr,
                   w.scratch.operand[0] + begin * operand_pitch, operand_pitch});
    team.wait();
    forward_pass(pass(2, w, draws.count(), k), kXbar, nullptr, {posterior_saves_, draw_rows_, draws.begin},
                 row(vhat_, draws.begin), pitch_);
    team.wait();
    for (int i = draws.begin + begin; i < draws.begin + end; ++i) {
      for (int c = 0; c < pitch_; ++c) row(a_, i)[c] += row(vhat_, i)[c];
    }
  });
}

// m Euler steps of the posterior flow from eps_n: a += w / m, w = c_x x + c_xbar a + c_v flow(p_x x + p_xbar a, t*).
void SampleRun::estimate_glass(int k, RowRange rows, const Worker& w) {
  const int m = steering_.glass_steps;
  for_draw_rows(rows, [&](RowRange draws) {
    const int begin = draws.begin + w.team.begin(draws.count()), end = draws.begin + w.team.end(draws.count());
    for (int i = begin; i < end; ++i) {
      std::memset(row(a_, i), 0, sizeof(float) * pitch_);
      std::memcpy(row(a_, i), draw_noise(k, i), sizeof(float) * plan_.action_dim);
    }
    for (int s = 0; s < m; ++s) {
      const GlassStep& c = plan_.glass[static_cast<std::size_t>(k) * m + s];
      const float px = static_cast<float>(c.p_x), pa = static_cast<float>(c.p_xbar);
      const float cx = static_cast<float>(c.c_x / m), ca = static_cast<float>(c.c_xbar / m);
      const float cv = static_cast<float>(c.c_v / m);
      for (int i = begin; i < end; ++i) {
        for (int d = 0; d < pitch_; ++d) row(jg_, i)[d] = px * row(x_, i / draws_)[d] + pa * row(a_, i)[d];
      }
      const std::size_t at = plan_.steps() + static_cast<std::size_t>(k) * m + s;
      flow_forward(draws, w, jg_, draws_, at,
                   {flow_saves_ + plan_.flow->saves_bytes(draw_rows_) * s, draw_rows_, draws.begin}, vhat_);
      for (int i = begin; i < end; ++i) {
        for (int d = 0; d < pitch_; ++d) {
          row(a_, i)[d] += cx * row(x_, i / draws_)[d] + ca * row(a_, i)[d] + cv * row(vhat_, i)[d];
        }
      }
    }
  });
}

// g_n *= p_n = softmax_n(tau Q_n / scale), and the std that the update sees, in the place of each row's first draw.
void SampleRun::weigh_draws(RowRange rows, const Worker& w) {
  w.team.wait();
  const int begin = rows.begin + w.team.begin(rows.count()), end = rows.begin + w.team.end(rows.count());
  for (int b = begin; b < end; ++b) {
    const int first = b * draws_;
    table_.posterior_softmax(value_ + first, draws_, steering_.tau / q_divisor_, p_ + first);
    float std = 0.0f;
    for (int i = first; i < first + draws_; ++i) {
      std += p_[i] * std_[i];
      for (int c = 0; c < pitch_; ++c) row(g_, i)[c] *= p_[i];
    }
    for (int i = first; i < first + draws_; ++i) std_[i] = std;
  }
  w.team.wait();
}

// jg = (dX/dx)^T g_n summed over the draws: their first-layer deltas are summed, then meet the columns of x once.
void SampleRun::pull_back_posterior(int k, RowRange rows, const Worker& w) {
  const Network& posterior = *plan_.posterior;
  const FormatKernels& fk = posterior.fk();
  const Team& team = w.team;
  const std::ptrdiff_t first = posterior.first_padded();
  const int column = static_cast<int>(first) / kPad;
  const int from = kPad * team.begin(column), to = kPad * team.end(column);
  weigh_draws(rows, w);
  for (int r = rows.begin; r < rows.end; ++r) {
    std::memset(delta_sum_ + r * first + from, 0, sizeof(float) * (to - from));
  }
  for_draw_rows(rows, [&](RowRange draws) {
    const int which = backward_pass(pass(2, w, draws.count(), k), row(g_, draws.begin), pitch_,
                                    {posterior_saves_, draw_rows_, draws.begin}, true);
    const std::ptrdiff_t delta_pitch = w.scratch.pitch;
    const float* delta = reinterpret_cast<const float*>(w.scratch.d_operand[which]);
    for (int i = draws.begin; i < draws.end; ++i) {
      float* sum = delta_sum_ + (i / draws_) * first;
      const float* one = delta + (i - draws.begin) * delta_pitch;
      for (int c = from; c < to; ++c) sum[c] += one[c];
    }
    team.wait();
  });
  const std::ptrdiff_t d_pitch = w.scratch.d_pitch();
  const int begin = team.begin(rows.count()), end = team.end(rows.count());
  fk.to_operand({end - begin, static_cast<int>(first), delta_sum_ + (rows.begin + begin) * first, first, nullptr,
                 nullptr, w.scratch.d_operand[0] + begin * d_pitch, d_pitch});
  team.wait();
  input_vjp(pass(2, w, rows.count(), k), posterior.input(kX), fk, 0, row(jg_, rows.begin), pitch_);
  team.wait();
}

// The inner Euler steps backwards, into total; the gradient at xbar lives in g.
void SampleRun::pull_back_glass(int k, RowRange rows, const Worker& w) {
  const Network& flow = *plan_.flow;
  const int m = steering_.glass_steps;
  weigh_draws(rows, w);
  for_draw_rows(rows, [&](RowRange draws) {
    const int begin = draws.begin + w.team.begin(draws.count()), end = draws.begin + w.team.end(draws.count());
    for (int i = begin; i < end; ++i) std::memset(row(gx_, i), 0, sizeof(float) * pitch_);
    for (int s = m - 1; s >= 0; --s) {
      const GlassStep& c = plan_.glass[static_cast<std::size_t>(k) * m + s];
      const float cv = static_cast<float>(c.c_v / m), cx = static_cast<float>(c.c_x / m);
      const float keep = static_cast<float>(1 + c.c_xbar / m);
      const float px = static_cast<float>(c.p_x), pa = static_cast<float>(c.p_xbar);
      for (int i = begin; i < end; ++i) {
        for (int d = 0; d < pitch_; ++d) row(vhat_, i)[d] = cv * row(g_, i)[d];
      }
      w.team.wait();
      const Pass p = pass(0, w, draws.count(), plan_.steps() + static_cast<std::size_t>(k) * m + s);
      const int which = backward_pass(p, row(vhat_, draws.begin), pitch_,
                                      {flow_saves_ + flow.saves_bytes(draw_rows_) * s, draw_rows_, draws.begin}, false);
      input_vjp(p, flow.input(kX), flow.fk(), which, row(jg_, draws.begin), pitch_);
      w.team.wait();
      for (int i = begin; i < end; ++i) {
        for (int d = 0; d < pitch_; ++d) {
          row(gx_, i)[d] += cx * row(g_, i)[d] + px * row(jg_, i)[d];
          row(g_, i)[d] = keep * row(g_, i)[d] + pa * row(jg_, i)[d];
        }
      }
    }
  });
  w.team.wait();
  for (int b = rows.begin + w.team.begin(rows.count()); b < rows.begin + w.team.end(rows.count()); ++b) {
    for (int d = 0; d < pitch_; ++d) {
      float sum = 0.0f;
      for (int n = 0; n < draws_; ++n) sum += row(gx_, b * draws_ + n)[d];
      row(total_, b)[d] = sum;
    }
  }
  w.team.wait();
}

}  // namespace qpilots::cpu
