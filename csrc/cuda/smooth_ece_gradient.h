// The gradient w_i (S(f_i) + r_i S'(f_i)) of the smooth ECE: S = K * sign R at the ends of cells, and cubics between.
#pragma once

#include "cuda/smooth_ece_samples.h"
#include "cuda/smooth_ece_search.h"

namespace calguide {

constexpr int curve_threads = 128, gradient_threads = 256;

__global__ void __launch_bounds__(curve_threads) curve_kernel(SmoothEceScratch* scratch) {
  // NaN where nothing was measured
  if (isnan(scratch->scale)) return;
  const int cells = static_cast<int>(gradient_cells(scratch->sigma));
  const int node = static_cast<int>(blockIdx.x) * curve_threads + static_cast<int>(threadIdx.x);
  if (node > cells) return;
  const int terms = static_cast<int>(series_terms(scratch->sigma));
  const double width = 1.0 / cells;
  const CurveNode at = cosine_series_with_slope(scratch->signs, terms, node * width);
  scratch->curve[node] = {at.value, at.slope * width};
}

template <class Real>
__global__ void __launch_bounds__(gradient_threads)
    gradient_kernel(const SmoothEceArguments a, const SmoothEceScratch* scratch) {
  Real* const grad = static_cast<Real*>(a.grad);
  const double scale = scratch->scale;
  const bool measured = !isnan(scale);
  const int cells = measured ? static_cast<int>(gradient_cells(scratch->sigma)) : 1;
  const int64_t step = static_cast<int64_t>(gridDim.x) * gradient_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * gradient_threads + threadIdx.x; i < a.count; i += step) {
    if (!measured) {
      grad[i] = static_cast<Real>(NAN);
      continue;
    }
    const double position = confidence_at<Real>(a, i) * cells;
    const int whole = static_cast<int>(position), cell = whole < cells ? whole : cells - 1;
    const CurveNode left = scratch->curve[cell], right = scratch->curve[cell + 1];
    double cubic[4];
    hermite(left.value, left.slope, right.value, right.slope, cubic);
    const double d = position - cell;
    const double value = ((cubic[3] * d + cubic[2]) * d + cubic[1]) * d + cubic[0];
    const double slope = cells * ((3.0 * cubic[3] * d + 2.0 * cubic[2]) * d + cubic[1]);
    grad[i] = static_cast<Real>(scale * weight_at<Real>(a, i) * (value + residual_at<Real>(a, i) * slope));
  }
}

}  // namespace calguide
