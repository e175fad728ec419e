#include "cpu/top_label.h"

#include "cpu/huge_pages.h"
#include "cpu/labels.h"
#include "read_arguments.h"

namespace calguide {
namespace {

void run(const TopLabelArguments& arguments, int threads) { CALGUIDE_DISPATCH(top_label(arguments, threads)); }

void run(const TopLabelBackwardArguments& arguments, int threads) {
  want_huge_pages(arguments.grad, arguments.batch * arguments.classes * storage_size(arguments.storage));
  CALGUIDE_DISPATCH(top_label_backward(arguments, threads));
}

// Returns the first row whose label is out of range, having written nothing, or -1.
int64_t label(const TopLabelArguments& arguments, int threads) {
  pybind11::gil_scoped_release release;
  const int64_t bad_row = first_bad_label(arguments);
  if (bad_row < 0) run(arguments, threads);
  return bad_row;
}

PyObject* top_label(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("top_label", items, count, top_label_arguments, [](PositionalArguments& in) -> PyObject* {
    const int threads = static_cast<int>(in.integer());
    const TopLabelArguments arguments = read_top_label(in);
    return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(label(arguments, threads));
  });
}

PyObject* top_label_backward(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("top_label_backward", items, count, top_label_backward_arguments,
              [](PositionalArguments& in) -> PyObject* {
                const int threads = static_cast<int>(in.integer());
                const TopLabelBackwardArguments arguments = read_top_label_backward(in);
                if (PyErr_Occurred()) return nullptr;
                {
                  pybind11::gil_scoped_release release;
                  run(arguments, threads);
                }
                Py_RETURN_NONE;
              });
}

}  // namespace

void bind_top_label(pybind11::module_& module) {
  static PyMethodDef methods[] = {
      positional("top_label", &top_label), positional("top_label_backward", &top_label_backward), {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace calguide
