#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qpilots::cpu {
namespace {

struct Path {
  const char* name;
  const KernelTable* (*table)();
  bool supported;
};

#if defined(QPILOTS_X86_PATHS)
unsigned long long enabled_state() {  // XCR0: which registers the operating system saves
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

bool is_zen4() {  // AMD, family 0x19: Zen 3 and 4, of which only Zen 4 knows bfloat16
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || c != signature_AMD_ecx || d != signature_AMD_edx) {
    return false;
  }
  return __get_cpuid(1, &a, &b, &c, &d) && ((a >> 8) & 0xf) + ((a >> 20) & 0xff) == 0x19;
}

#if defined(QPILOTS_AMX)
// Linux lends a process the tile registers on request; they are 8 KB of state a thread.
bool may_use_tiles() {
#if defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

std::vector<Path> paths() {
  unsigned a, b, c, d;
  bool avx2 = false, avx512 = false, bf16 = false, amx = false;
  if (__get_cpuid(1, &a, &b, &c, &d) && (c & bit_OSXSAVE) && (c & bit_AVX)) {
    const bool fma = c & bit_FMA;
    const unsigned long long state = enabled_state();
    unsigned b7 = 0, d7 = 0, max_leaf = 0;
    if (__get_cpuid_count(7, 0, &a, &b7, &c, &d7)) max_leaf = a;
    avx2 = fma && (b7 & bit_AVX2) && (state & 0x6) == 0x6;
    const unsigned needed = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    avx512 = avx2 && (b7 & needed) == needed && (state & 0xe6) == 0xe6;
    if (avx512 && max_leaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) bf16 = a & (1u << 5);
#if defined(QPILOTS_AMX)
    constexpr unsigned kTileBf16 = 1u << 22 | 1u << 24;
    amx = bf16 && (d7 & kTileBf16) == kTileBf16 && (state & 0x60000) == 0x60000 && may_use_tiles();
#endif
  }
  std::vector<Path> all{{"portable", table_portable, true},
                        {"avx2", table_avx2, avx2},
                        {"avx512", table_avx512, avx512},
                        {"avx512_bf16_zen4", table_avx512_bf16_zen4, bf16},
                        {"avx512_bf16", table_avx512_bf16, bf16}};
  if (is_zen4()) std::swap(all[3], all[4]);
#if defined(QPILOTS_AMX)
  all.push_back({"avx512_amx", table_avx512_amx, amx});
#else
  (void)amx;
#endif
  return all;
}
#else
std::vector<Path> paths() { return {{"portable", table_portable, true}}; }
#endif

}  // namespace

std::vector<std::string> available_paths() {
  std::vector<std::string> names;
  for (const Path& path : paths()) {
    if (path.supported) names.emplace_back(path.name);
  }
  return names;
}

const KernelTable& kernels(const std::string& name) {
  std::string wanted = name;
  if (wanted.empty()) {
    const char* forced = std::getenv("QPILOTS_CPU_ISA");
    if (forced != nullptr) wanted = forced;
  }
  const Path* best = nullptr;
  const std::vector<Path> all = paths();
  std::string known;
  for (const Path& path : all) {
    known += (known.empty() ? "" : ", ") + std::string(path.name);
    if (wanted == path.name) {
      if (!path.supported) {
        throw std::invalid_argument("QPILOTS_CPU_ISA is '" + wanted +
                                    "', which this machine lacks; unset it to use the best path.");
      }
      return *path.table();
    }
    if (path.supported) best = &path;
  }
  if (!wanted.empty())
    throw std::invalid_argument("QPILOTS_CPU_ISA is '" + wanted + "'; expected one of " + known + ".");
  return *best->table();
}

}  // namespace qpilots::cpu
