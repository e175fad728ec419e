// The step kernels as calguide_fast/backends/cpu.py calls them.
#include "cpu/step.h"

#include <vector>

#include "cpu/plain_tensor.h"
#include "cpu/tilt.h"
#include "read_arguments.h"

namespace calguide {
namespace {

namespace py = pybind11;

// below this many elements of work a second thread, or letting Python go on meanwhile, costs more than it gives
constexpr int64_t large_work = int64_t{1} << 16;

void call_guided_step(const StepArguments& arguments, const ImageScalars& images, int threads) {
  CALGUIDE_DISPATCH(guided_step(arguments, images, threads))
}
void call_predict_x0(const StepArguments& arguments, int threads) { CALGUIDE_DISPATCH(predict_x0(arguments, threads)) }
void call_philox_normal(const int64_t* seeds, int64_t batch, int64_t elements, uint32_t draw, uint32_t stream,
                        float* out, int threads) {
  CALGUIDE_DISPATCH(philox_normal(seeds, batch, elements, draw, stream, out, threads))
}

// Runs a kernel with one thread if its work is small, else with `threads` and without Python's lock.
template <class Kernel>
void launch(int64_t elements, int threads, const Kernel& kernel) {
  if (elements < large_work) return kernel(1);
  py::gil_scoped_release release;
  kernel(threads);
}

void step(const StepArguments& a, int threads) {
  std::vector<float> scratch(2 * a.batch, a.scale);
  float* const guide = scratch.data();
  if (a.tilt.scores != nullptr) {
    tilt_weights(a.tilt, guide);
    for (int64_t b = 0; b < a.batch; ++b) guide[b] *= a.scale;
  }
  if (a.weights != nullptr) {
    for (int64_t b = 0; b < a.batch; ++b) guide[b] *= a.weights[b];
  }
  const ImageScalars images = {guide, guide + a.batch};
  launch(a.batch * a.channels * a.pixels, threads, [&](int used) { call_guided_step(a, images, used); });
}

void predict(const StepArguments& a, int threads) {
  launch(a.batch * a.channels * a.pixels, threads, [&](int used) { call_predict_x0(a, used); });
}

PyObject* guided_step(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("guided_step", items, count, guided_step_arguments, [](PositionalArguments& in) -> PyObject* {
    const int threads = static_cast<int>(in.integer());
    const StepArguments a = read_guided_step(in);
    if (PyErr_Occurred()) return nullptr;
    step(a, threads);
    Py_RETURN_NONE;
  });
}

PyObject* predict_x0(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("predict_x0", items, count, predict_x0_arguments, [](PositionalArguments& in) -> PyObject* {
    const int threads = static_cast<int>(in.integer());
    const StepArguments a = read_predict_x0(in);
    if (PyErr_Occurred()) return nullptr;
    predict(a, threads);
    Py_RETURN_NONE;
  });
}

// What calls of plain tensors begin with: x_t, the model's output and a row of coefficients.
struct PlainImages {
  PlainTensor x_t, output, coefficients;

  bool read(PositionalArguments& in) {
    if (!x_t.read(in.object()) || !x_t.is_float32() || x_t.ndim() < 2) return false;
    if (!output.read(in.object()) || output.storage() < 0 || output.ndim() != x_t.ndim()) return false;
    for (int i = 0; i < x_t.ndim(); ++i) {
      const bool eps_and_v = i == 1 && output.size(i) == 2 * x_t.size(i);
      if (output.size(i) != x_t.size(i) && !eps_and_v) return false;
    }
    return coefficients.read(in.object()) && coefficients.is_float32() && coefficients.has_shape({16});
  }

  StepArguments arguments() const {
    StepArguments a{};
    a.x_t = operand(x_t), a.eps = operand(output);
    a.batch = x_t.size(0), a.channels = x_t.size(1), a.pixels = a.x_t.channel;
    if (output.size(1) != a.channels) a.v = past_channels(a.eps, a.channels);
    a.coefficients = coefficients.data<const float>();
    return a;
  }

