// Plain tensors, read in C++: asking for their attributes in Python would take most of a small call.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <initializer_list>

#include "storage.h"

namespace calguide {

// DLPack's DLTensor.
struct DlTensor {
  void* data;
  int32_t device_type, device_index, ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

// A contiguous, non-empty tensor on the CPU, of torch's own classes, with nothing lazy about it.
class PlainTensor {
 public:
  // False for any other object, and before plain tensors are known.
  bool read(PyObject* object);
  // As read, but None, too, is welcome: it has no data.
  bool read_optional(PyObject* object) { return object == Py_None || read(object); }
  // Reads what a result of another tensor's shape is written to: `object`, or where that is None a new tensor of the
  // other's type as well. Null where the object will not do.
  pybind11::object read_result(PyObject* object, const PlainTensor& like);

  explicit operator bool() const { return tensor_.data != nullptr; }
  template <class T>
  T* data() const {
    return static_cast<T*>(tensor_.data);
  }
  int ndim() const { return tensor_.ndim; }
  int64_t size(int dimension) const { return tensor_.shape[dimension]; }
  int64_t elements() const;
  bool has_shape(std::initializer_list<int64_t> shape) const;
  bool has_shape_of(const PlainTensor& other) const;
  bool is_int64() const { return tensor_.type_code == 0 && tensor_.type_bits == 64; }
  bool is_float32() const { return storage() == storage_float32; }
  // its StorageType, or -1
  int storage() const;

 private:
  PyObject* object_ = nullptr;
  DlTensor tensor_{};
};

}  // namespace calguide
