#include "cpu/guidance.h"

#include <pybind11/numpy.h>

#include "cpu/huge_pages.h"
#include "cpu/labels.h"
#include "cpu/plain_tensor.h"
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
    want_huge_pages(arguments.grad, arguments.batch * arguments.classes * storage_size(arguments.storage));
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

// Of plain tensors (threads, logits, labels, out or None, settings): the gradient and the (5, batch) statistics, or
// None where Python has to look closer.
PyObject* plain_guidance_gradient(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return call("plain_guidance_gradient", items, count, 4, [](PositionalArguments& in) -> PyObject* {
    const int threads = static_cast<int>(in.integer());
    PlainTensor logits, labels, out;
    if (!logits.read(in.object()) || logits.ndim() != 2 || logits.storage() < 0) Py_RETURN_NONE;
    GuidanceArguments a;
    a.batch = logits.size(0), a.classes = logits.size(1);
    if (!labels.read(in.object()) || !labels.is_int64() || !labels.has_shape({a.batch})) Py_RETURN_NONE;
    const pybind11::object grad = out.read_result(in.object(), logits);
    if (!grad || out.storage() != logits.storage()) Py_RETURN_NONE;

    a.logits = logits.data<const void>(), a.row_stride = a.classes, a.class_stride = 1;
    a.storage = logits.storage();
    a.labels = labels.data<const int64_t>(), a.label_stride = 1;
    PositionalArguments settings(in.object());
    a.settings = read_guidance_settings(settings);
    a.grad = out.data<void>();
    if (PyErr_Occurred()) return nullptr;
    // a fifth of what a tensor would take
    pybind11::array_t<float> stats({int64_t{5}, a.batch});
    a.stats = stats.mutable_data();
    if (guide(a, threads) >= 0) Py_RETURN_NONE;
    return PyTuple_Pack(2, grad.ptr(), stats.ptr());
  });
}

}  // namespace

void bind_guidance(pybind11::module_& module) {
  static PyMethodDef methods[] = {positional("guidance_gradient", &guidance_gradient),
                                  positional("plain_guidance_gradient", &plain_guidance_gradient),
                                  {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace calguide
