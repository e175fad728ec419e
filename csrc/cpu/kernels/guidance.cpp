// Logits to guidance gradient and score, one row at a time, each logit read once and each gradient written once.
//
// A row is copied to a buffer with its label moved out. Then: exponentials and their sums; for the divergences outside
// the Kullback-Leibler family one pass of class terms; and the gradient in the form that guidance_math.h gives it.
#include "cpu/guidance.h"

#include <math.h>
#include <stdlib.h>

#include <utility>

#include "cpu/kernels/lanes.h"
#include "cpu/kernels/rows.h"

namespace calguide {
namespace CALGUIDE_ISA {
namespace {

// A padding logit, and no number that anybody masks classes with: its exponential is 0 beside a maximum that is not
// almost as low.
constexpr float padding = -1.2345679e38f, lowest_max = -1e37f;
// a class that is farther below the maximum has no probability, and its d times a weight should stay finite
constexpr float farthest = -1e20f;
// rows up to this long use buffers on the stack
constexpr int64_t stack_classes = 2048;

struct Settings {
  const GuidanceArguments* arguments;
  GuidanceSettings<double> guidance;
  DivergenceTraits traits;
  Marginal marginal;
};

// What the caches may fetch while the exponentials keep the arithmetic busy.
struct Ahead {
  const char* logits;  // of the next row
  char* grad;
  int64_t bytes;  // of a class

