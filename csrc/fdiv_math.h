// The f-divergences D(q||p) = sum_i q_i phi(p_i / q_i) of classifier guidance and w_i = p_i phi'(p_i / q_i), from which the
// logit gradient is w_i - p_i sum_j w_j. One source for every device.
//
// q has two values only: that of the label and that of every other class.
//
// The Kullback-Leibler family needs no term per class beyond p_i and p_i log p_i:
//   KL(q||p): gradient p_i - q_i
//   KL(p||q): gradient p_i (log p_i - log q_i - D)
// The others are summed: sum_terms of each class, w normalised so that phi'(1) = 0.
#pragma once

#include <math.h>

#include "vector_math.h"

namespace calguide {

// codes as the bindings pass them
enum Divergence {
  divergence_none = 0,
  divergence_reverse_kl = 1,
  divergence_forward_kl = 2,
  divergence_js = 3,
  divergence_jeffreys = 4,
  divergence_hellinger = 5,
  divergence_chi2 = 6,
  divergence_neyman_chi2 = 7,
  divergence_alpha = 8,
};

// stands for log 0 where q_i = 0 (epsilon = 1): finite, so that 0 * log 0 is 0 and a difference of two is not NaN
constexpr float log_zero = -1e30f;

// weight of KL(q||p) and of KL(p||q) in a divergence of the Kullback-Leibler family
CALGUIDE_INLINE bool is_kl_family(int divergence) {
  return divergence <= divergence_forward_kl || divergence == divergence_jeffreys;
}
CALGUIDE_INLINE bool has_reverse_kl(int divergence) {
  return divergence == divergence_reverse_kl || divergence == divergence_jeffreys;
}
CALGUIDE_INLINE bool has_forward_kl(int divergence) {
  return divergence == divergence_forward_kl || divergence == divergence_jeffreys;
}

// whether a class of probability 0 has finite terms whatever its log p
CALGUIDE_INLINE bool vanishes_finitely(int divergence) {
  return divergence == divergence_js || divergence == divergence_hellinger || divergence == divergence_chi2;
}

struct ClassTerms {
  float w;      // p phi'(p / q)
  float value;  // sums to D over the classes
};

// What a class's terms need to know of q and of the order a: made once for the label and once for the other classes.
struct ClassWeight {
  float q;
  float half_q;
  float q_or_tiny;  // keeps log(p + q) finite where both are 0 and all it meets is 0
  float log_q;
  float root_q;
  float inverse_q;     // 0 where q is 0
  float order;         // a of alpha:a
  float order_less_1;  // a - 1, rounded once
  float w_factor;      // 1 / (a - 1)
  float value_factor;  // 1 / (a (a - 1)) below a = 1/2, else 1 / a
  // q t^a = power_factor exp(a d + power_shift), of the row: see set_power
  float power_factor;
  float power_shift;
};

CALGUIDE_INLINE ClassWeight class_weight(double q, double log_q, double root_q, double order) {
  ClassWeight weight = {};
  weight.q = static_cast<float>(q);
  weight.half_q = 0.5f * weight.q;
  weight.q_or_tiny = weight.q > 1e-37f ? weight.q : 1e-37f;
  weight.log_q = static_cast<float>(log_q);
  weight.root_q = static_cast<float>(root_q);
  weight.inverse_q = static_cast<float>(q > 0.0 ? 1.0 / q : 0.0);
  weight.order = static_cast<float>(order);
  weight.order_less_1 = static_cast<float>(order - 1.0);
  weight.w_factor = static_cast<float>(1.0 / (order - 1.0));
  weight.value_factor = static_cast<float>(order < 0.5 ? 1.0 / (order * (order - 1.0)) : 1.0 / order);
  return weight;
}

// q t^a = exp(a d + k), k = (1 - a) log q - a log s. The likely classes have the large powers when a > 0, and d near 0: there
// k as a factor costs no digits, where its rounding inside the exponent would. Elsewhere the factor could overflow.
CALGUIDE_INLINE void set_power(ClassWeight& weight, double log_q, double order, double log_s) {
  const double k = (1.0 - order) * log_q - order * log_s;
  const bool factor = order > 0.0 && k < 80.0 && k > -80.0;
  weight.power_factor = factor ? static_cast<float>(exp(k)) : 1.0f;
  weight.power_shift = factor ? 0.0f : static_cast<float>(k);
}

// p = exp(d) / s, d the logit less the row's largest
template <int D>
CALGUIDE_INLINE ClassTerms class_terms(float p, float d, float log_s, const ClassWeight& of) {
  if constexpr (D == divergence_js) {
    // phi = (t log t - (t + 1) log((t + 1) / 2)) / 2: one log per class, never that of a clamped ratio
    const float log_2 = 0.693147181f;
    const float log_sum = log_normal(p + of.q_or_tiny);
    const float w = 0.5f * p * ((d - (log_s - log_2)) - log_sum);
    return {w, w + of.half_q * ((of.log_q + log_2) - log_sum)};
  } else if constexpr (D == divergence_hellinger) {
    // phi = (sqrt t - 1)^2
    const float root = __builtin_sqrtf(p);
    const float difference = root - of.root_q;
    return {root * difference, difference * difference};
  } else if constexpr (D == divergence_chi2) {
    // phi = (t - 1)^2
    const float excess = (p - of.q) * of.inverse_q;
    return {2.0f * p * excess, (p - of.q) * excess};
  } else if constexpr (D == divergence_neyman_chi2) {
    // phi = (1 - t)^2 / t: infinite where p is 0, but q = 0 leaves p
    const float difference = p - of.q;
    const float ratio = difference / p;
    return {of.q > 0.0f ? ratio * (p + of.q) : p, of.q > 0.0f ? ratio * difference : p};
  } else {
    static_assert(D == divergence_alpha, "a divergence without class terms");
    // phi = (t^a - a t + a - 1) / (a (a - 1)), near t = 1 by expm1 so that a may come close to 0 and 1
    const float a = of.order;
    const float log_t = (d - log_s) - of.log_q;
    const float power = of.power_factor * exp_float(a * d + of.power_shift);  // q t^a
    const float z = of.order_less_1 * log_t;
    const float az = a * log_t;
    const float w = (__builtin_fabsf(z) < 0.34f ? p * expm1_small(z) : power - p) * of.w_factor;
    const float excess = __builtin_fabsf(az) < 0.34f ? of.q * expm1_small(az) : power - of.q;
    // the sums over the classes of either are D; each is the exact one where the other divides a rounding error by a small number
    return {w, a < 0.5f ? excess * of.value_factor : w * of.value_factor};
  }
}

}  // namespace calguide
