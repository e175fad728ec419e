// The step kernels as calguide_fast/backends/cpu.py calls them.
#include "cpu/step.h"

#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/tilt.h"
#include "storage.h"

namespace calguide {
namespace {

namespace py = pybind11;

// below this many elements of work a second thread, or letting Python go on meanwhile, costs more than it gives
constexpr int64_t large_work = int64_t{1} << 16;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Strides come as one flat tuple for all operands, or as None where every operand is contiguous.
Operand operand(uintptr_t address, int type, py::handle strides, int position, int64_t channels, int64_t pixels) {
  Operand result{pointer<const void>(address), type, channels * pixels, pixels, 1};
  if (address != 0 && !strides.is_none()) {
    const auto item = [&](int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), 3 * position + i)); };
    result.image = item(0), result.channel = item(1), result.pixel = item(2);
  }
  return result;
}

int64_t bytes_of(int type) { return type == storage_float32 ? 4 : 2; }

void call_guided_step(const StepArguments& arguments) { CALGUIDE_DISPATCH(guided_step(arguments)) }
void call_predict_x0(const StepArguments& arguments) { CALGUIDE_DISPATCH(predict_x0(arguments)) }
void call_philox_normal(const int64_t* seeds, int64_t batch, int64_t elements, uint32_t draw, uint32_t stream, float* out,
                        int threads) {
  CALGUIDE_DISPATCH(philox_normal(seeds, batch, elements, draw, stream, out, threads))
}

// Runs a kernel with one thread if its work is small, else with `threads` and without Python's lock.
template <class Kernel>
void launch(int64_t elements, int threads, const Kernel& kernel) {
  if (elements < large_work) return kernel(1);
  py::gil_scoped_release release;
  kernel(threads);
}

void guided_step(int64_t batch, int64_t channels, int64_t pixels, uintptr_t x_t, uintptr_t model_output, int output_type,
                 int64_t output_channels, uintptr_t gradient, int gradient_type, uintptr_t noise, py::handle strides,
                 uintptr_t coefficients, uintptr_t weights, uintptr_t scores, uintptr_t seeds, uintptr_t variance_max,
                 bool ddim, double scale, double tilt, double max_weight, bool normalize_sum, double sine_boost, bool clip,
                 uintptr_t out, int threads) {
  StepArguments a{};
  a.batch = batch, a.channels = channels, a.pixels = pixels;
  a.x_t = operand(x_t, storage_float32, strides, 0, channels, pixels);
  a.eps = operand(model_output, output_type, strides, 1, output_channels, pixels);
  if (output_channels == 2 * channels) {
    a.v = a.eps;
    a.v.data = static_cast<const char*>(a.eps.data) + channels * a.eps.channel * bytes_of(output_type);
  }
  a.gradient = operand(gradient, gradient_type, strides, 2, channels, pixels);
  a.noise = operand(noise, storage_float32, strides, 3, channels, pixels);
  a.out = operand(out, storage_float32, py::none(), 0, channels, pixels);
  a.coefficients = pointer<const float>(coefficients);
  a.seeds = pointer<const int64_t>(seeds);
  a.variance_max = pointer<float>(variance_max);
  a.sine_boost = static_cast<float>(sine_boost);
  a.ddim = ddim, a.clip = clip;

  std::vector<float> scratch(2 * batch, static_cast<float>(scale));
  float* const guide = scratch.data();
  a.guide = guide, a.boost = guide + batch;
  if (scores != 0 && gradient != 0) {
    tilt_weights(pointer<const float>(scores), 1, batch, tilt, normalize_sum, max_weight, guide);
    for (int64_t b = 0; b < batch; ++b) guide[b] *= static_cast<float>(scale);
  }
  if (weights != 0) {
    for (int64_t b = 0; b < batch; ++b) guide[b] *= pointer<const float>(weights)[b];
  }

  launch(batch * channels * pixels, threads, [&](int used) {
    a.threads = used;
    call_guided_step(a);
  });
}

void predict_x0(int64_t batch, int64_t channels, int64_t pixels, uintptr_t x_t, uintptr_t model_output, int output_type,
                int64_t output_channels, py::handle strides, uintptr_t coefficients, bool clip, uintptr_t out, int out_type,
                int threads) {
  StepArguments a{};
  a.batch = batch, a.channels = channels, a.pixels = pixels;
  a.x_t = operand(x_t, storage_float32, strides, 0, channels, pixels);
  a.eps = operand(model_output, output_type, strides, 1, output_channels, pixels);
  a.out = operand(out, out_type, strides, 2, channels, pixels);
  a.coefficients = pointer<const float>(coefficients);
  a.clip = clip;
  launch(batch * channels * pixels, threads, [&](int used) {
    a.threads = used;
    call_predict_x0(a);
  });
}

void philox_normal(uintptr_t seeds, int64_t batch, int64_t elements, uint32_t draw, uint32_t stream, uintptr_t out,
                   int threads) {
  launch(batch * elements, threads, [&](int used) {
    call_philox_normal(pointer<const int64_t>(seeds), batch, elements, draw, stream, pointer<float>(out), used);
  });
}

}  // namespace

void bind_step(py::module_& module) {
  module.def("guided_step", &guided_step);
  module.def("predict_x0", &predict_x0);
  module.def("philox_normal", &philox_normal);
}

}  // namespace calguide
