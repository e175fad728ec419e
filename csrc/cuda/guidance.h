#pragma once

#include "arguments.h"

namespace calguide {

class Place;

// The kernels for logits of one storage type; each type's are compiled in a source file of its own.
template <class T>
void launch_guidance_rows(const GuidanceArguments& arguments, const Place& place);

// On the stream of the device given; a row whose label is not in 0..classes-1 becomes NaN. Throws what CUDA says.
void launch_guidance_gradient(const GuidanceArguments& arguments, const Place& place);

}  // namespace calguide
