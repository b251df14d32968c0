// Copies live parameters, of any strides and type, into the kernels' layout: padded to whole tiles, in float32 or bf16,
// and the transposes that the backward pass reads; with what folded norms make of them (fold.h).
#include "host.h"
#include "phase.h"
#include "warp.h"

namespace qpilots {
namespace cuda {
namespace {

constexpr int kPackTile = 32;

struct PackArgs {
  const PackItem* items;
  const FoldItem* folds;
  unsigned char* target;
  std::int32_t num_items;
  std::int32_t num_tiles;
  std::int32_t num_folds;
  std::int32_t num_groups;
};

__device__ __forceinline__ float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  const float value = bits_float(magnitude << 13) * bits_float(0x77800000u);  // exponent bias by 2^112: exact
  return bits_float(sign | float_bits(value));
}

__device__ __forceinline__ float load_element(const void* source, std::int64_t i, std::int32_t type) {
  switch (static_cast<ElementType>(type)) {
    case ElementType::kBf16:
      return from_bf16(load_constant(static_cast<const std::uint16_t*>(source) + i));
    case ElementType::kFloat16:
      return half_to_float(load_constant(static_cast<const std::uint16_t*>(source) + i));
    case ElementType::kFloat64:
      return static_cast<float>(load_constant(static_cast<const double*>(source) + i));
    default:
      return load_constant(static_cast<const float*>(source) + i);
  }
}

__device__ __forceinline__ float load_parameter(const Parameters* vector, std::int64_t i, float otherwise) {
  const auto* source = reinterpret_cast<const unsigned char*>(load_constant(&vector->source));
  if (source == nullptr) return otherwise;
  return load_element(source, i * load_constant(&vector->stride), load_constant(&vector->type));
}

// The last of `count` items that begins at or before `index`.
template <class Begin>
__device__ __forceinline__ int find_item(int count, int index, Begin begin) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (begin(middle) <= index)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// One row of a folded weight by each warp.
__device__ __forceinline__ void pack_fold(const PackArgs& a, int group) {
  const FoldItem* item =
      a.folds + find_item(a.num_folds, group, [&](int i) { return load_constant(&a.folds[i].first_group); });
  const int row = (group - load_constant(&item->first_group)) * kWarps + warp_index();
  if (row >= load_constant(&item->rows)) return;
  const auto* source = reinterpret_cast<const unsigned char*>(load_constant(&item->source));
  const std::int64_t first = row * load_constant(&item->row_stride), stride = load_constant(&item->column_stride);
  const std::int32_t type = load_constant(&item->source_type);
  const bool to_bfloat16 = load_constant(&item->operand_type) == static_cast<std::int32_t>(ElementType::kBf16);
  float sum = 0.0f, shift = 0.0f;
  for (int c = lane_index(); c < load_constant(&item->columns); c += kWarpSize) {
    const float w = load_element(source, first + c * stride, type);
    const float scaled = w * load_parameter(&item->gamma, c, 1.0f);
    sum += to_bfloat16 ? round_to_bf16(scaled) : scaled;
    shift = fmadd(w, load_parameter(&item->beta, c, 0.0f), shift);
  }
  sum = warp_sum(sum);
  shift = warp_sum(shift);
  if (lane_index() != 0) return;
  store_global(reinterpret_cast<float*>(a.target + load_constant(&item->sums_target)) + row, sum);
  store_global(reinterpret_cast<float*>(a.target + load_constant(&item->bias_target)) + row,
               shift + load_parameter(&item->bias, row, 0.0f));
}

// One tile of kPackTile x kPackTile elements at a time, through shared memory: reads run along the source's nearer
// stride, writes along the target's rows.
// The 4 leaves it registers: without, nvcc 13.0 aims at 8 blocks on sm_100 and spills.
__global__ void __launch_bounds__(kThreads, 4) pack_kernel(const PackArgs a) {
  QPILOTS_SHARED(float, tile, kPackTile*(kPackTile + 1));
  const int x = threadIdx.x % kPackTile, y = threadIdx.x / kPackTile;
  for (int t = blockIdx.x; t < a.num_tiles + a.num_groups; t += gridDim.x) {
    if (t >= a.num_tiles) {
      pack_fold(a, t - a.num_tiles);
      continue;
    }
    const PackItem* item =
        a.items + find_item(a.num_items, t, [&](int i) { return load_constant(&a.items[i].first_tile); });
    const int rows = load_constant(&item->rows), columns = load_constant(&item->columns);
    const int target_rows = load_constant(&item->target_rows);
    const int stride = load_constant(&item->target_stride), width = load_constant(&item->target_columns);
    const int across = (width + kPackTile - 1) / kPackTile, index = t - load_constant(&item->first_tile);
    const int row0 = index / across * kPackTile, column0 = index % across * kPackTile;
    const std::int64_t row_stride = load_constant(&item->row_stride),
                       column_stride = load_constant(&item->column_stride);
    const auto* source = reinterpret_cast<const unsigned char*>(load_constant(&item->source));
    const std::int32_t source_type = load_constant(&item->source_type);
    const bool along_columns = column_stride <= row_stride;
    for (int i = y; i < kPackTile; i += kThreads / kPackTile) {
      const int r = along_columns ? i : x, c = along_columns ? x : i;
      if (row0 + r >= rows || column0 + c >= columns) continue;
      const std::int64_t offset = (row0 + r) * row_stride + (column0 + c) * column_stride;
      const float scale =
          load_parameter(&item->scale, load_constant(&item->scales_rows) ? row0 + r : column0 + c, 1.0f);
      store_shared(tile + r * (kPackTile + 1) + c, load_element(source, offset, source_type) * scale);
    }
    __syncthreads();
    unsigned char* target = a.target + load_constant(&item->target);
    const bool to_bfloat16 = load_constant(&item->target_type) == static_cast<std::int32_t>(ElementType::kBf16);
    for (int i = y; i < kPackTile; i += kThreads / kPackTile) {
      const int r = row0 + i, c = column0 + x;
      if (r >= target_rows || c >= width) continue;
      const float value = r < rows && c < columns ? load_shared(tile + i * (kPackTile + 1) + x) : 0.0f;
      const std::int64_t cell = static_cast<std::int64_t>(r) * stride + c;
      if (to_bfloat16) {
        store_global(reinterpret_cast<std::uint16_t*>(target) + cell, to_bf16(value));
      } else {
        store_global(reinterpret_cast<float*>(target) + cell, value);
      }
    }
    __syncthreads();
  }
}

int launch_pack(const PackArgs& args, const DeviceScope& device, cudaStream_t stream) {
  int num_sms = 0;
  QPILOTS_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device.index));
  const int work = args.num_tiles + args.num_groups, grid = work < 8 * num_sms ? work : 8 * num_sms;
  const LaunchConfig config{static_cast<unsigned>(grid), kThreads, 0, stream, false};
  QPILOTS_CHECK(QPILOTS_LAUNCH(pack_kernel, config, args));
  return kSuccess;
}

}  // namespace
}  // namespace cuda
}  // namespace qpilots

// items, folds: device memory, [num_items], [num_folds]; target: device memory, the packed weights.
QPILOTS_EXPORT int qpilots_cuda_pack(const void* items, int num_items, int num_tiles, const void* folds, int num_folds,
                                     int num_groups, void* target, int device, void* stream) {
  using namespace qpilots::cuda;
  const PackArgs args{static_cast<const PackItem*>(items),
                      static_cast<const FoldItem*>(folds),
                      static_cast<unsigned char*>(target),
                      num_items,
                      num_tiles,
                      num_folds,
                      num_groups};
  return on_device(
      device, [&](const DeviceScope& scope) { return launch_pack(args, scope, static_cast<cudaStream_t>(stream)); });
}
