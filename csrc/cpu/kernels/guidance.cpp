// Logits to guidance gradient and score, one row at a time, each logit read once and each gradient written once.
//
// A row is copied to a buffer with its label moved out, so that sums over the other classes are exact when the label has
// almost all of the probability. Then: exponentials and their sums; for the divergences outside the Kullback-Leibler
// family one pass of class terms; and the gradient
//   G_i = e_i (b0 + b1 d_i) + a2 e2_i + c0 - alpha w_i,   d = f - max f, e = exp(d), e2 = exp(marginal temperature * d).
// Real is float, or double for the divergences whose terms are powers of p / q; what is per row is always double.
#include "cpu/guidance.h"

#include <math.h>
#include <stdlib.h>

#include "fdiv_math.h"
#include "storage.h"

namespace calguide {
namespace CALGUIDE_ISA {
namespace {

// a buffer is padded to whole vectors of the widest instruction set
constexpr int64_t lanes = 16;
// partial sums in float add 64 terms a lane, their total is in double
#if defined(__AVX512F__)
constexpr int64_t block_length = 64 * 16;
#elif defined(__AVX__)
constexpr int64_t block_length = 64 * 8;
#else
constexpr int64_t block_length = 64 * 4;
#endif
// a padding logit: its exponential is 0 at any temperature
constexpr float padding = -1e38f;
// rows up to this long use buffers on the stack
constexpr int64_t stack_classes = 2048;
// below this many elements a thread costs more than it saves
constexpr int64_t elements_per_thread = 32768;

// how e2 is had from e: the same (temperature 1, or 0 where it has no weight), e = e2^2 (temperature 1/2), its own exp
enum Marginal { marginal_same, marginal_half, marginal_general };

struct Settings {
  const GuidanceArguments* arguments;
  DivergenceTraits traits;
  Marginal marginal;
  double temperature;  // the marginal one
  double order;
  double alpha;
};

// q over n classes
struct Prior {
  int64_t n;
  double label_q, log_label_q;
  double other_q, log_other_q;
  double log_n;
};

Prior make_prior(const Settings& settings, int64_t n, bool has_label) {
  Prior prior;
  prior.n = n;
  const double epsilon = has_label ? settings.arguments->epsilon : 0.0;
  prior.other_q = n > 1 ? (1.0 - epsilon) / n : 1.0;
  prior.label_q = n > 1 ? prior.other_q + epsilon : 1.0;
  prior.log_other_q = prior.other_q > 0.0 ? log(prior.other_q) : static_cast<double>(log_zero);
  prior.log_label_q = log(prior.label_q);
  prior.log_n = log(static_cast<double>(n));
  return prior;
}

// `count` classes other than the label, padded to whole vectors; the label apart
template <class Real>
struct Row {
  float* x;
  Real* e;   // e, or e2 where e = e2^2
  Real* e2;  // for a general marginal temperature
  Real* w;   // class terms
  int64_t count;
  float max;          // over all classes, in the units of x
  bool has_label;     // false: the label is masked
  double label_d;     // label logit less the maximum
  double label_logit;
};

// the gradient as a linear form of what the buffers hold, and the label's own
template <class Real>
struct Gradient {
  Real b0, b1, a2, c0, alpha;
  bool has_w;
  double label;
  // where the divergence overflows: the w_i are infinite, or their sum is
  bool overflows;
  double pull;  // alpha sum(w) / s
  // a class other than the label that has most of the probability, and its gradient; -1: none
  int64_t peak;
  double at_peak;
};

struct ExpSums {
  double s, s2, ed, d;
};

template <Marginal M, bool SumD, class Real>
ExpSums exp_pass(const Row<Real>& row, int64_t count, Real temperature) {
  const float* x = static_cast<const float*>(__builtin_assume_aligned(row.x, 64));
  Real* e = static_cast<Real*>(__builtin_assume_aligned(row.e, 64));
  Real* e2 = static_cast<Real*>(__builtin_assume_aligned(row.e2, 64));
  const Real max = row.max, log2_e = static_cast<Real>(1.4426950408889634);
  const Real half_log2_e = log2_e / 2, scale = temperature * log2_e;
  ExpSums total = {};
  for (int64_t begin = 0; begin < count; begin += block_length) {
    const int64_t end = begin + block_length < count ? begin + block_length : count;
    Real s = 0, s2 = 0, ed = 0, sum_d = 0;
#pragma omp simd reduction(+ : s, s2, ed, sum_d)
    for (int64_t i = begin; i < end; ++i) {
      const Real d = x[i] - max;
      Real exponential;
      if constexpr (M == marginal_half) {
        const Real half = exp2_product(d, half_log2_e);
        exponential = half * half;
        e[i] = half;
        s2 += half;
      } else {
        exponential = exp2_product(d, log2_e);
        e[i] = exponential;
        if constexpr (M == marginal_general) {
          const Real other = exp2_product(d, scale);
          e2[i] = other;
          s2 += other;
        }
      }
      s += exponential;
      ed += exponential * d;
      if constexpr (SumD) sum_d += d > static_cast<Real>(-1e37) ? d : 0;
    }
    total.s += s;
    total.s2 += s2;
    total.ed += ed;
    total.d += sum_d;
  }
  return total;
}

struct TermSums {
  double w, value;
};

template <int D, bool Half, class Real>
TermSums term_pass(const Row<Real>& row, int64_t count, const ClassWeight<Real>& other) {
  const float* x = static_cast<const float*>(__builtin_assume_aligned(row.x, 64));
  const Real* e = static_cast<const Real*>(__builtin_assume_aligned(row.e, 64));
  Real* w = static_cast<Real*>(__builtin_assume_aligned(row.w, 64));
  const Real max = row.max;
  const ClassWeight<Real> of = other;
  TermSums total = {};
  for (int64_t begin = 0; begin < count; begin += block_length) {
    const int64_t end = begin + block_length < count ? begin + block_length : count;
    Real sum_w = 0, sum_value = 0;
#pragma omp simd reduction(+ : sum_w, sum_value)
    for (int64_t i = begin; i < end; ++i) {
      const ClassTerms<Real> terms = class_terms<D>(Half ? e[i] * e[i] : e[i], x[i] - max, of);
      w[i] = terms.w;
      sum_w += terms.w;
      sum_value += terms.value;
    }
    total.w += sum_w;
    total.value += sum_value;
  }
  return total;
}

template <Marginal M, bool HasLog, bool HasW, class Real, class T>
void gradient_pass(const Row<Real>& row, const Gradient<Real>& gradient, T* grad) {
  const float* x = static_cast<const float*>(__builtin_assume_aligned(row.x, 64));
  const Real* e = static_cast<const Real*>(__builtin_assume_aligned(row.e, 64));
  const Real* e2 = static_cast<const Real*>(__builtin_assume_aligned(row.e2, 64));
  const Real* w = static_cast<const Real*>(__builtin_assume_aligned(row.w, 64));
  const Real max = row.max, b0 = gradient.b0, b1 = gradient.b1, a2 = gradient.a2, c0 = gradient.c0;
  const Real alpha = gradient.alpha;
#pragma omp simd
  for (int64_t i = 0; i < row.count; ++i) {
    const Real exponential = M == marginal_half ? e[i] * e[i] : e[i];
    Real g = exponential * (HasLog ? b1 * (x[i] - max) + b0 : b0) + c0;
    if constexpr (M == marginal_half) g += a2 * e[i];
    if constexpr (M == marginal_general) g += a2 * e2[i];
    if constexpr (HasW) g -= alpha * w[i];
    store_float(grad + i, static_cast<float>(g));
  }
}

// w - p W where either may be infinite: an infinite w outweighs, and 0 * inf is 0
double centred(double w, double p, double total) { return isinf(w) ? w : w - (p == 0.0 ? 0.0 : p * total); }

// gradient_pass for a divergence that overflows: never NaN
template <class Real, class T>
void overflow_pass(const Row<Real>& row, const Gradient<Real>& gradient, Marginal marginal, T* grad) {
  for (int64_t i = 0; i < row.count; ++i) {
    const double d = static_cast<double>(row.x[i]) - row.max;
    const double stored = row.e[i];
    const double exponential = marginal == marginal_half ? stored * stored : stored;
    const double second = marginal == marginal_half ? stored : marginal == marginal_general ? row.e2[i] : 0.0;
    const double finite = exponential * (gradient.b1 * d + gradient.b0) + gradient.a2 * second + gradient.c0;
    const double term = centred(static_cast<double>(gradient.alpha) * row.w[i], exponential, gradient.pull);
    store_float(grad + i, static_cast<float>(finite - term));
  }
}

template <Marginal M, class Real, class T>
void write_marginal(const Row<Real>& row, const Gradient<Real>& gradient, T* grad) {
  const bool has_log = gradient.b1 != 0;
  if (gradient.has_w) {
    return has_log ? gradient_pass<M, true, true>(row, gradient, grad) : gradient_pass<M, false, true>(row, gradient, grad);
  }
  return has_log ? gradient_pass<M, true, false>(row, gradient, grad) : gradient_pass<M, false, false>(row, gradient, grad);
}

template <class Real, class T>
void write_form(const Row<Real>& row, const Gradient<Real>& gradient, Marginal marginal, T* grad) {
  if (gradient.overflows) return overflow_pass(row, gradient, marginal, grad);
  switch (marginal) {
    case marginal_same: return write_marginal<marginal_same>(row, gradient, grad);
    case marginal_half: return write_marginal<marginal_half>(row, gradient, grad);
    default: return write_marginal<marginal_general>(row, gradient, grad);
  }
}

template <class Real, class T>
void write_gradient(const Row<Real>& row, const Gradient<Real>& gradient, Marginal marginal, T* grad) {
  write_form(row, gradient, marginal, grad);
  if (gradient.peak >= 0) store_float(grad + gradient.peak, static_cast<float>(gradient.at_peak));
}

template <class Real>
ExpSums exponentials(const Row<Real>& row, int64_t count, const Settings& settings, bool sum_d) {
  const Real temperature = static_cast<Real>(settings.temperature);
  switch (settings.marginal) {
    case marginal_same:
      return sum_d ? exp_pass<marginal_same, true>(row, count, temperature)
                   : exp_pass<marginal_same, false>(row, count, temperature);
    case marginal_half:
      return sum_d ? exp_pass<marginal_half, true>(row, count, temperature)
                   : exp_pass<marginal_half, false>(row, count, temperature);
    default:
      return sum_d ? exp_pass<marginal_general, true>(row, count, temperature)
                   : exp_pass<marginal_general, false>(row, count, temperature);
  }
}

template <class Real>
TermSums other_terms(int divergence, const Row<Real>& row, int64_t count, Marginal marginal,
                     const ClassWeight<Real>& other) {
  TermSums terms = {};
  with_divergence<Real>(divergence, [&](auto code) {
    constexpr int D = decltype(code)::value;
    terms = marginal == marginal_half ? term_pass<D, true>(row, count, other) : term_pass<D, false>(row, count, other);
  });
  return terms;
}

template <class Real>
ClassTerms<Real> one_class_terms(int divergence, Real e, Real d, const ClassWeight<Real>& of) {
  ClassTerms<Real> terms = {};
  with_divergence<Real>(divergence, [&](auto code) { terms = class_terms<decltype(code)::value>(e, d, of); });
  return terms;
}

// sum_i q_i (log q_i - log p_i), without 0 * log 0
double reverse_kl(const Prior& prior, double label_log_p, double others, double sum_other_log_p, bool has_label) {
  double divergence = has_label ? prior.label_q * (prior.log_label_q - label_log_p) : 0.0;
  if (prior.other_q > 0.0) divergence += prior.other_q * (others * prior.log_other_q - sum_other_log_p);
  return divergence;
}

struct Peak {
  int64_t index;
  double w, other_w, other_e;
};

// The class with d = 0, which must be one of row's, and the sums over row's others, free of what the peak would round away.
template <class Real>
Peak find_peak(const Row<Real>& row, Marginal marginal) {
  const Real* e = static_cast<const Real*>(__builtin_assume_aligned(row.e, 64));
  const Real* w = static_cast<const Real*>(__builtin_assume_aligned(row.w, 64));
  const bool half = marginal == marginal_half;
  Peak peak = {};
  while (row.x[peak.index] != row.max) ++peak.index;
  peak.w = row.w[peak.index];
  const int64_t ends[2][2] = {{0, peak.index}, {peak.index + 1, row.count}};
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

double at_least_zero(double value) { return value < 0.0 ? 0.0 : value; }

// Pads row b and finds its statistics and its gradient's form. False, having changed nothing else, if a logit is not finite
// (or two are further apart than floats go): then e d is 0 * inf or worse somewhere, and so is the sum of them.
template <class Real>
bool solve_row(const Settings& settings, const Prior& prior, const Row<Real>& row, int64_t b,
               Gradient<Real>& gradient) {
  const GuidanceArguments& arguments = *settings.arguments;
  const int divergence = arguments.divergence;
  const DivergenceTraits& traits = settings.traits;
  const double others = static_cast<double>(row.count);

  const int64_t padded = (row.count + lanes - 1) / lanes * lanes;
  for (int64_t i = row.count; i < padded; ++i) row.x[i] = padding;
  // where a padding class would have infinite terms the last vector is handled element by element
  const int64_t count = traits.vanishes_finitely ? padded : row.count;

  const ExpSums sums = exponentials(row, count, settings, traits.reverse_kl);
  if (!(isfinite(sums.ed) && (isfinite(row.label_d) || !row.has_label))) return false;
  const double label_e = row.has_label ? exp(row.label_d) : 0.0;
  const double s = sums.s + label_e;
  // log1p keeps what is left when the label has nearly everything
  const double log_s = row.label_d == 0.0 && sums.s < 1.0 ? log1p(sums.s) : log(s);
  const double p = label_e / s, rest = sums.s / s, log_p = row.label_d - log_s;
  const double entropy = log_s - (sums.ed + (row.has_label ? label_e * row.label_d : 0.0)) / s;

  const double tau1 = arguments.joint_temperature, tau2 = arguments.marginal_temperature;
  double s2, rest2, log_s2;
  if (settings.marginal == marginal_same) {
    s2 = s;
    rest2 = rest;
    log_s2 = tau2 == 0.0 ? prior.log_n : log_s;
  } else {
    const double label_e2 = row.has_label ? exp(tau2 * row.label_d) : 0.0;
    s2 = sums.s2 + label_e2;
    rest2 = sums.s2 / s2;
    log_s2 = row.label_d == 0.0 && sums.s2 < 1.0 ? log1p(sums.s2) : log(s2);
  }

  double lambda = arguments.entropy_weight;
  if (arguments.adaptive_entropy && prior.n > 1) lambda *= 1.0 - entropy / prior.log_n;

  gradient = {};
  gradient.peak = -1;
  // divergence's part of: b0 * s, b1 * s, c0 and the label's gradient
  double linear = 0.0, logarithmic = 0.0, constant = 0.0, at_label = 0.0, value = 0.0;
  if (traits.summation == sum_of_kls) {
    if (traits.reverse_kl) {
      value += reverse_kl(prior, log_p, others, sums.d - others * log_s, row.has_label);
      linear -= settings.alpha;
      constant += settings.alpha * prior.other_q;
      at_label += settings.alpha * (rest - others * prior.other_q);
    }
    if (traits.forward_kl) {
      const double gap = row.has_label ? prior.log_label_q - prior.log_other_q : 0.0;
      value += -entropy - rest * prior.log_other_q - p * prior.log_label_q;
      linear += settings.alpha * (log_s - entropy - p * gap);
      logarithmic -= settings.alpha;
      at_label -= settings.alpha * p * (log_p + entropy - rest * gap);
    }
  } else {
    // terms of e and q s, not of p and q: the s divides out of their sums
    const double unit = traits.unit / s;
    const ClassWeight<Real> other = class_weight<Real>(prior.other_q * s, prior.log_other_q + log_s, settings.order);
    const TermSums terms = other_terms(divergence, row, count, settings.marginal, other);
    double w_total = terms.w * unit;
    value = terms.value * unit;
    if (count > row.count) {
      const ClassTerms<Real> pad = one_class_terms(divergence, Real(0), Real(padding), other);
      value -= static_cast<double>(count - row.count) * pad.value * unit;
    }
    double label_w = 0.0;
    if (row.has_label) {
      const ClassWeight<Real> weight = class_weight<Real>(prior.label_q * s, prior.log_label_q + log_s, settings.order);
      const ClassTerms<Real> label =
          one_class_terms(divergence, static_cast<Real>(label_e), static_cast<Real>(row.label_d), weight);
      label_w = label.w * unit;
      value += label.value * unit;
      // w - p (w + the others' sum), with 1 - p as exact as the others' sum
      at_label -= settings.alpha == 0.0 ? 0.0 : settings.alpha * centred(label_w * rest, p, w_total);
    }
    w_total += label_w;
    gradient.has_w = settings.alpha != 0.0;
    gradient.alpha = static_cast<Real>(settings.alpha * unit);
    gradient.pull = settings.alpha * w_total / s;
    gradient.overflows = gradient.has_w && !isfinite(static_cast<Real>(settings.alpha * w_total));
    if (gradient.has_w && !gradient.overflows) linear += settings.alpha * w_total;
    // the peak's w and p W cancel to the last digits of a float, and of a double where w is as large as (1 / q)^(a - 1)
    if (gradient.has_w && s < 1.0625 && row.label_d < 0.0) {
      const Peak peak = find_peak(row, settings.marginal);
      const double others_w = peak.other_w * unit + label_w, others_e = peak.other_e + label_e;
      gradient.peak = peak.index;
      gradient.at_peak = -tau2 / s2 - lambda / s * (entropy - log_s) -
                         settings.alpha * (peak.w * unit * others_e - others_w) / s;
    }
  }
  value = at_least_zero(value);

  // the entropy's gradient is -p (log p + H), for the label as for the others
  linear += lambda * (log_s - entropy);
  logarithmic -= lambda;
  if (row.has_label) at_label -= lambda * p * (log_p + entropy);
  if (settings.marginal == marginal_same) linear -= tau2;

  gradient.b0 = static_cast<Real>(linear / s);
  gradient.b1 = static_cast<Real>(logarithmic / s);
  gradient.a2 = static_cast<Real>(-tau2 / s2);
  gradient.c0 = static_cast<Real>(constant);
  gradient.label = row.has_label ? (tau1 - tau2) + tau2 * rest2 + at_label : tau1;

  const double log_prob = row.has_label ? tau2 * row.label_d - log_s2 + (tau1 - tau2) * row.label_logit : -INFINITY;
  double score = log_prob;
  if (row.has_label && settings.alpha != 0.0) score -= settings.alpha * value;
  if (row.has_label) score += lambda * entropy;
  const int64_t batch = arguments.batch;
  arguments.stats[b] = static_cast<float>(score);
  arguments.stats[batch + b] = static_cast<float>(log_prob);
  arguments.stats[2 * batch + b] = static_cast<float>(entropy);
  arguments.stats[3 * batch + b] = static_cast<float>(value);
  arguments.stats[4 * batch + b] = static_cast<float>(row.has_label ? log_p : -INFINITY);
  return true;
}

// copies a row and returns its largest logit, NaNs ignored
template <bool Contiguous, class T>
float load_row(const T* logits, int64_t stride, int64_t classes, float* buffer) {
  float* x = static_cast<float*>(__builtin_assume_aligned(buffer, 64));
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < classes; ++i) {
    const float value = load_float(logits[Contiguous ? i : i * stride]);
    x[i] = value;
    max = value > max ? value : max;
  }
  return max;
}

template <class T>
float load_row(const GuidanceArguments& arguments, int64_t b, float* buffer) {
  const T* logits = static_cast<const T*>(arguments.logits) + b * arguments.row_stride;
  return arguments.class_stride == 1 ? load_row<true>(logits, 1, arguments.classes, buffer)
                                     : load_row<false>(logits, arguments.class_stride, arguments.classes, buffer);
}

template <class T>
void fill_invalid(const GuidanceArguments& arguments, int64_t b, T* grad) {
  for (int64_t i = 0; i < arguments.classes; ++i) store_float(grad + i, NAN);
  for (int64_t k = 0; k < 5; ++k) arguments.stats[k * arguments.batch + b] = NAN;
}

// A row with masked classes or huge logits: the finite classes alone, as if the others did not exist.
template <class Real, class T>
void unusual_row(const Settings& settings, Row<Real> row, int64_t label, int64_t b, T* grad) {
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

  row.has_label = row.x[label] > -INFINITY;
  row.label_logit = row.x[label];
  row.label_d = row.has_label ? row.label_logit - static_cast<double>(max) : -INFINITY;
  row.max = 0.0f;
  row.count = 0;
  int64_t* place = static_cast<int64_t*>(malloc(sizeof(int64_t) * classes));
  float* compact = static_cast<float*>(malloc(sizeof(float) * classes));
  if (place == nullptr || compact == nullptr) abort();
  for (int64_t i = 0; i < classes; ++i) {
    const float value = row.x[i];
    store_float(grad + i, 0.0f);
    if (value == -INFINITY || i == label) continue;
    place[row.count] = i;
    const float d = static_cast<float>(static_cast<double>(value) - max);
    row.x[row.count++] = d < -1e30f ? -1e30f : d;
  }
  const Prior prior = make_prior(settings, finite, row.has_label);
  Gradient<Real> gradient;
  solve_row(settings, prior, row, b, gradient);
  write_gradient(row, gradient, settings.marginal, compact);
  for (int64_t i = 0; i < row.count; ++i) store_float(grad + place[i], compact[i]);
  store_float(grad + label, static_cast<float>(gradient.label));
  free(compact);
  free(place);
}

template <class T, class Real>
void guide_row(const Settings& settings, const Prior& prior, Row<Real> row, int64_t b) {
  const GuidanceArguments& arguments = *settings.arguments;
  const int64_t last = arguments.classes - 1;
  const int64_t label = arguments.labels[b * arguments.label_stride];
  T* grad = static_cast<T*>(arguments.grad) + b * arguments.classes;
  row.max = load_row<T>(arguments, b, row.x);
  row.has_label = true;
  row.label_logit = row.x[label];
  row.label_d = row.label_logit - row.max;
  // the last class takes the label's place, and goes home at the end
  row.x[label] = row.x[last];
  row.count = last;
  Gradient<Real> gradient;
  if (!solve_row(settings, prior, row, b, gradient)) {
    load_row<T>(arguments, b, row.x);
    return unusual_row(settings, row, label, b, grad);
  }
  write_gradient(row, gradient, settings.marginal, grad);
  if (label < last) grad[last] = grad[label];
  store_float(grad + label, static_cast<float>(gradient.label));
}

template <class Real>
void guide_any_row(const Settings& settings, const Prior& prior, const Row<Real>& row, int64_t b) {
  switch (settings.arguments->storage) {
    case storage_bfloat16: return guide_row<BFloat16>(settings, prior, row, b);
    case storage_float16: return guide_row<Float16>(settings, prior, row, b);
    default: return guide_row<float>(settings, prior, row, b);
  }
}

template <class Real>
void guide_rows(const Settings& settings, int64_t begin, int64_t end) {
  alignas(64) unsigned char stack[4 * stack_classes * sizeof(Real)];
  const int64_t length = (settings.arguments->classes + lanes - 1) / lanes * lanes;
  void* buffer = stack;
  if (length > stack_classes) {
    buffer = aligned_alloc(64, 4 * length * sizeof(Real));
    if (buffer == nullptr) abort();
  }
  Row<Real> row = {};
  row.e = static_cast<Real*>(buffer);
  row.e2 = row.e + length;
  row.w = row.e + 2 * length;
  row.x = reinterpret_cast<float*>(row.e + 3 * length);
  const Prior prior = make_prior(settings, settings.arguments->classes, true);
  for (int64_t b = begin; b < end; ++b) guide_any_row(settings, prior, row, b);
  if (buffer != stack) free(buffer);
}

}  // namespace

void guidance_gradient(const GuidanceArguments& arguments) {
  Settings settings;
  settings.arguments = &arguments;
  settings.traits = divergence_traits(arguments.divergence);
  settings.temperature = arguments.marginal_temperature;
  settings.marginal = settings.temperature == 1.0 || settings.temperature == 0.0 ? marginal_same
                      : settings.temperature == 0.5                              ? marginal_half
                                                                                 : marginal_general;
  settings.order = arguments.order;
  settings.alpha = arguments.divergence == divergence_none ? 0.0 : arguments.alpha;
  const auto guide = settings.traits.summation == sum_of_doubles ? guide_rows<double> : guide_rows<float>;

  const int64_t batch = arguments.batch;
  const int64_t worth = arguments.batch * arguments.classes / elements_per_thread;
  int64_t threads = arguments.threads < worth ? arguments.threads : worth;
  threads = threads < batch ? threads : batch;
  if (threads <= 1) return guide(settings, 0, batch);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t part = 0; part < threads; ++part) {
    guide(settings, part * batch / threads, (part + 1) * batch / threads);
  }
}

}  // namespace CALGUIDE_ISA
}  // namespace calguide