  static Operand operand(const PlainTensor& images) {
    if (!images) return {};
    const int64_t image = images.elements() / images.size(0);
    return {images.data<const void>(), images.storage(), image, image / images.size(1), 1};
  }
};

// Of plain tensors (threads, the tensors of a guided step as the backends take them, out or None, and its settings):
// x_prev, or None where Python has to look closer.
PyObject* plain_guided_step(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("plain_guided_step", items, count, 17, [](PositionalArguments& in) -> PyObject* {
    const int threads = static_cast<int>(in.integer());
    PlainImages images;
    if (!images.read(in)) Py_RETURN_NONE;
    StepArguments a = images.arguments();
    const auto read_images = [&](PlainTensor& tensor) {
      return tensor.read_optional(in.object()) && (!tensor || tensor.has_shape_of(images.x_t));
    };
    const auto read_vector = [&](PlainTensor& tensor) {
      return tensor.read_optional(in.object()) && (!tensor || tensor.has_shape({a.batch}));
    };
    const auto is_float32 = [](const PlainTensor& tensor) { return !tensor || tensor.is_float32(); };
    PlainTensor gradient, weights, scores, noise, seeds, variance_max, out;
    const bool shaped = read_images(gradient) && read_vector(weights) && read_vector(scores) && read_images(noise) &&
                        read_vector(seeds) && read_vector(variance_max);
    const bool typed = (!gradient || gradient.storage() >= 0) && is_float32(weights) && is_float32(scores) &&
                       is_float32(noise) && (!seeds || seeds.is_int64()) && is_float32(variance_max);
    if (!shaped || !typed) Py_RETURN_NONE;
    py::object x_prev = out.read_result(in.object(), images.x_t);
    if (!x_prev || !out.is_float32()) Py_RETURN_NONE;

    a.gradient = images.operand(gradient), a.noise = images.operand(noise), a.out = images.operand(out);
    a.weights = weights.data<const float>();
    a.tilt.scores = scores.data<const float>(), a.tilt.stride = 1, a.tilt.count = a.batch;
    a.seeds = seeds.data<const int64_t>();
    a.variance_max = variance_max.data<float>();
    read_step_settings(in, a);
    a.clip = in.flag();
    if (PyErr_Occurred()) return nullptr;
    step(a, threads);
    return x_prev.release().ptr();
  });
}

// Of plain tensors (threads, x_t, model_output, coefficients, out or None, clip): x0, or None where Python has to look
// closer.
PyObject* plain_predict_x0(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("plain_predict_x0", items, count, 5, [](PositionalArguments& in) -> PyObject* {
    const int threads = static_cast<int>(in.integer());
    PlainImages images;
    if (!images.read(in)) Py_RETURN_NONE;
    PlainTensor out;
    py::object x0 = out.read_result(in.object(), images.x_t);
    if (!x0 || out.storage() < 0) Py_RETURN_NONE;
    StepArguments a = images.arguments();
    a.out = images.operand(out);
    a.clip = in.flag();
    if (PyErr_Occurred()) return nullptr;
    predict(a, threads);
    return x0.release().ptr();
  });
}

void philox_normal(int threads, uintptr_t seeds, int64_t batch, int64_t elements, uint32_t draw, uint32_t stream,
                   uintptr_t out) {
  launch(batch * elements, threads, [&](int used) {
    call_philox_normal(reinterpret_cast<const int64_t*>(seeds), batch, elements, draw, stream,
                       reinterpret_cast<float*>(out), used);
  });
}

}  // namespace

void bind_step(py::module_& module) {
  static PyMethodDef methods[] = {positional("guided_step", &guided_step),
                                  positional("predict_x0", &predict_x0),
                                  positional("plain_guided_step", &plain_guided_step),
                                  positional("plain_predict_x0", &plain_predict_x0),
                                  {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  module.def("philox_normal", &philox_normal);
}

}  // namespace calguide
