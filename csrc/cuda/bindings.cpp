// The module calguide_fast._cuda. Every function takes the place first, (device index, stream), and does not wait.
#include <stdlib.h>

#include "cuda/guidance.h"
#include "cuda/place.h"
#include "cuda/smooth_ece.h"
#include "cuda/step.h"
#include "cuda/tilt.h"
#include "cuda/top_label.h"
#include "read_arguments.h"

#ifndef CALGUIDE_CUDA_MACHINE_CODE
#error "CALGUIDE_CUDA_MACHINE_CODE and CALGUIDE_CUDA_PTX must list what the kernels are built for, such as _80_90"
#endif

namespace calguide {
namespace {

namespace py = pybind11;

Place place_of(PyObject* pair) {
  const int device = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(pair, 0)));
  return Place(device, PyLong_AsVoidPtr(PyTuple_GET_ITEM(pair, 1)));
}

// Other Python threads may run meanwhile: a launch waits where the device's queue is full.
template <class Launch>
void launch_at(PyObject* pair, const Launch& launch) {
  const Place place = place_of(pair);
  py::gil_scoped_release release;
  launch(place);
}

void tilt_weights(const py::tuple& pair, uintptr_t scores, int64_t stride, int64_t count, double tilt,
                  bool normalize_sum, double max_weight, uintptr_t weights) {
  const TiltArguments arguments = {
      reinterpret_cast<const float*>(scores), stride, count, tilt, normalize_sum, max_weight};
  launch_at(pair.ptr(),
            [&](const Place& place) { launch_tilt_weights(arguments, reinterpret_cast<float*>(weights), place); });
}

void philox_normal(const py::tuple& pair, uintptr_t seeds, int64_t batch, int64_t elements, uint32_t draw,
                   uint32_t stream, uintptr_t out) {
  launch_at(pair.ptr(), [&](const Place& place) {
    launch_philox_normal(reinterpret_cast<const int64_t*>(seeds), batch, elements, draw, stream,
                         reinterpret_cast<float*>(out), place);
  });
}

// What a function of positional arguments does: read those after the place, and launch with them. It returns the row
// whose label is bad, as on a CPU; labels are not looked at here, as that would wait for the device, and so it is none.
template <class Read, class Launch>
PyObject* launch_with(const char* name, PyObject* const* items, Py_ssize_t count, int expected, const Read& read,
                      const Launch& launch) {
  return call(name, items, count, expected, [&](PositionalArguments& in) -> PyObject* {
    PyObject* const pair = in.object();
    const auto arguments = read(in);
    if (PyErr_Occurred()) return nullptr;
    launch_at(pair, [&](const Place& place) { launch(arguments, place); });
    return PyLong_FromLong(-1);
  });
}

PyObject* guidance_gradient(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return launch_with("guidance_gradient", items, count, guidance_arguments, read_guidance, launch_guidance_gradient);
}

PyObject* top_label(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return launch_with("top_label", items, count, top_label_arguments, read_top_label, launch_top_label);
}

PyObject* top_label_backward(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return launch_with("top_label_backward", items, count, top_label_backward_arguments, read_top_label_backward,
                     launch_top_label_backward);
}

PyObject* guided_step(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return launch_with("guided_step", items, count, guided_step_arguments, read_guided_step, launch_guided_step);
}

PyObject* predict_x0(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return launch_with("predict_x0", items, count, predict_x0_arguments, read_predict_x0, launch_predict_x0);
}

// Arguments, and the memory that the launches leave each other what they find in.
template <class Arguments, class Scratch>
struct WithScratch {
  Arguments arguments;
  Scratch* scratch;
};

PyObject* smooth_ece(PyObject*, PyObject* const* items, Py_ssize_t count) {
  using All = WithScratch<SmoothEceArguments, SmoothEceScratch>;
  return launch_with(
      "smooth_ece", items, count, smooth_ece_arguments + 1,
      // braces, as they are read in this order
      [](PositionalArguments& in) { return All{read_smooth_ece(in), in.pointer<SmoothEceScratch>()}; },
      [](const All& all, const Place& place) { launch_smooth_ece(all.arguments, all.scratch, place); });
}

