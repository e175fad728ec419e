// Whole vectors of the instruction set in use, for sums that GCC would add up lane after lane and for exponentials that
// it would not find the instructions of.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "storage.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace calguide {
namespace CALGUIDE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t vector_bytes = 64;
// GCC warns of what its intrinsics without a mask leave undefined
constexpr __mmask16 every_lane = 0xffff;
#elif defined(__AVX__)
constexpr int64_t vector_bytes = 32;
#else
constexpr int64_t vector_bytes = 16;
#endif

// how many Reals a vector holds
template <class Real>
constexpr int64_t width = vector_bytes / sizeof(Real);

template <class Number, int64_t bytes>
struct VectorOf {
  typedef Number type __attribute__((vector_size(bytes)));
};

template <class Real>
using Vector = typename VectorOf<Real, vector_bytes>::type;

// as many Numbers as Vector<Real> has
template <class Number, class Real>
using VectorBeside = typename VectorOf<Number, width<Real> * sizeof(Number)>::type;

// whether numbers of this type are stored a vector at a time by an instruction or two
#if defined(__AVX512F__) || defined(__F16C__)
template <class T>
constexpr bool stored_whole = !std::is_same<T, BFloat16>::value;
#else
template <class T>
constexpr bool stored_whole = !std::is_same<T, BFloat16>::value && !std::is_same<T, Float16>::value;
#endif

// f of each of `width` things
template <class Real, class F>
CALGUIDE_INLINE Vector<Real> each_lane(const F& f) {
  alignas(vector_bytes) Real lanes[width<Real>];
#pragma omp simd
  for (int64_t i = 0; i < width<Real>; ++i) lanes[i] = f(i);
  Vector<Real> result;
  memcpy(&result, lanes, sizeof result);
  return result;
}

// `width` numbers that lie side by side
template <class Real>
CALGUIDE_INLINE Vector<Real> load_lanes(const float* from) {
  VectorBeside<float, Real> stored;
  memcpy(&stored, from, sizeof stored);
  return __builtin_convertvector(stored, Vector<Real>);
}

template <class Real>
CALGUIDE_INLINE Vector<Real> load_lanes(const BFloat16* from) {
  static_assert(sizeof(Real) == sizeof(float), "16-bit numbers are loaded as float");
  VectorBeside<uint16_t, Real> stored;
  memcpy(&stored, from, sizeof stored);
  return reinterpret_cast<Vector<Real>>(__builtin_convertvector(stored, Vector<uint32_t>) << 16);
}

