// One call: its memory and its steps. The loop is in sampler.cpp, the phases of a step in sample_phases.cpp.
#pragma once

#include <atomic>
#include <memory>

#include "call/region.h"
#include "call/sampler.h"

namespace qpilots::cpu {

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
    char* critic_saves;
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
  void time_rows(const Network& net, const char* arena, const std::vector<float>* features, std::size_t count,
                 float* out, TileScratch& scratch);
  void denoise(int k, Tile tile, const Worker& w);
  void flow_forward(Tile tile, const Worker& w, const float* src, int group, const float* time, Saves saves,
                    float* out);
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
  const int batch_, draws_, draw_rows_, pitch_, threads_, tile_rows_;
  int flow_tiles_, critic_tiles_;
  bool any_steered_ = false, keep_flow_ = false;
  float q_divisor_ = 1.0f;

  const char* arenas_[3] = {};
  ArenaLease* live_[3] = {};
  float *x_, *v_, *a_, *g_, *jg_, *vhat_ = nullptr, *gx_ = nullptr, *total_ = nullptr;
  float *flow_base_, *flow_time_, *critic_base_ = nullptr, *map_base_ = nullptr, *map_time_ = nullptr,
                                  *map_x_ = nullptr;
  float* delta_sum_ = nullptr;
  char *flow_saves_ = nullptr, *map_saves_ = nullptr, *thread_saves_ = nullptr;
  float *q_ = nullptr, *dq_ = nullptr, *value_ = nullptr, *std_ = nullptr, *p_ = nullptr;
  float* zeros_;
  int scratch_width_;
  char* scratch_;
  std::size_t scratch_bytes_, critic_saves_bytes_ = 0;
  float* thread_weights_ = nullptr;
  Barrier *barriers_, *all_;
  std::atomic<int>* queues_;  // pack units, then items to prepare, then one a step
};

// Visits the draws' rows of a tile in pieces that fit the scratch; rows(Tile).
template <class Rows>
void SampleRun::for_draw_subtiles(Tile tile, Rows rows) const {
  const int begin = tile.begin * draws_, count = tile.rows() * draws_;
  const int pieces = (count + tile_rows_ - 1) / tile_rows_;
  for (int i = 0; i < pieces; ++i) {
    rows(Tile{begin + tile_begin(count, pieces, i), begin + tile_begin(count, pieces, i + 1)});
  }
}

}  // namespace qpilots::cpu
