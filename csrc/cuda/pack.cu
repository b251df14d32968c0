// Copies live parameters, of any strides and type, into the kernels' layout: rows padded to 16 bytes, in float32 or
// bf16, and the transposes that the backward pass reads.
#include "host.h"
#include "phase.h"
#include "warp.h"

namespace qpilots {
namespace cuda {
namespace {

constexpr int kTile = 32;

struct PackArgs {
  const PackItem* items;
  unsigned char* target;
  std::int32_t num_items;
  std::int32_t num_tiles;
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

// One tile of kTile x kTile elements at a time, through shared memory: reads run along the source's nearer stride,
// writes along the target's rows.
__global__ void __launch_bounds__(kThreads) pack_kernel(const PackArgs a) {
  QPILOTS_SHARED(float, tile, kTile*(kTile + 1));
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  for (int t = blockIdx.x; t < a.num_tiles; t += gridDim.x) {
    int low = 0, high = a.num_items - 1;
    while (low < high) {  // the last item that begins at or before tile t
      const int middle = (low + high + 1) / 2;
      if (load_constant(&a.items[middle].first_tile) <= t)
        low = middle;
      else
        high = middle - 1;
    }
    const PackItem* item = a.items + low;
    const int rows = load_constant(&item->rows), columns = load_constant(&item->columns);
    const int target_rows = load_constant(&item->target_rows);
    const int stride = load_constant(&item->target_stride), width = load_constant(&item->target_columns);
    const int across = (width + kTile - 1) / kTile, index = t - load_constant(&item->first_tile);
    const int row0 = index / across * kTile, column0 = index % across * kTile;
    const std::int64_t row_stride = load_constant(&item->row_stride),
                       column_stride = load_constant(&item->column_stride);
    const auto* source = reinterpret_cast<const unsigned char*>(load_constant(&item->source));
    const std::int32_t source_type = load_constant(&item->source_type);
    const bool along_columns = column_stride <= row_stride;
    for (int i = y; i < kTile; i += kThreads / kTile) {
      const int r = along_columns ? i : x, c = along_columns ? x : i;
      if (row0 + r >= rows || column0 + c >= columns) continue;
      const std::int64_t offset = (row0 + r) * row_stride + (column0 + c) * column_stride;
      store_shared(tile + r * (kTile + 1) + c, load_element(source, offset, source_type));
    }
    __syncthreads();
    unsigned char* target = a.target + load_constant(&item->target);
    const bool to_bfloat16 = load_constant(&item->target_type) == static_cast<std::int32_t>(ElementType::kBf16);
    for (int i = y; i < kTile; i += kThreads / kTile) {
      const int r = row0 + i, c = column0 + x;
      if (r >= target_rows || c >= width) continue;
      const float value = r < rows && c < columns ? load_shared(tile + i * (kTile + 1) + x) : 0.0f;
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
  const int grid = args.num_tiles < 8 * num_sms ? args.num_tiles : 8 * num_sms;
  const LaunchConfig config{static_cast<unsigned>(grid), kThreads, 0, stream, false};
  QPILOTS_CHECK(QPILOTS_LAUNCH(pack_kernel, config, args));
  return kSuccess;
}

}  // namespace
}  // namespace cuda
}  // namespace qpilots

// items: device memory, [num_items]; target: device memory, the packed weights.
QPILOTS_EXPORT int qpilots_cuda_pack(const void* items, int num_items, int num_tiles, void* target, int device,
                                     void* stream) {
  using namespace qpilots::cuda;
  const PackArgs args{static_cast<const PackItem*>(items), static_cast<unsigned char*>(target), num_items, num_tiles};
  return on_device(
      device, [&](const DeviceScope& scope) { return launch_pack(args, scope, static_cast<cudaStream_t>(stream)); });
}
