// The compiled module qpilots_fast._C: raw pointers, sizes and thread counts; no torch headers.
#include <pybind11/pybind11.h>

#include "python/bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The CPU backend of qpilots_fast.";
  qpilots::cpu::bind(module);
}
