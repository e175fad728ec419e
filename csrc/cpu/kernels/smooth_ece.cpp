// Confidences and outcomes to the smooth ECE and what its gradient needs. Residuals become cosine moments; from these
// come the smoothed residual R and the places where it changes sign, and from the places the integral of |R| as a sum
// over k.
//
// Everything after the pass over the samples is small, and runs on one thread in one order.
#include "cpu/smooth_ece.h"

#include "cpu/kernels/buffer.h"
#include "cpu/kernels/cosine_series.h"
#include "cpu/kernels/even_grid.h"
#include "smooth_ece_math.h"

namespace calguide {
namespace CALGUIDE_ISA {
namespace {

// up to so many samples each has moments of its own, beyond they share bins
constexpr int64_t exact_samples = 4096;
constexpr int64_t least_bins = 2048;
// A part of at least so many samples fills bins of its own. To clear and share out a bin costs as much as four samples.
constexpr int64_t samples_per_part = 1 << 16, samples_per_bin = 16, most_parts = 16;
constexpr int64_t samples_per_block = 64, fetch_ahead = 4 * samples_per_block;
constexpr int64_t tables_per_part = 2;
// from so many terms on a series is summed on its grid in two stages, whose first has so many columns
constexpr int64_t many_terms = 128, grid_columns = 32;

// Sums over weighted places t of cos(pi k t), or of sin(pi k t), for k = 0, 1, 2, ... by Chebyshev's recurrence.
class WaveSums {
 public:
  enum Wave { cosine, sine };

  WaveSums(Wave wave, const double* place, const double* weight, int64_t count)
      : weight_(weight), count_(count), twice_cos_(count), previous_(count), current_(count) {
    double *twice_cos = twice_cos_, *previous = previous_, *current = current_;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const double c = cos_pi(place[j]);
      twice_cos[j] = 2.0 * c;
      previous[j] = wave == cosine ? c : -sin_pi(place[j]);
      current[j] = wave == cosine ? 1.0 : 0.0;
    }
  }

  // Sums for every k below `end`, rounded up to a multiple of 4, after those already in `sums`.
  void extend(int64_t end, double* sums) {
    const int64_t begin = known_;
    for (; known_ < end; known_ += 4) sums[known_] = sums[known_ + 1] = sums[known_ + 2] = sums[known_ + 3] = 0.0;
    constexpr int64_t block = 512;
    for (int64_t first = 0; first < count_; first += block) {
      const int64_t length = first + block < count_ ? block : count_ - first;
      for (int64_t k = begin; k < known_; k += 4) add(first, length, sums + k);
    }
  }

 private:
  // Four terms of the recurrence for each pass over the places. Within a longer function GCC runs out of registers.
  __attribute__((noinline)) void add(int64_t first, int64_t length, double* sums) {
    const double *weight = weight_ + first, *twice_cos = twice_cos_ + first;
    double *previous = previous_ + first, *current = current_ + first;
    double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t j = 0; j < length; ++j) {
      const double w = weight[j], x = twice_cos[j], w0 = current[j];
      const double w1 = x * w0 - previous[j], w2 = x * w1 - w0, w3 = x * w2 - w1;
      s0 += w * w0;
      s1 += w * w1;
      s2 += w * w2;
      s3 += w * w3;
      previous[j] = w3;
      current[j] = x * w3 - w2;
    }
    sums[0] += s0;
    sums[1] += s1;
    sums[2] += s2;
    sums[3] += s3;
  }

  const double* weight_;
  int64_t count_, known_ = 0;
  Buffer twice_cos_, previous_, current_;
};

// The places within (0, 1) at which a cosine series changes sign.
class SignChanges {
 public:
  SignChanges(const double* series, int64_t terms, double sigma)
      : intervals_(intervals(sigma, terms)), place_(2 * intervals_), rise_(2 * intervals_) {
    Buffer sample(2 * intervals_), value(2 * intervals_), low(2 * intervals_), high(2 * intervals_);
    const int64_t samples = look(series, terms, sample, value);
    bracket(sample, value, samples, low, high);
    polish(series, terms, low, high);
  }

  int64_t count() const { return count_; }
  const double* place() const { return place_; }
  // by how much the sign rises at each place: 2 or -2
  const double* rise() const { return rise_; }
  // the sign after the last place; 0 if the series is 0
  double last_sign() const { return last_sign_; }

 private:
  static int64_t intervals(double sigma, int64_t terms) {
    const int64_t least = sign_intervals(sigma);
    return terms < many_terms ? least : (least + grid_columns - 1) / grid_columns * grid_columns;
  }

