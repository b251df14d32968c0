// Which instruction-set path runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace qpilots::cpu {

// Paths that this build holds and this machine can run, slowest first.
std::vector<std::string> available_paths();

// The path of the given name, or for an empty name the one of the environment variable QPILOTS_CPU_ISA, or the best.
// Throws std::invalid_argument where the machine or the build lacks it.
const KernelTable& kernels(const std::string& name);

}  // namespace qpilots::cpu
