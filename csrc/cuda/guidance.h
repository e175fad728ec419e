#pragma once

#include "arguments.h"

namespace calguide {

// On the stream of the device given; a row whose label is not in 0..classes-1 becomes NaN. Throws what CUDA says.
void launch_guidance_gradient(const GuidanceArguments& arguments, int device, void* stream);

}  // namespace calguide
