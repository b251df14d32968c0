// One call: its memory and its steps. The loop is in sampler.cpp, the phases of a step in sample_phases.cpp.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <vector>

#include "call/network.h"
#include "call/parallel.h"
#include "call/region.h"
#include "call/sampler.h"
#include "kernels.h"
#include "live/arena.h"
#include "qpilots/types.h"

namespace qpilots::cpu {

// The state of one call, shared by its threads. Below B is the batch, N the draws of a row, D = B N, E the critics, K
// the steps, and P = padded(A) = pitch_ the width of a row of actions.
class SampleRun {
 public:
  SampleRun(const SamplerPlan& plan, const SampleArgs& args, int threads);

  std::size_t carve(char* base);
  void set_arenas(const std::unique_ptr<ArenaLease> (&live)[3]);
  void run(int thread, int threads);

 private:
  struct Worker {  // what one thread needs to work on one item
    const Team& team;
    PassScratch& scratch;
    char* critic_saves;
    float* weights;
  };

  RowRange flow_rows(int i) const { return row_range(batch_, flow_ranges_, i); }
  // of network n: flow, critic or posterior; at: which of its times
  Pass pass(int n, const Worker& w, int rows, std::size_t at = 0) const {
    const Network& net = *plan_.network(n);
    const float* film = net.film_dim() == 0 ? nullptr : args_.own[n].film + at * net.film_dim();
    return {net, arenas_[n], w.team, w.scratch, rows, film, 0};
  }
  template <class Visit>
  void for_flow_rows(int thread, int threads, Visit visit);
  template <class Visit>
  void for_draw_rows(RowRange rows, Visit visit) const;

  void prepare_item(int item, const Worker& w);
  void first_layer_base(int network, const char* member, RowRange rows, float* base);
  void time_rows(int network, const std::vector<float>* features, std::size_t count, float* out, PassScratch& scratch);
  void estimate(int k, RowRange rows, const Worker& w);
  void map_actions(RowRange rows, const Worker& w);
  void denoise(int k, RowRange rows, const Worker& w);
  void flow_forward(RowRange rows, const Worker& w, const float* src, int group, std::size_t at, Saves saves,
                    float* out);
  void estimate_posterior(int k, RowRange rows, const Worker& w);
  void estimate_glass(int k, RowRange rows, const Worker& w);
  void criticise(int item, const Worker& w);
  void pull_back_map(float* row, float* spare) const;
  void combine(RowRange rows, const Worker& w);
  void pull_back_tweedie(int k, RowRange rows, const Worker& w);
  void weigh_draws(RowRange rows, const Worker& w);
  void pull_back_posterior(int k, RowRange rows, const Worker& w);
  void pull_back_glass(int k, RowRange rows, const Worker& w);
  void update(int k, RowRange rows, const Worker& w);
  void set_batch_scale();
  void finish(RowRange rows, const Team& team);
  const float* draw_noise(int k, int row) const {
    return args_.posterior_noise + (static_cast<std::size_t>(k) * draw_rows_ + row) * plan_.action_dim;
  }
  float* row(float* base, int i) const { return base + static_cast<std::size_t>(i) * pitch_; }

  const SamplerPlan& plan_;
  const SampleArgs& args_;
  const KernelTable& table_;
  const SteeringParams& steering_;
  const int batch_, draws_, draw_rows_, pitch_;  // B, N, D, P
  const int threads_, rows_together_;
  int flow_ranges_, critic_ranges_;
  bool any_steered_ = false, keep_flow_ = false, keeps_ = false;
  float q_divisor_ = 1.0f;

  const char* arenas_[3] = {};  // packed weights of flow, critic, posterior
  ArenaLease* live_[3] = {};    // where they are live
  float *x_, *v_;               // [B, P] the noisy actions, the velocity
  float *a_, *g_;               // [D, P] the estimates, the gradients at them
  float* mapped_ = nullptr;     // [D, P] the critic's columns of the clipped estimates, where these are its own
  float* jg_;                   // [D, P] those pulled back to x; of the posterior network's draws [B, P], their sum
  float* vhat_ = nullptr;       // [D, P] what the posterior network, or a GLASS step's flow, returned
  float* gx_ = nullptr;         // [D, P] GLASS: gradients at x, draw by draw
  float* total_ = nullptr;      // [B, P] and their sum
  // first layers: what the observation and the bias give once a call, what time gives at each step; W the padded width
  float *flow_base_, *flow_time_;                                // [B, W], [K + K m, W] (m inner steps, GLASS alone)
  float* critic_base_ = nullptr;                                 // [E, B, W]
  float *posterior_base_ = nullptr, *posterior_time_ = nullptr;  // [B, W], [K, W]
  float* posterior_x_ = nullptr;                                 // [B, W] base, time and x of a step, of all draws
  float* delta_sum_ = nullptr;                                   // [B, W] first-layer deltas summed over the draws
  // what derivatives need, Network::saves_bytes of so many rows
  char* flow_saves_ = nullptr;          // B rows; GLASS: m times D rows
  char* posterior_saves_ = nullptr;     // D rows
  char* thread_saves_ = nullptr;        // [threads] times rows_together_ rows of a critic, critic_saves_bytes_ each
  float *q_ = nullptr, *dq_ = nullptr;  // [E, D], [E, D, P] Q_j and its gradient at the estimate
  float *value_ = nullptr, *std_ = nullptr, *p_ = nullptr;  // [D] aggregated Q, the members' std, draws' softmax
  float* thread_weights_ = nullptr;                         // [threads, E] the members' weights w_j of one row
  char* scratch_;                                           // [threads] of PassScratch, scratch_bytes_ each
  int scratch_width_;
  std::size_t scratch_bytes_, critic_saves_bytes_ = 0;
  Barrier *barriers_, *all_;  // [threads] one a team, by its leader; of all threads
  std::atomic<int>* queues_;  // [2 + K] pack units, then items to prepare, then one a step
};

// Visits the draws of a range of rows in pieces that fit the scratch; visit(RowRange).
template <class Visit>
void SampleRun::for_draw_rows(RowRange rows, Visit visit) const {
  const int begin = rows.begin * draws_, count = rows.count() * draws_;
  const int pieces = (count + rows_together_ - 1) / rows_together_;
  for (int i = 0; i < pieces; ++i) {
    const RowRange piece = row_range(count, pieces, i);
    visit(RowRange{begin + piece.begin, begin + piece.end});
  }
}

}  // namespace qpilots::cpu
