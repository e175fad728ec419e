// The softmax of a batch's tilted scores, by one block, in a fixed order and in double.
#pragma once

#include <math.h>

#include "arguments.h"
#include "cuda/group.h"

namespace calguide {

// weight(b) = unit exp(tilt score_b - largest), at most max_weight
struct Tilt {
  double largest, unit;
};

template <class Group>
CALGUIDE_DEVICE Tilt tilt_of(const TiltArguments& a, const Group& group) {
  double largest = -INFINITY;
  for (int64_t b = group.rank(); b < a.count; b += Group::size) {
    const double exponent = a.tilt * a.scores[b * a.stride];
    if (exponent > largest) largest = exponent;
  }
  largest = group.max(largest);
  double total[1] = {0.0};
  for (int64_t b = group.rank(); b < a.count; b += Group::size) {
    total[0] += exp(a.tilt * a.scores[b * a.stride] - largest);
  }
  group.sum(total);
  // all exponents -inf, or one +inf, have no softmax; a NaN is in the total
  const double unit = (a.normalize_sum ? 1.0 : static_cast<double>(a.count)) / total[0];
  return {largest, isinf(largest) ? NAN : unit};
}

CALGUIDE_DEVICE float tilt_weight(const TiltArguments& a, const Tilt& tilt, int64_t b) {
  // NaN of its own accord where there is no softmax
  const double weight = tilt.unit * exp(a.tilt * a.scores[b * a.stride] - tilt.largest);
  return static_cast<float>(weight > a.max_weight ? a.max_weight : weight);
}

}  // namespace calguide
