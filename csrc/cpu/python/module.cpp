// The compiled module qpilots_fast._C: raw pointers, sizes, streams and thread counts; no torch headers.
#include <pybind11/pybind11.h>

#include "python/bindings.h"
#if defined(QPILOTS_WITH_CUDA)
#include "cuda/bindings.h"
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native backends of qpilots_fast.";
  qpilots::cpu::bind(module);
#if defined(QPILOTS_WITH_CUDA)
  qpilots::cuda::bind(module);
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
}
