#pragma once

#include "arguments.h"
#include "cpu/isa.h"

// labels must lie in 0..classes-1
CALGUIDE_DECLARE_KERNEL(void guidance_gradient(const GuidanceArguments& arguments, int threads))
