#include "cpu/guidance.h"

#include "cpu/labels.h"
#include "read_arguments.h"

namespace calguide {
namespace {

// beyond this many elements other Python threads may run meanwhile
constexpr int64_t long_call = 16384;

void run(const GuidanceArguments& arguments, int threads) { CALGUIDE_DISPATCH(guidance_gradient(arguments, threads)); }

// Returns the first row whose label is out of range, having written nothing, or -1.
int64_t guide(const GuidanceArguments& arguments, int threads) {
  const int64_t bad_row = first_bad_label(arguments);
  if (bad_row >= 0) return bad_row;
  if (arguments.batch * arguments.classes > long_call) {
    pybind11::gil_scoped_release release;
    run(arguments, threads);
  } else {
    run(arguments, threads);
  }
  return -1;
}

PyObject* guidance_gradient(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("guidance_gradient", items, count, guidance_arguments, [](PositionalArguments& in) -> PyObject* {
    const int threads = static_cast<int>(in.integer());
    const GuidanceArguments arguments = read_guidance(in);
    return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(guide(arguments, threads));
  });
}

}  // namespace

void bind_guidance(pybind11::module_& module) {
  static PyMethodDef methods[] = {positional("guidance_gradient", &guidance_gradient), {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace calguide
