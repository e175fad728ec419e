// From the sums over a row of logits to its score and the form of its gradient; the same source for CPU and CUDA.
//
// With d = f - max f, e = exp(d) and e2 = exp(marginal temperature * d), the gradient of a class is
//   G_i = e_i (b0 + b1 d_i) + a2 e2_i + c0 - alpha w_i
// where w_i are its class terms. Sums are over the classes other than the label, so that they stay exact when the label
// has almost all of the probability. What is per class is in Real: float, or double for the divergences whose terms are
// powers of p / q. What is per row is in Scalar: double on a CPU, Real on a GPU, where every lane works it out.
#pragma once

#include <math.h>

#include "fdiv_math.h"

namespace calguide {

// how e2 is had from e: the same (temperature 1, or 0 where it has no weight), e = e2^2 (temperature 1/2), its own exp
enum Marginal { marginal_same, marginal_half, marginal_general };

template <class Scalar>
struct GuidanceSettings {
  int divergence;
  Scalar order;
  Scalar alpha;
  Scalar epsilon;
  Scalar joint_temperature;
  Scalar marginal_temperature;
  Scalar entropy_weight;
  bool adaptive_entropy;
};

template <class Scalar>
GuidanceSettings<Scalar> settings_in(const GuidanceSettings<double>& settings) {
  return {settings.divergence,
          static_cast<Scalar>(settings.order),
          static_cast<Scalar>(settings.alpha),
          static_cast<Scalar>(settings.epsilon),
          static_cast<Scalar>(settings.joint_temperature),
          static_cast<Scalar>(settings.marginal_temperature),
          static_cast<Scalar>(settings.entropy_weight),
          settings.adaptive_entropy};
}

template <class Scalar>
CALGUIDE_INLINE Marginal marginal_of(Scalar temperature) {
  return temperature == Scalar(1) || temperature == Scalar(0) ? marginal_same
         : temperature == Scalar(0.5)                         ? marginal_half
                                                              : marginal_general;
}

// what the divergence weighs: nothing where there is none
template <class Scalar>
CALGUIDE_INLINE Scalar divergence_weight(const GuidanceSettings<Scalar>& settings) {
  return settings.divergence == divergence_none ? Scalar(0) : settings.alpha;
}

// q over n classes
template <class Scalar>
struct Prior {
  Scalar n;
  Scalar label_q, log_label_q;
  Scalar other_q, log_other_q;
  Scalar log_n;
};

template <class Scalar>
CALGUIDE_INLINE Prior<Scalar> make_prior(const GuidanceSettings<Scalar>& settings, Scalar n, bool has_label) {
  Prior<Scalar> prior;
  prior.n = n;
  const Scalar epsilon = has_label ? settings.epsilon : Scalar(0);
  prior.other_q = n > 1 ? (1 - epsilon) / n : Scalar(1);
  prior.label_q = n > 1 ? prior.other_q + epsilon : Scalar(1);
  prior.log_other_q = prior.other_q > 0 ? log(prior.other_q) : static_cast<Scalar>(log_zero);
  prior.log_label_q = log(prior.label_q);
  prior.log_n = log(n);
  return prior;
}

template <class Scalar>
Prior<Scalar> prior_in(const Prior<double>& prior) {
  return {static_cast<Scalar>(prior.n),           static_cast<Scalar>(prior.label_q),
          static_cast<Scalar>(prior.log_label_q), static_cast<Scalar>(prior.other_q),
          static_cast<Scalar>(prior.log_other_q), static_cast<Scalar>(prior.log_n)};
}

template <class Scalar>
struct Label {
  bool present;  // false: the label is masked
  Scalar d;      // its logit less the row's maximum
  Scalar logit;
};

// over the classes other than the label; that of d is needed by reverse_kl only
template <class Scalar>
struct ExpSums {
  Scalar s, s2, ed, d;
  Scalar count;
};

// what follows of them for the whole row
template <class Scalar>
struct RowScalars {
  Scalar label_e, s, log_s;
  Scalar p, rest, log_p;  // the label's probability, that of all others, and the first one's log
  Scalar entropy;
  Scalar s2, rest2, log_s2;
  Scalar entropy_weight;
};

template <class Scalar>
CALGUIDE_INLINE RowScalars<Scalar> row_scalars(const GuidanceSettings<Scalar>& settings, const Prior<Scalar>& prior,
                                               const Label<Scalar>& label, const ExpSums<Scalar>& sums) {
  RowScalars<Scalar> row;
  row.label_e = label.present ? exp(label.d) : Scalar(0);
  row.s = sums.s + row.label_e;
  // log1p keeps what is left when the label has nearly everything
  row.log_s = label.d == Scalar(0) && sums.s < Scalar(1) ? log1p(sums.s) : log(row.s);
  row.p = row.label_e / row.s;
  row.rest = sums.s / row.s;
  row.log_p = label.d - row.log_s;
  row.entropy = row.log_s - (sums.ed + (label.present ? row.label_e * label.d : Scalar(0))) / row.s;

  const Scalar temperature = settings.marginal_temperature;
  if (marginal_of(temperature) == marginal_same) {
    row.s2 = row.s;
    row.rest2 = row.rest;
    row.log_s2 = temperature == Scalar(0) ? prior.log_n : row.log_s;
  } else {
    const Scalar label_e2 = label.present ? exp(temperature * label.d) : Scalar(0);
    row.s2 = sums.s2 + label_e2;
    row.rest2 = sums.s2 / row.s2;
    row.log_s2 = label.d == Scalar(0) && sums.s2 < Scalar(1) ? log1p(sums.s2) : log(row.s2);
  }
  row.entropy_weight = settings.entropy_weight;
  if (settings.adaptive_entropy && prior.n > 1) row.entropy_weight *= Scalar(1) - row.entropy / prior.log_n;
  return row;
}

// a divergence's value, and its part of b0 s, b1 s, c0 and the label's gradient
template <class Scalar>
struct DivergenceShare {
  Scalar value;
  Scalar linear, logarithmic, constant, at_label;
};

template <class Scalar>
CALGUIDE_INLINE DivergenceShare<Scalar> kl_share(const GuidanceSettings<Scalar>& settings, const Prior<Scalar>& prior,
                                                 const Label<Scalar>& label, const ExpSums<Scalar>& sums,
                                                 const RowScalars<Scalar>& row) {
  const DivergenceTraits traits = divergence_traits(settings.divergence);
  const Scalar alpha = divergence_weight(settings);
  DivergenceShare<Scalar> share = {};
  if (traits.reverse_kl) {
    // sum_i q_i (log q_i - log p_i), without 0 * log 0
    if (label.present) share.value += prior.label_q * (prior.log_label_q - row.log_p);
    if (prior.other_q > Scalar(0)) {
      share.value += prior.other_q * (sums.count * prior.log_other_q - (sums.d - sums.count * row.log_s));
    }
    share.linear -= alpha;
    share.constant += alpha * prior.other_q;
    share.at_label += alpha * (row.rest - sums.count * prior.other_q);
  }
  if (traits.forward_kl) {
    const Scalar gap = label.present ? prior.log_label_q - prior.log_other_q : Scalar(0);
    share.value += -row.entropy - row.rest * prior.log_other_q - row.p * prior.log_label_q;
    share.linear += alpha * (row.log_s - row.entropy - row.p * gap);
    share.logarithmic -= alpha;
    share.at_label -= alpha * row.p * (row.log_p + row.entropy - row.rest * gap);
  }
  return share;
}

// sums of class terms over the classes other than the label
template <class Scalar>
struct TermSums {
  Scalar w, value;
};

// The terms are those of e and q s, not of p and q: the s divides out of their sums.
template <class Real, class Scalar>
CALGUIDE_INLINE ClassWeight<Real> other_weight(const GuidanceSettings<Scalar>& settings, const Prior<Scalar>& prior,
                                               const RowScalars<Scalar>& row) {
  return class_weight<Real>(prior.other_q * row.s, prior.log_other_q + row.log_s, settings.order);
}

template <class Real, class Scalar>
CALGUIDE_INLINE ClassWeight<Real> label_weight(const GuidanceSettings<Scalar>& settings, const Prior<Scalar>& prior,
                                               const RowScalars<Scalar>& row) {
  return class_weight<Real>(prior.label_q * row.s, prior.log_label_q + row.log_s, settings.order);
}

template <class Real>
CALGUIDE_INLINE ClassTerms<Real> one_class_terms(int divergence, Real e, Real d, const ClassWeight<Real>& of) {
  ClassTerms<Real> terms = {};
  with_divergence<Real>(divergence, [&](auto code) { terms = class_terms<decltype(code)::value>(e, d, of); });
  return terms;
}

// the label's own terms, 0 where it is masked
template <class Real, class Scalar>
CALGUIDE_INLINE ClassTerms<Real> label_terms(const GuidanceSettings<Scalar>& settings, const Prior<Scalar>& prior,
                                             const Label<Scalar>& label, const RowScalars<Scalar>& row) {
  if (!label.present) return {};
  return one_class_terms(settings.divergence, static_cast<Real>(row.label_e), static_cast<Real>(label.d),
                         label_weight<Real>(settings, prior, row));
}

// the gradient as a linear form of what is known of a class, and where that does not serve
template <class Real>
struct GradientForm {
  Real b0, b1, a2, c0, alpha;
  bool has_w;
  Real label;
  // where the divergence overflows: the w_i are infinite, or their sum is
  bool overflows;
  Real pull;  // alpha sum(w) / s
  // a class other than the label that has most of the probability: that with d = 0
  bool has_peak;
  Real at_peak;
};

// w - p W where either may be infinite: an infinite w outweighs, and 0 * inf is 0
template <class Scalar>
CALGUIDE_INLINE Scalar centred(Scalar w, Scalar p, Scalar total) {
  return isinf(w) ? w : w - (p == Scalar(0) ? Scalar(0) : p * total);
}

template <class Real, class Scalar>
CALGUIDE_INLINE DivergenceShare<Scalar> term_share(const GuidanceSettings<Scalar>& settings, const Label<Scalar>& label,
                                                   const RowScalars<Scalar>& row, const TermSums<Scalar>& others,
                                                   const ClassTerms<Real>& own, GradientForm<Real>& form) {
  const Scalar alpha = divergence_weight(settings);
  const Scalar unit = static_cast<Scalar>(divergence_traits(settings.divergence).unit) / row.s;
  const Scalar label_w = own.w * unit, total_w = others.w * unit + label_w;
  DivergenceShare<Scalar> share = {};
  share.value = (others.value + own.value) * unit;
  if (alpha == Scalar(0)) return share;
  // w - p (w + the others' sum), with 1 - p as exact as the others' sum
  if (label.present) share.at_label = -alpha * centred<Scalar>(label_w * row.rest, row.p, others.w * unit);
  form.has_w = true;
  form.alpha = static_cast<Real>(alpha * unit);
  form.pull = static_cast<Real>(alpha * total_w / row.s);
  form.overflows = !isfinite(static_cast<Real>(alpha * total_w));
  if (!form.overflows) share.linear = alpha * total_w;
  return share;
}

// Whether a class other than the label has so much of the probability that its w and p sum(w) cancel to the last
// digits.
template <class Real, class Scalar>
CALGUIDE_INLINE bool peaks(const GradientForm<Real>& form, const Label<Scalar>& label, const RowScalars<Scalar>& row) {
  return form.has_w && row.s < Scalar(1.0625) && label.d < Scalar(0);
}

// the peak's own w, and the sums over the classes that are neither it nor the label
template <class Scalar>
struct PeakSums {
  Scalar w, other_w, other_e;
};

template <class Real, class Scalar>
CALGUIDE_INLINE void set_peak(const GuidanceSettings<Scalar>& settings, const RowScalars<Scalar>& row,
                              const PeakSums<Scalar>& peak, const ClassTerms<Real>& own, GradientForm<Real>& form) {
  const Scalar unit = static_cast<Scalar>(divergence_traits(settings.divergence).unit) / row.s;
  const Scalar others_w = peak.other_w * unit + own.w * unit, others_e = peak.other_e + row.label_e;
  form.has_peak = true;
  const Scalar without =
      -settings.marginal_temperature / row.s2 - row.entropy_weight / row.s * (row.entropy - row.log_s);
  form.at_peak = static_cast<Real>(without - settings.alpha * (peak.w * unit * others_e - others_w) / row.s);
}

template <class Real, class Scalar>
CALGUIDE_INLINE void set_form(const GuidanceSettings<Scalar>& settings, const Label<Scalar>& label,
                              const RowScalars<Scalar>& row, const DivergenceShare<Scalar>& share,
                              GradientForm<Real>& form) {
  const Scalar tau1 = settings.joint_temperature, tau2 = settings.marginal_temperature, lambda = row.entropy_weight;
  // the entropy's gradient is -p (log p + H), for the label as for the others
  Scalar linear = share.linear + lambda * (row.log_s - row.entropy);
  if (marginal_of(tau2) == marginal_same) linear -= tau2;
  form.b0 = static_cast<Real>(linear / row.s);
  form.b1 = static_cast<Real>((share.logarithmic - lambda) / row.s);
  // e2 is e, which b0 multiplies, or has no weight
  form.a2 = marginal_of(tau2) == marginal_same ? Real(0) : static_cast<Real>(-tau2 / row.s2);
  form.c0 = static_cast<Real>(share.constant);
  Scalar at_label = tau1;
  if (label.present) {
    at_label = (tau1 - tau2) + tau2 * row.rest2 + share.at_label - lambda * row.p * (row.log_p + row.entropy);
  }
  form.label = static_cast<Real>(at_label);
}

// The gradient of a class that is neither the label nor the peak, of exponentials e and, unless they are the same, e2.
// Number is Real or a vector of it.
template <Marginal M, bool HasLog, bool HasW, class Real, class Number>
CALGUIDE_INLINE Number gradient_of(const GradientForm<Real>& form, Number e, Number e2, Number d, Number w) {
  Number g = e * form.b0 + form.c0;
  if constexpr (HasLog) g = e * (form.b1 * d + form.b0) + form.c0;
  if constexpr (M != marginal_same) g += form.a2 * e2;
  if constexpr (HasW) g -= form.alpha * w;
  return g;
}

// gradient_of for a divergence that overflows: never NaN
template <class Real>
CALGUIDE_INLINE Real overflowing_gradient_of(const GradientForm<Real>& form, Marginal marginal, Real e, Real e2, Real d,
                                             Real w) {
  const Real finite = e * (form.b1 * d + form.b0) + (marginal == marginal_same ? Real(0) : form.a2 * e2) + form.c0;
  return finite - centred(form.alpha * w, e, form.pull);
}

constexpr int guidance_statistics = 5;

// stats is (5, batch): score, log_prob, entropy, divergence, label_log_prob
template <class Scalar>
CALGUIDE_INLINE void store_statistics(const GuidanceSettings<Scalar>& settings, const Label<Scalar>& label,
                                      const RowScalars<Scalar>& row, Scalar divergence, float* stats, int64_t batch,
                                      int64_t b) {
  const Scalar tau1 = settings.joint_temperature, tau2 = settings.marginal_temperature;
  const Scalar value = divergence < Scalar(0) ? Scalar(0) : divergence;
  const Scalar log_prob = label.present ? tau2 * label.d - row.log_s2 + (tau1 - tau2) * label.logit : -INFINITY;
  Scalar score = log_prob;
  if (label.present && divergence_weight(settings) != Scalar(0)) score -= settings.alpha * value;
  if (label.present) score += row.entropy_weight * row.entropy;
  stats[b] = static_cast<float>(score);
  stats[batch + b] = static_cast<float>(log_prob);
  stats[2 * batch + b] = static_cast<float>(row.entropy);
  stats[3 * batch + b] = static_cast<float>(value);
  stats[4 * batch + b] = static_cast<float>(label.present ? row.log_p : -INFINITY);
}

}  // namespace calguide
