#include "cpu/smooth_ece.h"

#include <pybind11/pybind11.h>

#include "cpu/huge_pages.h"
#include "storage.h"

namespace calguide {
namespace {

bool run(const SmoothEceArguments& arguments, int threads) { CALGUIDE_DISPATCH(smooth_ece(arguments, threads)); }

void run(const SmoothEceGradientArguments& arguments, int threads) {
  CALGUIDE_DISPATCH(smooth_ece_gradient(arguments, threads));
}

}  // namespace

void bind_smooth_ece(pybind11::module_& module) {
  module.def("smooth_ece",
             [](int threads, uintptr_t confidence, uintptr_t correct, uintptr_t weights, int64_t count, bool wide,
                double bandwidth, uintptr_t value, uintptr_t sigma, uintptr_t curve, int64_t curve_length) {
               const SmoothEceArguments arguments{reinterpret_cast<const void*>(confidence),
                                                  reinterpret_cast<const uint8_t*>(correct),
                                                  reinterpret_cast<const void*>(weights),
                                                  count,
                                                  wide,
                                                  bandwidth,
                                                  reinterpret_cast<void*>(value),
                                                  reinterpret_cast<void*>(sigma),
                                                  reinterpret_cast<double*>(curve),
                                                  curve_length};
               pybind11::gil_scoped_release release;
               return run(arguments, threads);
             });
  module.def("smooth_ece_gradient",
             [](int threads, uintptr_t confidence, int storage, bool wide, uintptr_t correct, uintptr_t weights,
                int64_t count, uintptr_t curve, uintptr_t value_grad, uintptr_t grad) {
               const SmoothEceGradientArguments arguments{reinterpret_cast<const void*>(confidence),
                                                          storage,
                                                          wide,
                                                          reinterpret_cast<const uint8_t*>(correct),
                                                          reinterpret_cast<const void*>(weights),
                                                          count,
                                                          reinterpret_cast<const double*>(curve),
                                                          reinterpret_cast<const void*>(value_grad),
                                                          reinterpret_cast<void*>(grad)};
               pybind11::gil_scoped_release release;
               const int64_t bytes = wide ? 8 : storage_size(storage);
               want_huge_pages(arguments.grad, static_cast<size_t>(count * bytes));
               run(arguments, threads);
             });
}

}  // namespace calguide
