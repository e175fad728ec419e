#include "cpu/smooth_ece.h"

#include "cpu/huge_pages.h"
#include "read_arguments.h"

namespace calguide {
namespace {

bool run(const SmoothEceArguments& arguments, int threads) { CALGUIDE_DISPATCH(smooth_ece(arguments, threads)); }

void run(const SmoothEceGradientArguments& arguments, int threads) {
  const int64_t bytes = arguments.wide ? 8 : storage_size(arguments.storage);
  want_huge_pages(arguments.grad, static_cast<size_t>(arguments.count * bytes));
  CALGUIDE_DISPATCH(smooth_ece_gradient(arguments, threads));
}

PyObject* smooth_ece(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("smooth_ece", items, count, smooth_ece_arguments, [](PositionalArguments& in) -> PyObject* {
    const int threads = static_cast<int>(in.integer());
    const SmoothEceArguments arguments = read_smooth_ece(in);
    if (PyErr_Occurred()) return nullptr;
    bool allowed;
    {
      pybind11::gil_scoped_release release;
      allowed = run(arguments, threads);
    }
    return PyBool_FromLong(allowed);
  });
}

PyObject* smooth_ece_gradient(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("smooth_ece_gradient", items, count, smooth_ece_gradient_arguments,
              [](PositionalArguments& in) -> PyObject* {
                const int threads = static_cast<int>(in.integer());
                const SmoothEceGradientArguments arguments = read_smooth_ece_gradient(in);
                if (PyErr_Occurred()) return nullptr;
                {
                  pybind11::gil_scoped_release release;
                  run(arguments, threads);
                }
                Py_RETURN_NONE;
              });
}

}  // namespace

void bind_smooth_ece(pybind11::module_& module) {
  static PyMethodDef methods[] = {
      positional("smooth_ece", &smooth_ece), positional("smooth_ece_gradient", &smooth_ece_gradient), {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace calguide
