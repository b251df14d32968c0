#define QPILOTS_ISA isa_avx512
#define QPILOTS_ISA_VEC "path/vec_avx512-inl.h"
#include "path/table-inl.h"

namespace qpilots::cpu {
const KernelTable* table_avx512() {
  static const KernelTable table = isa_avx512::make_table("avx512");
  return &table;
}
}  // namespace qpilots::cpu
