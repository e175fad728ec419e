// The step kernels as calguide_fast/backends/cpu.py calls them.
#include "cpu/step.h"

#include <vector>

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

PyObject* guided_step(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("guided_step", items, count, guided_step_arguments, [](PositionalArguments& in) -> PyObject* {
    const int threads = static_cast<int>(in.integer());
    const StepArguments a = read_guided_step(in);
    if (PyErr_Occurred()) return nullptr;

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
    Py_RETURN_NONE;
  });
}

PyObject* predict_x0(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("predict_x0", items, count, predict_x0_arguments, [](PositionalArguments& in) -> PyObject* {
    const int threads = static_cast<int>(in.integer());
    const StepArguments a = read_predict_x0(in);
    if (PyErr_Occurred()) return nullptr;
    launch(a.batch * a.channels * a.pixels, threads, [&](int used) { call_predict_x0(a, used); });
    Py_RETURN_NONE;
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
  static PyMethodDef methods[] = {positional("guided_step", &guided_step), positional("predict_x0", &predict_x0), {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  module.def("philox_normal", &philox_normal);
}

}  // namespace calguide
