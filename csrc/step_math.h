// One reverse-diffusion step at one element; the same source for CPU and CUDA.
//
// Formulas: ADM (Dhariwal and Nichol 2021) for the learned-range posterior and its guidance, EluCD (Ma et al. 2024) for
// the sine boost of the variance that guides.
#pragma once

#include <math.h>

#include "vector_math.h"

namespace calguide {

// What a step needs of its row of sixteen coefficients, computed once a call.
struct StepRow {
  float x0_x, x0_eps;         // x0 = x0_x x - x0_eps eps
  float mean_x0, mean_x;      // posterior mean = mean_x0 x0 + mean_x x
  float sd[6], log_sd_span;   // learned sd = sd[0] exp(log_sd_span v): the posterior's at v = -1, sqrt(beta) at v = 1
  float fixed_var, fixed_sd;  // variance that guides and deviation of the noise, where the model learns none
  float ddim_x0, ddim_eps;    // DDIM: x_prev = ddim_x0 x0 + ddim_eps eps + ddim_sd z
  float ddim_sd, ddim_guide;
  float inverse_x0_eps;
  float sine;     // sin(pi k / K)
  bool noisy;     // k > 0
  uint32_t draw;  // which draw of noise the step takes
};

CALGUIDE_INLINE StepRow step_row(const float* coefficients) {
  const float* c = coefficients;
  StepRow row;
  row.x0_x = c[0];
  row.x0_eps = c[1];
  row.mean_x0 = c[2];
  row.mean_x = c[3];
  // half the log-variance is linear in v; the part without v leaves the exponential
  row.log_sd_span = 0.25f * (c[4] - c[5]);
  row.sd[0] = exp_float(0.25f * (c[4] + c[5]));
  for (int power = 1; power < 6; ++power) {
    row.sd[power] = row.sd[power - 1] * row.log_sd_span / static_cast<float>(power);
  }
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

// Where the deviation comes from. Narrow is learned where every v is known to be small; its bits are the same.
enum class Deviation { fixed, learned, narrow };

// Where |log_sd_span v| stays below this, the deviation's Taylor series in v reaches fp32 with its fifth power, in
// fewer operations than an exponential: at all but one or two steps of a schedule.
CALGUIDE_INLINE bool is_small(const StepRow& row, float v) { return fabsf(v) * fabsf(row.log_sd_span) <= 0.17f; }

template <Deviation DEVIATION>
CALGUIDE_INLINE float step_sd(const StepRow& row, float v) {
  if (DEVIATION == Deviation::fixed) return row.fixed_sd;
  // in pairs, for a shorter chain of dependent operations
  const float vv = v * v;
  const float sd = (row.sd[0] + row.sd[1] * v) + vv * ((row.sd[2] + row.sd[3] * v) + vv * (row.sd[4] + row.sd[5] * v));
  if (DEVIATION == Deviation::narrow) return sd;
  return is_small(row, v) ? sd : row.sd[0] * exp_float(row.log_sd_span * v);
}

// whether the step adds noise at all
CALGUIDE_INLINE bool takes_noise(const StepRow& row, bool ddim) { return row.noisy && !(ddim && row.ddim_sd == 0.0f); }

// Nothing compares with a NaN, so one that is in stays, and one that comes is let in.
CALGUIDE_INLINE float running_maximum(float before, float value) {
  return value > before || value != value ? value : before;
}

enum class Guide { none, plain, boosted };

// guide is scale times the image's weights, boost the image's sine boost of the variance that guides.
template <Deviation DEVIATION, Guide GUIDE, bool NOISY>
CALGUIDE_INLINE float step_ddpm(const StepRow& row, float bound, float guide, float boost, float x, float eps, float v,
                                float g, float z) {
  const float x0 = step_x0(row, x, eps, bound);
  float x_prev = row.mean_x0 * x0 + row.mean_x * x;
  if (DEVIATION == Deviation::fixed) {
    if (GUIDE != Guide::none) x_prev += (row.fixed_var + boost) * (guide * g);
    return NOISY ? x_prev + row.fixed_sd * z : x_prev;
  }
  // var guide g + sd z with var = sd^2
  const float sd = step_sd<DEVIATION>(row, v);
  float push = 0.0f;
  if (GUIDE != Guide::none) push = sd * (guide * g);
  if (NOISY) push += z;
  if (GUIDE != Guide::none || NOISY) x_prev += sd * push;
  return GUIDE == Guide::boosted ? x_prev + boost * (guide * g) : x_prev;
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
