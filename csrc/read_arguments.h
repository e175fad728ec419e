// The bindings of every device read the same positional arguments from Python; here is how.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

#include "arguments.h"
#include "storage.h"

namespace calguide {

// Positional arguments in order. A step is launch-bound on small images, and this reads its many arguments sooner
// than a signature of pybind11's; a wrong type leaves Python's error set, which the caller looks for once.
class PositionalArguments {
 public:
  explicit PositionalArguments(PyObject* const* items) : next_(items) {}
  // the items of a tuple, which are taken to be as many as are read
  explicit PositionalArguments(PyObject* tuple) : next_(&PyTuple_GET_ITEM(tuple, 0)) {}
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

// A function of so many positional arguments after the place: body(in) reads them all, looks for Python's error, and
// returns the result or null.
template <class Body>
PyObject* call(const char* name, PyObject* const* items, Py_ssize_t count, int expected, const Body& body) {
  if (count != expected + 1) {
    return PyErr_Format(PyExc_TypeError, "%s takes %d arguments, got %zd", name, expected + 1, count);
  }
  PositionalArguments in(items);
  try {
    return body(in);
  } catch (pybind11::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
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

// The operand from the channel after so many of them.
inline Operand past_channels(Operand a, int64_t channels) {
  const int64_t bytes = a.type == storage_float32 ? 4 : 2;
  a.data = static_cast<const char*>(a.data) + channels * a.channel * bytes;
  return a;
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
  if (learned_variance) a.v = past_channels(a.eps, a.channels);
  return a;
}

inline void read_step_settings(PositionalArguments& in, StepArguments& a) {
  a.ddim = in.flag();
  a.scale = static_cast<float>(in.real());
  a.tilt.tilt = in.real(), a.tilt.max_weight = in.real();
  a.tilt.normalize_sum = in.flag();
  a.sine_boost = static_cast<float>(in.real());
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
  read_step_settings(in, a);
  return a;
}

inline StepArguments read_predict_x0(PositionalArguments& in) {
  PyObject* strides;
  StepArguments a = read_common(in, strides);
  const void* const out = in.pointer<const void>();
  a.out = operand(out, in.integer(), strides, 2, a.channels, a.pixels);
  return a;
}

inline void read_logits(PositionalArguments& in, LogitsArguments& a) {
  a.logits = in.pointer<const void>();
  a.row_stride = in.integer(), a.class_stride = in.integer();
  a.batch = in.integer(), a.classes = in.integer();
  a.storage = static_cast<int>(in.integer());
}

inline void read_labelled(PositionalArguments& in, LabelledArguments& a) {
  read_logits(in, a);
  a.labels = in.pointer<const int64_t>();
  a.label_stride = in.integer();
}

constexpr int top_label_arguments = 11, top_label_backward_arguments = 11;

inline TopLabelArguments read_top_label(PositionalArguments& in) {
  TopLabelArguments a;
  read_labelled(in, a);
  a.confidence = in.pointer<float>();
  a.top = in.pointer<int64_t>();
  a.correct = in.pointer<uint8_t>();
  return a;
}

inline TopLabelBackwardArguments read_top_label_backward(PositionalArguments& in) {
  TopLabelBackwardArguments a;
  a.grad_confidence = in.pointer<const float>();
  a.grad_stride = in.integer();
  read_logits(in, a);
  a.confidence = in.pointer<const float>();
  a.top = in.pointer<const int64_t>();
  a.grad = in.pointer<void>();
  return a;
}

constexpr int guidance_arguments = 18;

inline GuidanceSettings<double> read_guidance_settings(PositionalArguments& in) {
  GuidanceSettings<double> settings;
  const int64_t divergence = in.integer();
  if (divergence < 0 || divergence >= divergence_count) {
    PyErr_Format(PyExc_ValueError, "divergence=%lld is not a code of csrc/fdiv_math.h: 0..%d",
                 static_cast<long long>(divergence), divergence_count - 1);
  }
  settings.divergence = static_cast<int>(divergence);
  settings.order = in.real(), settings.alpha = in.real(), settings.epsilon = in.real();
  settings.joint_temperature = in.real(), settings.marginal_temperature = in.real();
  settings.entropy_weight = in.real(), settings.adaptive_entropy = in.flag();
  return settings;
}

inline GuidanceArguments read_guidance(PositionalArguments& in) {
  GuidanceArguments a;
  read_labelled(in, a);
  a.settings = read_guidance_settings(in);
  a.grad = in.pointer<void>();
  a.stats = in.pointer<float>();
  return a;
}

constexpr int smooth_ece_arguments = 10, smooth_ece_gradient_arguments = 9;

inline SmoothEceArguments read_smooth_ece(PositionalArguments& in) {
  SmoothEceArguments a;
  a.confidence = in.pointer<const void>();
  a.correct = in.pointer<const uint8_t>();
  a.weights = in.pointer<const void>();
  a.count = in.integer();
  a.wide = in.flag();
  a.bandwidth = in.real();
  a.value = in.pointer<void>(), a.sigma = in.pointer<void>();
  a.curve = in.pointer<double>();
  a.curve_length = in.integer();
  return a;
}

inline SmoothEceGradientArguments read_smooth_ece_gradient(PositionalArguments& in) {
  SmoothEceGradientArguments a;
  a.confidence = in.pointer<const void>();
  a.storage = static_cast<int>(in.integer()), a.wide = in.flag();
  a.correct = in.pointer<const uint8_t>();
  a.weights = in.pointer<const void>();
  a.count = in.integer();
  a.curve = in.pointer<const double>();
  a.value_grad = in.pointer<const void>();
  a.grad = in.pointer<void>();
  return a;
}

}  // namespace calguide
