// Errors, whether there is a GPU, and what Python mirrors.
#include "host.h"
#include "phase.h"
#include "qpilots/interface.h"

namespace qpilots {
namespace cuda {

std::string& last_error() {
  thread_local std::string message;
  return message;
}

namespace {

int device_count(int* count) {
  QPILOTS_CHECK(cudaGetDeviceCount(count));
  return kSuccess;
}

}  // namespace
}  // namespace cuda
}  // namespace qpilots

QPILOTS_EXPORT const char* qpilots_cuda_last_error() { return qpilots::cuda::last_error().c_str(); }

QPILOTS_EXPORT int qpilots_cuda_device_count(int* count) { return qpilots::cuda::device_count(count); }

// sizeof of Phase, SampleArgs, PackItem, FoldItem, SteerStepArgs: a mismatch with the Python side is refused at
// loading.
QPILOTS_EXPORT int qpilots_cuda_struct_bytes(int which) {
  using namespace qpilots::cuda;
  constexpr int bytes[] = {sizeof(Phase), sizeof(SampleArgs), sizeof(PackItem), sizeof(FoldItem),
                           sizeof(SteerStepArgs)};
  return which >= 0 && which < 5 ? bytes[which] : -1;
}

// What Python compares with its own: the lists of qpilots/types.h, and those of phase.h.
QPILOTS_EXPORT const char* qpilots_cuda_interface_text() {
  using qpilots::interface_line;
  static const std::string text = qpilots::interface_text() +
                                  interface_line("PhaseKind", {QPILOTS_PHASE_KINDS(QPILOTS_NAME)}) +
                                  interface_line("Operand", {QPILOTS_OPERANDS(QPILOTS_NAME)}) +
                                  interface_line("Result", {QPILOTS_RESULTS(QPILOTS_NAME)}) +
                                  interface_line("Input", {QPILOTS_INPUTS(QPILOTS_NAME)}) +
                                  interface_line("Collected", {QPILOTS_COLLECTED(QPILOTS_NAME)}) +
                                  interface_line("ElementType", {QPILOTS_ELEMENT_TYPES(QPILOTS_NAME)});
  return text.c_str();
}
