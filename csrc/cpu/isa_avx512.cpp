#include <immintrin.h>
#define QPILOTS_ISA isa_avx512
#define QPILOTS_ISA_VEC "vec_avx512.h"
#include "isa.inc"

namespace qpilots::cpu {
const KernelTable* table_avx512() {
  static const KernelTable table = isa_avx512::make_table("avx512");
  return &table;
}
}  // namespace qpilots::cpu
