// Whether the modules and parameters of a sampler are those that a quick call was made for.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace qpilots::cpu {

namespace py = pybind11;

inline py::str interned(const char* name) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)); }

inline py::object attribute(PyObject* object, const py::str& name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name.ptr()));
}

inline py::object call_method(PyObject* object, const py::str& name) {
  return py::reinterpret_steal<py::object>(PyObject_CallMethodObjArgs(object, name.ptr(), nullptr));
}

// Of tensors on any device.
class ParameterWatch {
 public:
  // slots: (dict, key, value) where each dict must still hold the value, and a tensor's memory be where it is now;
  // (dict, key, None) where it may lack the key instead; (dict, None, size) where it must hold that many. tensor_type:
  // torch.Tensor.
  ParameterWatch(py::list slots, const py::object& tensor_type)
      : slots_(std::move(slots)),
        shape_(interned("shape")),
        is_contiguous_(interned("is_contiguous")),
        data_ptr_(interned("data_ptr")),
        stride_(interned("stride")) {
    for (const py::handle slot : slots_) {
      const py::tuple parts = slot.cast<py::tuple>();
      const py::object value = parts[2];
      if (parts[1].is_none()) {
        sizes_.push_back({parts[0].ptr(), value.cast<Py_ssize_t>()});
        continue;
      }
      checked_slots_.push_back({parts[0].ptr(), parts[1].ptr(), value.ptr()});
      if (!py::isinstance(value, tensor_type)) continue;
      const bool contiguous = value.attr("is_contiguous")().cast<bool>();
      places_.push_back({value.ptr(), value.attr("data_ptr")().cast<std::uintptr_t>(), value.attr("shape"),
                         contiguous ? py::object() : value.attr("stride")()});
    }
  }

  // May leave a Python error behind: whoever asks clears it.
  bool stayed() const {
    for (const Slot& slot : checked_slots_) {
      PyObject* const held = PyDict_GetItemWithError(slot.dict, slot.key);
      if ((held == nullptr ? Py_None : held) != slot.value) return false;
    }
    for (const Size& held : sizes_) {
      if (PyDict_Size(held.dict) != held.size) return false;
    }
    for (const Place& place : places_) {
      if (address(place.parameter) != place.address) return false;
      if (!equal(attribute(place.parameter, shape_), place.shape)) return false;
      if (place.strides ? !equal(call_method(place.parameter, stride_), place.strides)
                        : call_method(place.parameter, is_contiguous_).ptr() != Py_True) {
        return false;
      }
    }
    return true;
  }

  std::uintptr_t address(PyObject* tensor) const {
    const py::object value = call_method(tensor, data_ptr_);
    return value ? static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(value.ptr())) : 0;
  }

 private:
  struct Slot {
    PyObject *dict, *key, *value;
  };
  struct Size {
    PyObject* dict;
    Py_ssize_t size;
  };
  struct Place {
    PyObject* parameter;
    std::uintptr_t address;
    py::object shape;
    py::object strides;  // null: contiguous
  };

  static bool equal(const py::object& now, const py::object& then) {
    return now && PyObject_RichCompareBool(now.ptr(), then.ptr(), Py_EQ) == 1;
  }

  py::list slots_;  // keeps alive what is checked
  py::str shape_, is_contiguous_, data_ptr_, stride_;
  std::vector<Slot> checked_slots_;
  std::vector<Size> sizes_;
  std::vector<Place> places_;
};

}  // namespace qpilots::cpu
