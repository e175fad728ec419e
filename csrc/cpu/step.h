// What the step kernels are called with: raw pointers and strides, no Python.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/isa.h"

namespace calguide {

// (image, channel, pixel) strides in elements; an absent operand has no data.
struct Operand {
  const void* data;
  int type;  // StorageType
  int64_t image, channel, pixel;
};

// guided_step reads all of it; its out is fp32 with contiguous channels and may be x_t itself. predict_x0 reads x_t,
// eps, coefficients and clip, and writes out in its own type and strides.
struct StepArguments {
  int64_t batch, channels, pixels;
  Operand x_t, eps, v, gradient, noise, out;
  const float* coefficients;
  const float* guide;    // (batch,) scale times weights times tilt
  const int64_t* seeds;  // (batch,)
  float* variance_max;   // (batch,) running maximum, updated; null without the sine boost
  float* boost;          // (batch,) scratch: the sine boost of each image
  float sine_boost;
  bool ddim, clip;
  int threads;
};

}  // namespace calguide

CALGUIDE_DECLARE_KERNEL(void guided_step(StepArguments arguments))
CALGUIDE_DECLARE_KERNEL(void predict_x0(StepArguments arguments))
CALGUIDE_DECLARE_KERNEL(void philox_normal(const int64_t* seeds, int64_t batch, int64_t elements, uint32_t draw,
                                           uint32_t stream, float* out, int threads))
