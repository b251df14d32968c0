// The phases of one step: prepare, denoise and project, gradient, pull back, update.
#include <cmath>
#include <cstring>

#include "call/sample_run.h"
#include "qpilots/number.h"

namespace qpilots::cpu {

// ---------------------------------------------------------------- once a call

void SampleRun::first_layer_base(int network, const char* member, RowRange rows, float* base) {
  const Network& net = *plan_.network(network);
  const float* bias = reinterpret_cast<const float*>(member + net.layer(0).bias);
  const std::ptrdiff_t pitch = net.first_padded();
  if (!net.has(kObs)) {
    for (int r = rows.begin; r < rows.end; ++r) std::memcpy(base + r * pitch, bias, sizeof(float) * pitch);
    return;
  }
  const Block& block = net.input(kObs);
  const float* obs = plan_.own_obs[network] ? args_.own[network].obs : args_.obs;
  const std::ptrdiff_t obs_bytes = sizeof(float) * block.in;
  ForwardArgs product{&block,
                      member + block.offset,
                      0,
                      block.panels,
                      reinterpret_cast<const char*>(obs) + rows.begin * obs_bytes,
                      obs_bytes,
                      rows.count(),
                      nullptr,
                      nullptr,
                      base + rows.begin * pitch,
                      pitch};
  product.init_shared = bias;
  table_.formats[0].forward(product);
}

void SampleRun::time_rows(int network, const std::vector<float>* features, std::size_t count, float* out,
                          PassScratch& scratch) {
  const Network& net = *plan_.network(network);
  const char* arena = arenas_[network];
  const std::ptrdiff_t pitch = net.first_padded();
  std::memset(out, 0, sizeof(float) * count * pitch);
  for (int i = 0; i < 3; ++i) {
    const InputKind kind = static_cast<InputKind>(kT + i);
    if (!net.has(kind)) continue;
    const Block& block = net.input(kind);
    const float* values = plan_.own_times[network] ? args_.own[network].times : features[i].data();
    for (std::size_t first = 0; first < count; first += rows_together_) {
      const int rows = static_cast<int>(std::min<std::size_t>(rows_together_, count - first));
      for (int r = 0; r < rows; ++r) scratch.init[r] = out + (first + r) * pitch;
      table_.formats[0].forward({&block, arena + block.offset, 0, block.panels, values + first * block.in,
                                 static_cast<std::ptrdiff_t>(sizeof(float)) * block.in, rows, scratch.init, nullptr,
                                 out + first * pitch, pitch});
    }
  }
}

// Items: the time rows, then the observation's part of each network's first layer, range by range.
void SampleRun::prepare_item(int item, const Worker& w) {
  if (item == 0) {
    time_rows(0, &plan_.flow_times, plan_.steps() + plan_.glass.size(), flow_time_, w.scratch);
    if (posterior_time_ != nullptr) {
      time_rows(2, plan_.posterior_times, plan_.steps(), posterior_time_, w.scratch);
    }
    return;
  }
  const int index = item - 1;
  const RowRange rows = flow_rows(index % flow_ranges_);
  const int part = index / flow_ranges_;
  if (part == 0) {
    first_layer_base(0, arenas_[0], rows, flow_base_);
    for (int r = rows.begin; r < rows.end; ++r) {
      std::memset(row(x_, r), 0, sizeof(float) * pitch_);
      std::memcpy(row(x_, r), args_.noise + static_cast<std::size_t>(r) * plan_.action_dim,
                  sizeof(float) * plan_.action_dim);
    }
    if (posterior_base_ != nullptr) first_layer_base(2, arenas_[2], rows, posterior_base_);
    return;
  }
  const Network& critic = *plan_.critic;
  const std::size_t j = part - 1;
  first_layer_base(1, arenas_[1] + j * critic.member_bytes(), rows, critic_base_ + j * batch_ * critic.first_padded());
}

// ---------------------------------------------------------------- denoise and project

// out = flow(obs, src, t) on `rows`, t its time `at`, where the observation of row r is r / group. Synchronised before
// and after.
void SampleRun::flow_forward(RowRange rows, const Worker& w, const float* src, int group, std::size_t at, Saves saves,
                             float* out) {
  const Network& flow = *plan_.flow;
  const std::ptrdiff_t operand_pitch = w.scratch.pitch * flow.fk().a_bytes;
  const int begin = w.team.begin(rows.count()), end = w.team.end(rows.count());
  for (int r = begin; r < end; ++r) {
    w.scratch.init[r] = flow_base_ + static_cast<std::size_t>((rows.begin + r) / group) * flow.first_padded();
  }
  flow.fk().to_operand({end - begin, pitch_, src + static_cast<std::size_t>(rows.begin + begin) * pitch_, pitch_,
                        nullptr, nullptr, w.scratch.operand[0] + begin * operand_pitch, operand_pitch});
  w.team.wait();
  const float* time = flow_time_ + at * flow.first_padded();
  forward_pass(pass(0, w, rows.count(), at), kX, time, saves, row(out, rows.begin), pitch_);
  w.team.wait();
}

void SampleRun::denoise(int k, RowRange rows, const Worker& w) {
  const auto [t, dt, weight] = plan_.schedule[k];
  const bool steered = weight > 0.0f;
  const Saves saves{steered && keep_flow_ ? flow_saves_ : nullptr, batch_, rows.begin};
  flow_forward(rows, w, x_, 1, k, saves, v_);
  const int begin = rows.begin + w.team.begin(rows.count()), end = rows.begin + w.team.end(rows.count());
  if (!steered) {
    for (std::ptrdiff_t i = static_cast<std::ptrdiff_t>(begin) * pitch_; i < static_cast<std::ptrdiff_t>(end) * pitch_;
         ++i) {
      x_[i] += dt * v_[i];
    }
    return;
  }
  estimate(k, rows, w);
  if (mapped_ != nullptr) map_actions(rows, w);
}

// The estimates of the clean action of these rows, into a.
void SampleRun::estimate(int k, RowRange rows, const Worker& w) {
  const int begin = rows.begin + w.team.begin(rows.count()), end = rows.begin + w.team.end(rows.count());
  switch (steering_.estimate) {
    case Estimate::kNoisy:
    case Estimate::kTweedie: {
      const float t = static_cast<float>(plan_.schedule[k].t);
      const float ahead = steering_.estimate == Estimate::kNoisy ? 0.0f : 1.0f - t;
      for (int r = begin; r < end; ++r) {
        for (int c = 0; c < pitch_; ++c)
          row(a_, r)[c] = ahead == 0.0f ? row(x_, r)[c] : row(x_, r)[c] + ahead * row(v_, r)[c];
      }
      return;
    }
    case Estimate::kMfm:
      estimate_posterior(k, rows, w);
      return;
    case Estimate::kGlass:
      estimate_glass(k, rows, w);
      return;
  }
}

// The critic's own columns of the estimates, clipped where the steering clips what the critic is shown.
void SampleRun::map_actions(RowRange rows, const Worker& w) {
  const OwnInputs& own = args_.own[1];
  const bool clipped = steering_.clip != Clip::kNone;
  const int width = static_cast<int>(plan_.action_columns.size());
  w.team.wait();
  const int count = rows.count() * draws_, first = rows.begin * draws_;
  for (int i = first + w.team.begin(count); i < first + w.team.end(count); ++i) {
    float* out = row(mapped_, i);
    std::memset(out, 0, sizeof(float) * pitch_);
    for (int c = 0; c < width; ++c) {
      const int dim = plan_.action_columns[c];
      const float a = row(a_, i)[dim];
      out[c] = own.scale[c] * (clipped ? qpilots::clamp(a, plan_.low[dim], plan_.high[dim]) : a) + own.shift[c];
    }
  }
}

// ---------------------------------------------------------------- gradient

// One member on one range of rows: Q and dQ/da, forward and backward while its weights are hot.
void SampleRun::criticise(int item, const Worker& w) {
  const Network& critic = *plan_.critic;
  const FormatKernels& fk = critic.fk();
  const Team& team = w.team;
  const int j = item / critic_ranges_, i = item % critic_ranges_;
  const RowRange rows = row_range(draw_rows_, critic_ranges_, i);
  const char* arena = arenas_[1] + critic.member_bytes() * j;
  const std::ptrdiff_t operand_pitch = w.scratch.pitch * fk.a_bytes, first = critic.first_padded();
  const bool clipped = steering_.clip != Clip::kNone && mapped_ == nullptr;
  const int begin = team.begin(rows.count()), end = team.end(rows.count());
  for (int r = begin; r < end; ++r) {
    w.scratch.init[r] = critic_base_ + (static_cast<std::ptrdiff_t>(j) * batch_ + (rows.begin + r) / draws_) * first;
  }
  fk.to_operand({end - begin, pitch_, row(mapped_ == nullptr ? a_ : mapped_, rows.begin + begin), pitch_,
                 clipped ? plan_.low.data() : nullptr, clipped ? plan_.high.data() : nullptr,
                 w.scratch.operand[0] + begin * operand_pitch, operand_pitch});
  team.wait();
  Pass p = pass(1, w, rows.count());
  p.arena = arena;
  const Saves saves{w.critic_saves, rows.count(), 0};
  float* q = q_ + static_cast<std::size_t>(j) * draw_rows_ + rows.begin;
  const float* seed = nullptr;
  if (critic.head()) {
    forward_pass(p, kX, nullptr, saves, q, 1);
  } else {  // a critic without hidden layers: the output is a padded row
    float* wide = reinterpret_cast<float*>(w.critic_saves);
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
  float* dq = row(dq_, j * draw_rows_ + rows.begin);
  input_vjp(p, critic.input(kX), fk, which, dq, pitch_);
  if (mapped_ == nullptr) return;
  team.wait();
  for (int r = begin; r < end; ++r) pull_back_map(row(dq, r), w.scratch.z + r * w.scratch.pitch);
}

// A row of gradients at the critic's columns becomes one at the actions; spare: [P].
void SampleRun::pull_back_map(float* row, float* spare) const {
  std::memcpy(spare, row, sizeof(float) * pitch_);
  std::memset(row, 0, sizeof(float) * pitch_);
  for (std::size_t c = 0; c < plan_.action_columns.size(); ++c) {
    row[plan_.action_columns[c]] += args_.own[1].scale[c] * spare[c];
  }
}

void SampleRun::combine(RowRange rows, const Worker& w) {
  const int count = rows.count() * draws_, first = rows.begin * draws_;
  table_.combine({first + w.team.begin(count), first + w.team.end(count), plan_.critic->shape().members,
                  plan_.action_dim, pitch_, &steering_, q_, draw_rows_, dq_, a_, plan_.low.data(), plan_.high.data(),
                  w.weights, g_, value_, std_});
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
void SampleRun::pull_back_tweedie(int k, RowRange rows, const Worker& w) {
  const Network& flow = *plan_.flow;
  const Pass p = pass(0, w, rows.count(), k);
  w.team.wait();
  const int which = backward_pass(p, row(g_, rows.begin), pitch_, {flow_saves_, batch_, rows.begin}, false);
  input_vjp(p, flow.input(kX), flow.fk(), which, row(jg_, rows.begin), pitch_);
  w.team.wait();
  const float ahead = static_cast<float>(1.0 - plan_.schedule[k].t);
  for (int r = rows.begin + w.team.begin(rows.count()); r < rows.begin + w.team.end(rows.count()); ++r) {
    for (int c = 0; c < pitch_; ++c) row(g_, r)[c] += ahead * row(jg_, r)[c];
  }
}

// ---------------------------------------------------------------- update

void SampleRun::update(int k, RowRange rows, const Worker& w) {
  float* g = g_;
  switch (steering_.estimate) {
    case Estimate::kNoisy:
      break;
    case Estimate::kTweedie:
      if (steering_.full_jacobian) pull_back_tweedie(k, rows, w);
      break;
    case Estimate::kMfm:
      pull_back_posterior(k, rows, w);
      g = jg_;
      break;
    case Estimate::kGlass:
      pull_back_glass(k, rows, w);
      g = total_;
      break;
  }
  const int begin = rows.begin + w.team.begin(rows.count()), end = rows.begin + w.team.end(rows.count());
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
                  plan_.schedule[k].weight,
                  args_.alpha,
                  plan_.mask.empty() ? nullptr : plan_.mask.data(),
                  x_,
                  v_,
                  g,
                  std_,
                  draws_,
                  plan_.schedule[k].dt,
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr};
  if (args_.gradient_norms != nullptr) {
    steer.norms = args_.gradient_norms + at;
    steer.nonfinite = args_.nonfinite + at;
    steer.q_std = args_.q_std + at;
    steer.gated = args_.gated + at;
  }
  table_.steer_velocity(steer);
}

}  // namespace qpilots::cpu
