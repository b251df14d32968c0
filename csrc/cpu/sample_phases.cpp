// The phases of one step: prepare, denoise and project, gradient, pull back, update.
#include <cmath>
#include <cstring>
#include <limits>

#include "sample_run.h"

namespace qpilots::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

// ---------------------------------------------------------------- once a call

void SampleRun::first_layer_base(const Network& net, const char* member, Tile rows, float* base) {
  const float* bias = reinterpret_cast<const float*>(member + net.layer(0).bias);
  const std::ptrdiff_t pitch = net.first_padded();
  if (!net.has(kObs)) {
    for (int r = rows.begin; r < rows.end; ++r) std::memcpy(base + r * pitch, bias, sizeof(float) * pitch);
    return;
  }
  const Block& block = net.input(kObs);
  const std::ptrdiff_t obs_bytes = sizeof(float) * plan_.obs_dim;
  ForwardArgs product{&block,
                      member + block.offset,
                      0,
                      block.panels,
                      reinterpret_cast<const char*>(args_.obs) + rows.begin * obs_bytes,
                      obs_bytes,
                      rows.rows(),
                      nullptr,
                      nullptr,
                      base + rows.begin * pitch,
                      pitch};
  product.init_shared = bias;
  table_.formats[0].forward(product);
}

void SampleRun::time_rows(const Network& net, const char* arena, const std::vector<float>* features, std::size_t count,
                          float* out, TileScratch& scratch) {
  const std::ptrdiff_t pitch = net.first_padded();
  std::memset(out, 0, sizeof(float) * count * pitch);
  for (int i = 0; i < 3; ++i) {
    const InputKind kind = static_cast<InputKind>(kT + i);
    if (!net.has(kind)) continue;
    const Block& block = net.input(kind);
    for (std::size_t first = 0; first < count; first += kMaxTileRows) {
      const int rows = static_cast<int>(std::min<std::size_t>(kMaxTileRows, count - first));
      for (int r = 0; r < rows; ++r) scratch.init[r] = out + (first + r) * pitch;
      table_.formats[0].forward({&block, arena + block.offset, 0, block.panels, features[i].data() + first * block.in,
                                 static_cast<std::ptrdiff_t>(sizeof(float)) * block.in, rows, scratch.init, nullptr,
                                 out + first * pitch, pitch});
    }
  }
}

// Items: the time rows, then the observation's part of each network's first layer, tile by tile.
void SampleRun::prepare_item(int item, const Worker& w) {
  if (item == 0) {
    time_rows(*plan_.flow, arenas_[0], &plan_.flow_times, plan_.steps + plan_.glass.size(), flow_time_, w.scratch);
    if (map_time_ != nullptr) {
      time_rows(*plan_.posterior, arenas_[2], plan_.posterior_times, plan_.steps, map_time_, w.scratch);
    }
    return;
  }
  const int index = item - 1;
  const Tile tile = flow_tile(index % flow_tiles_);
  const int part = index / flow_tiles_;
  if (part == 0) {
    first_layer_base(*plan_.flow, arenas_[0], tile, flow_base_);
    for (int r = tile.begin; r < tile.end; ++r) {
      std::memset(row(x_, r), 0, sizeof(float) * pitch_);
      std::memcpy(row(x_, r), args_.noise + static_cast<std::size_t>(r) * plan_.action_dim,
                  sizeof(float) * plan_.action_dim);
    }
    if (map_base_ != nullptr) first_layer_base(*plan_.posterior, arenas_[2], tile, map_base_);
    return;
  }
  const Network& critic = *plan_.critic;
  const std::size_t j = part - 1;
  first_layer_base(critic, arenas_[1] + j * critic.member_bytes(), tile,
                   critic_base_ + j * batch_ * critic.first_padded());
}

// ---------------------------------------------------------------- denoise and project

// Visits the draws' rows of a tile in pieces that fit the scratch; rows(Tile).
template <class Rows>
void SampleRun::for_draw_subtiles(Tile tile, Rows rows) const {
  const int begin = tile.begin * draws_, count = tile.rows() * draws_;
  const int pieces = (count + kMaxTileRows - 1) / kMaxTileRows;
  for (int i = 0; i < pieces; ++i) {
    rows(Tile{begin + tile_begin(count, pieces, i), begin + tile_begin(count, pieces, i + 1)});
  }
}

