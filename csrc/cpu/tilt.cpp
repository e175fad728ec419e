#include "cpu/tilt.h"

#include <pybind11/pybind11.h>

namespace calguide {

void tilt_weights(const TiltArguments& arguments, float* weights) {
  CALGUIDE_DISPATCH(tilt_weights(arguments, weights))
}

void bind_tilt(pybind11::module_& module) {
  module.def("tilt_weights", [](int, uintptr_t scores, int64_t stride, int64_t count, double tilt, bool normalize_sum,
                                double max_weight, uintptr_t weights) {
    tilt_weights({reinterpret_cast<const float*>(scores), stride, count, tilt, normalize_sum, max_weight},
                 reinterpret_cast<float*>(weights));
  });
}

}  // namespace calguide
