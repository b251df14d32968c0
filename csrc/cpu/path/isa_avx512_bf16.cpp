#define QPILOTS_ISA isa_avx512_bf16
#define QPILOTS_ISA_VEC "path/vec_avx512-inl.h"
#include "path/backward_dot-inl.h"
#include "path/table-inl.h"

namespace qpilots::cpu {
const KernelTable* table_avx512_bf16() {
  static const KernelTable table = isa_avx512_bf16::make_table("avx512_bf16");
  return &table;
}

const KernelTable* table_avx512_bf16_zen4() {
  static const KernelTable table = [] {
    KernelTable t = isa_avx512_bf16::make_table("avx512_bf16_zen4");
    t.formats[static_cast<int>(Format::kBf16)].backward = isa_avx512_bf16::backward_dot<isa_avx512_bf16::OnZen4>;
    return t;
  }();
  return &table;
}
}  // namespace qpilots::cpu
