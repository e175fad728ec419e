// From the sums over a row of logits to its score and the form of its gradient; the same source for CPU and CUDA.
//
// With d = f - max f, e = exp(d) and e2 = exp(marginal temperature * d), the gradient of a class is
//   G_i = e_i (b0 + b1 d_i) + a2 e2_i + c0 - alpha w_i
// where w_i are its class terms. Sums are over the classes other than the label, so that they stay exact when the label has
// almost all of the probability. What is per row is in double; what is per class in Real, which is float, or double for the
// divergences whose terms are powers of p / q.
#pragma once

#include <math.h>

#include "fdiv_math.h"

namespace calguide {

// how e2 is had from e: the same (temperature 1, or 0 where it has no weight), e = e2^2 (temperature 1/2), its own exp
enum Marginal { marginal_same, marginal_half, marginal_general };

struct GuidanceSettings {
  int divergence;
  double order;
  double alpha;
  double epsilon;
  double joint_temperature;
  double marginal_temperature;
  double entropy_weight;
  bool adaptive_entropy;
};

CALGUIDE_INLINE Marginal marginal_of(double temperature) {
  return temperature == 1.0 || temperature == 0.0 ? marginal_same
         : temperature == 0.5                     ? marginal_half
                                                  : marginal_general;
}

// what the divergence weighs: nothing where there is none
CALGUIDE_INLINE double divergence_weight(const GuidanceSettings& settings) {
  return settings.divergence == divergence_none ? 0.0 : settings.alpha;
}

// q over n classes
struct Prior {
  int64_t n;
  double label_q, log_label_q;
  double other_q, log_other_q;
  double log_n;
};

CALGUIDE_INLINE Prior make_prior(const GuidanceSettings& settings, int64_t n, bool has_label) {
  Prior prior;
  prior.n = n;
  const double epsilon = has_label ? settings.epsilon : 0.0;
  prior.other_q = n > 1 ? (1.0 - epsilon) / n : 1.0;
  prior.label_q = n > 1 ? prior.other_q + epsilon : 1.0;
  prior.log_other_q = prior.other_q > 0.0 ? log(prior.other_q) : static_cast<double>(log_zero);
  prior.log_label_q = log(prior.label_q);
  prior.log_n = log(static_cast<double>(n));
  return prior;
}

struct Label {
  bool present;  // false: the label is masked
  double d;      // its logit less the row's maximum
  double logit;
};

// over the classes other than the label; that of d is needed by reverse_kl only
struct ExpSums {
  double s, s2, ed, d;
  double count;
};

// what follows of them for the whole row
struct RowScalars {
  double label_e, s, log_s;
  double p, rest, log_p;  // the label's probability, that of all others, and the first one's log
  double entropy;
  double s2, rest2, log_s2;
  double entropy_weight;
};

CALGUIDE_INLINE RowScalars row_scalars(const GuidanceSettings& settings, const Prior& prior, const Label& label,
                                       const ExpSums& sums) {
  RowScalars row;
  row.label_e = label.present ? exp(label.d) : 0.0;
  row.s = sums.s + row.label_e;
  // log1p keeps what is left when the label has nearly everything
  row.log_s = label.d == 0.0 && sums.s < 1.0 ? log1p(sums.s) : log(row.s);
  row.p = row.label_e / row.s;
  row.rest = sums.s / row.s;
  row.log_p = label.d - row.log_s;
  row.entropy = row.log_s - (sums.ed + (label.present ? row.label_e * label.d : 0.0)) / row.s;

  const double temperature = settings.marginal_temperature;
  if (marginal_of(temperature) == marginal_same) {
    row.s2 = row.s;
    row.rest2 = row.rest;
    row.log_s2 = temperature == 0.0 ? prior.log_n : row.log_s;
  } else {
    const double label_e2 = label.present ? exp(temperature * label.d) : 0.0;
    row.s2 = sums.s2 + label_e2;
    row.rest2 = sums.s2 / row.s2;
    row.log_s2 = label.d == 0.0 && sums.s2 < 1.0 ? log1p(sums.s2) : log(row.s2);
  }
  row.entropy_weight = settings.entropy_weight;
  if (settings.adaptive_entropy && prior.n > 1) row.entropy_weight *= 1.0 - row.entropy / prior.log_n;
  return row;
}

// a divergence's value, and its part of b0 s, b1 s, c0 and the label's gradient
struct DivergenceShare {
  double value;
  double linear, logarithmic, constant, at_label;
};

CALGUIDE_INLINE DivergenceShare kl_share(const GuidanceSettings& settings, const Prior& prior, const Label& label,
                                         const ExpSums& sums, const RowScalars& row) {
  const DivergenceTraits traits = divergence_traits(settings.divergence);
  const double alpha = divergence_weight(settings);
  DivergenceShare share = {};
  if (traits.reverse_kl) {
    // sum_i q_i (log q_i - log p_i), without 0 * log 0
    if (label.present) share.value += prior.label_q * (prior.log_label_q - row.log_p);
    if (prior.other_q > 0.0) {
      share.value += prior.other_q * (sums.count * prior.log_other_q - (sums.d - sums.count * row.log_s));
    }
    share.linear -= alpha;
    share.constant += alpha * prior.other_q;
    share.at_label += alpha * (row.rest - sums.count * prior.other_q);
  }
  if (traits.forward_kl) {
    const double gap = label.present ? prior.log_label_q - prior.log_other_q : 0.0;
    share.value += -row.entropy - row.rest * prior.log_other_q - row.p * prior.log_label_q;
    share.linear += alpha * (row.log_s - row.entropy - row.p * gap);
    share.logarithmic -= alpha;
    share.at_label -= alpha * row.p * (row.log_p + row.entropy - row.rest * gap);
  }
  return share;
}

// sums of class terms over the classes other than the label
struct TermSums {
  double w, value;
};

// The terms are those of e and q s, not of p and q: the s divides out of their sums.
template <class Real>
CALGUIDE_INLINE ClassWeight<Real> other_weight(const GuidanceSettings& settings, const Prior& prior,
                                               const RowScalars& row) {
  return class_weight<Real>(prior.other_q * row.s, prior.log_other_q + row.log_s, settings.order);
}

template <class Real>
CALGUIDE_INLINE ClassWeight<Real> label_weight(const GuidanceSettings& settings, const Prior& prior,
                                               const RowScalars& row) {
  return class_weight<Real>(prior.label_q * row.s, prior.log_label_q + row.log_s, settings.order);
}

template <class Real>
CALGUIDE_INLINE ClassTerms<Real> one_class_terms(int divergence, Real e, Real d, const ClassWeight<Real>& of) {
  ClassTerms<Real> terms = {};
  with_divergence<Real>(divergence, [&](auto code) { terms = class_terms<decltype(code)::value>(e, d, of); });
  return terms;
}

// the label's own terms, 0 where it is masked
template <class Real>
CALGUIDE_INLINE ClassTerms<Real> label_terms(const GuidanceSettings& settings, const Prior& prior, const Label& label,
                                             const RowScalars& row) {
  if (!label.present) return {};
  return one_class_terms(settings.divergence, static_cast<Real>(row.label_e), static_cast<Real>(label.d),
                         label_weight<Real>(settings, prior, row));
}

// the gradient as a linear form of what is known of a class, and where that does not serve
template <class Real>
struct GradientForm {
  Real b0, b1, a2, c0, alpha;
  bool has_w;
  double label;
  // where the divergence overflows: the w_i are infinite, or their sum is
  bool overflows;
  double pull;  // alpha sum(w) / s
  // a class other than the label that has most of the probability: that with d = 0
  bool has_peak;
  double at_peak;
};

// w - p W where either may be infinite: an infinite w outweighs, and 0 * inf is 0
CALGUIDE_INLINE double centred(double w, double p, double total) {
  return isinf(w) ? w : w - (p == 0.0 ? 0.0 : p * total);
}

template <class Real>
CALGUIDE_INLINE DivergenceShare term_share(const GuidanceSettings& settings, const Label& label, const RowScalars& row,
                                           const TermSums& others, const ClassTerms<Real>& own,
                                           GradientForm<Real>& form) {
  const double alpha = divergence_weight(settings);
  const double unit = divergence_traits(settings.divergence).unit / row.s;
  const double label_w = own.w * unit, total_w = others.w * unit + label_w;
  DivergenceShare share = {};
  share.value = (others.value + own.value) * unit;
  if (alpha == 0.0) return share;
  // w - p (w + the others' sum), with 1 - p as exact as the others' sum
  if (label.present) share.at_label = -alpha * centred(label_w * row.rest, row.p, others.w * unit);
  form.has_w = true;
  form.alpha = static_cast<Real>(alpha * unit);
  form.pull = alpha * total_w / row.s;
  form.overflows = !isfinite(static_cast<Real>(alpha * total_w));
  if (!form.overflows) share.linear = alpha * total_w;
  return share;
}

// Whether a class other than the label has so much of the probability that its w and p sum(w) cancel to the last digits.
template <class Real>
CALGUIDE_INLINE bool peaks(const GradientForm<Real>& form, const Label& label, const RowScalars& row) {
  return form.has_w && row.s < 1.0625 && label.d < 0.0;
}

// the peak's own w, and the sums over the classes that are neither it nor the label
struct PeakSums {
  double w, other_w, other_e;
};

template <class Real>
CALGUIDE_INLINE void set_peak(const GuidanceSettings& settings, const RowScalars& row, const PeakSums& peak,
                              const ClassTerms<Real>& own, GradientForm<Real>& form) {
  const double unit = divergence_traits(settings.divergence).unit / row.s;
  const double others_w = peak.other_w * unit + own.w * unit, others_e = peak.other_e + row.label_e;
  form.has_peak = true;
  form.at_peak = -settings.marginal_temperature / row.s2 - row.entropy_weight / row.s * (row.entropy - row.log_s) -
                 settings.alpha * (peak.w * unit * others_e - others_w) / row.s;
}

template <class Real>
CALGUIDE_INLINE void set_form(const GuidanceSettings& settings, const Label& label, const RowScalars& row,
                              const DivergenceShare& share, GradientForm<Real>& form) {
  const double tau1 = settings.joint_temperature, tau2 = settings.marginal_temperature, lambda = row.entropy_weight;
  // the entropy's gradient is -p (log p + H), for the label as for the others
  double linear = share.linear + lambda * (row.log_s - row.entropy);
  if (marginal_of(tau2) == marginal_same) linear -= tau2;
  form.b0 = static_cast<Real>(linear / row.s);
  form.b1 = static_cast<Real>((share.logarithmic - lambda) / row.s);
  form.a2 = static_cast<Real>(-tau2 / row.s2);
  form.c0 = static_cast<Real>(share.constant);
  form.label = tau1;
  if (label.present) {
    form.label = (tau1 - tau2) + tau2 * row.rest2 + share.at_label - lambda * row.p * (row.log_p + row.entropy);
  }
}

// The gradient of a class that is neither the label nor the peak, of exponentials e and, unless they are the same, e2.
template <Marginal M, bool HasLog, bool HasW, class Real>
CALGUIDE_INLINE Real gradient_of(const GradientForm<Real>& form, Real e, Real e2, Real d, Real w) {
  Real g = e * (HasLog ? form.b1 * d + form.b0 : form.b0) + form.c0;
  if constexpr (M != marginal_same) g += form.a2 * e2;
  if constexpr (HasW) g -= form.alpha * w;
  return g;
}

// gradient_of for a divergence that overflows: never NaN
template <class Real>
CALGUIDE_INLINE Real overflowing_gradient_of(const GradientForm<Real>& form, Marginal marginal, double e, double e2,
                                             double d, double w) {
  const double finite = e * (form.b1 * d + form.b0) + (marginal == marginal_same ? 0.0 : form.a2 * e2) + form.c0;
  return static_cast<Real>(finite - centred(form.alpha * w, e, form.pull));
}

constexpr int guidance_statistics = 5;

// stats is (5, batch): score, log_prob, entropy, divergence, label_log_prob
CALGUIDE_INLINE void store_statistics(const GuidanceSettings& settings, const Label& label, const RowScalars& row,
                                      double divergence, float* stats, int64_t batch, int64_t b) {
  const double tau1 = settings.joint_temperature, tau2 = settings.marginal_temperature;
  const double value = divergence < 0.0 ? 0.0 : divergence;
  const double log_prob = label.present ? tau2 * label.d - row.log_s2 + (tau1 - tau2) * label.logit : -INFINITY;
  double score = log_prob;
  if (label.present && divergence_weight(settings) != 0.0) score -= settings.alpha * value;
  if (label.present) score += row.entropy_weight * row.entropy;
  stats[b] = static_cast<float>(score);
  stats[batch + b] = static_cast<float>(log_prob);
  stats[2 * batch + b] = static_cast<float>(row.entropy);
  stats[3 * batch + b] = static_cast<float>(value);
  stats[4 * batch + b] = static_cast<float>(label.present ? row.log_p : -INFINITY);
}

}  // namespace calguide
