// The f-divergences D(q||p) = sum_i q_i phi(p_i / q_i) of classifier guidance and w_i = p_i phi'(p_i / q_i), from which
// the logit gradient is w_i - p_i sum_j w_j. One source for every device.
//
// q has two values only: that of the label and that of every other class.
//
// The Kullback-Leibler family needs no term per class beyond p_i and p_i log p_i:
//   KL(q||p): gradient p_i - q_i
//   KL(p||q): gradient p_i (log p_i - log q_i - D)
// The others are summed: class_terms of each class, w normalised so that phi'(1) = 0. All terms are homogeneous: p and
// q may come with any common factor, and p be an exponential before its normalisation. Those that are powers of p / q
// are computed in double, as there G_i is a small difference of terms as large as (1 / q)^(a - 1).
#pragma once

#include <math.h>

#include "vector_math.h"

namespace calguide {

// codes as the bindings pass them, the same as in ops/divergences.py
enum Divergence : int {
  divergence_none = 0,
  divergence_reverse_kl = 1,
  divergence_forward_kl = 2,
  divergence_js = 3,
  divergence_jeffreys = 4,
  divergence_hellinger = 5,
  divergence_chi2 = 6,
  divergence_neyman_chi2 = 7,
  divergence_alpha = 8,
  divergence_count
};

// how a divergence is summed: as the two KLs that it is made of, or from class_terms in the precision that they need
enum Summation { sum_of_kls, sum_of_floats, sum_of_doubles };

struct DivergenceTraits {
  Summation summation;
  bool reverse_kl, forward_kl;  // the parts of a sum of KLs
  float unit;                   // what the terms of class_terms are to be multiplied by
};

// A divergence without a line here does not compile, nor does one of class terms that class_terms does not know.
CALGUIDE_INLINE constexpr DivergenceTraits divergence_traits(int divergence) {
  switch (static_cast<Divergence>(divergence)) {
    case divergence_none: return {sum_of_kls, false, false, 1.0f};
    case divergence_reverse_kl: return {sum_of_kls, true, false, 1.0f};
    case divergence_forward_kl: return {sum_of_kls, false, true, 1.0f};
    case divergence_js: return {sum_of_floats, false, false, 0.5f};
    case divergence_jeffreys: return {sum_of_kls, true, true, 1.0f};
    case divergence_hellinger: return {sum_of_floats, false, false, 1.0f};
    case divergence_chi2: return {sum_of_doubles, false, false, 1.0f};
    case divergence_neyman_chi2: return {sum_of_doubles, false, false, 1.0f};
    case divergence_alpha: return {sum_of_doubles, false, false, 1.0f};
    case divergence_count: break;
  }
  return {};
}

// stands for log 0 where q_i = 0 (epsilon = 1): finite, so that 0 * log 0 is 0 and a difference of two is not NaN
constexpr float log_zero = -1e30f;

template <class Number>
struct ClassTerms {
  Number w;      // p phi'(p / q)
  Number value;  // sums to D over the classes
};

// What a class's terms need to know of q and of the order a: made once for the label and once for the other classes.
template <class Real>
struct ClassWeight {
  Real q;
  Real q_or_tiny;  // keeps log(p + q) finite where both are 0 and all it meets is 0
  Real log_q;
  Real root_q;
  Real inverse_q;     // 0 where q is 0
  Real order;         // a of alpha:a
  Real exponent;      // a where a < 1/2, else a - 1, rounded once
  Real w_factor;      // 1 / (a - 1)
  Real value_factor;  // 1 / a
};

template <class Real, class Scalar>
CALGUIDE_INLINE ClassWeight<Real> class_weight(Scalar q, Scalar log_q, Scalar order) {
  const Scalar tiny = static_cast<Scalar>(1e-37);
  ClassWeight<Real> weight = {};
  weight.q = static_cast<Real>(q);
  weight.q_or_tiny = static_cast<Real>(q > tiny ? q : tiny);
  weight.log_q = static_cast<Real>(log_q);
  weight.root_q = static_cast<Real>(sqrt(q));
  weight.inverse_q = static_cast<Real>(q > 0 ? 1 / q : Scalar(0));
  weight.order = static_cast<Real>(order);
  weight.w_factor = static_cast<Real>(1 / (order - 1));
  weight.value_factor = static_cast<Real>(1 / order);
  weight.exponent = static_cast<Real>(order < static_cast<Scalar>(0.5) ? order : order - 1);
  return weight;
}

// Real is double for a power of p / q and float otherwise, Number is Real or a vector of it.
template <int D, class Functions = ScalarFunctions, class Number, class Real>
CALGUIDE_INLINE ClassTerms<Number> class_terms(Number p, Number log_p, const ClassWeight<Real>& of) {
  if constexpr (D == divergence_js) {
    // phi = (t log t - (t + 1) log((t + 1) / 2)) / 2: one log per class, never that of a clamped ratio
    const Real log_2 = static_cast<Real>(0.6931471805599453);
    const Number log_sum = Functions::log(p + of.q_or_tiny);
    const Number w = p * ((log_p + log_2) - log_sum);
    return {w, w + of.q * ((of.log_q + log_2) - log_sum)};
  } else if constexpr (D == divergence_hellinger) {
    // phi = (sqrt t - 1)^2
    const Number root = Functions::root(p);
    const Number difference = root - of.root_q;
    return {root * difference, difference * difference};
  } else if constexpr (D == divergence_chi2) {
    // phi = (t - 1)^2
    const Number excess = (p - of.q) * of.inverse_q;
    return {2 * p * excess, (p - of.q) * excess};
  } else if constexpr (D == divergence_neyman_chi2) {
    // phi = (1 - t)^2 / t: infinite where p is 0, but q = 0 leaves p
    const Number difference = p - of.q;
    const Number ratio = difference / p;
    return {of.q > 0 ? ratio * (p + of.q) : p, of.q > 0 ? ratio * difference : p};
  } else {
    static_assert(D == divergence_alpha, "class_terms does not know this divergence");
    // phi = (t^a - a t + a - 1) / (a (a - 1)). p (t^(a-1) - 1) and q (t^a - 1) both sum to a (a - 1) D: below a = 1/2
    // the second is taken, above it the first, by expm1 so that a may come as close to 0 and to 1 as it likes
    const bool low = of.order < static_cast<Real>(0.5);
    const Number power = Functions::expm1(of.exponent * (log_p - of.log_q));
    const Number excess = (low ? of.q * power : p * power) * of.w_factor;
    const Number w = low ? excess + (of.q - p) * of.w_factor : excess;
    return {w, excess * of.value_factor};
  }
}

// a divergence as a type, from which it can be read at compile time
template <int D>
struct DivergenceCode {
  static constexpr int value = D;
};

// Calls body with the DivergenceCode of the given divergence, one of those whose class_terms are summed in Real.
template <class Real, int D = 0, class Body>
CALGUIDE_INLINE void with_divergence(int divergence, const Body& body) {
  if constexpr (D < divergence_count) {
    constexpr Summation summation = sizeof(Real) == sizeof(double) ? sum_of_doubles : sum_of_floats;
    if constexpr (divergence_traits(D).summation == summation) {
      if (divergence == D) return body(DivergenceCode<D>());
    }
    with_divergence<Real, D + 1>(divergence, body);
  }
}

}  // namespace calguide
