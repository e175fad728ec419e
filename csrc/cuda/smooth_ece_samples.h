// How the kernels read a sample.
#pragma once

#include "cuda/smooth_ece.h"

namespace calguide {

template <class Real>
CALGUIDE_DEVICE double weight_at(const SmoothEceArguments& a, int64_t i) {
  return a.weights == nullptr ? 1.0 : static_cast<double>(static_cast<const Real*>(a.weights)[i]);
}

template <class Real>
CALGUIDE_DEVICE double confidence_at(const SmoothEceArguments& a, int64_t i) {
  return static_cast<const Real*>(a.confidence)[i];
}

// 0 or 1 whatever the byte is
CALGUIDE_DEVICE double outcome_at(const uint8_t* correct, int64_t i) { return correct[i] != 0 ? 1.0 : 0.0; }

template <class Real>
CALGUIDE_DEVICE double residual_at(const SmoothEceArguments& a, int64_t i) {
  return confidence_at<Real>(a, i) - outcome_at(a.correct, i);
}

}  // namespace calguide
