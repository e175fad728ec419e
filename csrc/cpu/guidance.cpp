#include "cpu/guidance.h"

#include "cpu/labels.h"
#include "read_arguments.h"

namespace calguide {
namespace {

// beyond this many elements other Python threads may run meanwhile
constexpr int64_t long_call = 16384;

void run(const GuidanceArguments& arguments, int threads) { CALGUIDE_DISPATCH(guidance_gradient(arguments, threads)); }

// Returns the first row whose label is out of range, having written nothing, or -1.
int64_t guide(int threads, const GuidanceArguments& arguments) {
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

}  // namespace

void bind_guidance(pybind11::module_& module) { module.def("guidance_gradient", guidance_function<int>(&guide)); }

}  // namespace calguide
