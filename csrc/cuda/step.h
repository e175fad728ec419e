#pragma once

#include "arguments.h"

namespace calguide {

class Place;

// Each is one launch on the place's stream. Throws what CUDA says.
void launch_guided_step(StepArguments arguments, const Place& place);
void launch_predict_x0(StepArguments arguments, const Place& place);
void launch_philox_normal(const int64_t* seeds, int64_t batch, int64_t elements, uint32_t draw, uint32_t stream,
                          float* out, const Place& place);

}  // namespace calguide