  // Values on a grid and, where a parabola through three of them dips through 0 unseen, at its vertex.
  int64_t look(const double* series, int64_t terms, double* sample, double* value) const {
    const int64_t n = intervals_;
    const double step = 1.0 / static_cast<double>(n);
    Buffer grid(n + 1), on_grid(n + 1), vertex(n), at_vertex(n);
    for (int64_t g = 0; g <= n; ++g) grid[g] = static_cast<double>(g) * step;
    if (terms < many_terms) {
      evaluate<false>(series, terms, grid, n + 1, on_grid, nullptr);
    } else {
      EvenCosineSums(series, terms, n, grid_columns).extend(n + 1, on_grid);
    }
    int64_t vertices = 0;
    for (int64_t g = 1; g < n; ++g) {
      double from_middle;
      if (dips(on_grid[g - 1], on_grid[g], on_grid[g + 1], step, &from_middle)) {
        vertex[vertices++] = grid[g] + from_middle;
      }
    }
    if (vertices > 0) evaluate<false>(series, terms, vertex, vertices, at_vertex, nullptr);
    int64_t samples = 0;
    for (int64_t g = 0, v = 0; g <= n; ++g) {
      for (; v < vertices && vertex[v] < grid[g]; ++v, ++samples)
        sample[samples] = vertex[v], value[samples] = at_vertex[v];
      sample[samples] = grid[g], value[samples] = on_grid[g], ++samples;
    }
    return samples;
  }

  void bracket(const double* sample, const double* value, int64_t samples, double* low, double* high) {
    double largest = 0.0;
    for (int64_t g = 0; g < samples; ++g) largest = fabs(value[g]) > largest ? fabs(value[g]) : largest;
    for (int64_t g = 0, last = 0; g < samples; ++g) {
      if (!(fabs(value[g]) > rounding_share * largest)) continue;
      const double sign = value[g] > 0.0 ? 1.0 : -1.0;
      if (sign == -last_sign_) {
        low[count_] = sample[last], high[count_] = sample[g];
        place_[count_] = sample[last] + (sample[g] - sample[last]) * value[last] / (value[last] - value[g]);
        rise_[count_++] = 2.0 * sign;
      }
      last = g, last_sign_ = sign;
    }
  }

  // Newton's method within the brackets, which close by halves where it leads out of them.
  void polish(const double* series, int64_t terms, double* low, double* high) {
    Buffer value(count_), slope(count_);
    double farthest = 1.0;
    for (int step = 0; step < 20 && farthest > 1e-11 && count_ > 0; ++step) {
      evaluate<true>(series, terms, place_, count_, value, slope);
      farthest = 0.0;
      for (int64_t j = 0; j < count_; ++j) {
        const double next = next_place(low + j, high + j, place_[j], rise_[j], value[j], slope[j]);
        const double moved = fabs(next - place_[j]);
        farthest = moved > farthest ? moved : farthest;
        place_[j] = next;
      }
    }
  }

  int64_t intervals_, count_ = 0;
  Buffer place_, rise_;
  double last_sign_ = 0.0;
};

// The integral of |R| at one bandwidth, and its derivative by the bandwidth.
struct Integral {
  double value, slope;
};

// exp(-sigma^2 pi^2 k^2 / 2), twice for k > 0, times terms[k]
void damp(double sigma, const double* moments, int64_t terms, double scale, double* series) {
  const double exponent = damping_exponent(sigma);
#pragma omp simd
  for (int64_t k = 0; k < terms; ++k) {
    const double square = static_cast<double>(k) * static_cast<double>(k);
    series[k] = 2.0 * scale * exp2_product(square, exponent) * moments[k];
  }
  series[0] = scale * moments[0];
}

// The residuals of all samples, by the sums of cosine waves over them.
template <class Cosines>
class Residuals {
 public:
  Residuals(Cosines& cosines, double total)
      : cosines_(cosines), scale_(1.0 / total), moments_(most_terms), sine_(most_terms) {}

  Integral integral(double sigma) {
    const int64_t terms = series_terms(sigma);
    cosines_.extend(terms, moments_);
    Buffer series(terms);
    damp(sigma, moments_, terms, scale_, series);
    const SignChanges changes(series, terms, sigma);
    WaveSums(WaveSums::sine, changes.place(), changes.rise(), changes.count()).extend(terms, sine_);
    sine_[0] = changes.last_sign();
    for (int64_t j = 0; j < changes.count(); ++j) sine_[0] -= changes.rise()[j] * changes.place()[j];
    Integral result = {series[0] * sine_[0], 0.0};
    for (int64_t k = 1; k < terms; ++k) {
      const double frequency = pi * static_cast<double>(k);
      sine_[k] /= -frequency;
      result.value += series[k] * sine_[k];
      result.slope -= sigma * frequency * frequency * series[k] * sine_[k];
    }
    return result;
  }

