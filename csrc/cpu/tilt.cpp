#include "cpu/tilt.h"

#include "cpu/plain_tensor.h"
#include "read_arguments.h"

namespace calguide {

void tilt_weights(const TiltArguments& arguments, float* weights) {
  CALGUIDE_DISPATCH(tilt_weights(arguments, weights))
}

namespace {

// Of a plain tensor (scores, tilt, normalize_sum, max_weight): the weights, or None where Python has to look closer.
PyObject* plain_tilt_weights(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("plain_tilt_weights", items, count, 3, [](PositionalArguments& in) -> PyObject* {
    PlainTensor scores, weights;
    if (!scores.read(in.object()) || !scores.is_float32() || scores.ndim() != 1) Py_RETURN_NONE;
    const double tilt = in.real();
    const bool normalize_sum = in.flag();
    const double max_weight = in.real();
    if (PyErr_Occurred()) return nullptr;
    pybind11::object result = weights.read_result(Py_None, scores);
    tilt_weights({scores.data<const float>(), 1, scores.size(0), tilt, normalize_sum, max_weight},
                 weights.data<float>());
    return result.release().ptr();
  });
}

}  // namespace

void bind_tilt(pybind11::module_& module) {
  static PyMethodDef methods[] = {positional("plain_tilt_weights", &plain_tilt_weights), {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
  module.def("tilt_weights", [](int, uintptr_t scores, int64_t stride, int64_t count, double tilt, bool normalize_sum,
                                double max_weight, uintptr_t weights) {
    tilt_weights({reinterpret_cast<const float*>(scores), stride, count, tilt, normalize_sum, max_weight},
                 reinterpret_cast<float*>(weights));
  });
}

}  // namespace calguide
