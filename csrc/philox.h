// Counter-based Gaussian noise: Philox4x32-10 words turned into normals, the same bits on every machine.
//
// One source for CPU and CUDA; calguide_fast/backends/philox.py restates it operation by operation in torch. The
// construction is frozen: a change of a constant, or of the order of two roundings, changes every picture ever drawn
// from a seed. That is why the logarithm here is not the one of vector_math.h, which is free to improve. Philox and its
// constants: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//
// Each multiply and each add rounds by itself. Host code must therefore be compiled with -ffp-contract=off; on the
// device the round-to-nearest intrinsics, which nvcc never fuses, say the same whatever its flags.
#pragma once

#include "vector_math.h"

#if defined(__CUDA_ARCH__)
#define PHILOX_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define PHILOX_UNROLL
#elif defined(__clang__)
#define PHILOX_UNROLL _Pragma("clang loop unroll(full)")
#else
#define PHILOX_UNROLL _Pragma("GCC unroll 10")
#endif

namespace calguide {

#if defined(__CUDA_ARCH__)
CALGUIDE_INLINE float rounded_mul(float a, float b) { return __fmul_rn(a, b); }
CALGUIDE_INLINE float rounded_add(float a, float b) { return __fadd_rn(a, b); }
CALGUIDE_INLINE float rounded_sqrt(float a) { return __fsqrt_rn(a); }
#else
CALGUIDE_INLINE float rounded_mul(float a, float b) { return a * b; }
CALGUIDE_INLINE float rounded_add(float a, float b) { return a + b; }
CALGUIDE_INLINE float rounded_sqrt(float a) { return __builtin_sqrtf(a); }
#endif

// The keys of the ten rounds, in 64 bits to meet the counter words of philox_rounds.
struct PhiloxKey {
  uint64_t k0[10], k1[10];
};

CALGUIDE_INLINE PhiloxKey philox_key(uint64_t seed) {
  PhiloxKey key;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  PHILOX_UNROLL
  for (int round = 0; round < 10; ++round) {
    key.k0[round] = k0;
    key.k1[round] = k1;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return key;
}

// A counter word in the lower half of 64 bits, whose upper half is free for a round's product to spill into.
struct PhiloxScalar {
  typedef uint64_t Word;
  CALGUIDE_INLINE Word product(Word a, uint32_t b) { return static_cast<uint64_t>(static_cast<uint32_t>(a)) * b; }
};

// Ten rounds in place; Lanes is PhiloxScalar or a vector of the same, and only the lower halves of the words count.
template <class Lanes>
CALGUIDE_INLINE void philox_rounds(const PhiloxKey& key, typename Lanes::Word& c0, typename Lanes::Word& c1,
                                   typename Lanes::Word& c2, typename Lanes::Word& c3) {
  PHILOX_UNROLL
  for (int round = 0; round < 10; ++round) {
    const typename Lanes::Word p0 = Lanes::product(c0, 0xD2511F53u), p1 = Lanes::product(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ key.k0[round];
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ key.k1[round];
    c3 = p0;
  }
}

// Natural logarithm of u in (0, 1]: u = 2^n (1 + t) with 1 + t in [sqrt(1/2), sqrt(2)); 1 ulp.
CALGUIDE_INLINE float philox_log(float u) {
  const uint32_t offset = bits_of(u) - 0x3f3504f3u;
  const float n = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  const float t = rounded_add(float_of(bits_of(u) - (offset & 0xff800000u)), -1.0f);
  const float square = rounded_mul(t, t);
  // in pairs, for a shorter chain of dependent operations
  const float c01 = rounded_add(rounded_mul(t, -0x1.000226p-2f), 0x1.555554p-2f);
  const float c23 = rounded_add(rounded_mul(t, -0x1.54728ap-3f), 0x1.99a01cp-3f);
  const float c45 = rounded_add(rounded_mul(t, -0x1.0d8242p-3f), 0x1.22d92ep-3f);
  const float c67 = rounded_add(rounded_mul(t, -0x1.38c9d4p-4f), 0x1.055ec4p-3f);
  const float c03 = rounded_add(rounded_mul(square, c23), c01);
  const float c47 = rounded_add(rounded_mul(square, c67), c45);
  const float c = rounded_add(rounded_mul(rounded_mul(square, square), c47), c03);
  // log(2) in two parts, the first short enough for an exact product
  float log_u = rounded_add(rounded_mul(rounded_mul(c, t), square), rounded_mul(n, -0x1.bd0106p-13f));
  log_u = rounded_add(log_u, rounded_mul(square, -0.5f));
  log_u = rounded_add(t, log_u);
  return rounded_add(log_u, rounded_mul(n, 0x1.63p-1f));
}

// Two normals by Box-Muller: the radius from the upper 24 bits of one word, the angle 2 pi word / 2^32 from the other.
CALGUIDE_INLINE void philox_normal_pair(uint32_t radius_word, uint32_t angle_word, float* z_cos, float* z_sin) {
  const float u = rounded_mul(static_cast<float>(static_cast<int32_t>((radius_word >> 8) + 1u)), 0x1p-24f);
  const float radius = rounded_sqrt(rounded_mul(philox_log(u), -2.0f));

  // half a quarter turn further, the upper two bits are the nearest quadrant; the rest of the angle is within pi / 4
  const uint32_t turned = angle_word + 0x20000000u;
  const int32_t rest = static_cast<int32_t>((turned & 0x3fffffffu) - 0x20000000u);
  const float x = rounded_mul(static_cast<float>(rest), 0x1.921fb6p-30f);
  const float xx = rounded_mul(x, x);
  float s = -0x1.995408p-13f;
  s = rounded_add(rounded_mul(s, xx), 0x1.110778p-7f);
  s = rounded_add(rounded_mul(s, xx), -0x1.555546p-3f);
  s = rounded_add(x, rounded_mul(rounded_mul(x, xx), s));
  float c = 0x1.99e80cp-16f;
  c = rounded_add(rounded_mul(c, xx), -0x1.6c0c28p-10f);
  c = rounded_add(rounded_mul(c, xx), 0x1.55554ap-5f);
  c = rounded_add(rounded_mul(c, xx), -0.5f);
  c = rounded_add(rounded_mul(c, xx), 1.0f);

  // an odd quadrant swaps the two; sine is negative in the upper half turn, cosine in the middle one
  const bool odd = (turned & 0x40000000u) != 0;
  const uint32_t cos_sign = (turned + 0x40000000u) & 0x80000000u, sin_sign = turned & 0x80000000u;
  *z_cos = rounded_mul(radius, float_of(bits_of(odd ? s : c) ^ cos_sign));
  *z_sin = rounded_mul(radius, float_of(bits_of(odd ? c : s) ^ sin_sign));
}

// The normals of elements 4 block .. 4 block + 3: counter (block, draw, stream, 0) under the key of the image's seed.
CALGUIDE_INLINE void philox_normal_block(const PhiloxKey& key, uint32_t block, uint32_t draw, uint32_t stream,
                                         float* z) {
  uint64_t c0 = block, c1 = draw, c2 = stream, c3 = 0;
  philox_rounds<PhiloxScalar>(key, c0, c1, c2, c3);
  philox_normal_pair(static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), z, z + 1);
  philox_normal_pair(static_cast<uint32_t>(c2), static_cast<uint32_t>(c3), z + 2, z + 3);
}

}  // namespace calguide