// out = flow(obs, src, t) on `tile`, rows whose observation is row / group. Synchronised before and after.
void SampleRun::flow_forward(Tile tile, const Worker& w, const float* src, int group, const float* time, Saves saves,
                             float* out) {
  const Network& flow = *plan_.flow;
  const std::ptrdiff_t operand_pitch = w.scratch.pitch * flow.fk().a_bytes;
  const int begin = w.team.begin(tile.rows()), end = w.team.end(tile.rows());
  for (int r = begin; r < end; ++r) {
    w.scratch.init[r] = flow_base_ + static_cast<std::size_t>((tile.begin + r) / group) * flow.first_padded();
  }
  flow.fk().to_operand({end - begin, pitch_, src + static_cast<std::size_t>(tile.begin + begin) * pitch_, pitch_,
                        -kInfinity, kInfinity, w.scratch.operand[0] + begin * operand_pitch, operand_pitch});
  w.team.wait();
  forward_pass(pass(flow, arenas_[0], w, tile.rows()), kX, time, saves, row(out, tile.begin), pitch_);
  w.team.wait();
}

void SampleRun::denoise(int k, Tile tile, const Worker& w) {
  const bool steered = plan_.steered(k);
  const Saves saves{steered && keep_flow_ ? flow_saves_ : nullptr, batch_, tile.begin};
  flow_forward(tile, w, x_, 1, flow_time_ + static_cast<std::size_t>(k) * plan_.flow->first_padded(), saves, v_);
  const int begin = tile.begin + w.team.begin(tile.rows()), end = tile.begin + w.team.end(tile.rows());
  const float t = static_cast<float>(static_cast<double>(k) / plan_.steps);
  const float dt = static_cast<float>(1.0 / plan_.steps);
  if (!steered) {
    for (std::ptrdiff_t i = static_cast<std::ptrdiff_t>(begin) * pitch_; i < static_cast<std::ptrdiff_t>(end) * pitch_;
         ++i) {
      x_[i] += dt * v_[i];
    }
    return;
  }
  switch (steering_.estimate) {
    case Estimate::kNoisy:
    case Estimate::kTweedie: {
      const float ahead = steering_.estimate == Estimate::kNoisy ? 0.0f : 1.0f - t;
      for (int r = begin; r < end; ++r) {
        for (int c = 0; c < pitch_; ++c)
          row(a_, r)[c] = ahead == 0.0f ? row(x_, r)[c] : row(x_, r)[c] + ahead * row(v_, r)[c];
      }
      return;
    }
    case Estimate::kMfm:
      estimate_mfm(k, tile, w);
      return;
    case Estimate::kGlass:
      estimate_glass(k, tile, w);
      return;
  }
}

// a_n = eps_n + vhat(obs, eps_n, x, t, 0, 1); W_x x is computed once for the N draws.
void SampleRun::estimate_mfm(int k, Tile tile, const Worker& w) {
  const Network& map = *plan_.posterior;
  const FormatKernels& fk = map.fk();
  const Team& team = w.team;
  const std::ptrdiff_t operand_pitch = w.scratch.pitch * fk.a_bytes, first = map.first_padded();
  {
    const int begin = team.begin(tile.rows()), end = team.end(tile.rows());
    fk.to_operand({end - begin, pitch_, row(x_, tile.begin + begin), pitch_, -kInfinity, kInfinity,
                   w.scratch.operand[0] + begin * operand_pitch, operand_pitch});
    for (int r = begin; r < end; ++r) w.scratch.init[r] = map_base_ + (tile.begin + r) * first;
    team.wait();
    const Block& block = map.input(kX);
    fk.forward({&block, arenas_[2] + block.offset, team.begin(block.panels), team.end(block.panels),
                w.scratch.operand[0], operand_pitch, tile.rows(), w.scratch.init, map_time_ + k * first,
                map_x_ + tile.begin * first, first});
    team.wait();
  }
  for_draw_subtiles(tile, [&](Tile rows) {
    const int begin = team.begin(rows.rows()), end = team.end(rows.rows());
    for (int r = begin; r < end; ++r) {
      const int i = rows.begin + r;
      w.scratch.init[r] = map_x_ + (i / draws_) * first;
      std::memset(row(a_, i), 0, sizeof(float) * pitch_);
      std::memcpy(row(a_, i), draw_noise(k, i), sizeof(float) * plan_.action_dim);
    }
    fk.to_operand({end - begin, pitch_, row(a_, rows.begin + begin), pitch_, -kInfinity, kInfinity,
                   w.scratch.operand[0] + begin * operand_pitch, operand_pitch});
    team.wait();
    forward_pass(pass(map, arenas_[2], w, rows.rows()), kXbar, nullptr, {map_saves_, draw_rows_, rows.begin},
                 row(vhat_, rows.begin), pitch_);
    team.wait();
    for (int i = rows.begin + begin; i < rows.begin + end; ++i) {
      for (int c = 0; c < pitch_; ++c) row(a_, i)[c] += row(vhat_, i)[c];
    }
  });
}