  // The sigma whose integral it is, or the least bandwidth where that is less. The search begins at sigma, and leaves
  // off near a fixpoint for which there are too few bins.
  Integral fixpoint(double& sigma, double bins) {
    for (FixpointSearch search = begin_search();;) {
      const Integral at = integral(sigma);
      if (at.value == 0.0) {
        // residuals that cancel do so at any bandwidth
        for (int64_t k = 0; k < most_terms; ++k) sine_[k] = 0.0;
        sigma = least_bandwidth;
        return {0.0, 0.0};
      }
      if (is_found(search, sigma, at.value)) return at;
      const double next = next_bandwidth(&search, sigma, at.value, at.slope);
      const bool near = next > 0.5 * sigma && next < 2.0 * sigma;
      sigma = next;
      if (near && bins < bins_per_fixpoint / sigma) return at;
    }
  }

  // The cosine series of S = K * sign R; the sine moments are those that the last integral left.
  void sign_series(double sigma, double* series) const { damp(sigma, sine_, series_terms(sigma), 1.0, series); }

 private:
  Cosines& cosines_;
  double scale_;
  Buffer moments_, sine_;
};

template <class Real, bool Weighted>
struct Samples {
  const Real* confidence;
  const uint8_t* correct;
  const Real* weights;
  int64_t count;

  double weight(int64_t i) const {
    if constexpr (Weighted) return weights[i];
    return 1.0;
  }
  // 0 or 1 whatever the byte is
  int outcome(int64_t i) const { return correct[i] != 0; }
  double residual(int64_t i) const { return confidence[i] - static_cast<double>(outcome(i)); }
  Samples from(int64_t first) const {
    return {confidence + first, correct + first, Weighted ? weights + first : nullptr, count - first};
  }
  // 1 for a sample that is not allowed: comparisons that NaN fails
  int bad(int64_t i) const {
    const Real f = confidence[i];
    const int outside = f * (1 - f) >= 0 ? 0 : 1;
    if constexpr (!Weighted) return outside;
    const Real w = weights[i];
    return outside | (w >= 0 ? 0 : 1) | (w - w == 0 ? 0 : 1);
  }
};

// Weights that have the samples' cosine moments, at places of their own or on an even grid from 0 to 1, and the total
// weight of the samples.
struct Sources {
  Buffer place, weight;
  int64_t count;
  double total;
  bool allowed;

  explicit Sources(int64_t length) : place(length), weight(length), count(length), total(0.0), allowed(true) {}
};

template <class Real, bool Weighted>
double total_weight(const Samples<Real, Weighted>& samples, int64_t count) {
  if constexpr (!Weighted) return static_cast<double>(count);
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += samples.weight(i);
  return sum;
}

template <class Real, bool Weighted>
void take_each(const Samples<Real, Weighted>& samples, Sources& to) {
  double *place = to.place, *weight = to.weight;
  int bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < samples.count; ++i) {
    place[i] = samples.confidence[i];
    weight[i] = samples.weight(i) * samples.residual(i);
    bad |= samples.bad(i);
  }
  to.total = total_weight(samples, samples.count);
  to.allowed = bad == 0;
}

// A sample's residual r at an offset d from the centre of its bin, as r, rd, rd^2 and rd^3.
template <class Real>
struct Moments;

template <>
struct Moments<float> {
  float of[4];

  // one by one, as a loop that copies them whole is no loop of vectors
  __attribute__((always_inline)) void take(float r, float d) {
    of[0] = r;
    of[1] = r * d;
    of[2] = r * (d * d);
    of[3] = r * d * (d * d);
  }
  double operator[](int power) const { return of[power]; }
};

// multiplied out only as they are added: to bring four vectors of doubles into the samples' order costs more
template <>
struct Moments<double> {
  double r, d;

  __attribute__((always_inline)) void take(double residual, double offset) { r = residual, d = offset; }
  double operator[](int power) const { return (power % 2 == 0 ? r : r * d) * (power < 2 ? 1.0 : d * d); }
};

// The sums of a bin's moments.
struct alignas(4 * sizeof(double)) Bin {
  double of[4];

  double operator[](int power) const { return of[power]; }
  template <class Terms>
  __attribute__((always_inline)) void add(const Terms& terms) {
    // read whole before any is written, which makes one vector of them
    double sum[4];
    for (int power = 0; power < 4; ++power) sum[power] = of[power] + terms[power];
    for (int power = 0; power < 4; ++power) of[power] = sum[power];
  }
};

