#include <immintrin.h>
#define QPILOTS_ISA isa_avx2
#define QPILOTS_ISA_VEC "vec_avx2.h"
#include "isa.inc"

namespace qpilots::cpu {
const KernelTable* table_avx2() {
  static const KernelTable table = isa_avx2::make_table("avx2");
  return &table;
}
}  // namespace qpilots::cpu
