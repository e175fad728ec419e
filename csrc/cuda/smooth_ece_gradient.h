// The gradient factor w_i (S(f_i) + r_i S'(f_i)) of the smooth ECE: S = K * sign R at the ends of cells, and cubics
// between.
#pragma once

#include "cuda/smooth_ece_samples.h"
#include "cuda/smooth_ece_search.h"
#include "storage.h"

namespace calguide {

constexpr int curve_threads = 128, gradient_threads = 256;

__global__ void __launch_bounds__(curve_threads) curve_kernel(const double* curve, SmoothEceGradientScratch* scratch) {
  const double sigma = curve[curve_sigma];
  // NaN where nothing was measured
  if (isnan(sigma)) return;
  const int cells = static_cast<int>(gradient_cells(sigma));
  const int node = static_cast<int>(blockIdx.x) * curve_threads + static_cast<int>(threadIdx.x);
  if (node > cells) return;
  const int terms = static_cast<int>(series_terms(sigma));
  const double width = 1.0 / cells;
  const CurveNode at = cosine_series_with_slope(curve + curve_series, terms, node * width);
  scratch->nodes[node] = {at.value, at.slope * width};
}

template <class T>
__global__ void __launch_bounds__(gradient_threads)
    gradient_kernel(const SmoothEceGradientArguments a, const SmoothEceGradientScratch* scratch) {
  using Real = WideOf<T>;
  const T* const confidence = static_cast<const T*>(a.confidence);
  const Real* const weights = static_cast<const Real*>(a.weights);
  T* const grad = static_cast<T*>(a.grad);
  const double factor = a.curve[curve_factor] * *static_cast<const Real*>(a.value_grad);
  const bool measured = !isnan(a.curve[curve_sigma]);
  const int cells = measured ? static_cast<int>(gradient_cells(a.curve[curve_sigma])) : 1;
  const int64_t step = static_cast<int64_t>(gridDim.x) * gradient_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * gradient_threads + threadIdx.x; i < a.count; i += step) {
    if (!measured) {
      store_wide(grad + i, static_cast<Real>(NAN));
      continue;
    }
    const double f = load_wide(confidence[i]), position = f * cells;
    // the last cell has its end, too; NaN, which is none, becomes 0
    const int cell = static_cast<int>(fmin(fmax(position, 0.0), cells - 1.0));
    const CurveNode left = scratch->nodes[cell], right = scratch->nodes[cell + 1];
    double cubic[4];
    hermite(left.value, left.slope, right.value, right.slope, cubic);
    const double d = position - cell;
    const double value = ((cubic[3] * d + cubic[2]) * d + cubic[1]) * d + cubic[0];
    const double slope = cells * ((3.0 * cubic[3] * d + 2.0 * cubic[2]) * d + cubic[1]);
    const double g = factor * (value + (f - outcome_at(a.correct, i)) * slope);
    store_wide(grad + i, static_cast<Real>(weights == nullptr ? g : g * weights[i]));
  }
}

}  // namespace calguide
