#include "sampler.h"

#include <pthread.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "qpilots/number.h"
#include "region.h"

namespace qpilots::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::atomic<bool> forked{false};

// The state of one call, shared by its threads. Rows of `x`, `a`, ... are padded to `pitch` = padded(A).
class SampleRun {
 public:
  SampleRun(const SamplerPlan& plan, const SampleArgs& args, int threads);

  std::size_t carve(char* base);
  void set_arenas(const std::unique_ptr<ArenaLease> (&live)[3]);
  void run(int thread, int threads);

 private:
  struct Tile {
    int begin, end;
    int rows() const { return end - begin; }
  };
  struct Worker {  // what one thread needs to work on one item
    const Team& team;
    TileScratch& scratch;
    float* critic_saves;
    float* weights;
  };

  Tile flow_tile(int i) const { return {tile_begin(batch_, flow_tiles_, i), tile_begin(batch_, flow_tiles_, i + 1)}; }
  Pass pass(const Network& net, const char* arena, const Worker& w, int rows) const {
    return {net, arena, w.team, w.scratch, rows};
  }
  template <class Visit>
  void for_flow_tiles(int thread, int threads, Visit visit);
  template <class Rows>
  void for_draw_subtiles(Tile tile, Rows rows) const;

  void prepare_item(int item, const Worker& w);
  void first_layer_base(const Network& net, const char* member, Tile rows, float* base);
  void time_rows(const Network& net, const char* arena, const std::vector<float>* features, std::size_t count, float* out,
                 TileScratch& scratch);
  void denoise(int k, Tile tile, const Worker& w);
  void flow_forward(Tile tile, const Worker& w, const float* src, int group, const float* time, Saves saves, float* out);
  void estimate_mfm(int k, Tile tile, const Worker& w);
  void estimate_glass(int k, Tile tile, const Worker& w);
  void criticise(int item, const Worker& w);
  void combine(Tile tile, const Worker& w);
  void pull_back_tweedie(int k, Tile tile, const Worker& w);
  void weigh_draws(Tile tile, const Worker& w);
  void pull_back_mfm(Tile tile, const Worker& w);
  void pull_back_glass(int k, Tile tile, const Worker& w);
  void update(int k, Tile tile, const Worker& w);
  void set_batch_scale();
  void finish(Tile tile, const Team& team);
  const float* draw_noise(int k, int row) const {
    return args_.posterior_noise + (static_cast<std::size_t>(k) * draw_rows_ + row) * plan_.action_dim;
  }
  float* row(float* base, int i) const { return base + static_cast<std::size_t>(i) * pitch_; }

  const SamplerPlan& plan_;
  const SampleArgs& args_;
  const KernelTable& table_;
  const SteeringParams& steering_;
  const int batch_, draws_, draw_rows_, pitch_, threads_;
  int flow_tiles_, critic_tiles_;
  bool any_steered_ = false, keep_flow_ = false;
  float q_divisor_ = 1.0f;

  const char* arenas_[3] = {};
  const ArenaLease* live_[3] = {};
  float *x_, *v_, *a_, *g_, *jg_, *vhat_ = nullptr, *gx_ = nullptr, *total_ = nullptr;
  float *flow_base_, *flow_time_, *critic_base_ = nullptr, *map_base_ = nullptr, *map_time_ = nullptr, *map_x_ = nullptr;
  float *delta_sum_ = nullptr, *flow_saves_ = nullptr, *map_saves_ = nullptr;
  float *q_ = nullptr, *dq_ = nullptr, *value_ = nullptr, *std_ = nullptr, *p_ = nullptr;
  float *zeros_, *q_wide_ = nullptr;
  int scratch_width_;
  char* scratch_;
  std::size_t scratch_bytes_, critic_saves_floats_ = 0;
  float *thread_saves_ = nullptr, *thread_weights_ = nullptr;
  Barrier *barriers_, *all_;
  std::atomic<int>* queues_;  // pack units, then items to prepare, then one a step
};

SampleRun::SampleRun(const SamplerPlan& plan, const SampleArgs& args, int threads)
    : plan_(plan), args_(args), table_(plan.flow->table()), steering_(plan.steering), batch_(args.batch),
      draws_(plan.draws() ? plan.steering.num_samples : 1), draw_rows_(args.batch * draws_),
      pitch_(padded(plan.action_dim)), threads_(threads) {
  for (int k = 0; k < plan.steps; ++k) any_steered_ = any_steered_ || plan.steered(k);
  keep_flow_ = any_steered_ && steering_.estimate == Estimate::kTweedie && steering_.full_jacobian;
  flow_tiles_ = tile_count(batch_, 1, threads_);
  critic_tiles_ = any_steered_ ? tile_count(draw_rows_, plan.critic->shape().members, threads_) : 0;
  if (steering_.q_scale_kind == QScale::kNumber) q_divisor_ = steering_.q_scale;
}

