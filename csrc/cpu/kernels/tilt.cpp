// Scores to tilt weights, by one thread, in double and in the same order whatever the instructions: the weights must
// not depend on anything but the scores.
#include "cpu/tilt.h"

#include <math.h>

#include "cpu/kernels/buffer.h"
#include "vector_math.h"

namespace calguide {
namespace CALGUIDE_ISA {
namespace {

constexpr int64_t lanes = 8;
constexpr double log2_e = 1.4426950408889634;

}  // namespace

void tilt_weights(const TiltArguments& a, float* weights) {
  const int64_t padded = (a.count + lanes - 1) / lanes * lanes;
  Buffer buffer(padded);
  double* const values = buffer;
  for (int64_t b = 0; b < a.count; ++b) values[b] = a.tilt * a.scores[b * a.stride];
  for (int64_t b = a.count; b < padded; ++b) values[b] = -INFINITY;
  double largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t b = 0; b < padded; ++b) largest = values[b] > largest ? values[b] : largest;
#pragma omp simd
  for (int64_t b = 0; b < padded; ++b) values[b] = exp2_product(values[b] - largest, log2_e);
  double sums[lanes] = {}, total = 0.0;
  for (int64_t first = 0; first < padded; first += lanes) {
    for (int64_t j = 0; j < lanes; ++j) sums[j] += values[first + j];
  }
  for (const double sum : sums) total += sum;
  // all exponents -inf, or one +inf, have no softmax; a NaN is in the total
  const double unit = isinf(largest) ? NAN : (a.normalize_sum ? 1.0 : static_cast<double>(a.count)) / total;
#pragma omp simd
  for (int64_t b = 0; b < a.count; ++b) {
    const double weight = unit * values[b];
    weights[b] = static_cast<float>(weight > a.max_weight ? a.max_weight : weight);
  }
}

}  // namespace CALGUIDE_ISA
}  // namespace calguide
