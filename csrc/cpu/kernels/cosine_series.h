// Sums of cosine waves at many places, of each kernel source and instruction set its own.
#pragma once

#include "smooth_ece_math.h"

namespace calguide {
namespace CALGUIDE_ISA {
namespace {

// Values of sum_k series[k] cos(pi k t), and slopes by t if asked for, at `count` places; an odd number of terms.
template <bool Slope>
void evaluate(const double* series, int64_t terms, const double* place, int64_t count, double* value, double* slope) {
  constexpr int64_t block = 32;
  for (int64_t first = 0; first < count; first += block) {
    const int64_t length = first + block < count ? block : count - first;
    alignas(64) double x[block], b1[block], b2[block], d1[block], d2[block];
    for (int64_t j = 0; j < block; ++j) {
      x[j] = j < length ? 2.0 * cos_pi(place[first + j]) : 0.0;
      b1[j] = b2[j] = d1[j] = d2[j] = 0.0;
    }
    // Clenshaw's recurrence, two terms at a time so that nothing moves
    for (int64_t k = terms - 1; k > 0; k -= 2) {
      const double even = series[k], odd = series[k - 1];
      const double k_even = static_cast<double>(k) * even, k_odd = static_cast<double>(k - 1) * odd;
#pragma omp simd
      for (int64_t j = 0; j < block; ++j) {
        b2[j] = x[j] * b1[j] - b2[j] + even;
        b1[j] = x[j] * b2[j] - b1[j] + odd;
        if constexpr (Slope) {
          d2[j] = x[j] * d1[j] - d2[j] + k_even;
          d1[j] = x[j] * d2[j] - d1[j] + k_odd;
        }
      }
    }
    for (int64_t j = 0; j < length; ++j) {
      value[first + j] = 0.5 * x[j] * b1[j] - b2[j] + series[0];
      if constexpr (Slope) slope[first + j] = -pi * sin_pi(place[first + j]) * d1[j];
    }
  }
}

}  // namespace
}  // namespace CALGUIDE_ISA
}  // namespace calguide
