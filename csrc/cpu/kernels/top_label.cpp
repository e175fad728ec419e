// Logits to the confidence in the top class, and back: each logit read once, each gradient written once. Forward, rows
// of few classes go sixteen at a time, one to a lane, as what is done once a row would outweigh so few classes.
//
// With s the sum of exp(f - max f), the confidence is 1/s. It is NaN of its own accord where it should be: a NaN, an
// infinite largest logit or none but masked ones give a difference that is NaN.
#include "cpu/top_label.h"

#include <math.h>
#include <stdlib.h>

#include "cpu/kernels/rows.h"

namespace calguide {
namespace CALGUIDE_ISA {
namespace {

// rows up to this long use a buffer on the stack
constexpr int64_t stack_classes = 4096;
constexpr float log2_e = 1.4426950408889634f;
// rows up to this long are narrow
constexpr int64_t narrow_classes = 48;
// classes that are looked at together for the largest logit
constexpr int64_t search_length = 256;

void store_label(const TopLabelArguments& arguments, int64_t b, int64_t top, float confidence) {
  arguments.confidence[b] = confidence;
  arguments.top[b] = top;
  arguments.correct[b] = top == arguments.labels[b * arguments.label_stride] && !isnan(confidence);
}

template <class T>
void label_narrow_rows(const TopLabelArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) float x[narrow_classes][lanes] = {}, max[lanes], sum[lanes];
  alignas(64) int32_t top[lanes];
  const int32_t classes = static_cast<int32_t>(arguments.classes);
  for (int64_t first = begin; first < end; first += lanes) {
    const int64_t rows = end - first < lanes ? end - first : lanes;
    for (int64_t lane = 0; lane < rows; ++lane) {
      const T* logits = static_cast<const T*>(arguments.logits) + (first + lane) * arguments.row_stride;
      for (int32_t i = 0; i < classes; ++i) x[i][lane] = load_float(logits[i * arguments.class_stride]);
    }
    for (int64_t lane = 0; lane < lanes; ++lane) max[lane] = -INFINITY, sum[lane] = 0.0f, top[lane] = 0;
    for (int32_t i = 0; i < classes; ++i) {
#pragma omp simd
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const bool more = x[i][lane] > max[lane];
        max[lane] = more ? x[i][lane] : max[lane];
        top[lane] = more ? i : top[lane];
      }
    }
    for (int32_t i = 0; i < classes; ++i) {
#pragma omp simd
      for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] += exp2_product(x[i][lane] - max[lane], log2_e);
    }
    for (int64_t lane = 0; lane < rows; ++lane) store_label(arguments, first + lane, top[lane], 1.0f / sum[lane]);
  }
}

// The sum of exp(x - max). The caches fetch the row at `next` while the exponentials keep the arithmetic busy.
template <class T>
double sum_of_exponentials(const float* x, int64_t count, float max, const T* next) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += block_length) {
    const int64_t end = begin + block_length < count ? begin + block_length : count;
    Vector<float> sum = {};
    for (int64_t i = begin; i < end; i += width<float>) {
      __builtin_prefetch(next + i);
      sum += exp2_far_lanes<float>(load_lanes<float>(x + i) - max, log2_e);
    }
    total += sum_of_lanes<float>(sum);
  }
  return total;
}

// the first place of `value`, or 0
int64_t find(const float* row, int64_t count, float value) {
  const float* x = static_cast<const float*>(__builtin_assume_aligned(row, 64));
  for (int64_t begin = 0; begin < count; begin += search_length) {
    const int length = static_cast<int>(begin + search_length < count ? search_length : count - begin);
    int first = length;
#pragma omp simd reduction(min : first)
    for (int i = 0; i < length; ++i) {
      const int here = x[begin + i] == value ? i : length;
      first = here < first ? here : first;
    }
    if (first < length) return begin + first;
  }
  return 0;
}

template <class T>
void label_row(const TopLabelArguments& arguments, int64_t b, float* x) {
  const int64_t classes = arguments.classes, padded = (classes + lanes - 1) / lanes * lanes;
  const float max = load_row<T>(arguments, b, x);
  for (int64_t i = classes; i < padded; ++i) x[i] = -INFINITY;
  const int64_t place = find(x, padded, max);
  const T* next =
      static_cast<const T*>(arguments.logits) + (b + 1 < arguments.batch ? b + 1 : b) * arguments.row_stride;
  const double sum = sum_of_exponentials(x, padded, max, next);
  store_label(arguments, b, place < classes ? place : 0, static_cast<float>(1.0 / sum));
}

template <class T>
void label_rows(const TopLabelArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) float stack[stack_classes];
  const int64_t length = (arguments.classes + lanes - 1) / lanes * lanes;
  float* x = length > stack_classes ? static_cast<float*>(aligned_alloc(64, length * sizeof(float))) : stack;
  if (x == nullptr) abort();
  for (int64_t b = begin; b < end; ++b) label_row<T>(arguments, b, x);
  if (x != stack) free(x);
}

// g confidence (1[i = top] - p_i), with p_i = exp(f_i - f_top) confidence
template <bool Contiguous, class T>
void pull_row(const TopLabelBackwardArguments& arguments, int64_t b) {
  const T* logits = static_cast<const T*>(arguments.logits) + b * arguments.row_stride;
  T* grad = static_cast<T*>(arguments.grad) + b * arguments.classes;
  const int64_t stride = Contiguous ? 1 : arguments.class_stride, top = arguments.top[b];
  const float max = load_float(logits[top * stride]), p = arguments.confidence[b];
  const float scale = arguments.grad_confidence[b * arguments.grad_stride] * p, share = -scale * p;
  // a type that is not does better in a loop by elements, which converts two vectors together
  if (Contiguous && stored_whole<T> && arguments.classes >= width<float>) {
    each_vector<float>(arguments.classes, [&](int64_t i) {
      store_lanes<float>(grad + i, share * exp2_far_lanes<float>(load_lanes<float>(logits + i) - max, log2_e));
    });
  } else {
#pragma omp simd
    for (int64_t i = 0; i < arguments.classes; ++i) {
      store_float(grad + i, share * exp2_product(load_float(logits[i * stride]) - max, log2_e));
    }
  }
  store_float(grad + top, scale * (1.0f - p));
}

template <class T>
void pull_rows(const TopLabelBackwardArguments& arguments, int64_t begin, int64_t end) {
  const auto pull = arguments.class_stride == 1 ? pull_row<true, T> : pull_row<false, T>;
  for (int64_t b = begin; b < end; ++b) pull(arguments, b);
}

}  // namespace

void top_label(const TopLabelArguments& arguments, int threads) {
  with_storage(arguments.storage, [&](auto type) {
    using T = decltype(type);
    const auto label = arguments.classes <= narrow_classes ? label_narrow_rows<T> : label_rows<T>;
    each_part(arguments, threads, [&](int64_t begin, int64_t end) { label(arguments, begin, end); });
  });
}

void top_label_backward(const TopLabelBackwardArguments& arguments, int threads) {
  with_storage(arguments.storage, [&](auto type) {
    each_part(arguments, threads,
              [&](int64_t begin, int64_t end) { pull_rows<decltype(type)>(arguments, begin, end); });
  });
}

}  // namespace CALGUIDE_ISA
}  // namespace calguide
