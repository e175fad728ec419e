#include "cpu/guidance.h"

#include "read_arguments.h"

namespace calguide {
namespace {

// beyond this many elements other Python threads may run meanwhile
constexpr int64_t long_call = 16384;

void run(const GuidanceArguments& arguments, int threads) { CALGUIDE_DISPATCH(guidance_gradient(arguments, threads)); }

// Returns the first row whose label is out of range, having written nothing, or -1.
int64_t guidance_gradient(int threads, uintptr_t logits, int64_t row_stride, int64_t class_stride, uintptr_t labels,
                          int64_t label_stride, int64_t batch, int64_t classes, int storage, int divergence,
                          double order, double alpha, double epsilon, double joint_temperature,
                          double marginal_temperature, double entropy_weight, bool adaptive_entropy, uintptr_t grad,
                          uintptr_t stats) {
  check_divergence(divergence);
  const int64_t* label = reinterpret_cast<const int64_t*>(labels);
  for (int64_t b = 0; b < batch; ++b) {
    if (label[b * label_stride] < 0 || label[b * label_stride] >= classes) return b;
  }
  const GuidanceArguments arguments = {
      reinterpret_cast<const void*>(logits), row_stride, class_stride, label, label_stride, batch, classes, storage,
      {divergence, order, alpha, epsilon, joint_temperature, marginal_temperature, entropy_weight, adaptive_entropy},
      reinterpret_cast<void*>(grad), reinterpret_cast<float*>(stats)};
  if (batch * classes > long_call) {
    pybind11::gil_scoped_release release;
    run(arguments, threads);
  } else {
    run(arguments, threads);
  }
  return -1;
}

}  // namespace

void bind_guidance(pybind11::module_& module) { module.def("guidance_gradient", &guidance_gradient); }

}  // namespace calguide