std::size_t SampleRun::carve(char* base) {
  Carver c(base);
  const Network& flow = *plan_.flow;
  const std::size_t B = batch_, D = draw_rows_, P = pitch_;
  barriers_ = c.take<Barrier>(threads_);
  all_ = c.take<Barrier>(1);
  queues_ = c.take<std::atomic<int>>(plan_.steps + 2);
  x_ = c.take<float>(B * P);
  v_ = c.take<float>(B * P);
  flow_base_ = c.take<float>(B * flow.first_padded());
  flow_time_ = c.take<float>((plan_.steps + plan_.glass.size()) * flow.first_padded());
  int width = flow.max_padded();
  if (any_steered_) {
    const Network& critic = *plan_.critic;
    const std::size_t E = critic.shape().members;
    width = std::max(width, critic.max_padded());
    a_ = c.take<float>(D * P);
    g_ = c.take<float>(D * P);
    jg_ = c.take<float>(D * P);
    critic_base_ = c.take<float>(E * B * critic.first_padded());
    q_ = c.take<float>(E * D);
    dq_ = c.take<float>(E * D * P);
    value_ = c.take<float>(D);
    std_ = c.take<float>(D);
    p_ = c.take<float>(D);
    critic_saves_floats_ = critic.saves_floats(kMaxTileRows) + kMaxTileRows * kPad;
    thread_saves_ = c.take<float>(critic_saves_floats_ * threads_);
    thread_weights_ = c.take<float>(E * threads_);
    if (keep_flow_) flow_saves_ = c.take<float>(flow.saves_floats(batch_));
    if (plan_.draws()) vhat_ = c.take<float>(D * P);
    if (steering_.estimate == Estimate::kMfm) {
      const Network& map = *plan_.posterior;
      width = std::max(width, map.max_padded());
      map_base_ = c.take<float>(B * map.first_padded());
      map_time_ = c.take<float>(static_cast<std::size_t>(plan_.steps) * map.first_padded());
      map_x_ = c.take<float>(B * map.first_padded());
      delta_sum_ = c.take<float>(B * map.first_padded());
      map_saves_ = c.take<float>(map.saves_floats(draw_rows_));
    } else if (steering_.estimate == Estimate::kGlass) {
      gx_ = c.take<float>(D * P);
      total_ = c.take<float>(B * P);
      flow_saves_ = c.take<float>(flow.saves_floats(draw_rows_) * steering_.glass_steps);
    }
  }
  zeros_ = c.take<float>(width);
  scratch_width_ = width;
  scratch_bytes_ = TileScratch::bytes(kMaxTileRows, width);
  scratch_ = c.take<char>(scratch_bytes_ * threads_);
  return c.used();
}