  void prefetch(int64_t i) const {
    __builtin_prefetch(logits + i * bytes);
    __builtin_prefetch(grad + i * bytes, 1);
  }
};

// `count` classes other than the label, padded to whole vectors; the label apart
template <class Real>
struct Row {
  float* x;
  Real* e;   // e, or e2 where e = e2^2
  Real* e2;  // for a general marginal temperature
  Real* w;   // class terms
  int64_t count;
  float max;  // over all classes, in the units of x
  bool far;   // some may be as far below the maximum as floats go
  Label<double> label;
};

template <class Real>
struct LaneSums {
  Vector<Real> s, s2, ed, d;
};

// Exponentials of a vector of classes, of which some may be padding or far.
template <Marginal M, bool SumD, bool Padded, class Real>
CALGUIDE_INLINE void exp_vector(const Row<Real>& row, int64_t i, Real temperature, LaneSums<Real>& sums) {
  using Lanes = Vector<Real>;
  const Real log2_e = static_cast<Real>(1.4426950408889634);
  const Lanes x = load_lanes<Real>(row.x + i), d = x - static_cast<Real>(row.max);
  const auto power = [&](Real scale) { return Padded ? exp2_far_lanes<Real>(d, scale) : exp2_lanes<Real>(d, scale); };
  Lanes exponential;
  if constexpr (M == marginal_half) {
    const Lanes half = power(log2_e / 2);
    exponential = half * half;
    store_lanes<Real>(row.e + i, half);
    sums.s2 += half;
  } else {
    exponential = power(log2_e);
    store_lanes<Real>(row.e + i, exponential);
    if constexpr (M == marginal_general) {
      const Lanes other = power(temperature * log2_e);
      store_lanes<Real>(row.e2 + i, other);
      sums.s2 += other;
    }
  }
  sums.s += exponential;
  sums.ed += exponential * d;
  if constexpr (SumD) {
    const Lanes zero = {};
    sums.d += Padded ? (x == zero + static_cast<Real>(padding) ? zero : d) : d;
  }
}

template <Marginal M, bool SumD, class Real>
ExpSums<double> exp_pass(const Row<Real>& given, int64_t padded, Real temperature, Ahead ahead) {
  // a copy that no store can reach stays in registers
  const Row<Real> row = given;
  const int64_t plain = row.far ? 0 : row.count / width<Real> * width<Real>;
  ExpSums<double> total = {};
  for (int64_t i = 0; i < padded;) {
    const int64_t end = i + block_length < padded ? i + block_length : padded;
    LaneSums<Real> sums = {};
    for (; i < end && i < plain; i += width<Real>) {
      ahead.prefetch(i);
      exp_vector<M, SumD, false>(row, i, temperature, sums);
    }
    for (; i < end; i += width<Real>) exp_vector<M, SumD, true>(row, i, temperature, sums);
    total.s += sum_of_lanes<Real>(sums.s);
    total.s2 += sum_of_lanes<Real>(sums.s2);
    total.ed += sum_of_lanes<Real>(sums.ed);
    total.d += sum_of_lanes<Real>(sums.d);
  }
  return total;
}

// Terms of a vector of classes, of which some may be padding.
template <int D, bool Half, bool Padded, class Real>
CALGUIDE_INLINE void term_vector(const Row<Real>& row, int64_t i, const ClassWeight<Real>& of,
                                 ClassTerms<Vector<Real>>& sums) {
  using Lanes = Vector<Real>;
  const Lanes x = load_lanes<Real>(row.x + i), e = load_lanes<Real>(row.e + i);
  ClassTerms<Lanes> terms = class_terms<D, LaneFunctions<Real>>(Half ? e * e : e, x - static_cast<Real>(row.max), of);
  store_lanes<Real>(row.w + i, terms.w);
  if constexpr (Padded) {
    const Lanes zero = {};
    terms.w = x == zero + static_cast<Real>(padding) ? zero : terms.w;
    terms.value = x == zero + static_cast<Real>(padding) ? zero : terms.value;
  }
  sums.w += terms.w;
  sums.value += terms.value;
}

template <int D, bool Half, class Real>
TermSums<double> term_pass(const Row<Real>& given, const ClassWeight<Real>& other) {
  // copies that no store can reach stay in registers
  const Row<Real> row = given;
  const ClassWeight<Real> of = other;
  const int64_t whole = row.count / width<Real> * width<Real>;
  TermSums<double> total = {};
  for (int64_t i = 0; i < row.count;) {
    const int64_t end = i + block_length < whole ? i + block_length : whole;
    ClassTerms<Vector<Real>> sums = {};
    for (; i < end; i += width<Real>) term_vector<D, Half, false>(row, i, of, sums);
    if (end == whole && whole < row.count) {
      term_vector<D, Half, true>(row, i, of, sums);
      i = row.count;
    }
    total.w += sum_of_lanes<Real>(sums.w);
    total.value += sum_of_lanes<Real>(sums.value);
  }
  return total;
}

// gradients of a vector of classes
template <Marginal M, bool HasLog, bool HasW, class Real>
CALGUIDE_INLINE Vector<Real> gradient_vector(const Row<Real>& row, const GradientForm<Real>& form, int64_t i) {
  using Lanes = Vector<Real>;
  const Lanes stored = load_lanes<Real>(row.e + i);
  const Lanes e = M == marginal_half ? stored * stored : stored;
  const Lanes e2 = M == marginal_general ? load_lanes<Real>(row.e2 + i) : stored;
  const Lanes zero = {}, far = zero + static_cast<Real>(farthest);
  const Lanes d = HasLog ? max_lanes<Real>(load_lanes<Real>(row.x + i) - static_cast<Real>(row.max), far) : zero;
  const Lanes w = HasW ? load_lanes<Real>(row.w + i) : Lanes{};
  return gradient_of<M, HasLog, HasW>(form, e, e2, d, w);
}

template <Marginal M, bool HasLog, bool HasW, class Real, class T>
void gradient_pass(const Row<Real>& given_row, const GradientForm<Real>& given_form, T* grad) {
  // copies that no store can reach stay in registers
  const Row<Real> row = given_row;
  const GradientForm<Real> form = given_form;
  constexpr int64_t step = width<Real>;
  if (row.count >= step) {
    each_vector<Real>(row.count,
                      [&](int64_t i) { store_lanes<Real>(grad + i, gradient_vector<M, HasLog, HasW>(row, form, i)); });
  } else {
    alignas(vector_bytes) Real few[step];
    store_lanes<Real>(few, gradient_vector<M, HasLog, HasW>(row, form, 0));
    for (int64_t i = 0; i < row.count; ++i) store_float(grad + i, static_cast<float>(few[i]));
  }
}

// gradient_pass for a divergence that overflows: never NaN
template <class Real, class T>
void overflow_pass(const Row<Real>& row, const GradientForm<Real>& form, Marginal marginal, T* grad) {
  for (int64_t i = 0; i < row.count; ++i) {
    const Real distance = static_cast<Real>(row.x[i]) - row.max, d = distance < farthest ? farthest : distance;
    const Real stored = row.e[i];
    const Real exponential = marginal == marginal_half ? stored * stored : stored;
    const Real second = marginal == marginal_general ? row.e2[i] : stored;
    store_float(grad + i,
                static_cast<float>(overflowing_gradient_of(form, marginal, exponential, second, d, row.w[i])));
  }
}

template <Marginal M, class Real, class T>
void write_marginal(const Row<Real>& row, const GradientForm<Real>& form, T* grad) {
  const bool has_log = form.b1 != 0;
  if (form.has_w) {
    return has_log ? gradient_pass<M, true, true>(row, form, grad) : gradient_pass<M, false, true>(row, form, grad);
  }
  return has_log ? gradient_pass<M, true, false>(row, form, grad) : gradient_pass<M, false, false>(row, form, grad);
}

template <class Real, class T>
void write_gradient(const Row<Real>& row, const GradientForm<Real>& form, Marginal marginal, T* grad) {
  if (form.overflows) return overflow_pass(row, form, marginal, grad);
  switch (marginal) {
    case marginal_same: return write_marginal<marginal_same>(row, form, grad);
    case marginal_half: return write_marginal<marginal_half>(row, form, grad);
    default: return write_marginal<marginal_general>(row, form, grad);
  }
}

template <class Real>
ExpSums<double> exponentials(const Row<Real>& row, int64_t padded, const Settings& settings, bool sum_d,
                             const Ahead& ahead) {
  const Real temperature = static_cast<Real>(settings.guidance.marginal_temperature);
  switch (settings.marginal) {
    case marginal_same:
      return sum_d ? exp_pass<marginal_same, true>(row, padded, temperature, ahead)
                   : exp_pass<marginal_same, false>(row, padded, temperature, ahead);
    case marginal_half:
      return sum_d ? exp_pass<marginal_half, true>(row, padded, temperature, ahead)
                   : exp_pass<marginal_half, false>(row, padded, temperature, ahead);
    default:
      return sum_d ? exp_pass<marginal_general, true>(row, padded, temperature, ahead)
                   : exp_pass<marginal_general, false>(row, padded, temperature, ahead);
  }
}

template <class Real>
TermSums<double> other_terms(int divergence, const Row<Real>& row, Marginal marginal, const ClassWeight<Real>& other) {
  TermSums<double> terms = {};
  with_divergence<Real>(divergence, [&](auto code) {
    constexpr int D = decltype(code)::value;
    terms = marginal == marginal_half ? term_pass<D, true>(row, other) : term_pass<D, false>(row, other);
  });
  return terms;
}

template <class Real>
struct Solution {
  GradientForm<Real> form;
  int64_t peak;  // where the form's peak is; -1: nowhere
};

// The w of one of row's classes and the sums over its others, free of what that one would round away.
template <class Real>
PeakSums<double> find_peak(const Row<Real>& row, int64_t place, Marginal marginal) {
  const Real* e = static_cast<const Real*>(__builtin_assume_aligned(row.e, 64));
  const Real* w = static_cast<const Real*>(__builtin_assume_aligned(row.w, 64));
  const bool half = marginal == marginal_half;
  PeakSums<double> peak = {};
  peak.w = row.w[place];
  const int64_t ends[2][2] = {{0, place}, {place + 1, row.count}};
  for (const auto& part : ends) {
    for (int64_t begin = part[0]; begin < part[1]; begin += block_length) {
      const int64_t end = begin + block_length < part[1] ? begin + block_length : part[1];
      Real sum_w = 0, sum_e = 0;
#pragma omp simd reduction(+ : sum_w, sum_e)
      for (int64_t i = begin; i < end; ++i) {
        sum_w += w[i];
        sum_e += half ? e[i] * e[i] : e[i];
      }
      peak.other_w += sum_w;
      peak.other_e += sum_e;
    }
  }
  return peak;
}

// Pads row b, stores its statistics and finds its gradient's form. False, having changed nothing else, if a logit is
// not finite or two are so far apart that exp2_lanes does not serve: then e d or e2 is not finite somewhere, and so is
// the sum of them. Likewise if floats cannot hold the sum of d, or the padding is no lower than the row.
template <class Real>
bool solve_row(const Settings& settings, const Prior<double>& prior, const Row<Real>& row, int64_t b,
               const Ahead& ahead, Solution<Real>& solution) {
  const GuidanceArguments& arguments = *settings.arguments;
  const GuidanceSettings<double>& guidance = settings.guidance;
  const int64_t padded = (row.count + lanes - 1) / lanes * lanes;
  for (int64_t i = row.count; i < padded; ++i) row.x[i] = padding;

  ExpSums<double> sums = exponentials(row, padded, settings, settings.traits.reverse_kl, ahead);
  sums.count = static_cast<double>(row.count);
  const bool finite = isfinite(sums.ed) && isfinite(sums.s2) && isfinite(sums.d);
  const bool padded_below = row.far || row.max > lowest_max;
  if (!(finite && padded_below && (isfinite(row.label.d) || !row.label.present))) return false;
  const RowScalars<double> scalars = row_scalars(guidance, prior, row.label, sums);

  solution = {};
  solution.peak = -1;
  DivergenceShare<double> share;
  if (settings.traits.summation == sum_of_kls) {
    share = kl_share(guidance, prior, row.label, sums, scalars);
  } else {
    const ClassWeight<Real> other = other_weight<Real>(guidance, prior, scalars);
    const TermSums<double> terms = other_terms(guidance.divergence, row, settings.marginal, other);
    const ClassTerms<Real> own = label_terms<Real>(guidance, prior, row.label, scalars);
    share = term_share(guidance, row.label, scalars, terms, own, solution.form);
    if (peaks(solution.form, row.label, scalars)) {
      solution.peak = 0;
      while (row.x[solution.peak] != row.max) ++solution.peak;
      set_peak(guidance, scalars, find_peak(row, solution.peak, settings.marginal), own, solution.form);
    }
  }
  set_form(guidance, row.label, scalars, share, solution.form);
  store_statistics(guidance, row.label, scalars, share.value, arguments.stats, arguments.batch, b);
  return true;
}

template <class Real, class T>
void write_solution(const Row<Real>& row, const Solution<Real>& solution, Marginal marginal, T* grad) {
  write_gradient(row, solution.form, marginal, grad);
  if (solution.peak >= 0) store_float(grad + solution.peak, static_cast<float>(solution.form.at_peak));
}

// below the maximum; beyond the range of floats it is only very far
double distance(double x, double max) { return x - max < -1e30 ? -1e30 : x - max; }

template <class T>
void fill_invalid(const GuidanceArguments& arguments, int64_t b, T* grad) {
  for (int64_t i = 0; i < arguments.classes; ++i) store_float(grad + i, NAN);
  for (int64_t k = 0; k < guidance_statistics; ++k) arguments.stats[k * arguments.batch + b] = NAN;
}

// A row with masked classes or huge logits: the finite classes alone, as if the others did not exist.
template <class Real, class T>
void unusual_row(const Settings& settings, Row<Real> row, int64_t label, int64_t b, const Ahead& ahead, T* grad) {
  const GuidanceArguments& arguments = *settings.arguments;
  const int64_t classes = arguments.classes;
  float max = -INFINITY;
  bool invalid = false;
  int64_t finite = 0;
  for (int64_t i = 0; i < classes; ++i) {
    invalid |= isnan(row.x[i]) || row.x[i] == INFINITY;
    finite += row.x[i] > -INFINITY;
    if (row.x[i] > max) max = row.x[i];
  }
  if (invalid || finite == 0) return fill_invalid(arguments, b, grad);

  row.label.present = row.x[label] > -INFINITY;
  row.label.logit = row.x[label];
  row.label.d = row.label.present ? distance(row.label.logit, max) : -INFINITY;
  // in double the passes take the maximum off themselves, unless padding would be above it
  const bool in_double = sizeof(Real) == sizeof(double) && max > lowest_max;
  row.max = in_double ? max : 0.0f;
  row.far = true;
  row.count = 0;
  int64_t* place = static_cast<int64_t*>(malloc(sizeof(int64_t) * classes));
  float* compact = static_cast<float*>(malloc(sizeof(float) * classes));
  if (place == nullptr || compact == nullptr) abort();
  for (int64_t i = 0; i < classes; ++i) {
    const float value = row.x[i];
    store_float(grad + i, 0.0f);
    if (value == -INFINITY || i == label) continue;
    place[row.count] = i;
    row.x[row.count++] = in_double ? value : static_cast<float>(distance(value, max));
  }
  const Prior<double> prior = make_prior(settings.guidance, static_cast<double>(finite), row.label.present);
  Solution<Real> solution;
  if (solve_row(settings, prior, row, b, ahead, solution)) {
    write_solution(row, solution, settings.marginal, compact);
    for (int64_t i = 0; i < row.count; ++i) store_float(grad + place[i], compact[i]);
    store_float(grad + label, static_cast<float>(solution.form.label));
  } else {
    fill_invalid(arguments, b, grad);
  }
  free(compact);
  free(place);
}

// Loads row b; its label is moved out, and the last class takes the label's place.
template <class T, class Real>
void take_row(const GuidanceArguments& arguments, int64_t b, Row<Real>& row) {
  const int64_t last = arguments.classes - 1, label = arguments.labels[b * arguments.label_stride];
  row.max = load_row<T>(arguments, b, row.x);
  row.count = last;
  row.label.present = true;
  row.label.logit = row.x[label];
  // a masked label stays at minus infinity, by which it is found
  row.label.d = row.label.logit > -INFINITY ? distance(row.label.logit, row.max) : row.label.logit;
  row.x[label] = row.x[last];
}

template <class T, class Real>
void guide_rows(const Settings& settings, const Prior<double>& prior, Row<Real> row, float* next_x, int64_t begin,
                int64_t end) {
  const GuidanceArguments& arguments = *settings.arguments;
  const int64_t last = arguments.classes - 1;
  Row<Real> next = row;
  next.x = next_x;
  if (begin < end) take_row<T>(arguments, begin, row);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t label = arguments.labels[b * arguments.label_stride];
    T* grad = static_cast<T*>(arguments.grad) + b * arguments.classes;
    const T* following =
        static_cast<const T*>(arguments.logits) + (b + 1 < arguments.batch ? b + 1 : b) * arguments.row_stride;
    const Ahead ahead = {reinterpret_cast<const char*>(following), reinterpret_cast<char*>(grad), sizeof(T)};
    Solution<Real> solution;
    const bool usual = solve_row(settings, prior, row, b, ahead, solution);
    // the gradient waits for the row's scalars, one after the other: there is time to load a row
    if (b + 1 < end) take_row<T>(arguments, b + 1, next);
    if (usual) {
      write_solution(row, solution, settings.marginal, grad);
      // the last class goes home
      if (label < last) grad[last] = grad[label];
      store_float(grad + label, static_cast<float>(solution.form.label));
    } else {
      load_row<T>(arguments, b, row.x);
      unusual_row(settings, row, label, b, ahead, grad);
    }
    std::swap(row, next);
  }
}

template <class Real>
void guide_part(const Settings& settings, int64_t begin, int64_t end) {
  // The buffers begin some of a page apart: a load is held up by an earlier store to an address with the same lowest 12
  // bits, and how they fell would be left to chance.
  constexpr int64_t page = 4096 / sizeof(Real), apart = page / 16 * 3;
  alignas(64) unsigned char stack[5 * (stack_classes + apart) * sizeof(Real)];
  const int64_t length = (settings.arguments->classes + page - 1) / page * page + apart;
  void* buffer = stack;
  if (length > stack_classes + apart) {
    buffer = aligned_alloc(64, 5 * length * sizeof(Real));
    if (buffer == nullptr) abort();
  }
  Row<Real> row = {};
  row.e = static_cast<Real*>(buffer);
  row.e2 = row.e + length;
  row.w = row.e + 2 * length;
  row.x = reinterpret_cast<float*>(row.e + 3 * length);
  float* next_x = reinterpret_cast<float*>(row.e + 4 * length);
  const Prior<double> prior = make_prior(settings.guidance, static_cast<double>(settings.arguments->classes), true);
  with_storage(settings.arguments->storage,
               [&](auto type) { guide_rows<decltype(type)>(settings, prior, row, next_x, begin, end); });
  if (buffer != stack) free(buffer);
}

}  // namespace

void guidance_gradient(const GuidanceArguments& arguments, int threads) {
  Settings settings;
  settings.arguments = &arguments;
  settings.guidance = arguments.settings;
  settings.traits = divergence_traits(settings.guidance.divergence);
  settings.marginal = marginal_of(settings.guidance.marginal_temperature);
  const auto guide = settings.traits.summation == sum_of_doubles ? guide_part<double> : guide_part<float>;

  each_part(arguments, threads, [&](int64_t begin, int64_t end) { guide(settings, begin, end); });
}

}  // namespace CALGUIDE_ISA
}  // namespace calguide
