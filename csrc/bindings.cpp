// The module calguide_fast._cpu: every op's source file binds its own functions.
#include <pybind11/pybind11.h>

namespace calguide {

void bind_isa(pybind11::module_& module);
void bind_guidance(pybind11::module_& module);
void bind_plain_tensor(pybind11::module_& module);
void bind_smooth_ece(pybind11::module_& module);
void bind_step(pybind11::module_& module);
void bind_tilt(pybind11::module_& module);
void bind_top_label(pybind11::module_& module);

}  // namespace calguide

PYBIND11_MODULE(_cpu, module) {
  module.doc() =
      "CPU kernels of calguide_fast; tensors come as pointers, sizes and strides, checked by the caller, or as they "
      "are to the functions named plain_, which leave what they do not know to the caller.";
  calguide::bind_isa(module);
  calguide::bind_guidance(module);
  calguide::bind_plain_tensor(module);
  calguide::bind_smooth_ece(module);
  calguide::bind_step(module);
  calguide::bind_tilt(module);
  calguide::bind_top_label(module);
}
