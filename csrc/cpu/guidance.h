#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace calguide {

struct GuidanceArguments {
  const void* logits;  // (batch, classes) of `storage`, strides in elements
  int64_t row_stride;
  int64_t class_stride;
  const int64_t* labels;  // (batch), each in 0..classes-1
  int64_t label_stride;
  int64_t batch;
  int64_t classes;
  int storage;
  int divergence;
  double order;
  double alpha;
  double epsilon;
  double joint_temperature;
  double marginal_temperature;
  double entropy_weight;
  bool adaptive_entropy;
  void* grad;    // (batch, classes) of `storage`, contiguous; may be the logits themselves
  float* stats;  // (5, batch): score, log_prob, entropy, divergence, label_log_prob
  int threads;
};

}  // namespace calguide

CALGUIDE_DECLARE_KERNEL(void guidance_gradient(const GuidanceArguments& arguments))