// m Euler steps of the posterior flow from eps_n: a += w / m, w = c_x x + c_xbar a + c_v flow(p_x x + p_xbar a, t*).
void SampleRun::estimate_glass(int k, Tile tile, const Worker& w) {
  const int m = steering_.glass_steps;
  for_draw_subtiles(tile, [&](Tile rows) {
    const int begin = rows.begin + w.team.begin(rows.rows()), end = rows.begin + w.team.end(rows.rows());
    for (int i = begin; i < end; ++i) {
      std::memset(row(a_, i), 0, sizeof(float) * pitch_);
      std::memcpy(row(a_, i), draw_noise(k, i), sizeof(float) * plan_.action_dim);
    }
    for (int s = 0; s < m; ++s) {
      const GlassCoefficients& c = plan_.glass[static_cast<std::size_t>(k) * m + s];
      const float px = static_cast<float>(c.x_point), pa = static_cast<float>(c.xbar_point);
      const float cx = static_cast<float>(c.x_drift / m), ca = static_cast<float>(c.xbar_drift / m);
      const float cv = static_cast<float>(c.v_drift / m);
      for (int i = begin; i < end; ++i) {
        for (int d = 0; d < pitch_; ++d) row(jg_, i)[d] = px * row(x_, i / draws_)[d] + pa * row(a_, i)[d];
      }
      const std::size_t at = plan_.steps + static_cast<std::size_t>(k) * m + s;
      flow_forward(rows, w, jg_, draws_, flow_time_ + at * plan_.flow->first_padded(),
                   {flow_saves_ + plan_.flow->saves_floats(draw_rows_) * s, draw_rows_, rows.begin}, vhat_);
      for (int i = begin; i < end; ++i) {
        for (int d = 0; d < pitch_; ++d) {
          row(a_, i)[d] += cx * row(x_, i / draws_)[d] + ca * row(a_, i)[d] + cv * row(vhat_, i)[d];
        }
      }
    }
  });
}

// ---------------------------------------------------------------- gradient

// One member on one tile: Q and dQ/da, forward and backward while its weights are hot.
void SampleRun::criticise(int item, const Worker& w) {
  const Network& critic = *plan_.critic;
  const FormatKernels& fk = critic.fk();
  const Team& team = w.team;
  const int j = item / critic_tiles_, i = item % critic_tiles_;
  const Tile tile{tile_begin(draw_rows_, critic_tiles_, i), tile_begin(draw_rows_, critic_tiles_, i + 1)};
  const char* arena = arenas_[1] + critic.member_bytes() * j;
  const std::ptrdiff_t operand_pitch = w.scratch.pitch * fk.a_bytes, first = critic.first_padded();
  const bool clipped = steering_.clip != Clip::kNone;
  const int begin = team.begin(tile.rows()), end = team.end(tile.rows());
  for (int r = begin; r < end; ++r) {
    w.scratch.init[r] = critic_base_ + (static_cast<std::ptrdiff_t>(j) * batch_ + (tile.begin + r) / draws_) * first;
  }
  fk.to_operand({end - begin, pitch_, row(a_, tile.begin + begin), pitch_, clipped ? steering_.action_low : -kInfinity,
                 clipped ? steering_.action_high : kInfinity, w.scratch.operand[0] + begin * operand_pitch,
                 operand_pitch});
  team.wait();
  const Pass p = pass(critic, arena, w, tile.rows());
  const Saves saves{w.critic_saves, tile.rows(), 0};
  float* q = q_ + static_cast<std::size_t>(j) * draw_rows_ + tile.begin;
  const float* seed = nullptr;
  if (critic.head()) {
    forward_pass(p, kX, nullptr, saves, q, 1);
  } else {  // a critic without hidden layers: the output is a padded row
    float* wide = w.critic_saves;
    forward_pass(p, kX, nullptr, {}, wide, kPad);
    team.wait();
    for (int r = begin; r < end; ++r) {
      q[r] = wide[r * kPad];
      wide[r * kPad] = 1.0f;
      for (int c = 1; c < kPad; ++c) wide[r * kPad + c] = 0.0f;
    }
    seed = wide;
  }
  const int which = backward_pass(p, seed, kPad, saves, false);
  input_vjp(p, critic.input(kX), fk, which, row(dq_, j * draw_rows_ + tile.begin), pitch_);
}

