#define QPILOTS_ISA isa_avx2
#define QPILOTS_ISA_VEC "path/vec_avx2-inl.h"
#include "path/table-inl.h"

namespace qpilots::cpu {
const KernelTable* table_avx2() {
  static const KernelTable table = isa_avx2::make_table("avx2");
  return &table;
}
}  // namespace qpilots::cpu
