// Nodes to the fixpoint: cosine moments, and by one block the series, its changes of sign, the integral of |R| and the
// search over the bandwidth. Every sum has one order.
#pragma once

#include "cuda/group.h"
#include "cuda/smooth_ece.h"

namespace calguide {

struct Complex {
  double re, im;
};

// e^(i pi index / deposit_bins)
CALGUIDE_DEVICE Complex wave(int64_t index) {
  const int turn = static_cast<int>(index & (2 * deposit_bins - 1));
  const bool upper = turn <= deposit_bins;
  const double t = static_cast<double>(upper ? turn : 2 * deposit_bins - turn) * (1.0 / deposit_bins);
  return {cos_pi(t), upper ? sin_pi(t) : -sin_pi(t)};
}

// sum z + (re, im), a step of Horner's scheme
CALGUIDE_DEVICE void horner(Complex& sum, const Complex& z, double re, double im) {
  const double real = sum.re * z.re - sum.im * z.im + re;
  sum.im = sum.re * z.im + sum.im * z.re + im;
  sum.re = real;
}

// Row q of the table of waves by block q, a column by each thread.
__global__ void __launch_bounds__(moment_columns) column_waves_kernel(SmoothEceScratch* scratch) {
  const int q = blockIdx.x, column = threadIdx.x;
  const Complex z = wave(static_cast<int64_t>(q) * moment_columns);
  Complex sum = {0.0, 0.0};
  // the last node begins a row of its own
  for (int row = column == 0 ? moment_rows : moment_rows - 1; row >= 0; --row) {
    const auto node = static_cast<int64_t>(scratch->nodes[row * moment_columns + column]);
    horner(sum, z, static_cast<double>(node), 0.0);
  }
  scratch->waves[q][column][0] = sum.re;
  scratch->waves[q][column][1] = sum.im;
}

// c_k = sum of e^(i pi k column / bins) times the column's sum for k, which has the period 2 rows and is conjugate
// about its middle; in every lane of a warp.
CALGUIDE_DEVICE double cosine_moment(const SmoothEceScratch* scratch, int k) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size, phase = k % (2 * moment_rows);
  const bool conjugate = phase > moment_rows;
  const auto row = scratch->waves[conjugate ? 2 * moment_rows - phase : phase];
  const Complex z = wave(static_cast<int64_t>(k) * warp_size), first = wave(static_cast<int64_t>(k) * lane);
  Complex sum = {0.0, 0.0};
  for (int column = moment_columns - warp_size + lane; column >= 0; column -= warp_size) {
    horner(sum, z, row[column][0], conjugate ? -row[column][1] : row[column][1]);
  }
  double moment[1] = {sum.re * first.re - sum.im * first.im};
  warp_sum(moment);
  return deposit_unit * moment[0];
}

// sum of series[k] cos(pi k t) over an odd number of terms
CALGUIDE_DEVICE double cosine_series(const double* series, int terms, double t) {
  const double x = 2.0 * cos_pi(t);
  double b1 = 0.0, b2 = 0.0;
  // what the last step made is needed in one product alone, for a shorter chain of dependent operations
  for (int k = terms - 1; k > 0; k -= 2) {
    b2 = x * b1 + (series[k] - b2);
    b1 = x * b2 + (series[k - 1] - b1);
  }
  return 0.5 * x * b1 + (series[0] - b2);
}

// and its slope by t
CALGUIDE_DEVICE CurveNode cosine_series_with_slope(const double* series, int terms, double t) {
  const double x = 2.0 * cos_pi(t);
  double b1 = 0.0, b2 = 0.0, d1 = 0.0, d2 = 0.0;
  for (int k = terms - 1; k > 0; k -= 2) {
    const double even = series[k], odd = series[k - 1];
    b2 = x * b1 + (even - b2);
    b1 = x * b2 + (odd - b1);
    d2 = x * d1 + (static_cast<double>(k) * even - d2);
    d1 = x * d2 + (static_cast<double>(k - 1) * odd - d1);
  }
  return {0.5 * x * b1 + (series[0] - b2), -pi * sin_pi(t) * d1};
}

