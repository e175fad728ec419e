#pragma once

#include "arguments.h"

namespace calguide {

class Place;

// One launch on the place's stream. Throws what CUDA says.
void launch_tilt_weights(const TiltArguments& arguments, float* weights, const Place& place);

}  // namespace calguide
