// exp and log in float, and exp in double: no branch and no table, so that a loop of them vectorises; the same source
// for CPU and CUDA.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define CALGUIDE_INLINE static __host__ __device__ __forceinline__
#define CALGUIDE_TABLE static __device__ constexpr
#else
#define CALGUIDE_INLINE static inline __attribute__((always_inline))
#define CALGUIDE_TABLE constexpr
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

// 2^n for the integer in the low bits of a sum with 1.5 * 2^52 + 1023, the exponent's bias
CALGUIDE_INLINE double power_of_two(double shifted) {
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits <<= 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

// 1 ulp
CALGUIDE_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return __builtin_sqrtf(x);
#endif
}

// (e^r - 1 - r) / r^2 for |r| <= log(2) / 2: minimax in the relative error of e^r, 3.1e-9
CALGUIDE_INLINE float exp_remainder(float r) {
  float c = 0x1.6a23dp-10f;
  c = c * r + 0x1.123a2p-7f;
  c = c * r + 0x1.5558f2p-5f;
  c = c * r + 0x1.555492p-3f;
  return c * r + 0x1.fffffcp-2f;
}

// e^x, 1 ulp; 0 below -87.3 (no subnormals), inf above 88.37, NaN for NaN
CALGUIDE_INLINE float exp_float(float x) {
  // adding 1.5 * 2^23 rounds to an integer in the low bits; the further 127 makes them the biased exponent of 2^n
  const float magic = 12582912.0f + 127.0f;
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  // log(2) in two parts, the first short enough for an exact product
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float power = ((exp_remainder(r) * r + 1.0f) * r + 1.0f) * float_of(bits_of(shifted) << 23);
  return x > 88.37f ? __builtin_inff() : x < -87.33f ? 0.0f : power;
}

// 2^f for |f| <= 1/2: minimax in the relative error, 9.1e-8. Of a float or a vector of them.
template <class Real>
CALGUIDE_INLINE Real exp2_fraction(Real f) {
  Real c = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  c = c * f + 0x1.c6b752p-5f;
  c = c * f + 0x1.ebf9bcp-3f;
  c = c * f + 0x1.62e42ap-1f;
  return c * f + 1.0f;
}

// 2^(x * scale) for a product up to 126, 2 ulp and, where products are rounded before a sum, the product's own
// rounding. 1 for x = 0, 0 below 2^-126, NaN for NaN. With scale = t log2(e) it is e^(t x), in fewer steps than
// exp_float.
CALGUIDE_INLINE float exp2_product(float x, float scale) {
#if defined(__CUDA_ARCH__)
  // a GPU has an instruction for it: relative error 2^-22
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * scale));
  return power;
#else
  const float magic = 12582912.0f + 127.0f;
  const float shifted = x * scale + magic;
  const float n = shifted - magic;
  return n < -126.0f ? 0.0f : exp2_fraction(x * scale - n) * float_of(bits_of(shifted) << 23);
#endif
}

// e^r - 1 for |r| <= log(2) / 2: r + r^2 c(r), minimax in the relative error of e^r, 1.7e-14
CALGUIDE_INLINE double expm1_small(double r) {
  double c = 0x1.71017b7eef938p-19;
  c = c * r + 0x1.a16e43c628b67p-16;
  c = c * r + 0x1.a01b73a57ed33p-13;
  c = c * r + 0x1.6c163bdbce5d7p-10;
  c = c * r + 0x1.1111108e1a003p-7;
  c = c * r + 0x1.5555557df4fccp-5;
  c = c * r + 0x1.5555555589fa4p-3;
  c = c * r + 0x1.fffffffff13c7p-2;
  return c * (r * r) + r;
}

// 2^(x * scale) for a product up to 1022, relative error 2e-14 and the rounding of the product
CALGUIDE_INLINE double exp2_product(double x, double scale) {
  const double magic = 0x1.8p52 + 1023.0;
  const double shifted = x * scale + magic;
  const double n = shifted - magic;
  const double f = x * scale - n;
  const double fraction = expm1_small(f * 0.6931471805599453) + 1.0;
  return n < -1022.0 ? 0.0 : fraction * power_of_two(shifted);
}

// e^x - 1, relative error 2e-13, x clamped to +-700: finite for any finite or infinite x, NaN for NaN
CALGUIDE_INLINE double expm1_bounded(double x) {
  const double magic = 0x1.8p52 + 1023.0;
  const double bounded = x < -700.0 ? -700.0 : x > 700.0 ? 700.0 : x;
  const double shifted = bounded * 1.4426950408889634 + magic;
  const double n = shifted - magic;
  // log(2) in two parts, the first short enough for an exact product
  const double r = (bounded - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  const double power = power_of_two(shifted);
  return power * expm1_small(r) + (power - 1.0);
}

// log x for positive normal x, absolute error 3.4e-8 and the rounding of the result (anything else: nonsense, no trap)
CALGUIDE_INLINE float log_normal(float x) {
#if defined(__CUDA_ARCH__)
  // a GPU has an instruction for log2: absolute error 2^-22 within (1/2, 2), relative error 2^-22 elsewhere
  float log2_x;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2_x) : "f"(x));
  return log2_x * 0.693147181f;
#else
  // x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
  const uint32_t offset = bits_of(x) - 0x3f3504f3u;
  const float n = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  const float f = float_of(bits_of(x) - (offset & 0xff800000u)) - 1.0f;
  // log(1 + f) / f, minimax in the absolute error of the logarithm
  float c = -0x1.9dc9ep-4f;
  c = c * f + 0x1.50481p-3f;
  c = c * f + -0x1.62fd4p-3f;
  c = c * f + 0x1.96fffep-3f;
  c = c * f + -0x1.ff2ad8p-3f;
  c = c * f + 0x1.555ccep-2f;
  c = c * f + -0x1.0000ep-1f;
  c = c * f + 0x1.fffffap-1f;
  return n * 0.693147181f + c * f;
#endif
}

// The functions that a formula for any kind of number is given; vectors bring their own.
struct ScalarFunctions {
  CALGUIDE_INLINE float root(float x) { return square_root(x); }
  CALGUIDE_INLINE float log(float x) { return log_normal(x); }
  CALGUIDE_INLINE double expm1(double x) { return expm1_bounded(x); }
};

}  // namespace calguide
