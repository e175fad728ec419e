#include "cpu/smooth_ece.h"

#include <pybind11/pybind11.h>

namespace calguide {
namespace {

bool run(const SmoothEceArguments& arguments, int threads) { CALGUIDE_DISPATCH(smooth_ece(arguments, threads)); }

}  // namespace

void bind_smooth_ece(pybind11::module_& module) {
  module.def("smooth_ece", [](int threads, uintptr_t confidence, uintptr_t correct, uintptr_t weights, int64_t count,
                              bool wide, double bandwidth, uintptr_t stats, uintptr_t grad) {
    const SmoothEceArguments arguments{reinterpret_cast<const void*>(confidence),
                                       reinterpret_cast<const uint8_t*>(correct),
                                       reinterpret_cast<const void*>(weights),
                                       count,
                                       wide,
                                       bandwidth,
                                       reinterpret_cast<void*>(stats),
                                       reinterpret_cast<void*>(grad)};
    pybind11::gil_scoped_release release;
    return run(arguments, threads);
  });
}

}  // namespace calguide
