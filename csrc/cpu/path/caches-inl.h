// What the order of work depends on.
#pragma once

#include <unistd.h>

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

static long second_level_bytes() {  // 0 where the system does not say
#if defined(_SC_LEVEL2_CACHE_SIZE)
  return sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  return 0;
#endif
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
