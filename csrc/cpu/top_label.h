#pragma once

#include "arguments.h"
#include "cpu/isa.h"

// labels must lie in 0..classes-1
CALGUIDE_DECLARE_KERNEL(void top_label(const TopLabelArguments& arguments, int threads))
CALGUIDE_DECLARE_KERNEL(void top_label_backward(const TopLabelBackwardArguments& arguments, int threads))
