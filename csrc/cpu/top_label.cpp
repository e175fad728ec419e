#include "cpu/top_label.h"

#include "cpu/labels.h"
#include "read_arguments.h"

namespace calguide {
namespace {

void run(const TopLabelArguments& arguments, int threads) { CALGUIDE_DISPATCH(top_label(arguments, threads)); }

void run(const TopLabelBackwardArguments& arguments, int threads) {
  CALGUIDE_DISPATCH(top_label_backward(arguments, threads));
}

// Returns the first row whose label is out of range, having written nothing, or -1.
int64_t label(int threads, const TopLabelArguments& arguments) {
  pybind11::gil_scoped_release release;
  const int64_t bad_row = first_bad_label(arguments);
  if (bad_row < 0) run(arguments, threads);
  return bad_row;
}

void pull(int threads, const TopLabelBackwardArguments& arguments) {
  pybind11::gil_scoped_release release;
  run(arguments, threads);
}

}  // namespace

void bind_top_label(pybind11::module_& module) {
  module.def("top_label", top_label_function<int>(&label));
  module.def("top_label_backward", top_label_backward_function<int>(&pull));
}

}  // namespace calguide
