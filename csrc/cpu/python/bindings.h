// What module.cpp binds.
#pragma once

#include <pybind11/pybind11.h>

namespace qpilots::cpu {
void bind(pybind11::module_& module);
}