// Adds up to a block of samples to two tables of (bins); false, with nothing added, if one is not allowed.
template <class Real, bool Weighted>
__attribute__((always_inline)) inline bool add_block(const Samples<Real, Weighted>& samples, int64_t count,
                                                     int64_t bins, Bin* table, double& total) {
  alignas(64) Moments<Real> moments[samples_per_block];
  alignas(64) int bin[samples_per_block];
  int bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t j = 0; j < count; ++j) bad |= samples.bad(j);
  if (bad != 0) return false;
  const Real scale = static_cast<Real>(bins);
  const int last_bin = static_cast<int>(bins - 1);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    // exact, as the bins are a power of two
    const Real position = samples.confidence[j] * scale;
    const int whole = static_cast<int>(position), b = whole < last_bin ? whole : last_bin;
    const Real offset = position - static_cast<Real>(b) - Real(0.5);
    const Real weight = Weighted ? samples.weights[j] : Real(1);
    // as a difference: where all four moments are products, GCC makes vectors of these and none across samples
    const Real residual = weight * samples.confidence[j] - weight * static_cast<Real>(samples.outcome(j));
    bin[j] = b;
    moments[j].take(residual, offset);
  }
  if (count % 2 != 0) moments[count].take(0, 0), bin[count] = 0;
  // neighbours go to different tables, so that the second need not wait for the first
  Bin* const other_table = table + bins;
  for (int64_t j = 0; j < count; j += 2) {
    table[bin[j]].add(moments[j]);
    other_table[bin[j + 1]].add(moments[j + 1]);
  }
  total += total_weight(samples, count);
  return true;
}

// Asks the memory for a block of samples.
template <class Real, bool Weighted>
__attribute__((always_inline)) inline void fetch_block(const Samples<Real, Weighted>& samples) {
  constexpr int64_t reals_per_line = 64 / sizeof(Real);
  for (int64_t j = 0; j < samples_per_block; j += reals_per_line) {
    __builtin_prefetch(samples.confidence + j);
    if constexpr (Weighted) __builtin_prefetch(samples.weights + j);
  }
  __builtin_prefetch(samples.correct);
}

// Adds samples to two tables of (bins); false if one is not allowed.
template <class Real, bool Weighted>
bool fill(const Samples<Real, Weighted>& samples, int64_t count, int64_t bins, Bin* table, double& total) {
  // loops over a whole block have a length that the compiler knows
  const int64_t whole = count - count % samples_per_block;
  for (int64_t i = 0; i < whole; i += samples_per_block) {
    // the additions to the tables keep the processor from looking so far ahead
    if (i + fetch_ahead < whole) fetch_block(samples.from(i + fetch_ahead));
    if (!add_block(samples.from(i), samples_per_block, bins, table, total)) return false;
  }
  return add_block(samples.from(whole), count - whole, bins, table, total);
}

// Shares two tables of (bins) out among (bins + 3) nodes, of which the first lies before 0 and the last beyond 1.
void share_out(const Bin* table, int64_t bins, double* nodes) {
  // what the bins so far have for the next three nodes
  double next[3] = {0.0, 0.0, 0.0};
  for (int64_t b = 0; b < bins; ++b) {
    Bin sum = table[b];
    sum.add(table[bins + b]);
    double share[4];
    for (int node = 0; node < 4; ++node) {
      share[node] = 0.0;
      for (int power = 0; power < 4; ++power) share[node] += share_coefficients[power][node] * sum[power];
    }
    nodes[b] = next[0] + share[0];
    next[0] = next[1] + share[1];
    next[1] = next[2] + share[2];
    next[2] = share[3];
  }
  for (int node = 0; node < 3; ++node) nodes[bins + node] = next[node];
}

// A power of two, which as many threads share evenly. It follows from the samples alone, and so does the result.
int64_t parts_for(int64_t count, int64_t bins) {
  const int64_t least = samples_per_part > samples_per_bin * bins ? samples_per_part : samples_per_bin * bins;
  int64_t parts = 1;
  while (parts < most_parts && count >= 2 * parts * least) parts *= 2;
  return parts;
}

