// The smooth ECE's formulas that are the same on every device; backends/smooth_ece.py tells the whole of them.
#pragma once

#include "vector_math.h"

namespace calguide {

// the bandwidth does not go below
constexpr double least_bandwidth = 1e-3;
// the cosine series ends at k = cutoff / sigma, with exp(-sigma^2 pi^2 k^2 / 2) = 4e-14
constexpr double series_cutoff = 2.5;
// points per sigma at which the smoothed residual is looked at for changes of sign, and cells per sigma of the gradient
constexpr double points_per_sigma = 8.0, cells_per_sigma = 24.0;
// bins per sigma: cubic deposition is then right to 9e-8 of the value, or to 5e-6 of a fixpoint as small as 0.006
constexpr double bins_per_sigma = 32.0, bins_per_fixpoint = 12.0;
// a value below this share of the largest is rounding, which has no sign
constexpr double rounding_share = 1e-12;

// sin(pi u) for |u| <= 1/2, 2 ulp
CALGUIDE_INLINE double sin_pi_small(double u) {
  const double x = 3.141592653589793 * u, x2 = x * x;
  double r = 1.0 - x2 * (1.0 / 420.0);
  r = 1.0 - x2 * (1.0 / 342.0) * r;
  r = 1.0 - x2 * (1.0 / 272.0) * r;
  r = 1.0 - x2 * (1.0 / 210.0) * r;
  r = 1.0 - x2 * (1.0 / 156.0) * r;
  r = 1.0 - x2 * (1.0 / 110.0) * r;
  r = 1.0 - x2 * (1.0 / 72.0) * r;
  r = 1.0 - x2 * (1.0 / 42.0) * r;
  r = 1.0 - x2 * (1.0 / 20.0) * r;
  r = 1.0 - x2 * (1.0 / 6.0) * r;
  return x * r;
}

// cos(pi t) and sin(pi t) for t in [0, 1]
CALGUIDE_INLINE double cos_pi(double t) { return sin_pi_small(0.5 - t); }
CALGUIDE_INLINE double sin_pi(double t) {
  const double nearer = t < 0.5 ? t : 1.0 - t;
  return sin_pi_small(nearer);
}

// Shares of the four nodes around a bin, at -3/2, -1/2, 1/2 and 3/2 from its centre in bins, in a sample at offset d
// from the centre, by cubic interpolation: the coefficients of d^0 .. d^3, each for the four nodes.
constexpr double share_coefficients[4][4] = {{-1.0 / 16.0, 9.0 / 16.0, 9.0 / 16.0, -1.0 / 16.0},
                                             {1.0 / 24.0, -9.0 / 8.0, 9.0 / 8.0, -1.0 / 24.0},
                                             {1.0 / 4.0, -1.0 / 4.0, -1.0 / 4.0, 1.0 / 4.0},
                                             {-1.0 / 6.0, 1.0 / 2.0, -1.0 / 2.0, 1.0 / 6.0}};

// cubic[0..3]: coefficients of the cubic on [0, 1] with given values and slopes at its ends
CALGUIDE_INLINE void hermite(double left, double left_slope, double right, double right_slope, double* cubic) {
  const double rise = right - left;
  cubic[0] = left;
  cubic[1] = left_slope;
  cubic[2] = 3.0 * rise - 2.0 * left_slope - right_slope;
  cubic[3] = left_slope + right_slope - 2.0 * rise;
}

}  // namespace calguide
