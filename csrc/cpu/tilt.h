#pragma once

#include <cstdint>

namespace calguide {

// weights[b] = count * softmax(tilt * scores)[b] (softmax itself if normalize_sum), at most max_weight; a NaN spreads to all.
void tilt_weights(const float* scores, int64_t stride, int64_t count, double tilt, bool normalize_sum, double max_weight,
                  float* weights);

}  // namespace calguide