void SampleRun::combine(Tile tile, const Worker& w) {
  const int rows = tile.rows() * draws_, first = tile.begin * draws_;
  table_.combine({first + w.team.begin(rows), first + w.team.end(rows), plan_.critic->shape().members, plan_.action_dim,
                  pitch_, &steering_, q_, draw_rows_, dq_, a_, w.weights, g_, value_, std_});
}

// The population std of all finite values (+ 1e-6); the same on every thread.
void SampleRun::set_batch_scale() {
  double sum = 0, squares = 0;
  int count = 0;
  for (int i = 0; i < draw_rows_; ++i) {
    if (!std::isfinite(value_[i])) continue;
    sum += value_[i];
    ++count;
  }
  const double mean = count > 0 ? sum / count : 0;
  for (int i = 0; i < draw_rows_; ++i) {
    if (std::isfinite(value_[i])) squares += (value_[i] - mean) * (value_[i] - mean);
  }
  q_divisor_ = count > 0 ? static_cast<float>(std::sqrt(squares / count) + 1e-6) : 1.0f;
}

// g += (1 - t) J_v^T g
void SampleRun::pull_back_tweedie(int k, Tile tile, const Worker& w) {
  const Network& flow = *plan_.flow;
  const Pass p = pass(flow, arenas_[0], w, tile.rows());
  w.team.wait();
  const int which = backward_pass(p, row(g_, tile.begin), pitch_, {flow_saves_, batch_, tile.begin}, false);
  input_vjp(p, flow.input(kX), flow.fk(), which, row(jg_, tile.begin), pitch_);
  w.team.wait();
  const float ahead = static_cast<float>(1.0 - static_cast<double>(k) / plan_.steps);
  for (int r = tile.begin + w.team.begin(tile.rows()); r < tile.begin + w.team.end(tile.rows()); ++r) {
    for (int c = 0; c < pitch_; ++c) row(g_, r)[c] += ahead * row(jg_, r)[c];
  }
}

