// The bindings of every device read the same positional arguments from Python; here is how.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "arguments.h"
#include "storage.h"

namespace calguide {

// Positional arguments in order. A step is launch-bound on small images, and this reads its many arguments sooner
// than a signature of pybind11's; a wrong type leaves Python's error set, which the caller looks for once.
class PositionalArguments {
 public:
  explicit PositionalArguments(PyObject* const* items) : next_(items) {}
  PyObject* object() { return *next_++; }
  int64_t integer() { return PyLong_AsLongLong(object()); }
  double real() { return PyFloat_AsDouble(object()); }
  bool flag() { return PyObject_IsTrue(object()) == 1; }
  // None is a null pointer
  template <class T>
  T* pointer() {
    PyObject* const item = object();
    return item == Py_None ? nullptr : static_cast<T*>(PyLong_AsVoidPtr(item));
  }

 private:
  PyObject* const* next_;
};

template <class Function>
PyMethodDef positional(const char* name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

// Strides come as one flat tuple for all operands, or as None where every operand is contiguous.
inline Operand operand(const void* data, int64_t type, PyObject* strides, int position, int64_t channels,
                       int64_t pixels) {
  Operand result{data, static_cast<int>(type), channels * pixels, pixels, 1};
  if (data != nullptr && strides != Py_None) {
    const auto item = [&](int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(strides, 3 * position + i)); };
    result.image = item(0), result.channel = item(1), result.pixel = item(2);
  }
  return result;
}

// The operands that guided_step and predict_x0 share, from the arguments that both begin with.
inline StepArguments read_common(PositionalArguments& in, PyObject*& strides) {
  StepArguments a{};
  a.batch = in.integer(), a.channels = in.integer(), a.pixels = in.integer();
  strides = in.object();
  a.coefficients = in.pointer<const float>();
  a.clip = in.flag();
  a.x_t = operand(in.pointer<const void>(), storage_float32, strides, 0, a.channels, a.pixels);
  const void* const model_output = in.pointer<const void>();
  const int64_t type = in.integer();
  const bool learned_variance = in.flag();
  a.eps = operand(model_output, type, strides, 1, a.channels * (learned_variance ? 2 : 1), a.pixels);
  if (learned_variance) {
    const int64_t bytes = a.eps.type == storage_float32 ? 4 : 2;
    a.v = a.eps;
    a.v.data = static_cast<const char*>(a.eps.data) + a.channels * a.eps.channel * bytes;
  }
  return a;
}

constexpr int guided_step_arguments = 24, predict_x0_arguments = 12;

inline StepArguments read_guided_step(PositionalArguments& in) {
  PyObject* strides;
  StepArguments a = read_common(in, strides);
  const void* const gradient = in.pointer<const void>();
  a.gradient = operand(gradient, in.integer(), strides, 2, a.channels, a.pixels);
  a.noise = operand(in.pointer<const void>(), storage_float32, strides, 3, a.channels, a.pixels);
  a.out = operand(in.pointer<const void>(), storage_float32, Py_None, 0, a.channels, a.pixels);
  a.weights = in.pointer<const float>();
  a.tilt.scores = in.pointer<const float>();
  a.tilt.stride = 1, a.tilt.count = a.batch;
  a.seeds = in.pointer<const int64_t>();
  a.variance_max = in.pointer<float>();
  a.ddim = in.flag();
  a.scale = static_cast<float>(in.real());
  a.tilt.tilt = in.real(), a.tilt.max_weight = in.real();
  a.tilt.normalize_sum = in.flag();
  a.sine_boost = static_cast<float>(in.real());
  return a;
}

inline StepArguments read_predict_x0(PositionalArguments& in) {
  PyObject* strides;
  StepArguments a = read_common(in, strides);
  const void* const out = in.pointer<const void>();
  a.out = operand(out, in.integer(), strides, 2, a.channels, a.pixels);
  return a;
}

// The bindings of top_label and its backward call run(place, arguments).
template <class Place, class Run>
auto top_label_function(Run run) {
  return [run](Place place, uintptr_t logits, int64_t row_stride, int64_t class_stride, uintptr_t labels,
               int64_t label_stride, int64_t batch, int64_t classes, int storage, uintptr_t confidence, uintptr_t top,
               uintptr_t correct) -> int64_t {
    TopLabelArguments a;
    a.logits = reinterpret_cast<const void*>(logits), a.row_stride = row_stride, a.class_stride = class_stride;
    a.labels = reinterpret_cast<const int64_t*>(labels), a.label_stride = label_stride;
    a.batch = batch, a.classes = classes, a.storage = storage;
    a.confidence = reinterpret_cast<float*>(confidence), a.top = reinterpret_cast<int64_t*>(top);
    a.correct = reinterpret_cast<uint8_t*>(correct);
    return run(place, a);
  };
}

template <class Place, class Run>
auto top_label_backward_function(Run run) {
  return [run](Place place, uintptr_t grad_confidence, int64_t grad_stride, uintptr_t logits, int64_t row_stride,
               int64_t class_stride, int64_t batch, int64_t classes, int storage, uintptr_t confidence, uintptr_t top,
               uintptr_t grad) {
    TopLabelBackwardArguments a;
    a.grad_confidence = reinterpret_cast<const float*>(grad_confidence), a.grad_stride = grad_stride;
    a.logits = reinterpret_cast<const void*>(logits), a.row_stride = row_stride, a.class_stride = class_stride;
    a.batch = batch, a.classes = classes, a.storage = storage;
    a.confidence = reinterpret_cast<const float*>(confidence), a.top = reinterpret_cast<const int64_t*>(top);
    a.grad = reinterpret_cast<void*>(grad);
    run(place, a);
  };
}

// The binding of guidance_gradient: checks the divergence and calls run(place, arguments).
template <class Place, class Run>
auto guidance_function(Run run) {
  return [run](Place place, uintptr_t logits, int64_t row_stride, int64_t class_stride, uintptr_t labels,
               int64_t label_stride, int64_t batch, int64_t classes, int storage, int divergence, double order,
               double alpha, double epsilon, double joint_temperature, double marginal_temperature,
               double entropy_weight, bool adaptive_entropy, uintptr_t grad, uintptr_t stats) -> int64_t {
    if (divergence < 0 || divergence >= divergence_count) {
      throw pybind11::value_error("divergence=" + std::to_string(divergence) +
                                  " is not a code of csrc/fdiv_math.h: 0.." + std::to_string(divergence_count - 1));
    }
    GuidanceArguments a;
    a.logits = reinterpret_cast<const void*>(logits), a.row_stride = row_stride, a.class_stride = class_stride;
    a.labels = reinterpret_cast<const int64_t*>(labels), a.label_stride = label_stride;
    a.batch = batch, a.classes = classes, a.storage = storage;
    a.settings = {divergence,           order,          alpha,           epsilon, joint_temperature,
                  marginal_temperature, entropy_weight, adaptive_entropy};
    a.grad = reinterpret_cast<void*>(grad), a.stats = reinterpret_cast<float*>(stats);
    return run(place, a);
  };
}

}  // namespace calguide