PyObject* smooth_ece_gradient(PyObject*, PyObject* const* items, Py_ssize_t count) {
  using All = WithScratch<SmoothEceGradientArguments, SmoothEceGradientScratch>;
  return launch_with(
      "smooth_ece_gradient", items, count, smooth_ece_gradient_arguments + 1,
      [](PositionalArguments& in) { return All{read_smooth_ece_gradient(in), in.pointer<SmoothEceGradientScratch>()}; },
      [](const All& all, const Place& place) { launch_smooth_ece_gradient(all.arguments, all.scratch, place); });
}

int version(cudaError_t (*query)(int*)) {
  int number = 0;
  return query(&number) == cudaSuccess ? number : 0;
}

// What setup.py built: machine code serves its own generation from its own version on, PTX all that is newer than it.
#define CALGUIDE_STRING(list) #list
#define CALGUIDE_EXPANDED_STRING(list) CALGUIDE_STRING(list)

// whether a capability in a list such as "_80_90" satisfies the condition
template <class Condition>
bool any_of(const char* list, const Condition& condition) {
  for (; *list != 0; ++list) {
    if (*list == '_' && condition(atoi(list + 1))) return true;
  }
  return false;
}

// a device of compute capability major.minor, in tenths
bool serves(int capability) {
  const auto machine_code = [&](int code) { return code / 10 == capability / 10 && code <= capability; };
  const auto ptx = [&](int code) { return code > 0 && code <= capability; };
  return any_of(CALGUIDE_EXPANDED_STRING(CALGUIDE_CUDA_MACHINE_CODE), machine_code) ||
         any_of(CALGUIDE_EXPANDED_STRING(CALGUIDE_CUDA_PTX), ptx);
}

std::string release(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// Why no kernel can run here, or an empty string.
std::string unavailable() {
  const int driver = version(cudaDriverGetVersion), runtime = version(cudaRuntimeGetVersion);
  if (driver == 0) return "no NVIDIA driver";
  if (driver / 1000 < runtime / 1000) {
    return "an NVIDIA driver for CUDA " + release(driver) + ", and they are built with CUDA " + release(runtime);
  }
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  // not an error that the next launch is to report
  cudaGetLastError();
  if (status == cudaErrorNoDevice || (status == cudaSuccess && devices == 0)) return "no CUDA device";
  if (status != cudaSuccess) return cudaGetErrorString(status);
  for (int device = 0; device < devices; ++device) {
    const Place place(device, nullptr);
    const int major = place.attribute(cudaDevAttrComputeCapabilityMajor);
    const int minor = place.attribute(cudaDevAttrComputeCapabilityMinor);
    if (!serves(10 * major + minor)) {
      return "a device of compute capability " + std::to_string(major) + "." + std::to_string(minor) +
             ", for which no code was built";
    }
  }
  return "";
}

}  // namespace
}  // namespace calguide

PYBIND11_MODULE(_cuda, module) {
  using namespace calguide;
  module.doc() = "CUDA kernels of calguide_fast; tensors come as pointers, sizes and strides, checked by the caller.";
  static PyMethodDef methods[] = {positional("guidance_gradient", &guidance_gradient),
                                  positional("top_label", &top_label),
                                  positional("top_label_backward", &top_label_backward),
                                  positional("guided_step", &guided_step),
                                  positional("predict_x0", &predict_x0),
                                  positional("smooth_ece", &smooth_ece),
                                  positional("smooth_ece_gradient", &smooth_ece_gradient),
                                  {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  module.def("tilt_weights", &tilt_weights);
  module.def("philox_normal", &philox_normal);
  // doubles that every call of these needs to itself
  module.attr("smooth_ece_scratch") = sizeof(SmoothEceScratch) / sizeof(double);
  module.attr("smooth_ece_gradient_scratch") = sizeof(SmoothEceGradientScratch) / sizeof(double);
  module.def("unavailable", &unavailable);
  module.def("runtime_version", [] { return version(cudaRuntimeGetVersion); });
}
