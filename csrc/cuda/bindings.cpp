// The module calguide_fast._cuda. Every function takes the place first, (device index, stream), and does not wait.
#include "cuda/guidance.h"
#include "cuda/place.h"
#include "cuda/step.h"
#include "cuda/tilt.h"
#include "read_arguments.h"

namespace calguide {
namespace {

namespace py = pybind11;

Place place_of(PyObject* pair) {
  const int device = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(pair, 0)));
  return Place(device, PyLong_AsVoidPtr(PyTuple_GET_ITEM(pair, 1)));
}

Place place_of(const py::tuple& pair) { return place_of(pair.ptr()); }

// Labels are not looked at, as that would wait for the device: always -1, "no bad row".
int64_t guide(const py::tuple& place, const GuidanceArguments& arguments) {
  launch_guidance_gradient(arguments, place_of(place));
  return -1;
}

void tilt_weights(const py::tuple& place, uintptr_t scores, int64_t stride, int64_t count, double tilt,
                  bool normalize_sum, double max_weight, uintptr_t weights) {
  launch_tilt_weights({reinterpret_cast<const float*>(scores), stride, count, tilt, normalize_sum, max_weight},
                      reinterpret_cast<float*>(weights), place_of(place));
}

void philox_normal(const py::tuple& place, uintptr_t seeds, int64_t batch, int64_t elements, uint32_t draw,
                   uint32_t stream, uintptr_t out) {
  launch_philox_normal(reinterpret_cast<const int64_t*>(seeds), batch, elements, draw, stream,
                       reinterpret_cast<float*>(out), place_of(place));
}

// What guided_step and predict_x0 have in common: positional arguments, and errors as Python's.
template <class Launch>
PyObject* call(const char* name, PyObject* const* items, Py_ssize_t count, int expected, const Launch& launch) {
  if (count != expected + 1) {
    return PyErr_Format(PyExc_TypeError, "%s takes %d arguments, got %zd", name, expected + 1, count);
  }
  PositionalArguments in(items);
  PyObject* const place = in.object();
  try {
    launch(in, place);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

PyObject* guided_step(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("guided_step", items, count, guided_step_arguments, [](PositionalArguments& in, PyObject* place) {
    const StepArguments arguments = read_guided_step(in);
    if (!PyErr_Occurred()) launch_guided_step(arguments, place_of(place));
  });
}

PyObject* predict_x0(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("predict_x0", items, count, predict_x0_arguments, [](PositionalArguments& in, PyObject* place) {
    const StepArguments arguments = read_predict_x0(in);
    if (!PyErr_Occurred()) launch_predict_x0(arguments, place_of(place));
  });
}

int version(cudaError_t (*query)(int*)) {
  int number = 0;
  return query(&number) == cudaSuccess ? number : 0;
}

// Why no kernel can run here, or an empty string.
std::string unavailable() {
  const int driver = version(cudaDriverGetVersion), runtime = version(cudaRuntimeGetVersion);
  const auto name = [](int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); };
  if (driver == 0) return "no NVIDIA driver";
  if (driver / 1000 < runtime / 1000) {
    return "the NVIDIA driver serves CUDA " + name(driver) + ", and this was built with CUDA " + name(runtime);
  }
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  // not an error that the next launch is to report
  cudaGetLastError();
  if (status == cudaErrorNoDevice || (status == cudaSuccess && devices == 0)) return "no CUDA device";
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

}  // namespace
}  // namespace calguide

PYBIND11_MODULE(_cuda, module) {
  using namespace calguide;
  module.doc() = "CUDA kernels of calguide_fast; tensors come as pointers, sizes and strides, checked by the caller.";
  static PyMethodDef methods[] = {positional("guided_step", &guided_step), positional("predict_x0", &predict_x0), {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  module.def("guidance_gradient", guidance_function<py::tuple>(&guide));
  module.def("tilt_weights", &tilt_weights);
  module.def("philox_normal", &philox_normal);
  module.def("unavailable", &unavailable);
  module.def("runtime_version", [] { return version(cudaRuntimeGetVersion); });
}
