#define QPILOTS_ISA isa_portable
#define QPILOTS_ISA_VEC "path/vec_portable-inl.h"
#include "path/table-inl.h"

namespace qpilots::cpu {
const KernelTable* table_portable() {
  static const KernelTable table = isa_portable::make_table("portable");
  return &table;
}
}  // namespace qpilots::cpu
