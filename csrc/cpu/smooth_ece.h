#pragma once

#include "arguments.h"
#include "cpu/isa.h"

// false, with nothing written, if a confidence is outside [0, 1] or the weights are not allowed; the result does not
// depend on the number of threads
CALGUIDE_DECLARE_KERNEL(bool smooth_ece(const SmoothEceArguments& arguments, int threads);
                        void smooth_ece_gradient(const SmoothEceGradientArguments& arguments, int threads))
