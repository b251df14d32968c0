#include <immintrin.h>
#define QPILOTS_ISA isa_avx512_bf16
#define QPILOTS_ISA_VEC "vec_avx512.h"
#include "isa.inc"

namespace qpilots::cpu {
const KernelTable* table_avx512_bf16() {
  static const KernelTable table = isa_avx512_bf16::make_table("avx512_bf16");
  return &table;
}
}  // namespace qpilots::cpu
