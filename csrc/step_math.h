// One reverse-diffusion step at one element; the same source for CPU and CUDA.
//
// Formulas: ADM (Dhariwal and Nichol 2021) for the learned-range posterior and its guidance, EluCD (Ma et al. 2024) for the
// sine boost of the variance that guides.
#pragma once

#include <math.h>

#include "vector_math.h"

namespace calguide {

// What a step needs of its row of sixteen coefficients, computed once a call.
struct StepRow {
  float x0_x, x0_eps;         // x0 = x0_x x - x0_eps eps
  float mean_x0, mean_x;      // posterior mean = mean_x0 x0 + mean_x x
  float sd_mid, log_sd_span;  // learned sd = sd_mid exp(log_sd_span v): the posterior's at v = -1, sqrt(beta) at v = 1
  float fixed_var, fixed_sd;  // variance that guides and deviation of the noise, where the model learns none
  float ddim_x0, ddim_eps;    // DDIM: x_prev = ddim_x0 x0 + ddim_eps eps + ddim_sd z
  float ddim_sd, ddim_guide;
  float inverse_x0_eps;
  float sine;                 // sin(pi k / K)
  bool noisy;                 // k > 0
  uint32_t draw;              // which draw of noise the step takes
};

CALGUIDE_INLINE StepRow step_row(const float* coefficients) {
  const float* c = coefficients;
  StepRow row;
  row.x0_x = c[0];
  row.x0_eps = c[1];
  row.mean_x0 = c[2];
  row.mean_x = c[3];
  // half the log-variance is linear in v; the part without v leaves the exponential
  row.sd_mid = exp_float(0.25f * (c[4] + c[5]));
  row.log_sd_span = 0.25f * (c[4] - c[5]);
  row.fixed_var = c[6];
  row.fixed_sd = c[7];
  row.ddim_x0 = c[8];
  row.ddim_eps = c[9];
  row.ddim_sd = c[10];
  row.ddim_guide = c[11];
  row.inverse_x0_eps = 1.0f / c[1];
  row.sine = c[12];
  row.noisy = c[13] != 0.0f;
  row.draw = static_cast<uint32_t>(c[14]);
  return row;
}

// x0 within [-bound, bound]; a NaN fails both comparisons and stays.
CALGUIDE_INLINE float step_x0(const StepRow& row, float x, float eps, float bound) {
  float x0 = row.x0_x * x - row.x0_eps * eps;
  x0 = -bound > x0 ? -bound : x0;
  return bound < x0 ? bound : x0;
}

// Where the deviation comes from. Narrow is learned where |log_sd_span v| <= narrow_limit is known: the same bits, sooner.
enum class Deviation { fixed, learned, narrow };

constexpr float narrow_limit = 0.34f;

template <Deviation DEVIATION>
CALGUIDE_INLINE float step_sd(const StepRow& row, float v) {
  if (DEVIATION == Deviation::fixed) return row.fixed_sd;
  const float t = row.log_sd_span * v;
  // what exp_float computes where its exponent is 0
  if (DEVIATION == Deviation::narrow) return row.sd_mid * ((exp_remainder(t) * t + 1.0f) * t + 1.0f);
  return row.sd_mid * exp_float(t);
}

// guide is scale times the image's weights, boost the sine boost of the image.
template <Deviation DEVIATION, bool GUIDED, bool NOISY>
CALGUIDE_INLINE float step_ddpm(const StepRow& row, float bound, float guide, float boost, float x, float eps, float v,
                                float g, float z) {
  const float x0 = step_x0(row, x, eps, bound);
  float x_prev = row.mean_x0 * x0 + row.mean_x * x;
  const float sd = step_sd<DEVIATION>(row, v);
  const float var = DEVIATION == Deviation::fixed ? row.fixed_var : sd * sd;
  if (GUIDED) x_prev += (var + boost) * (guide * g);
  if (NOISY) x_prev += sd * z;
  return x_prev;
}

template <bool GUIDED, bool NOISY>
CALGUIDE_INLINE float step_ddim(const StepRow& row, float bound, float guide, float x, float eps, float g, float z) {
  float x0 = step_x0(row, x, eps, bound);
  // the noise that belongs to the clipped x0, which is what guidance shifts
  float e = (row.x0_x * x - x0) * row.inverse_x0_eps;
  if (GUIDED) {
    e -= row.ddim_guide * guide * g;
    x0 = row.x0_x * x - row.x0_eps * e;
  }
  float x_prev = row.ddim_x0 * x0 + row.ddim_eps * e;
  if (NOISY) x_prev += row.ddim_sd * z;
  return x_prev;
}

}  // namespace calguide