// g_n *= p_n = softmax_n(tau Q_n / scale), and the std that the update sees, in the place of each row's first draw.
void SampleRun::weigh_draws(Tile tile, const Worker& w) {
  w.team.wait();
  const int begin = tile.begin + w.team.begin(tile.rows()), end = tile.begin + w.team.end(tile.rows());
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
void SampleRun::pull_back_mfm(Tile tile, const Worker& w) {
  const Network& map = *plan_.posterior;
  const FormatKernels& fk = map.fk();
  const Team& team = w.team;
  const std::ptrdiff_t first = map.first_padded();
  const int column = static_cast<int>(first) / kPad;
  const int from = kPad * team.begin(column), to = kPad * team.end(column);
  weigh_draws(tile, w);
  for (int r = tile.begin; r < tile.end; ++r) {
    std::memset(delta_sum_ + r * first + from, 0, sizeof(float) * (to - from));
  }
  for_draw_subtiles(tile, [&](Tile rows) {
    const int which = backward_pass(pass(map, arenas_[2], w, rows.rows()), row(g_, rows.begin), pitch_,
                                    {map_saves_, draw_rows_, rows.begin}, true);
    const std::ptrdiff_t delta_pitch = w.scratch.pitch;
    const float* delta = reinterpret_cast<const float*>(w.scratch.d_operand[which]);
    for (int i = rows.begin; i < rows.end; ++i) {
      float* sum = delta_sum_ + (i / draws_) * first;
      const float* one = delta + (i - rows.begin) * delta_pitch;
      for (int c = from; c < to; ++c) sum[c] += one[c];
    }
    team.wait();
  });
  const std::ptrdiff_t d_pitch = w.scratch.d_pitch();
  const int begin = team.begin(tile.rows()), end = team.end(tile.rows());
  fk.to_d_operand({end - begin, static_cast<int>(first), delta_sum_ + (tile.begin + begin) * first, first, -kInfinity,
                   kInfinity, w.scratch.d_operand[0] + begin * d_pitch, d_pitch});
  team.wait();
  input_vjp(pass(map, arenas_[2], w, tile.rows()), map.input(kX), fk, 0, row(jg_, tile.begin), pitch_);
  team.wait();
}

// The inner Euler steps backwards, into total; the gradient at xbar lives in g.
void SampleRun::pull_back_glass(int k, Tile tile, const Worker& w) {
  const Network& flow = *plan_.flow;
  const int m = steering_.glass_steps;
  weigh_draws(tile, w);
  for_draw_subtiles(tile, [&](Tile rows) {
    const int begin = rows.begin + w.team.begin(rows.rows()), end = rows.begin + w.team.end(rows.rows());
    for (int i = begin; i < end; ++i) std::memset(row(gx_, i), 0, sizeof(float) * pitch_);
    for (int s = m - 1; s >= 0; --s) {
      const GlassCoefficients& c = plan_.glass[static_cast<std::size_t>(k) * m + s];
      const float cv = static_cast<float>(c.v_drift / m), cx = static_cast<float>(c.x_drift / m);
      const float keep = static_cast<float>(1 + c.xbar_drift / m);
      const float px = static_cast<float>(c.x_point), pa = static_cast<float>(c.xbar_point);
      for (int i = begin; i < end; ++i) {
        for (int d = 0; d < pitch_; ++d) row(vhat_, i)[d] = cv * row(g_, i)[d];
      }
      w.team.wait();
      const Pass p = pass(flow, arenas_[0], w, rows.rows());
      const int which = backward_pass(p, row(vhat_, rows.begin), pitch_,
                                      {flow_saves_ + flow.saves_floats(draw_rows_) * s, draw_rows_, rows.begin}, false);
      input_vjp(p, flow.input(kX), flow.fk(), which, row(jg_, rows.begin), pitch_);
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
  for (int b = tile.begin + w.team.begin(tile.rows()); b < tile.begin + w.team.end(tile.rows()); ++b) {
    for (int d = 0; d < pitch_; ++d) {
      float sum = 0.0f;
      for (int n = 0; n < draws_; ++n) sum += row(gx_, b * draws_ + n)[d];
      row(total_, b)[d] = sum;
    }
  }
  w.team.wait();
}

// ---------------------------------------------------------------- update

void SampleRun::update(int k, Tile tile, const Worker& w) {
  float* g = g_;
  switch (steering_.estimate) {
    case Estimate::kNoisy:
      break;
    case Estimate::kTweedie:
      if (steering_.full_jacobian) pull_back_tweedie(k, tile, w);
      break;
    case Estimate::kMfm:
      pull_back_mfm(tile, w);
      g = jg_;
      break;
    case Estimate::kGlass:
      pull_back_glass(k, tile, w);
      g = total_;
      break;
  }
  const int begin = tile.begin + w.team.begin(tile.rows()), end = tile.begin + w.team.end(tile.rows());
  const float scale = steering_.tau / q_divisor_;
  for (std::ptrdiff_t i = static_cast<std::ptrdiff_t>(begin) * pitch_; i < static_cast<std::ptrdiff_t>(end) * pitch_;
       ++i) {
    g[i] *= scale;
  }
  const std::size_t at = static_cast<std::size_t>(k) * batch_;
  SteerArgs steer{begin,
                  end,
                  plan_.action_dim,
                  pitch_,
                  &steering_,
                  plan_.mask.empty() ? nullptr : plan_.mask.data(),
                  x_,
                  v_,
                  g,
                  std_,
                  draws_,
                  static_cast<float>(1.0 / plan_.steps),
                  args_.gradient_norms == nullptr ? nullptr : args_.gradient_norms + at,
                  args_.nonfinite == nullptr ? nullptr : args_.nonfinite + at};
  table_.steer(steer);
}

}  // namespace qpilots::cpu
