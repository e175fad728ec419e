#pragma once

#include "arguments.h"
#include "cpu/isa.h"

namespace calguide {

// what is worked out for each image before its pixels
struct ImageScalars {
  const float* guide;  // (batch,) scale times weights times tilt
  float* boost;        // (batch,) scratch: the sine boost
};

}  // namespace calguide

CALGUIDE_DECLARE_KERNEL(void guided_step(StepArguments arguments, ImageScalars images, int threads))
CALGUIDE_DECLARE_KERNEL(void predict_x0(StepArguments arguments, int threads))
CALGUIDE_DECLARE_KERNEL(void philox_normal(const int64_t* seeds, int64_t batch, int64_t elements, uint32_t draw,
                                           uint32_t stream, float* out, int threads))
