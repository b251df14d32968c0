// The whole call in one launch: every block works through the same program (phase.h), each on its share of it.
//
// A phase is one product for every member of a network, or a step on what products sent. A member belongs to whole
// blocks, which split its neurons in tiles of 16. What a block sends, others await word by word (exchange.h): there is
// no barrier between blocks. x and the few numbers of a row are computed by every block for itself (update.h).
#include "block.h"
#include "host.h"
#include "norms.h"
#include "update.h"

namespace qpilots {
namespace cuda {
namespace {

// A warp's columns [first, first + count tiles) of the operand.
template <class Weight, int NT>
__device__ __forceinline__ void load_operand(const SampleArgs& a, Block<Weight, NT>& block, const Phase& p, int member,
                                             int row0, int valid, int first, int count,
                                             OperandWords<Weight, NT>& operand) {
  const auto make = [&](auto value) { make_operand<Weight, NT>(operand, p.in_dim, first, count, valid, value); };
  switch (static_cast<Operand>(p.operand)) {
    case Operand::kReceived: {
      const int row_words = p.in_stride / kTile * kTileWords<Weight>;
      receive_operand<Weight, NT>(operand, block.words + p.source + row_index(p, member, row0) * row_words, row_words,
                                  first, count, valid, block.tag, block.patience);
      break;
    }
    case Operand::kInput: {
      const float* rows =
          a.inputs[p.input] + p.source + member * p.source_member_stride + static_cast<std::int64_t>(row0) * p.in_dim;
      make([&](int r, int c) { return load_constant(rows + r * p.in_dim + c); });
      break;
    }
    case Operand::kState:
      make([&](int r, int c) { return load_shared(block.x + (row0 + r) * a.action_dim + c); });
      break;
    case Operand::kEstimate:
      make([&](int r, int c) {
        const float value = estimate(a, block, row0 + r, c);
        return a.steering.clip == Clip::kNone ? value : clamp(value, action_low(a, c), action_high(a, c));
      });
      break;
    case Operand::kPosteriorInput:
      make([&](int r, int c) {
        if (c < a.action_dim) return posterior_noise(a, block.step, row0 + r, c);
        return load_shared(block.x + (row0 + r) / a.steering.num_samples * a.action_dim + c - a.action_dim);
      });
      break;
    case Operand::kCotangent:
      make([&](int r, int c) { return load_shared(block.gradients + (row0 + r) * a.action_dim + c); });
      break;
  }
}

template <class Weight, int NT>
__device__ __forceinline__ bool run_product(const SampleArgs& a, Block<Weight, NT>& block, const Phase& p) {
  const Weight* weights = nullptr;
  const Slice slice = warp_slice(p);
  const int stride = shared_stride<Weight>(p.in_stride);
  const bool done = each_group<8 * NT>(a, p, [&](int member, int first_tile, int tiles, int row0, int valid) {
    if (row0 == 0) weights = block.stream.acquire(a, block.program);
    const Partials<NT> partials = block.partials(a, block.parity);
    Needs early{};
    if constexpr (kLoadsEarly<Weight>) {
      Pair pair = pair_of<8 * NT, Weight>(a, p, member, first_tile, row0, valid, threadIdx.x);
      if (static_cast<int>(threadIdx.x) >= tiles * 8 * 8 * NT) pair.count = 0;
      early = load_needs(a, block, p, pair, member);
    }
    const RowWork work = row_work(p);
    RowParts<Weight, NT> parts;
    int column = slice.begin;
    do {
      const int count = slice.end - column < kChunk ? slice.end - column : kChunk;
      OperandWords<Weight, NT> operand;
      if (work == RowWork::kSums) parts.load_sums(block, p, member, row0, valid, column, count);
      load_operand<Weight, NT>(a, block, p, member, row0, valid, column, count, operand);
      if (row0 == 0 && column == slice.begin) block.stream.await(a);
      if (work == RowWork::kMoments) parts.add_moments(p, operand, column, column + count);
      if (work == RowWork::kSums) parts.add_sums(block, p, member, row0, column);
      multiply_group<NT>(weights + column * kTile, stride, operand, count, tiles, partials, column == slice.begin);
      column += kChunk;
    } while (column < slice.end);
    if (work != RowWork::kNone) parts.store(block);
    if (!block.barrier()) return false;
    if (row0 + 8 * NT >= p.rows) block.stream.release(a, block.program);
    finish_product(a, block, p, early, member, first_tile, tiles, row0, valid);
    return true;
  });
  return done && (static_cast<Result>(p.result) != Result::kOwn || block.barrier());
}

template <class Weight, int NT>
__device__ __forceinline__ bool run_phase(const SampleArgs& a, Block<Weight, NT>& block, const Phase& p) {
  switch (static_cast<PhaseKind>(p.kind)) {
    case PhaseKind::kProduct:
      return run_product(a, block, p);
    case PhaseKind::kNorm:
      return finish_norm(a, block, p);
    case PhaseKind::kNormVjp:
      return finish_norm_vjp(a, block, p);
    case PhaseKind::kCollect:
      return collect(block, p);
    default:
      return weigh(a, block, p);
  }
}

// This block's part of a phase: the members of its team, and its tiles of each.
__device__ __forceinline__ void take_share(Phase& p) {
  if (static_cast<Result>(p.result) == Result::kOwn) {
    p.first_member = p.tile_begin = 0;
    p.tile_end = p.tiles;
    return;
  }
  const int rank = static_cast<int>(blockIdx.x) - p.first_block;
  const int active = p.team_blocks < p.tiles ? p.team_blocks : p.tiles;  // of a team
  const bool shares = rank >= 0 && rank < p.teams * p.team_blocks && rank % p.team_blocks < active;
  p.first_member = shares ? rank / p.team_blocks : 0;
  p.tile_begin = shares ? p.tiles * (rank % p.team_blocks) / active : 0;
  p.tile_end = shares ? p.tiles * (rank % p.team_blocks + 1) / active : 0;
}

// x between the last step without steering and a steered one, for the blocks that sat out.
template <class Weight, int NT>
__device__ __forceinline__ bool receive_state(const SampleArgs& a, Block<Weight, NT>& block) {
  for (int i = threadIdx.x; i < a.batch * a.action_dim; i += kThreads) {
    const std::uint64_t* word = block.slot(a, block.step - 1) + a.state + i;
    store_shared(block.x + i, receive_number(word, block.tag - 1u, block.patience));
  }
  return block.barrier();
}

// Step k, or for k = -1 what comes before the first; false once a block gave up.
template <class Weight, int NT>
__device__ __forceinline__ bool run_step(const SampleArgs& a, Block<Weight, NT>& block, int k) {
  const bool always_takes_part = static_cast<int>(blockIdx.x) < a.num_flow_blocks;
  block.begin_step(a, k);
  if (k > 0 && !always_takes_part && !is_steered_step(a, k - 1) && !receive_state(a, block)) return false;
  for (int i = first_phase(a, k); i < end_phase(a, k); ++i) {
    const Phase& p = block.program[i];
    if (!skips(a, p, k) && !run_phase(a, block, p)) return false;
  }
  if (k < 0 && !block.barrier()) return false;  // all may read the columns that were made once
  const bool goes_on = k + 1 < a.num_steps && runs_step(a, k + 1);
  if (k < 0 || a.num_steps == 0 || !(goes_on || always_takes_part)) return true;  // no x, or another block's
  update(a, block, load_constant(a.schedule + 3 * k + 2));
  if (blockIdx.x == 0 && !is_steered_step(a, k) && is_steered_step(a, k + 1)) {
    for (int i = threadIdx.x; i < a.batch * a.action_dim; i += kThreads) {
      send_number(block.words + a.state + i, load_shared(block.x + i), block.tag);
    }
  }
  return true;
}

// ROWS: of a product at once, 8 or 16.
template <class Weight, int ROWS>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const SampleArgs a) {
  Block<Weight, ROWS / 8> block(a);
  const int num_phases = a.num_once + a.num_step_phases;
  const auto* program_words = reinterpret_cast<const std::uint32_t*>(a.program);
  auto* shared_words = reinterpret_cast<std::uint32_t*>(block.program);
  for (int i = threadIdx.x; i < num_phases * static_cast<int>(sizeof(Phase) / 4); i += kThreads) {
    store_shared(shared_words + i, load_constant(program_words + i));
  }
  for (int i = threadIdx.x; a.num_steps > 0 && i < a.batch * a.action_dim; i += kThreads) {
    store_shared(block.x + i, load_constant(a.noise + i));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_phases; i += kThreads) take_share(block.program[i]);
  __syncthreads();
  block.stream.copy_next(a, block.program);

  bool alive = true;
#pragma unroll 1
  for (int k = -1; k <= last_step(a) && alive; ++k) {
    if (k < 0 || runs_step(a, k)) alive = run_step(a, block, k);
  }
  copy_async_wait<0>();
  if (threadIdx.x == 0) {
    store_word(a.tags + 1 + blockIdx.x, block.patience.first_tag + static_cast<std::uint32_t>(last_step(a)));
    if (!alive && a.host_failure != nullptr) store_relaxed(a.host_failure, 1u);
  }
  if (blockIdx.x != 0 || a.actions == nullptr) return;
  for (int i = threadIdx.x; i < a.batch * a.action_dim; i += kThreads) {
    const float x = alive ? load_shared(block.x + i) : not_a_number();
    const int c = i % a.action_dim;
    store_global(a.actions + i, clamp(x, action_low(a, c), action_high(a, c)));
  }
}

// The most tiles and buffers of weights that fit, of those asked for; false where not even one tile does.
template <class Weight>
bool fit_shared_memory(SampleArgs& args, int nt, std::int64_t limit) {
  for (args.buffers = 2; args.group_tiles >= 1; --args.group_tiles) {
    if (shared_layout<Weight>(args, nt).total <= limit) return true;
  }
  args.group_tiles = args.buffers = 1;
  return shared_layout<Weight>(args, nt).total <= limit;
}

template <class Weight, int ROWS>
int launch_rows(SampleArgs args, std::int64_t shared_limit, cudaStream_t stream) {
  if (!fit_shared_memory<Weight>(args, ROWS / 8, shared_limit)) {
    return fail(kRefused, "16 neurons of the widest layer and the state need " +
                              std::to_string(shared_layout<Weight>(args, ROWS / 8).total) +
                              " bytes of shared memory; this GPU gives a block " + std::to_string(shared_limit));
  }
  const std::int64_t shared_bytes = shared_layout<Weight>(args, ROWS / 8).total;
  const auto kernel = sample_kernel<Weight, ROWS>;
  // what this call needs would be too little for a launch of another thread between its own call and its launch
  QPILOTS_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit));
  int blocks_per_sm = 0;
  QPILOTS_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, kThreads, shared_bytes));
  if (blocks_per_sm < 1) return fail(kRefused, "no block of the persistent kernel fits on an SM of this GPU");
  const LaunchConfig config{static_cast<unsigned>(args.num_blocks), kThreads, static_cast<std::size_t>(shared_bytes),
                            stream, true};
  QPILOTS_CHECK(QPILOTS_LAUNCH(kernel, config, args));
  return kSuccess;
}

