// 16-bit storage types and their conversions, in integer arithmetic that vectorises on any machine; a GPU has
// instructions for them.
#pragma once

#include "vector_math.h"

namespace calguide {

// codes of the storage types as the bindings pass them
enum StorageType { storage_float32 = 0, storage_bfloat16 = 1, storage_float16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

CALGUIDE_INLINE float load_float(float value) { return value; }

CALGUIDE_INLINE float load_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// the same bits as another type, or as a vector of it
template <class To, class From>
CALGUIDE_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The float with the value of a float16's bits, or a vector of them.
template <class Number, class Word>
CALGUIDE_INLINE Number float16_value(Word bits) {
  const Word magnitude = (bits & 0x7fffu) << 13, none = {}, infinite = Word{} + 0x7f800000u;
  // the multiplication moves the exponent's bias and normalises subnormals alike
  const Word scaled = bits_as<Word>(bits_as<Number>(magnitude) * 0x1p112f);
  const Word special = magnitude >= 0x0f800000u ? infinite : none;
  return bits_as<Number>(scaled | special | ((bits & 0x8000u) << 16));
}

CALGUIDE_INLINE float load_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return float16_value<float>(static_cast<uint32_t>(value.bits));
#endif
}

CALGUIDE_INLINE void store_float(float* at, float value) { *at = value; }

// The bits of a bfloat16 from those of a float, or of a vector of them: round to nearest, ties to even.
template <class Word>
CALGUIDE_INLINE Word bfloat16_bits(Word bits) {
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = Word{} + 0x7fc0u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

CALGUIDE_INLINE void store_float(BFloat16* at, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(at->bits) : "f"(value));
#else
  at->bits = static_cast<uint16_t>(bfloat16_bits(bits_of(value)));
#endif
}

// The bits of a float16 from a float, or from a vector of them: round to nearest, ties to even.
template <class Word, class Number>
CALGUIDE_INLINE Word float16_bits(Number value) {
  const Word bits = bits_as<Word>(value), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const Word normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // adding 0.5 lets the hardware round a subnormal result at the right bit
  const Word subnormal = bits_as<Word>(bits_as<Number>(magnitude) + 0.5f) - 0x3f000000u;
  const Word nan = Word{} + 0x7e00u, infinite = Word{} + 0x7c00u;
  const Word special = magnitude > 0x7f800000u ? nan : infinite;
  const Word finite = magnitude < 0x38800000u ? subnormal : normal;
  return (magnitude >= 0x47800000u ? special : finite) | sign;
}

CALGUIDE_INLINE void store_float(Float16* at, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(at->bits) : "f"(value));
#else
  at->bits = static_cast<uint16_t>(float16_bits<uint32_t>(value));
#endif
}

// A number in the precision that it is computed in where doubles are served, too: its own, or float for 16 bits.
CALGUIDE_INLINE double load_wide(double value) { return value; }
template <class T>
CALGUIDE_INLINE float load_wide(T value) {
  return load_float(value);
}
template <class T>
using WideOf = decltype(load_wide(T()));

CALGUIDE_INLINE void store_wide(double* at, double value) { *at = value; }
template <class T>
CALGUIDE_INLINE void store_wide(T* at, float value) {
  store_float(at, value);
}

// bytes of a number of the given storage type
CALGUIDE_INLINE int64_t storage_size(int type) { return type == storage_float32 ? 4 : 2; }

// Calls body with a value of the given storage type. A body may be the host's alone, of which nvcc would warn.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class Body>
CALGUIDE_INLINE void with_storage(int type, const Body& body) {
  switch (type) {
    case storage_bfloat16: return body(BFloat16());
    case storage_float16: return body(Float16());
    default: return body(float());
  }
}

}  // namespace calguide
