// The smooth ECE's formulas that are the same on every device; backends/smooth_ece.py tells the whole of them.
#pragma once

#include <math.h>

#include "vector_math.h"

namespace calguide {

constexpr double pi = 3.141592653589793;
// the bandwidth does not go below
constexpr double least_bandwidth = 1e-3;
// where the search for the fixpoint begins
constexpr double first_bandwidth = 0.1;
// the cosine series ends at k = cutoff / sigma, with exp(-sigma^2 pi^2 k^2 / 2) = 4e-14
constexpr double series_cutoff = 2.5;
// points per sigma at which the smoothed residual is looked at for changes of sign, and cells per sigma of the gradient
constexpr double points_per_sigma = 8.0, cells_per_sigma = 24.0;
// bins per sigma: cubic deposition is then right to 9e-8 of the value, or to 5e-6 of a fixpoint as small as 0.006
constexpr double bins_per_sigma = 32.0, bins_per_fixpoint = 12.0;
// a value below this share of the largest is rounding, which has no sign
constexpr double rounding_share = 1e-12;
// between these the total weight and its inverse may be multiplied by what they are, with no overflow or underflow
constexpr double least_total = 1e-270, most_total = 1e270;
// the search for the fixpoint ends where value and bandwidth are so close, or after so many steps; a step goes down to
// no less than this share of the bandwidth
constexpr double found_within = 1e-12, least_step_share = 0.25;
constexpr int most_steps = 100;

CALGUIDE_INLINE bool is_total_allowed(double total) { return total >= least_total && total <= most_total; }

// terms of the series: an odd number, as Clenshaw's recurrence takes them in pairs
CALGUIDE_INLINE int64_t series_terms(double sigma) {
  return 2 * static_cast<int64_t>(ceil(0.5 * series_cutoff / sigma)) + 1;
}
constexpr int64_t most_terms = 2 * static_cast<int64_t>(0.5 * series_cutoff / least_bandwidth) + 8;

// exp(-sigma^2 pi^2 k^2 / 2) = 2^(k^2 times this)
CALGUIDE_INLINE double damping_exponent(double sigma) { return -0.5 * sigma * sigma * pi * pi * 1.4426950408889634; }

// intervals of the grid on which changes of sign are looked for
CALGUIDE_INLINE int64_t sign_intervals(double sigma) {
  return static_cast<int64_t>(ceil(points_per_sigma / (sigma < 1.0 ? sigma : 1.0)));
}

// cells between which the gradient's curve is interpolated: a power of two, by which a float is multiplied exactly
CALGUIDE_INLINE int64_t gradient_cells(double sigma) {
  int64_t cells = 1;
  while (static_cast<double>(cells) * (sigma < 1.0 ? sigma : 1.0) < cells_per_sigma) cells *= 2;
  return cells;
}

// What a measurement leaves for its gradient, in doubles: sigma, the gradient's factor (NaN where nothing could be
// measured), and from curve_series on the cosine series of S = K * sign R, then zeros.
constexpr int64_t curve_sigma = 0, curve_factor = 1, curve_series = 2;

// The search for the sigma whose integral it is: Newton's method within bounds.
struct FixpointSearch {
  // the integral falls with sigma, so the fixpoint lies between any sigma and the integral there
  double low, high;
  int step;
};

CALGUIDE_INLINE FixpointSearch begin_search() { return {least_bandwidth, 1.0, 0}; }

CALGUIDE_INLINE bool is_found(const FixpointSearch& search, double sigma, double value) {
  const bool at_least = sigma == least_bandwidth && value < sigma;
  return fabs(value - sigma) < found_within || at_least || search.step == most_steps;
}

// the sigma to look at after this one
CALGUIDE_INLINE double next_bandwidth(FixpointSearch* search, double sigma, double value, double slope) {
  ++search->step;
  const double below = value < sigma ? value : sigma, above = value < sigma ? sigma : value;
  search->low = below > search->low ? below : search->low;
  search->high = above < search->high ? above : search->high;
  const double newton = sigma + (value - sigma) / (1.0 - slope);
  // small bandwidths are dear, and Newton's first step overshoots to them
  double next = newton > least_step_share * sigma ? newton : least_step_share * sigma;
  if (next < search->low) next = search->low == least_bandwidth ? search->low : 0.5 * (search->low + search->high);
  if (next > search->high) next = 0.5 * (search->low + search->high);
  return next;
}

// Whether a parabola through three values of one sign dips through 0 unseen, and where its vertex is from the middle.
CALGUIDE_INLINE bool dips(double left, double middle, double right, double step, double* vertex) {
  const double slope = 0.5 * (right - left), bend = left - 2.0 * middle + right;
  const bool one_sign = left * middle > 0.0 && right * middle > 0.0;
  *vertex = -(step * slope / bend);
  return one_sign && fabs(slope) <= 0.5 * fabs(bend) && 2.0 * middle * bend <= slope * slope && middle * bend > 0.0;
}

// Newton's next place after one at which a function that rises (rise > 0) or falls through 0 has this value and slope;
// the bounds close by halves where it leads out of them.
CALGUIDE_INLINE double next_place(double* low, double* high, double place, double rise, double value, double slope) {
  const bool above = value * rise > 0.0;
  *high = above ? place : *high;
  *low = above ? *low : place;
  const double next = place - value / slope;
  return next >= *low && next <= *high ? next : 0.5 * (*low + *high);
}

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

// sin(pi k t) for whole k, from the exact product
CALGUIDE_INLINE double sin_pi_multiple(double k, double t) {
  // less an even number, in [-1, 1]
  const double turn = fma(k, t, -2.0 * rint(0.5 * k * t));
  const double magnitude = sin_pi(fabs(turn));
  return turn < 0.0 ? -magnitude : magnitude;
}

// Shares of the four nodes around a bin, at -3/2, -1/2, 1/2 and 3/2 from its centre in bins, in a sample at offset d
// from the centre, by cubic interpolation: the coefficients of d^0 .. d^3, each for the four nodes.
CALGUIDE_TABLE double share_coefficients[4][4] = {{-1.0 / 16.0, 9.0 / 16.0, 9.0 / 16.0, -1.0 / 16.0},
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