// 16 rows at once where that is useful and fits, else 8.
template <class Weight>
int launch_sample(const SampleArgs& args, int max_rows, const DeviceScope& device, cudaStream_t stream) {
  int cooperative = 0, shared_limit = 0;
  QPILOTS_CHECK(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device.index));
  QPILOTS_CHECK(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index));
  if (!cooperative) return fail(kRefused, "this GPU has no cooperative launch, which the persistent kernel needs");
  SampleArgs wide = args;
  return max_rows > 8 && fit_shared_memory<Weight>(wide, 2, shared_limit)
             ? launch_rows<Weight, 16>(args, shared_limit, stream)
             : launch_rows<Weight, 8>(args, shared_limit, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace qpilots

// Queues one call. weight_bytes: 4 (float32) or 2 (bf16); max_rows: the most rows of any phase.
QPILOTS_EXPORT int qpilots_cuda_sample(const qpilots::cuda::SampleArgs* args, int weight_bytes, int max_rows,
                                       int device, void* stream) {
  using namespace qpilots::cuda;
  return on_device(device, [&](const DeviceScope& scope) {
    const auto queue = static_cast<cudaStream_t>(stream);
    return weight_bytes == 2 ? launch_sample<Bf16>(*args, max_rows, scope, queue)
                             : launch_sample<float>(*args, max_rows, scope, queue);
  });
}

// What a program is made for.
QPILOTS_EXPORT int qpilots_cuda_multiprocessors(int device, int* count) {
  using namespace qpilots::cuda;
  QPILOTS_CHECK(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
  return kSuccess;
}
