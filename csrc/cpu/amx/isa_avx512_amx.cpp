// The bfloat16 products on the tile registers of Intel's AMX. Forward a product sums 32 columns of 16 rows into 16
// outputs: pairs along the columns, as the weights are packed, are what tdpbf16ps wants of its second factor. Backward
// the sum runs along the outputs, across those pairs (backward-inl.h).
//
// One row or many, the sums are the same: a row's result is bitwise that of any batch.
#define QPILOTS_ISA isa_avx512_amx
#define QPILOTS_ISA_VEC "path/vec_avx512-inl.h"
#include "amx/backward-inl.h"
#include "amx/forward-inl.h"
#include "amx/tiles-inl.h"
#include "kernels.h"
#include "path/unroll-inl.h"
#include "tuning.h"

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

// The machine's limit: products on tile registers without loads.
double peak(Format format, long iterations) {
  if (format != Format::kBf16) return table_avx512_bf16()->peak(format, iterations);
  const TilesInUse tiles(Configuration(kTile, kTile, kTileBytes));
  unroll<kSecond + 2>([&](auto i) { clear<i>(); });
  for (long i = 0; i < iterations; ++i) {  // a product of tiles takes about as long as 16 of vectors
    unroll<kSums>([&](auto s) { multiply<s, kFirst + s / 2, kSecond + s % 2>(); });
  }
  return 2.0 * kSums * kTile * kTile * kTileColumns * static_cast<double>(iterations);
}

}  // namespace
}  // namespace QPILOTS_ISA

const KernelTable* table_avx512_amx() {
  static const KernelTable table = [] {
    KernelTable t = *table_avx512_bf16();
    t.name = "avx512_amx";
    t.peak = isa_avx512_amx::peak;
    FormatKernels& bf16 = t.formats[static_cast<int>(Format::kBf16)];
    bf16.rows_together = tuning::Amx::kRowsTogether;
    bf16.forward = isa_avx512_amx::forward;
    bf16.backward = isa_avx512_amx::backward;
    return t;
  }();
  return &table;
}

}  // namespace qpilots::cpu