template <class Real>
CALGUIDE_INLINE Vector<Real> load_lanes(const Float16* from) {
  static_assert(sizeof(Real) == sizeof(float), "16-bit numbers are loaded as float");
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<Real>>(
      _mm512_maskz_cvtph_ps(every_lane, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return reinterpret_cast<Vector<Real>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  VectorBeside<uint16_t, Real> stored;
  memcpy(&stored, from, sizeof stored);
  return float16_value<Vector<Real>>(__builtin_convertvector(stored, Vector<uint32_t>));
#endif
}

template <class Real>
CALGUIDE_INLINE Vector<Real> load_lanes(const double* from) {
  Vector<Real> lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// Puts the lanes side by side, as whatever is stored there.
template <class Real, class Stored>
CALGUIDE_INLINE void store_lanes(Stored* to, Vector<Real> lanes) {
  constexpr bool is_float = sizeof(Real) == sizeof(float);
  if constexpr (std::is_same<Stored, Real>::value) {
    memcpy(to, &lanes, sizeof lanes);
  } else if constexpr (is_float && std::is_same<Stored, BFloat16>::value) {
    const Vector<uint32_t> bits = bfloat16_bits(reinterpret_cast<Vector<uint32_t>>(lanes));
    const VectorBeside<uint16_t, Real> stored = __builtin_convertvector(bits, VectorBeside<uint16_t, Real>);
    memcpy(to, &stored, sizeof stored);
#if defined(__AVX512F__)
  } else if constexpr (is_float && std::is_same<Stored, Float16>::value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtps_ph(every_lane, reinterpret_cast<__m512>(lanes), 0));
#elif defined(__F16C__)
  } else if constexpr (is_float && std::is_same<Stored, Float16>::value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(reinterpret_cast<__m256>(lanes), 0));
#else
  } else if constexpr (is_float && std::is_same<Stored, Float16>::value) {
    const Vector<uint32_t> bits = float16_bits<Vector<uint32_t>>(lanes);
    const VectorBeside<uint16_t, Real> stored = __builtin_convertvector(bits, VectorBeside<uint16_t, Real>);
    memcpy(to, &stored, sizeof stored);
#endif
  } else {
    alignas(vector_bytes) Real each[width<Real>];
    memcpy(each, &lanes, sizeof lanes);
#pragma omp simd
    for (int64_t i = 0; i < width<Real>; ++i) store_float(to + i, static_cast<float>(each[i]));
  }
}

// the greater of each two, or max where x is NaN
template <class Real>
CALGUIDE_INLINE Vector<Real> max_lanes(Vector<Real> x, Vector<Real> max) {
#if defined(__AVX512F__)
  // GCC would compare and blend
  if constexpr (sizeof(Real) == sizeof(float)) {
    return reinterpret_cast<Vector<Real>>(
        _mm512_maskz_max_ps(every_lane, reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(max)));
  }
#endif
  return x > max ? x : max;
}

// Lanes combined by halves until one is left.
template <class Number, int64_t count, class Combine>
CALGUIDE_INLINE Number fold_lanes(typename VectorOf<Number, count * sizeof(Number)>::type lanes,
                                  const Combine& combine) {
  if constexpr (count == 1) {
    return lanes[0];
  } else {
    typename VectorOf<Number, count / 2 * sizeof(Number)>::type half[2];
    memcpy(half, &lanes, sizeof half);
    return fold_lanes<Number, count / 2>(combine(half[0], half[1]), combine);
  }
}

// The sum in double, by halves.
template <class Real>
CALGUIDE_INLINE double sum_of_lanes(Vector<Real> lanes) {
  constexpr int64_t half = width<Real> / 2;
  typename VectorOf<Real, half * sizeof(Real)>::type halves[2];
  memcpy(halves, &lanes, sizeof halves);
  using Wide = typename VectorOf<double, half * sizeof(double)>::type;
  const Wide sums = __builtin_convertvector(halves[0], Wide) + __builtin_convertvector(halves[1], Wide);
  return fold_lanes<double, half>(sums, [](auto x, auto y) { return x + y; });
}

// the largest lane, no NaN among them
CALGUIDE_INLINE float max_of_lanes(Vector<float> lanes) {
  return fold_lanes<float, width<float>>(lanes, [](auto x, auto y) { return x > y ? x : y; });
}

// exp2_product of each lane, with the product exact. NaN where that product is infinite, and infinite or NaN where it
// is so far below 0 that floats cannot hold the square of its last digit (at -1e26, say).
template <class Real>
CALGUIDE_INLINE Vector<Real> exp2_lanes(Vector<Real> x, Real scale) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    // 2^(n + f), n a multiple of 1/32: adding 1.5 * 2^18 rounds to one, whose fraction is in the lowest five bits
    alignas(vector_bytes) static constexpr float powers[32] = {
        0x1p0f,        0x1.059b0ep0f, 0x1.0b5586p0f, 0x1.11301ep0f, 0x1.172b84p0f, 0x1.1d4874p0f, 0x1.2387a6p0f,
        0x1.29e9ep0f,  0x1.306fep0f,  0x1.371a74p0f, 0x1.3dea64p0f, 0x1.44e086p0f, 0x1.4bfdaep0f, 0x1.5342b6p0f,
        0x1.5ab07ep0f, 0x1.6247ecp0f, 0x1.6a09e6p0f, 0x1.71f75ep0f, 0x1.7a1148p0f, 0x1.82589ap0f, 0x1.8ace54p0f,
        0x1.93737cp0f, 0x1.9c4918p0f, 0x1.a5503cp0f, 0x1.ae89fap0f, 0x1.b7f77p0f,  0x1.c199bep0f, 0x1.cb720ep0f,
        0x1.d5818ep0f, 0x1.dfc974p0f, 0x1.ea4afap0f, 0x1.f50766p0f};
    const float magic = 0x1.8p18f;
    const Vector<Real> shifted = x * scale + magic, n = shifted - magic, f = x * scale - n;
    const Vector<Real> power = reinterpret_cast<Vector<Real>>(_mm512_permutex2var_ps(
        _mm512_load_ps(powers), reinterpret_cast<__m512i>(shifted), _mm512_load_ps(powers + 16)));
    // (2^f - 1) / f for |f| <= 1/64, minimax in the relative error of 2^f, 5.3e-8
    const Vector<Real> fraction = power * f * (f * 0x1.ebfdp-3f + 0x1.62e586p-1f) + power;
    // the whole part of n by an instruction
    return reinterpret_cast<Vector<Real>>(
        _mm512_maskz_scalef_ps(every_lane, reinterpret_cast<__m512>(fraction), reinterpret_cast<__m512>(n)));
  }
