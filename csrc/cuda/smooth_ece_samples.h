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

template <class Real>
CALGUIDE_DEVICE double residual_at(const SmoothEceArguments& a, int64_t i) {
  return confidence_at<Real>(a, i) - static_cast<double>(a.correct[i]);
}

}  // namespace calguide
