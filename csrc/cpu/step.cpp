// The step kernels as calguide_fast/backends/cpu.py calls them.
#include "cpu/step.h"

#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/tilt.h"
#include "storage.h"

namespace calguide {
namespace {

namespace py = pybind11;

// below this many elements of work a second thread, or letting Python go on meanwhile, costs more than it gives
constexpr int64_t large_work = int64_t{1} << 16;

// Positional arguments in order. A step is launch-bound on small images, and this reads its many arguments sooner
// than a signature of pybind11's; a wrong type leaves Python's error set, which the caller looks for once.
class Arguments {
 public:
  explicit Arguments(PyObject* const* items) : next_(items) {}
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

// Strides come as one flat tuple for all operands, or as None where every operand is contiguous.
Operand operand(const void* data, int64_t type, PyObject* strides, int position, int64_t channels, int64_t pixels) {
  Operand result{data, static_cast<int>(type), channels * pixels, pixels, 1};
  if (data != nullptr && strides != Py_None) {
    const auto item = [&](int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(strides, 3 * position + i)); };
    result.image = item(0), result.channel = item(1), result.pixel = item(2);
  }
  return result;
}

int64_t bytes_of(int type) { return type == storage_float32 ? 4 : 2; }

void call_guided_step(const StepArguments& arguments) { CALGUIDE_DISPATCH(guided_step(arguments)) }
void call_predict_x0(const StepArguments& arguments) { CALGUIDE_DISPATCH(predict_x0(arguments)) }
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

// The operands that guided_step and predict_x0 share, from the arguments that both begin with.
StepArguments read_common(Arguments& in, PyObject*& strides) {
  StepArguments a{};
  a.batch = in.integer(), a.channels = in.integer(), a.pixels = in.integer();
  a.threads = static_cast<int>(in.integer());
  strides = in.object();
  a.coefficients = in.pointer<const float>();
  a.clip = in.flag();
  a.x_t = operand(in.pointer<const void>(), storage_float32, strides, 0, a.channels, a.pixels);
  const void* const model_output = in.pointer<const void>();
  const int64_t type = in.integer();
  const bool learned_variance = in.flag();
  a.eps = operand(model_output, type, strides, 1, a.channels * (learned_variance ? 2 : 1), a.pixels);
  if (learned_variance) {
    a.v = a.eps;
    a.v.data = static_cast<const char*>(a.eps.data) + a.channels * a.eps.channel * bytes_of(a.eps.type);
  }
  return a;
}

PyObject* guided_step(PyObject*, PyObject* const* items, Py_ssize_t count) {
  if (count != 25) return PyErr_Format(PyExc_TypeError, "guided_step takes 25 arguments, got %zd", count);
  Arguments in(items);
  PyObject* strides;
  StepArguments a = read_common(in, strides);
  const void* const gradient = in.pointer<const void>();
  a.gradient = operand(gradient, in.integer(), strides, 2, a.channels, a.pixels);
  a.noise = operand(in.pointer<const void>(), storage_float32, strides, 3, a.channels, a.pixels);
  a.out = operand(in.pointer<const void>(), storage_float32, Py_None, 0, a.channels, a.pixels);
  const float* const weights = in.pointer<const float>();
  const float* const scores = in.pointer<const float>();
  a.seeds = in.pointer<const int64_t>();
  a.variance_max = in.pointer<float>();
  a.ddim = in.flag();
  const double scale = in.real(), tilt = in.real(), max_weight = in.real();
  const bool normalize_sum = in.flag();
  a.sine_boost = static_cast<float>(in.real());
  if (PyErr_Occurred()) return nullptr;

  std::vector<float> scratch(2 * a.batch, static_cast<float>(scale));
  float* const guide = scratch.data();
  a.guide = guide, a.boost = guide + a.batch;
  if (scores != nullptr) {
    tilt_weights(scores, 1, a.batch, tilt, normalize_sum, max_weight, guide);
    for (int64_t b = 0; b < a.batch; ++b) guide[b] *= static_cast<float>(scale);
  }
  if (weights != nullptr) {
    for (int64_t b = 0; b < a.batch; ++b) guide[b] *= weights[b];
  }
  launch(a.batch * a.channels * a.pixels, a.threads, [&](int threads) {
    a.threads = threads;
    call_guided_step(a);
  });
  Py_RETURN_NONE;
}

PyObject* predict_x0(PyObject*, PyObject* const* items, Py_ssize_t count) {
  if (count != 13) return PyErr_Format(PyExc_TypeError, "predict_x0 takes 13 arguments, got %zd", count);
  Arguments in(items);
  PyObject* strides;
  StepArguments a = read_common(in, strides);
  const void* const out = in.pointer<const void>();
  a.out = operand(out, in.integer(), strides, 2, a.channels, a.pixels);
  if (PyErr_Occurred()) return nullptr;
  launch(a.batch * a.channels * a.pixels, a.threads, [&](int threads) {
    a.threads = threads;
    call_predict_x0(a);
  });
  Py_RETURN_NONE;
}

void philox_normal(uintptr_t seeds, int64_t batch, int64_t elements, uint32_t draw, uint32_t stream, uintptr_t out,
                   int threads) {
  launch(batch * elements, threads, [&](int used) {
    call_philox_normal(reinterpret_cast<const int64_t*>(seeds), batch, elements, draw, stream,
                       reinterpret_cast<float*>(out), used);
  });
}

template <class Function>
PyMethodDef positional(const char* name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

void bind_step(py::module_& module) {
  static PyMethodDef methods[] = {positional("guided_step", &guided_step), positional("predict_x0", &predict_x0), {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  module.def("philox_normal", &philox_normal);
}

}  // namespace calguide
