// What kernels over rows of logits share: a row copied to a buffer in float, and the rows spread over threads.
#pragma once

#include <math.h>

#include "arguments.h"
#include "cpu/kernels/lanes.h"
#include "storage.h"

namespace calguide {
namespace CALGUIDE_ISA {
namespace {

// a buffer is padded to whole vectors of the widest instruction set
constexpr int64_t lanes = 16;
// partial sums in float add 64 terms a lane, their total is in double
#if defined(__AVX512F__)
constexpr int64_t block_length = 64 * 16;
#elif defined(__AVX__)
constexpr int64_t block_length = 64 * 8;
#else
constexpr int64_t block_length = 64 * 4;
#endif
// below this many elements a thread costs more than it saves
constexpr int64_t elements_per_thread = 32768;

// copies a row and returns its largest logit, NaNs ignored
template <class T>
float load_contiguous_row(const T* logits, int64_t classes, float* x) {
  constexpr int64_t step = width<float>;
  const Vector<float> lowest = Vector<float>{} - INFINITY;
  Vector<float> even = lowest, odd = lowest;
  const auto take = [&](int64_t i, Vector<float>& max) {
    const Vector<float> value = load_lanes<float>(logits + i);
    store_lanes<float>(x + i, value);
    max = max_lanes<float>(value, max);
  };
  int64_t i = 0;
  for (; i + 2 * step <= classes; i += 2 * step) {
    take(i, even);
    take(i + step, odd);
  }
  if (i + step <= classes) take(i, even), i += step;
  float max = -INFINITY;
  if (classes >= step) {
    // the last vector may take some classes again
    if (i < classes) take(classes - step, odd);
    max = max_of_lanes(max_lanes<float>(even, odd));
  } else {
    for (; i < classes; ++i) {
      x[i] = load_float(logits[i]);
      max = x[i] > max ? x[i] : max;
    }
  }
  return max;
}

template <class T>
float load_strided_row(const T* logits, int64_t stride, int64_t classes, float* x) {
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < classes; ++i) {
    x[i] = load_float(logits[i * stride]);
    max = x[i] > max ? x[i] : max;
  }
  return max;
}

template <class T>
float load_row(const LogitsArguments& arguments, int64_t b, float* buffer) {
  const T* logits = static_cast<const T*>(arguments.logits) + b * arguments.row_stride;
  return arguments.class_stride == 1 ? load_contiguous_row(logits, arguments.classes, buffer)
                                     : load_strided_row(logits, arguments.class_stride, arguments.classes, buffer);
}

// Calls body(i) where each vector of `count` numbers begins, `count` being a vector's width at least; the last vector
// may take some numbers again.
template <class Real, class Body>
CALGUIDE_INLINE void each_vector(int64_t count, const Body& body) {
  for (int64_t i = 0; i + width<Real> <= count; i += width<Real>) body(i);
  if (count % width<Real> != 0) body(count - width<Real>);
}

// Calls body(begin, end) for a part of the rows on each of as many threads as the rows are worth.
template <class Body>
void each_part(const LogitsArguments& arguments, int threads, const Body& body) {
  const int64_t batch = arguments.batch;
  const int64_t worth = batch * arguments.classes / elements_per_thread;
  int64_t parts = threads < worth ? threads : worth;
  parts = parts < batch ? parts : batch;
  if (parts <= 1) return body(0, batch);
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static)
  for (int64_t part = 0; part < parts; ++part) body(part * batch / parts, (part + 1) * batch / parts);
}

}  // namespace
}  // namespace CALGUIDE_ISA
}  // namespace calguide
