// exp and log in float: no branch and no table, so that a loop of them vectorises; the same source for CPU and CUDA.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define CALGUIDE_INLINE static __host__ __device__ __forceinline__
#else
#define CALGUIDE_INLINE static inline __attribute__((always_inline))
#endif

namespace calguide {

CALGUIDE_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

CALGUIDE_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// (e^r - 1 - r) / r^2 for |r| <= log(2) / 2: minimax in the relative error of e^r, 3.1e-9
CALGUIDE_INLINE float exp_remainder(float r) {
  float c = 0x1.6a23dp-10f;
  c = c * r + 0x1.123a2p-7f;
  c = c * r + 0x1.5558f2p-5f;
  c = c * r + 0x1.555492p-3f;
  return c * r + 0x1.fffffcp-2f;
}

// e^x - 1 for |x| <= log(2) / 2
CALGUIDE_INLINE float expm1_small(float x) { return x + x * x * exp_remainder(x); }

// e^x without the check against overflow: right for x <= 88, 0 below -87.3 (no subnormals), NaN for NaN
CALGUIDE_INLINE float exp_below_88(float x) {
  // adding 1.5 * 2^23 rounds to an integer in the low bits; the further 127 makes them the biased exponent of 2^n
  const float magic = 12582912.0f + 127.0f;
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  // log(2) in two parts, the first short enough for an exact product
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float power = ((exp_remainder(r) * r + 1.0f) * r + 1.0f) * float_of(bits_of(shifted) << 23);
  return x < -87.33f ? 0.0f : power;
}

// e^x, 1 ulp; 0 below -87.3, inf above 88.37, NaN for NaN
CALGUIDE_INLINE float exp_float(float x) {
  const float power = exp_below_88(x);
  return x > 88.37f ? __builtin_inff() : power;
}

// log x for positive normal x, 1 ulp (anything else gives nonsense, no trap)
CALGUIDE_INLINE float log_normal(float x) {
  // x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
  const uint32_t offset = bits_of(x) - 0x3f3504f3u;
  const float n = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  const float f = float_of(bits_of(x) - (offset & 0xff800000u)) - 1.0f;
  // log(1 + f) = f - f^2/2 + f^3 c(f): minimax in the relative error, 5.8e-9
  float c = -0.07634498924016953f;
  c = c * f + 0.12761583924293518f;
  c = c * f + -0.13160185515880585f;
  c = c * f + 0.14201757311820984f;
  c = c * f + -0.16623356938362122f;
  c = c * f + 0.20001226663589478f;
  c = c * f + -0.2500081956386566f;
  c = c * f + 0.3333333134651184f;
  const float square = f * f;
  const float tail = (c * f - 0.5f) * square - n * 2.12194440e-4f;
  return n * 0.693359375f + (f + tail);
}

}  // namespace calguide