// what the smoothed series' term k has of the moment k; every term but the first counts twice
CALGUIDE_DEVICE double damping(double sigma, int k) {
  const double square = static_cast<double>(k) * static_cast<double>(k);
  return (k == 0 ? 1.0 : 2.0) * exp2_product(square, damping_exponent(sigma));
}

using SearchBlock = BlockGroup<512>;

// The integral of |R| at one bandwidth, and its derivative by the bandwidth.
struct Integral {
  double value, slope;
};

// R for any bandwidth, by one block; all of its threads call the same at the same time.
struct Residuals {
  const SearchBlock& group;
  SmoothEceScratch* scratch;
  double* series;  // shared, most_terms
  int known;       // moments

  CALGUIDE_MEMBER Integral integral(double sigma) {
    const int terms = static_cast<int>(series_terms(sigma)), intervals = static_cast<int>(sign_intervals(sigma));
    extend(terms);
    for (int k = group.rank(); k < terms; k += SearchBlock::size) series[k] = damping(sigma, k) * scratch->moments[k];
    __syncthreads();
    const double rounding = rounding_share * look(terms, intervals);
    const Changes changes = bracket(2 * (intervals + 1), rounding);
    polish(terms, changes.count);
    __syncthreads();
    double sums[2] = {0.0, 0.0};
    for (int k = group.rank(); k < terms; k += SearchBlock::size) {
      const double sine = sine_moment(k, changes), term = series[k] * sine, frequency = pi * k;
      scratch->sine[k] = sine;
      sums[0] += term;
      sums[1] -= sigma * frequency * frequency * term;
    }
    group.sum(sums);
    return {sums[0], sums[1]};
  }

 private:
  struct Changes {
    int count;
    double last_sign;  // after the last change; 0 if the series is 0
  };

  CALGUIDE_MEMBER void extend(int terms) {
    const int warp = group.rank() / warp_size;
    for (int k = known + warp; k < terms; k += SearchBlock::warps) {
      const double moment = cosine_moment(scratch, k);
      if (group.rank() % warp_size == 0) scratch->moments[k] = moment;
    }
    known = terms > known ? terms : known;
    __syncthreads();
  }

  // Values on a grid and, where a parabola through three of them dips through 0 unseen, at its vertex: the largest.
  CALGUIDE_MEMBER double look(int terms, int intervals) const {
    const double step = 1.0 / intervals;
    for (int g = group.rank(); g <= intervals; g += SearchBlock::size) {
      scratch->on_grid[g] = cosine_series(series, terms, g * step);
    }
    __syncthreads();
    double largest = 0.0;
    for (int g = group.rank(); g <= intervals; g += SearchBlock::size) {
      const double place = g * step, value = scratch->on_grid[g];
      double from_middle = 0.0, at_vertex = 0.0;
      if (g > 0 && g < intervals && dips(scratch->on_grid[g - 1], value, scratch->on_grid[g + 1], step, &from_middle)) {
        at_vertex = cosine_series(series, terms, place + from_middle);
      }
      const int grid_point = 2 * g + (from_middle < 0.0 ? 1 : 0), vertex = 4 * g + 1 - grid_point;
      scratch->place[grid_point] = place, scratch->value[grid_point] = value;
      scratch->place[vertex] = place + from_middle, scratch->value[vertex] = at_vertex;
      const double larger = fabs(value) > fabs(at_vertex) ? fabs(value) : fabs(at_vertex);
      largest = larger > largest ? larger : largest;
    }
    return group.max(largest);
  }

  // Pairs of neighbours of different signs, among the samples that have one. Each thread has a part of the samples.
  CALGUIDE_MEMBER Changes bracket(int samples, double rounding) const {
    const double* const value = scratch->value;
    const int part = (samples + SearchBlock::size - 1) / SearchBlock::size;
    const int begin = group.rank() * part, end = begin + part < samples ? begin + part : samples;
    int last = -1;
    for (int s = begin; s < end; ++s) last = fabs(value[s]) > rounding ? s : last;
    const Scan signed_ones = group.scan(last, -1, [](int a, int b) { return a > b ? a : b; });
    // calls body(sample before, sample after) for every change up to this thread's samples
    const auto each_change = [&](const auto& body) {
      for (int s = begin, before = signed_ones.before; s < end; ++s) {
        if (!(fabs(value[s]) > rounding)) continue;
        if (before >= 0 && (value[s] > 0.0) != (value[before] > 0.0)) body(before, s);
        before = s;
      }
    };
    int count = 0;
    each_change([&](int, int) { ++count; });
    const Scan counted = group.scan(count, 0, [](int a, int b) { return a + b; });
    int change = counted.before;
    each_change([&](int before, int after) {
      scratch->bracket[change][0] = before, scratch->bracket[change][1] = after;
      ++change;
    });
    __syncthreads();
    const double sign = signed_ones.all < 0 ? 0.0 : value[signed_ones.all] > 0.0 ? 1.0 : -1.0;
    return {counted.all, sign};
  }