template <class Real, bool Weighted>
void take_binned(const Samples<Real, Weighted>& samples, int64_t bins, int threads, Sources& to) {
  const int64_t parts = parts_for(samples.count, bins);
  const int64_t nodes = bins + 3;
  Buffer of_parts(nodes * parts), totals(parts);
  bool allowed[most_parts];
  const int workers = threads < parts ? threads : static_cast<int>(parts);
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t length = 4 * tables_per_part * bins;
    Buffer memory(length);
    memset(memory, 0, length * sizeof(double));
    Bin* const table = reinterpret_cast<Bin*>(static_cast<double*>(memory));
    totals[part] = 0.0;
    const int64_t begin = part * samples.count / parts, end = (part + 1) * samples.count / parts;
    allowed[part] = fill(samples.from(begin), end - begin, bins, table, totals[part]);
    share_out(table, bins, of_parts + part * nodes);
  }
  for (int64_t j = 0; j <= bins; ++j) to.weight[j] = 0.0;
  for (int64_t part = 0; part < parts; ++part) {
    to.total += totals[part], to.allowed &= allowed[part];
    const double* const of_part = of_parts + part * nodes;
    for (int64_t j = 0; j <= bins; ++j) to.weight[j] += of_part[j + 1];
    // cosines are even about 0 and 1, and so a node beyond is the one before
    to.weight[1] += of_part[0];
    to.weight[bins - 1] += of_part[bins + 2];
  }
}

int64_t bins_for(double wanted) {
  int64_t bins = least_bins;
  while (static_cast<double>(bins) < wanted) bins *= 2;
  return bins;
}

int64_t columns_for(int64_t bins) {
  int64_t columns = 8;
  while (columns * columns < bins) columns *= 2;
  return columns;
}

// Writes the results at bandwidth sigma.
template <class Real, class Cosines>
void finish(const Residuals<Cosines>& residuals, const SmoothEceArguments& arguments, double total, double sigma,
            const Integral& at) {
  *static_cast<Real*>(arguments.value) = static_cast<Real>(at.value);
  *static_cast<Real*>(arguments.sigma) = static_cast<Real>(sigma);
  double* const curve = arguments.curve;
  if (curve == nullptr) return;
  const bool fixpoint = arguments.bandwidth == 0.0 && sigma > least_bandwidth;
  curve[curve_sigma] = sigma;
  curve[curve_factor] = 1.0 / (total * (fixpoint ? 1.0 - at.slope : 1.0));
  for (int64_t k = curve_series; k < arguments.curve_length; ++k) curve[k] = 0.0;
  residuals.sign_series(sigma, curve + curve_series);
}

// Measures, and writes the results unless they want more bins than there are: how many they want. The search for a
// fixpoint begins at sigma, and leaves it there.
template <class Real, class Cosines>
double settle(Cosines cosines, double total, const SmoothEceArguments& arguments, double bins, double& sigma) {
  Residuals<Cosines> residuals(cosines, total);
  const bool search = arguments.bandwidth == 0.0;
  const Integral at = search ? residuals.fixpoint(sigma, bins) : residuals.integral(sigma);
  const double wanted = search && at.value != 0.0 ? bins_per_fixpoint / sigma : 0.0;
  if (bins >= wanted) finish<Real>(residuals, arguments, total, sigma, at);
  return wanted;
}

template <class Real, bool Weighted>
bool measure(const SmoothEceArguments& arguments, int threads) {
  const Samples<Real, Weighted> samples = {static_cast<const Real*>(arguments.confidence), arguments.correct,
                                           static_cast<const Real*>(arguments.weights), arguments.count};
  const bool search = arguments.bandwidth == 0.0;
  double sigma = search ? first_bandwidth : arguments.bandwidth;
  if (samples.count <= exact_samples) {
    Sources each(samples.count);
    take_each(samples, each);
    if (!each.allowed || !is_total_allowed(each.total)) return false;
    settle<Real>(WaveSums(WaveSums::cosine, each.place, each.weight, each.count), each.total, arguments, HUGE_VAL,
                 sigma);
    return true;
  }
  int64_t bins = bins_for(search ? 0.0 : bins_per_sigma / sigma);
  for (;;) {
    Sources binned(bins + 1);
    take_binned(samples, bins, threads, binned);
    if (!binned.allowed || !is_total_allowed(binned.total)) return false;
    const double wanted = settle<Real>(EvenCosineSums(binned.weight, bins + 1, bins, columns_for(bins)), binned.total,
                                       arguments, static_cast<double>(bins), sigma);
    if (static_cast<double>(bins) >= wanted) return true;
    bins = bins_for(wanted);
  }
}

}  // namespace

bool smooth_ece(const SmoothEceArguments& arguments, int threads) {
  if (arguments.weights != nullptr) {
    return arguments.wide ? measure<double, true>(arguments, threads) : measure<float, true>(arguments, threads);
  }
  return arguments.wide ? measure<double, false>(arguments, threads) : measure<float, false>(arguments, threads);
}

}  // namespace CALGUIDE_ISA
}  // namespace calguide
