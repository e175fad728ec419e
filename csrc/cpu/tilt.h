#pragma once

#include "arguments.h"
#include "cpu/isa.h"

CALGUIDE_DECLARE_KERNEL(void tilt_weights(const TiltArguments& arguments, float* weights))

namespace calguide {

// weights[b] = count * softmax(tilt * scores)[b] (softmax itself if normalize_sum), at most max_weight; a NaN spreads
// to all.
void tilt_weights(const TiltArguments& arguments, float* weights);

}  // namespace calguide