void SampleRun::set_arenas(const std::unique_ptr<ArenaLease> (&live)[3]) {
  for (int i = 0; i < 3; ++i) {
    live_[i] = live[i].get();
    arenas_[i] = args_.packed != nullptr ? args_.packed->arenas[i].data() : live_[i] != nullptr ? live_[i]->data() : nullptr;
  }
  for (int i = 0; i < threads_; ++i) new (&barriers_[i]) Barrier();
  new (all_) Barrier();
  for (int i = 0; i < plan_.steps + 2; ++i) new (&queues_[i]) std::atomic<int>(0);
  std::memset(zeros_, 0, sizeof(float) * scratch_width_);
}

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
  ForwardArgs product{&block, member + block.offset, 0, block.panels,
                      reinterpret_cast<const char*>(args_.obs) + rows.begin * obs_bytes, obs_bytes, rows.rows(),
                      nullptr, nullptr, base + rows.begin * pitch, pitch};
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
    for (std::ptrdiff_t i = static_cast<std::ptrdiff_t>(begin) * pitch_; i < static_cast<std::ptrdiff_t>(end) * pitch_; ++i) {
      x_[i] += dt * v_[i];
    }
    return;
  }
  switch (steering_.estimate) {
    case Estimate::kNoisy:
    case Estimate::kTweedie: {
      const float ahead = steering_.estimate == Estimate::kNoisy ? 0.0f : 1.0f - t;
      for (int r = begin; r < end; ++r) {
        for (int c = 0; c < pitch_; ++c) row(a_, r)[c] = ahead == 0.0f ? row(x_, r)[c] : row(x_, r)[c] + ahead * row(v_, r)[c];
      }
      return;
    }
    case Estimate::kMfm: estimate_mfm(k, tile, w); return;
    case Estimate::kGlass: estimate_glass(k, tile, w); return;
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
                 clipped ? steering_.action_high : kInfinity, w.scratch.operand[0] + begin * operand_pitch, operand_pitch});
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
    const std::ptrdiff_t delta_pitch = w.scratch.pitch * fk.d_bytes / static_cast<std::ptrdiff_t>(sizeof(float));
    const float* delta = reinterpret_cast<const float*>(w.scratch.d_operand[which]);
    for (int i = rows.begin; i < rows.end; ++i) {
      float* sum = delta_sum_ + (i / draws_) * first;
      const float* one = delta + (i - rows.begin) * delta_pitch;
      for (int c = from; c < to; ++c) sum[c] += one[c];
    }
    team.wait();
  });
  const std::ptrdiff_t d_pitch = w.scratch.pitch * fk.d_bytes;
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
    case Estimate::kNoisy: break;
    case Estimate::kTweedie:
      if (steering_.full_jacobian) pull_back_tweedie(k, tile, w);
      break;
    case Estimate::kMfm: pull_back_mfm(tile, w); g = jg_; break;
    case Estimate::kGlass: pull_back_glass(k, tile, w); g = total_; break;
  }
  const int begin = tile.begin + w.team.begin(tile.rows()), end = tile.begin + w.team.end(tile.rows());
  const float scale = steering_.tau / q_divisor_;
  for (std::ptrdiff_t i = static_cast<std::ptrdiff_t>(begin) * pitch_; i < static_cast<std::ptrdiff_t>(end) * pitch_; ++i) {
    g[i] *= scale;
  }
  const std::size_t at = static_cast<std::size_t>(k) * batch_;
  SteerArgs steer{begin, end, plan_.action_dim, pitch_, &steering_, plan_.mask.empty() ? nullptr : plan_.mask.data(),
                  x_, v_, g, std_, draws_, static_cast<float>(1.0 / plan_.steps),
                  args_.gradient_norms == nullptr ? nullptr : args_.gradient_norms + at,
                  args_.nonfinite == nullptr ? nullptr : args_.nonfinite + at};
  table_.steer(steer);
}

void SampleRun::finish(Tile tile, const Team& team) {
  for (int r = tile.begin + team.begin(tile.rows()); r < tile.begin + team.end(tile.rows()); ++r) {
    float* out = args_.actions + static_cast<std::size_t>(r) * plan_.action_dim;
    for (int c = 0; c < plan_.action_dim; ++c) out[c] = qpilots::clamp(row(x_, r)[c], steering_.action_low, steering_.action_high);
  }
}

// ---------------------------------------------------------------- the loop

template <class Visit>
void SampleRun::for_flow_tiles(int thread, int threads, Visit visit) {
  for_fixed_items(flow_tiles_, thread, threads, barriers_, [&](int item, const Team& team, int leader) {
    TileScratch scratch = TileScratch::carve(scratch_ + scratch_bytes_ * leader, kMaxTileRows, scratch_width_);
    float* weights = thread_weights_ == nullptr ? nullptr : thread_weights_ + thread * plan_.critic->shape().members;
    visit(flow_tile(item), Worker{team, scratch, nullptr, weights});
  });
}

