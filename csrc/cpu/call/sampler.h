// One sampling call: all K steps inside one parallel region.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "call/network.h"
#include "live/arena.h"
#include "live/buffer.h"
#include "live/workspace.h"
#include "qpilots/types.h"

namespace qpilots::cpu {

// A private packed copy of every network, for many calls.
struct PackedWeights {
  Buffer arenas[3];
};

// One of the m inner steps of a GLASS draw, a += (c_x x + c_xbar a + c_v flow(p_x x + p_xbar a, t*)) / m.
struct GlassStep {
  double p_x, p_xbar, c_x, c_xbar, c_v;
};

// One Euler step, from flow time t over dt; weight multiplies the strength of the steering, at 0 no critic is asked.
struct Step {
  double t;
  float dt, weight;
};

struct SamplerPlan {
  std::shared_ptr<const Network> flow, critic, posterior;  // null: takes no part in a call
  SteeringParams steering{};
  int obs_dim = 0, action_dim = 0;
  std::vector<Step> schedule;             // [K]
  std::vector<float> low, high;           // [padded(A)], the bounds of the actions; infinite in the padding
  std::vector<unsigned char> mask;        // steered dims, or empty
  std::vector<float> flow_times;          // [K (+ K m for glass), dim]
  std::vector<float> posterior_times[3];  // t, s, u: [K, dim] each
  std::vector<GlassStep> glass;           // [K, m], or empty
  // what a call's OwnInputs has of each network
  bool own_obs[3] = {}, own_times[3] = {};
  std::vector<int> action_columns;  // [d], d <= A: the critic reads these actions, scaled and shifted; or empty

  int steps() const { return static_cast<int>(schedule.size()); }
  const Network* network(int i) const { return i == 0 ? flow.get() : i == 1 ? critic.get() : posterior.get(); }
  bool draws() const {  // posterior noise is needed
    return critic != nullptr && (steering.estimate == Estimate::kMfm || steering.estimate == Estimate::kGlass);
  }
};

// Columns of a network's first layer that its own module computed for this call.
struct OwnInputs {
  const float* obs = nullptr;                      // [B, dim]
  const float* times = nullptr;                    // [K (+ K m), dim], in the place of the plan's
  const float *scale = nullptr, *shift = nullptr;  // [d], of the critic's action_columns
  const float* film = nullptr;                     // [K (+ K m), film_dim], what the chains read
};

#define QPILOTS_PHASES(X) \
  X(kPack, "pack") X(kPrepare, "prepare") X(kDenoise, "denoise") X(kGradient, "gradient") X(kUpdate, "update")
enum PhaseIndex { QPILOTS_PHASES(QPILOTS_ENUMERATOR) kPhases };

struct SampleArgs {
  const LayerSource* sources[3] = {};  // live weights, where packed is null
  LiveArena* live[3] = {};             // their packed copies between calls
  const PackedWeights* packed = nullptr;
  int batch = 0, threads = 1;
  const float* obs = nullptr;              // [B, S]
  const float* noise = nullptr;            // [B, A]
  const float* posterior_noise = nullptr;  // [K, B, N, A]
  float* actions = nullptr;                // outputs [B, A]
  OwnInputs own[3];
  const float* alpha = nullptr;  // [B], the strength of each row, or null: the steering's
  // the report, [K, B] each: all of them or none
  float* gradient_norms = nullptr;
  unsigned char* nonfinite = nullptr;
  float* q_std = nullptr;
  unsigned char* gated = nullptr;
  double* phase_seconds = nullptr;  // [kPhases] or null
};

void sample(const SamplerPlan& plan, const SampleArgs& args, WorkspacePool& pool);
void pack(const SamplerPlan& plan, const LayerSource* const (&sources)[3], int threads, PackedWeights& out);
std::size_t workspace_bytes(const SamplerPlan& plan, int batch, int threads);

// One network on its input blocks. out [E, B, out]. blocks: pointers to [B, dim] by InputKind. film: [B, film_dim].
void network_forward(const Network& net, const LayerSource* sources, LiveArena& live,
                     const float* const (&blocks)[kInputKinds], const float* film, int batch, int threads, float* out,
                     WorkspacePool& pool);
// cotangent [E, B, out] pulled back to the input columns, summed over members: [B, input_dim].
void network_vjp(const Network& net, const LayerSource* sources, LiveArena& live,
                 const float* const (&blocks)[kInputKinds], const float* film, const float* cotangent, int batch,
                 int threads, int input_dim, float* dx, WorkspacePool& pool);

// How many threads a region may use: one in a forked child, whose thread pool is gone, and inside another region.
int usable_threads(int threads);

}  // namespace qpilots::cpu
