// Errors, versions, and what Python mirrors.
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

int versions(int* runtime, int* driver) {
  QPILOTS_CHECK(cudaRuntimeGetVersion(runtime));
  QPILOTS_CHECK(cudaDriverGetVersion(driver));
  return kSuccess;
}

int device_limits(int device, int* num_sms, int* shared_bytes, int* capability) {
  int major = 0, minor = 0;
  QPILOTS_CHECK(cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device));
  QPILOTS_CHECK(cudaDeviceGetAttribute(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  QPILOTS_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  QPILOTS_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  *capability = 10 * major + minor;
  return kSuccess;
}

}  // namespace
}  // namespace cuda
}  // namespace qpilots

QPILOTS_EXPORT const char* qpilots_cuda_last_error() { return qpilots::cuda::last_error().c_str(); }

QPILOTS_EXPORT int qpilots_cuda_device_count(int* count) { return qpilots::cuda::device_count(count); }

QPILOTS_EXPORT int qpilots_cuda_versions(int* runtime, int* driver) { return qpilots::cuda::versions(runtime, driver); }

QPILOTS_EXPORT int qpilots_cuda_device_limits(int device, int* num_sms, int* shared_bytes, int* capability) {
  return qpilots::cuda::device_limits(device, num_sms, shared_bytes, capability);
}

// sizeof of Phase, SampleArgs, PackItem, SteerStepArgs: a mismatch with the Python side is refused at loading.
QPILOTS_EXPORT int qpilots_cuda_struct_bytes(int which) {
  using namespace qpilots::cuda;
  constexpr int bytes[] = {sizeof(Phase), sizeof(SampleArgs), sizeof(PackItem), sizeof(SteerStepArgs)};
  return which >= 0 && which < 4 ? bytes[which] : -1;
}

// What Python compares with its own: the lists of qpilots/types.h, and those of phase.h.
QPILOTS_EXPORT const char* qpilots_cuda_interface_text() {
  using qpilots::interface_line;
  static const std::string text = qpilots::interface_text() + interface_line("Stage", {QPILOTS_STAGES(QPILOTS_NAME)}) +
                                  interface_line("ElementType", {QPILOTS_ELEMENT_TYPES(QPILOTS_NAME)});
  return text.c_str();
}