#endif
  return each_lane<Real>([&](int64_t i) { return exp2_product(x[i], scale); });
}

// exp2_product of each lane, which may be as far below 0 as minus infinity
template <class Real>
CALGUIDE_INLINE Vector<Real> exp2_far_lanes(Vector<Real> x, Real scale) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    // so that the product is no lower
    const Real farthest = static_cast<Real>(-1e20) / (scale > 1 ? scale : 1);
    x = max_lanes<Real>(Vector<Real>{} + farthest, x);
  }
#endif
  return exp2_lanes<Real>(x, scale);
}

#if defined(__AVX2__)
// of eight numbers those that the lowest three bits of each index choose
CALGUIDE_INLINE Vector<float> choose_lanes(const float (&from)[8], Vector<int32_t> index) {
  const __m256 eight = _mm256_loadu_ps(from);
#if defined(__AVX512F__)
  // which looks at four bits
  const __m512 twice = _mm512_maskz_broadcast_f32x8(every_lane, eight);
  return reinterpret_cast<Vector<float>>(
      _mm512_maskz_permutexvar_ps(every_lane, reinterpret_cast<__m512i>(index), twice));
#else
  return reinterpret_cast<Vector<float>>(_mm256_permutevar8x32_ps(eight, reinterpret_cast<__m256i>(index)));
#endif
}
#endif

// log_normal of each lane; by a table, where there is an instruction for it, of half as many multiply-adds
CALGUIDE_INLINE Vector<float> log_lanes(Vector<float> x) {
#if defined(__AVX2__)
  // x = 2^n m with 1 <= m < 2, and m = (1 + f) / r with 1 / r the middle of the eighth that m is in; -log(r) in the
  // table has the polynomial's constant added
  constexpr float inverses[8] = {0x1.e1e1e2p-1f, 0x1.af286cp-1f, 0x1.861862p-1f, 0x1.642c86p-1f,
                                 0x1.47ae14p-1f, 0x1.2f684cp-1f, 0x1.1a7b96p-1f, 0x1.08421p-1f};
  constexpr float logs[8] = {0x1.f0a30ap-5f, 0x1.5ff306p-3f, 0x1.1675cap-2f, 0x1.739d7ep-2f,
                             0x1.c8ff7ep-2f, 0x1.0be72ep-1f, 0x1.307d74p-1f, 0x1.52a2d4p-1f};
  const Vector<int32_t> bits = reinterpret_cast<Vector<int32_t>>(x), eighth = bits >> 20;
#if defined(__AVX512F__)
  const Vector<float> n =
      reinterpret_cast<Vector<float>>(_mm512_maskz_getexp_ps(every_lane, reinterpret_cast<__m512>(x)));
#else
  const Vector<float> n = __builtin_convertvector((bits >> 23) - 127, Vector<float>);
#endif
  const Vector<float> m = reinterpret_cast<Vector<float>>((bits & 0x007fffff) | 0x3f800000);
  const Vector<float> f = m * choose_lanes(inverses, eighth) - 1.0f;
  // log(1 + f) for |f| <= 1/17, minimax in the absolute error, 8.8e-9
  Vector<float> c = f * -0x1.010978p-2f + 0x1.5638b2p-2f;
  c = c * f + -0x1.ffff92p-2f;
  c = c * f + 0x1.ffffe6p-1f;
  return c * f + (n * 0.693147181f + choose_lanes(logs, eighth));
#else
  return each_lane<float>([&](int64_t i) { return log_normal(x[i]); });
#endif
}

// The functions that a formula for any kind of number is given.
template <class Real>
struct LaneFunctions {
  using Lanes = Vector<Real>;
  CALGUIDE_INLINE Lanes root(Lanes x) {
    return each_lane<Real>([&](int64_t i) { return square_root(x[i]); });
  }
  CALGUIDE_INLINE Lanes log(Lanes x) { return log_lanes(x); }
  CALGUIDE_INLINE Lanes expm1(Lanes x) {
    return each_lane<Real>([&](int64_t i) { return expm1_bounded(x[i]); });
  }
};

}  // namespace
}  // namespace CALGUIDE_ISA
}  // namespace calguide
