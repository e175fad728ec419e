// What the kernels of every device are called with: raw pointers, sizes and strides in elements, no Python.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "guidance_math.h"

namespace calguide {

struct LogitsArguments {
  const void* logits;  // (batch, classes) of `storage`
  int64_t row_stride;
  int64_t class_stride;
  int64_t batch;
  int64_t classes;
  int storage;  // StorageType
};

struct LabelledArguments : LogitsArguments {
  const int64_t* labels;  // (batch)
  int64_t label_stride;
};

struct GuidanceArguments : LabelledArguments {
  GuidanceSettings<double> settings;
  void* grad;    // (batch, classes) of `storage`, contiguous; may be the logits themselves
  float* stats;  // (5, batch): score, log_prob, entropy, divergence, label_log_prob
};

struct TopLabelArguments : LabelledArguments {
  float* confidence;  // (batch)
  int64_t* top;       // (batch)
  uint8_t* correct;   // (batch) 0 or 1
};

// top lies in 0..classes-1
struct TopLabelBackwardArguments : LogitsArguments {
  const float* grad_confidence;  // (batch)
  int64_t grad_stride;
  const float* confidence;  // (batch)
  const int64_t* top;       // (batch)
  void* grad;               // (batch, classes) of `storage`, contiguous
};

struct TiltArguments {
  const float* scores;  // (count)
  int64_t stride;
  int64_t count;
  double tilt;
  bool normalize_sum;
  double max_weight;
};

// confidences, weights, value and sigma are double if `wide`, else float
struct SmoothEceArguments {
  const void* confidence;  // (count)
  const uint8_t* correct;  // (count) 0, or any other byte for 1
  const void* weights;     // (count) or null
  int64_t count;
  bool wide;
  double bandwidth;  // 0: the fixpoint
  void* value;       // one number
  void* sigma;       // one: the bandwidth that it was measured with
  double* curve;     // (curve_length) as smooth_ece_math.h has it, or null
  int64_t curve_length;
};

// confidences and grad are double if `wide`, else of `storage`; weights and value_grad are double if `wide`, else float
struct SmoothEceGradientArguments {
  const void* confidence;  // (count)
  int storage;             // StorageType
  bool wide;
  const uint8_t* correct;  // (count) 0, or any other byte for 1
  const void* weights;     // (count) or null
  int64_t count;
  const double* curve;     // as smooth_ece left it for these samples
  const void* value_grad;  // what the gradient is multiplied by
  void* grad;              // (count)
};

// (image, channel, pixel) strides in elements; an absent operand has no data.
struct Operand {
  const void* data;
  int type;  // StorageType
  int64_t image, channel, pixel;
};

// guided_step reads all of it; its out is fp32 with contiguous channels and may be x_t itself. predict_x0 reads x_t,
// eps, coefficients and clip, and writes out in its own type and strides.
struct StepArguments {
  int64_t batch, channels, pixels;
  Operand x_t, eps, v, gradient, noise, out;
  const float* coefficients;
  float scale;
  const float* weights;  // (batch,) or null
  TiltArguments tilt;    // without scores: no tilt
  const int64_t* seeds;  // (batch,) or null
  float* variance_max;   // (batch,) running maximum, updated; null without the sine boost
  float sine_boost;
  bool ddim, clip;
};

// One long channel where all operands allow, so that small channels do not make short runs.
static inline void flatten_channels(StepArguments& a) {
  if (a.channels == 1) return;
  Operand* const operands[] = {&a.x_t, &a.eps, &a.v, &a.gradient, &a.noise, &a.out};
  for (const Operand* o : operands) {
    if (o->data != nullptr && a.pixels > 1 && o->channel != a.pixels * o->pixel) return;
  }
  if (a.pixels == 1) {
    for (Operand* o : operands) o->pixel = o->channel;
  }
  a.pixels *= a.channels;
  a.channels = 1;
}

}  // namespace calguide
