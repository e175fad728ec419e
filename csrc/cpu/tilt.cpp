#include "cpu/tilt.h"

#include <pybind11/pybind11.h>

#include <cmath>

namespace calguide {

// one thread and one fixed order, in double: B is small and the weights must not depend on anything but the scores
void tilt_weights(const TiltArguments& a, float* weights) {
  double largest = -INFINITY;
  bool invalid = false;
  for (int64_t b = 0; b < a.count; ++b) {
    const double exponent = a.tilt * a.scores[b * a.stride];
    invalid |= std::isnan(exponent);
    if (exponent > largest) largest = exponent;
  }
  // all exponents -inf, or one +inf, have no softmax
  if (invalid || std::isinf(largest)) {
    for (int64_t b = 0; b < a.count; ++b) weights[b] = NAN;
    return;
  }
  double total = 0.0;
  for (int64_t b = 0; b < a.count; ++b) total += std::exp(a.tilt * a.scores[b * a.stride] - largest);
  const double unit = (a.normalize_sum ? 1.0 : static_cast<double>(a.count)) / total;
  for (int64_t b = 0; b < a.count; ++b) {
    const double weight = unit * std::exp(a.tilt * a.scores[b * a.stride] - largest);
    weights[b] = static_cast<float>(weight > a.max_weight ? a.max_weight : weight);
  }
}

void bind_tilt(pybind11::module_& module) {
  module.def("tilt_weights", [](int, uintptr_t scores, int64_t stride, int64_t count, double tilt, bool normalize_sum,
                                double max_weight, uintptr_t weights) {
    tilt_weights({reinterpret_cast<const float*>(scores), stride, count, tilt, normalize_sum, max_weight},
                 reinterpret_cast<float*>(weights));
  });
}

}  // namespace calguide