void SampleRun::run(int thread, int threads) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point last = Clock::now();
  const auto lap = [&](PhaseIndex phase) {
    if (args_.phase_seconds == nullptr || thread != 0) return;
    const Clock::time_point now = Clock::now();
    args_.phase_seconds[phase] += std::chrono::duration<double>(now - last).count();
    last = now;
  };
  if (args_.packed == nullptr) {
    int units = 0;
    for (int n = 0; n < 3; ++n) units += live_[n] == nullptr ? 0 : plan_.network(n)->pack_units();
    for (int i; (i = queues_[0].fetch_add(1, std::memory_order_relaxed)) < units;) {
      int n = 0;
      for (; live_[n] == nullptr || i >= plan_.network(n)->pack_units(); ++n) {
        if (live_[n] != nullptr) i -= plan_.network(n)->pack_units();
      }
      plan_.network(n)->refresh(i, args_.sources[n], live_[n]->data(), live_[n]->fingerprints());
    }
    all_->wait(threads);
    lap(kPack);
  }
  {
    TileScratch scratch = TileScratch::carve(scratch_ + scratch_bytes_ * thread, kMaxTileRows, scratch_width_);
    const Team alone{0, 1, nullptr};
    const int members = any_steered_ ? plan_.critic->shape().members : 0;
    const int items = 1 + flow_tiles_ * (1 + members);
    for (int i; (i = queues_[1].fetch_add(1, std::memory_order_relaxed)) < items;) {
      prepare_item(i, Worker{alone, scratch, nullptr, nullptr});
    }
    all_->wait(threads);
    lap(kPrepare);
  }
  for (int k = 0; k < plan_.steps; ++k) {
    for_flow_tiles(thread, threads, [&](Tile tile, const Worker& w) { denoise(k, tile, w); });
    lap(kDenoise);
    if (!plan_.steered(k)) continue;
    all_->wait(threads);
    const int items = plan_.critic->shape().members * critic_tiles_;
    for_queued_items(items, thread, threads, queues_[2 + k], barriers_, [&](int i, const Team& team, int leader) {
      TileScratch scratch = TileScratch::carve(scratch_ + scratch_bytes_ * leader, kMaxTileRows, scratch_width_);
      // alternate directions: the members visited last are the ones still in cache
      const int item = k % 2 == 0 ? i : items - 1 - i;
      criticise(item, Worker{team, scratch, thread_saves_ + critic_saves_floats_ * leader, nullptr});
    });
    all_->wait(threads);
    lap(kGradient);
    for_flow_tiles(thread, threads, [&](Tile tile, const Worker& w) { combine(tile, w); });
    if (steering_.q_scale_kind == QScale::kBatchStd) {
      all_->wait(threads);
      if (thread == 0) set_batch_scale();
      all_->wait(threads);
    }
    for_flow_tiles(thread, threads, [&](Tile tile, const Worker& w) { update(k, tile, w); });
    lap(kUpdate);
  }
  for_flow_tiles(thread, threads, [&](Tile tile, const Worker& w) { finish(tile, w.team); });
}

}  // namespace

int usable_threads(int threads) {
#if defined(_OPENMP)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  (void)registered;
  return forked.load(std::memory_order_relaxed) || omp_in_parallel() ? 1 : std::max(1, threads);
#else
  (void)threads;
  return 1;
#endif
}

std::size_t workspace_bytes(const SamplerPlan& plan, int batch, int threads) {
  SampleArgs args;
  args.batch = batch;
  return SampleRun(plan, args, std::max(1, threads)).carve(nullptr);
}

void sample(const SamplerPlan& plan, const SampleArgs& args, WorkspacePool& pool) {
  const int threads = usable_threads(args.threads);
  std::unique_ptr<Workspace> workspace = pool.acquire();
  SampleRun run(plan, args, threads);
  run.carve(workspace->scratch.reserve(run.carve(nullptr)));
  std::unique_ptr<ArenaLease> live[3];
  for (int n = 0; n < 3 && args.packed == nullptr; ++n) {
    if (args.sources[n] != nullptr) {
      live[n] = std::make_unique<ArenaLease>(*plan.network(n), *args.live[n], workspace->arenas[n]);
    }
  }
  run.set_arenas(live);
  parallel_region(threads, [&](int thread, int count) { run.run(thread, count); });
  for (auto& lease : live) lease.reset();
  pool.release(std::move(workspace));
}

ArenaLease::ArenaLease(const Network& net, LiveArena& own, LiveArena& spare)
    : lock_(own.mutex, std::try_to_lock), arena_(lock_.owns_lock() ? &own : &spare) {
  arena_->arena.reserve(net.arena_bytes());
  if (arena_ == &spare) arena_->fingerprints.clear();  // whatever it holds may be another network's
  arena_->fingerprints.resize(net.pack_units(), 0);
}

void pack(const SamplerPlan& plan, const LayerSource* const (&sources)[3], int threads, PackedWeights& out) {
  for (int n = 0; n < 3; ++n) {
    if (sources[n] != nullptr) out.arenas[n].reserve(plan.network(n)->arena_bytes());
  }
  parallel_region(usable_threads(threads), [&](int thread, int count) {
    for (int n = 0; n < 3; ++n) {
      if (sources[n] == nullptr) continue;
      for (int u = thread; u < plan.network(n)->pack_units(); u += count) plan.network(n)->pack(u, sources[n], out.arenas[n].data());
    }
  });
}

}  // namespace qpilots::cpu
