#pragma once

#include "arguments.h"

namespace calguide {

class Place;

// One launch each on the place's stream; a row whose label is not in 0..classes-1 has confidence NaN. Throw what CUDA
// says.
void launch_top_label(const TopLabelArguments& arguments, const Place& place);
void launch_top_label_backward(const TopLabelBackwardArguments& arguments, const Place& place);

}  // namespace calguide
