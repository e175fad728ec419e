// The smooth ECE's gradient, factor w_i (S(f_i) + r_i S'(f_i)), from the cosine series of S = K * sign R.
//
// For many samples S is a cubic in each of some cells, and so is r S', for either outcome: a sample then takes four
// coefficients. Confidences in float have floats for them.
#include "cpu/kernels/buffer.h"
#include "cpu/kernels/cosine_series.h"
#include "cpu/smooth_ece.h"
#include "storage.h"

namespace calguide {
namespace CALGUIDE_ISA {
namespace {

// below this many samples a thread costs more than it saves
constexpr int64_t samples_per_thread = 32768;
constexpr int64_t samples_per_block = 128, fetch_ahead = 4 * samples_per_block;

template <class T, bool Weighted>
struct Samples {
  const T* confidence;
  const uint8_t* correct;
  const WideOf<T>* weights;
  T* grad;
  int64_t count;

  explicit Samples(const SmoothEceGradientArguments& a)
      : confidence(static_cast<const T*>(a.confidence)),
        correct(a.correct),
        weights(static_cast<const WideOf<T>*>(a.weights)),
        grad(static_cast<T*>(a.grad)),
        count(a.count) {}

  WideOf<T> weight(int64_t i) const {
    if constexpr (Weighted) return weights[i];
    return 1;
  }
  // 0 or 1 whatever the byte is
  int outcome(int64_t i) const { return correct[i] != 0; }
};

// S and its slope at each sample's own confidence.
template <class T, bool Weighted>
void write_each(const Samples<T, Weighted>& samples, const double* series, int64_t terms, double factor) {
  const int64_t count = samples.count;
  Buffer place(count), value(count), slope(count);
  for (int64_t i = 0; i < count; ++i) place[i] = load_wide(samples.confidence[i]);
  evaluate<true>(series, terms, place, count, value, slope);
  for (int64_t i = 0; i < count; ++i) {
    const double residual = place[i] - samples.outcome(i);
    const double g = factor * samples.weight(i) * (value[i] + residual * slope[i]);
    store_wide(samples.grad + i, static_cast<WideOf<T>>(g));
  }
}

// Of S + r S' in a cell, as a function of the place in it from 0 to 1.
template <class Real>
struct Cubic {
  Real of[4];
};

// Two for each cell, for outcomes 0 and 1.
template <class Real>
void make_cubics(const double* series, int64_t terms, double factor, int64_t cells, Cubic<Real>* cubics) {
  Buffer place(cells + 1), value(cells + 1), slope(cells + 1);
  const double width = 1.0 / static_cast<double>(cells);
  for (int64_t j = 0; j <= cells; ++j) place[j] = static_cast<double>(j) * width;
  evaluate<true>(series, terms, place, cells + 1, value, slope);
  for (int64_t j = 0; j <= cells; ++j) value[j] *= factor, slope[j] *= factor * width;
  for (int64_t j = 0; j < cells; ++j) {
    double s[4];
    hermite(value[j], slope[j], value[j + 1], slope[j + 1], s);
    for (int64_t correct = 0; correct < 2; ++correct) {
      // the residual and the slope are one per cell, and the residual is r + d at d
      const double r = static_cast<double>(j - correct * cells);
      cubics[2 * j + correct] = {{static_cast<Real>(s[0] + r * s[1]), static_cast<Real>(2.0 * (s[1] + r * s[2])),
                                  static_cast<Real>(3.0 * (s[2] + r * s[3])), static_cast<Real>(4.0 * s[3])}};
    }
  }
}

// Asks the memory for a block of samples.
template <class T, bool Weighted>
__attribute__((always_inline)) inline void fetch_block(const Samples<T, Weighted>& samples, int64_t first) {
  constexpr int64_t line = 64, per_line = line / sizeof(T), weights_per_line = line / sizeof(WideOf<T>);
  for (int64_t j = 0; j < samples_per_block; j += per_line) __builtin_prefetch(samples.confidence + first + j);
  for (int64_t j = 0; j < samples_per_block; j += line) __builtin_prefetch(samples.correct + first + j);
  if constexpr (Weighted) {
    for (int64_t j = 0; j < samples_per_block; j += weights_per_line) __builtin_prefetch(samples.weights + first + j);
  }
}

template <class T, bool Weighted>
void write_part(const Samples<T, Weighted>& samples, int64_t begin, int64_t end, int64_t cells,
                const Cubic<WideOf<T>>* cubics) {
  using Real = WideOf<T>;
  const Real scale = static_cast<Real>(cells);
  const int last_cell = static_cast<int>(cells - 1);
  for (int64_t first = begin; first < end; first += samples_per_block) {
    const int64_t length = first + samples_per_block < end ? samples_per_block : end - first;
    // the processor's own fetching ahead ends with a page
    if (first + fetch_ahead + samples_per_block <= end) fetch_block(samples, first + fetch_ahead);
    alignas(64) Real offset[samples_per_block];
    alignas(64) int index[samples_per_block];
    alignas(64) Cubic<Real> taken[samples_per_block];
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) {
      const Real position = load_wide(samples.confidence[first + j]) * scale;
      const int whole = static_cast<int>(position), below = whole < last_cell ? whole : last_cell;
      const int cell = below > 0 ? below : 0;
      offset[j] = position - static_cast<Real>(cell);
      index[j] = 2 * cell + samples.outcome(first + j);
    }
    // one after the other, as a machine's own gathering takes twice as long
#pragma GCC unroll 8
    for (int64_t j = 0; j < length; ++j) taken[j] = cubics[index[j]];
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) {
      const Real d = offset[j], *c = taken[j].of;
      store_wide(samples.grad + first + j, samples.weight(first + j) * (((c[3] * d + c[2]) * d + c[1]) * d + c[0]));
    }
  }
}

template <class T, bool Weighted>
void write_all(const SmoothEceGradientArguments& arguments, int threads) {
  using Real = WideOf<T>;
  const Samples<T, Weighted> samples(arguments);
  const double* const curve = arguments.curve;
  const double factor = curve[curve_factor] * *static_cast<const Real*>(arguments.value_grad);
  // of what could not be measured
  if (factor != factor) {
    for (int64_t i = 0; i < samples.count; ++i) store_wide(samples.grad + i, static_cast<Real>(factor));
    return;
  }
  const double* const series = curve + curve_series;
  const int64_t terms = series_terms(curve[curve_sigma]), cells = gradient_cells(curve[curve_sigma]);
  if (samples.count <= cells) return write_each(samples, series, terms, factor);
  Buffer memory(8 * cells);
  Cubic<Real>* const cubics = reinterpret_cast<Cubic<Real>*>(static_cast<double*>(memory));
  make_cubics(series, terms, factor, cells, cubics);
  const int64_t worth = samples.count / samples_per_thread;
  int64_t parts = threads < worth ? threads : worth;
  parts = parts < 1 ? 1 : parts;
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    write_part(samples, part * samples.count / parts, (part + 1) * samples.count / parts, cells, cubics);
  }
}

template <class T>
void write_all(const SmoothEceGradientArguments& arguments, int threads) {
  return arguments.weights != nullptr ? write_all<T, true>(arguments, threads)
                                      : write_all<T, false>(arguments, threads);
}

}  // namespace

void smooth_ece_gradient(const SmoothEceGradientArguments& arguments, int threads) {
  if (arguments.wide) return write_all<double>(arguments, threads);
  with_storage(arguments.storage, [&](auto type) { write_all<decltype(type)>(arguments, threads); });
}

}  // namespace CALGUIDE_ISA
}  // namespace calguide