  CALGUIDE_MEMBER void polish(int terms, int count) const {
    for (int change = group.rank(); change < count; change += SearchBlock::size) {
      const int before = scratch->bracket[change][0], after = scratch->bracket[change][1];
      const double left = scratch->value[before], right = scratch->value[after], rise = right > 0.0 ? 2.0 : -2.0;
      double low = scratch->place[before], high = scratch->place[after];
      double place = low + (high - low) * left / (left - right);
      double moved = 1.0;
      for (int step = 0; step < 20 && moved > 1e-11; ++step) {
        const CurveNode at = cosine_series_with_slope(series, terms, place);
        const double next = next_place(&low, &high, place, rise, at.value, at.slope);
        moved = fabs(next - place);
        place = next;
      }
      scratch->root[change] = place, scratch->rise[change] = rise;
    }
  }

  // integral of sign R(t) cos(pi k t)
  CALGUIDE_MEMBER double sine_moment(int k, const Changes& changes) const {
    double sum = 0.0;
    for (int change = 0; change < changes.count; ++change) {
      const double root = scratch->root[change];
      sum += scratch->rise[change] * (k == 0 ? root : sin_pi_multiple(k, root));
    }
    return k == 0 ? changes.last_sign - sum : -sum / (pi * k);
  }
};

// The fixpoint, or where a bandwidth is given the integral there; leaves the gradient's curve where one is wanted.
__global__ void __launch_bounds__(SearchBlock::size, 1)
    search_kernel(const SmoothEceArguments a, SmoothEceScratch* scratch) {
  CALGUIDE_SHARED(double, sums, SearchBlock::scratch_length);
  CALGUIDE_DYNAMIC_SHARED(double, series);
  const SearchBlock group = {sums};
  const double bandwidth = a.bandwidth, total = scratch->total;
  double* const curve = a.curve;
  const bool allowed = scratch->spoilt == 0 && is_total_allowed(total);
  double sigma = NAN, slope = 0.0, value = NAN;
  if (allowed) {
    Residuals residuals = {group, scratch, series, 0};
    sigma = bandwidth > 0.0 ? bandwidth : first_bandwidth;
    Integral at;
    for (FixpointSearch search = begin_search();;) {
      at = residuals.integral(sigma);
      if (bandwidth > 0.0 || at.value == 0.0 || is_found(search, sigma, at.value)) break;
      sigma = next_bandwidth(&search, sigma, at.value, at.slope);
    }
    // residuals that cancel do so at any bandwidth
    if (bandwidth == 0.0 && at.value == 0.0) sigma = least_bandwidth;
    value = at.value;
    slope = bandwidth == 0.0 && sigma > least_bandwidth ? at.slope : 0.0;
  }
  if (curve != nullptr) {
    const int length = static_cast<int>(a.curve_length - curve_series);
    const int terms = allowed && value != 0.0 ? static_cast<int>(series_terms(sigma)) : 0;
    for (int k = group.rank(); k < length; k += SearchBlock::size) {
      curve[curve_series + k] = k < terms ? damping(sigma, k) * scratch->sine[k] : 0.0;
    }
  }
  if (group.rank() != 0) return;
  if (curve != nullptr) {
    curve[curve_sigma] = sigma;
    curve[curve_factor] = allowed ? 1.0 / (total * (1.0 - slope)) : NAN;
  }
  if (a.wide) {
    *static_cast<double*>(a.value) = value, *static_cast<double*>(a.sigma) = sigma;
  } else {
    *static_cast<float*>(a.value) = static_cast<float>(value),
    *static_cast<float*>(a.sigma) = static_cast<float>(sigma);
  }
}

}  // namespace calguide
