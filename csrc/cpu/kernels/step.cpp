// The step kernels on the CPU: predict_x0, guided_step and the noise they draw.
//
// Work is cut into runs of pixels of one channel of one image, small enough for the first-level cache. Operands that
// are contiguous fp32 are read in place; any other stride or type is gathered into a buffer first, so one vector body
// serves all. No result depends on how the work was cut: an element sees its own operands, its image's scalars and its
// own noise counter. Compiled with -ffp-contract=off: the noise needs it, and with it every instruction set gives the
// same bits.
#include "cpu/step.h"

#include "philox.h"
#include "step_math.h"
#include "storage.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace calguide {
namespace {

constexpr int64_t run_length = 1024;

// Lanes of Philox words, for which a round's product is one instruction.
struct PhiloxLanes {
#if defined(__AVX512F__)
  typedef uint64_t Word __attribute__((vector_size(64)));
  // all lanes are kept: the form without a mask has GCC 12 warn of its own header
  CALGUIDE_INLINE Word product(Word a, uint32_t b) {
    return (Word)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
  }
#elif defined(__AVX2__)
  typedef uint64_t Word __attribute__((vector_size(32)));
  CALGUIDE_INLINE Word product(Word a, uint32_t b) { return (Word)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }
#elif defined(__SSE2__)
  typedef uint64_t Word __attribute__((vector_size(16)));
  CALGUIDE_INLINE Word product(Word a, uint32_t b) { return (Word)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b)); }
#else
  typedef uint64_t Word __attribute__((vector_size(16)));
  CALGUIDE_INLINE Word product(Word a, uint32_t b) { return (a & 0xffffffffu) * b; }
#endif
};

constexpr int lanes = sizeof(PhiloxLanes::Word) / sizeof(uint64_t);
constexpr int blocks_at_once = 16;
constexpr int64_t normals_buffer = run_length + 4 + 4 * blocks_at_once;

// Normals of elements first .. first + n - 1 of one image; returns where in the buffer the first of them is.
CALGUIDE_INLINE const float* draw_normals(const PhiloxKey& key, int64_t first, int64_t n, uint32_t draw,
                                          uint32_t stream, float* buffer) {
  alignas(64) uint64_t words[4][blocks_at_once];
  PhiloxLanes::Word ramp;
  for (int lane = 0; lane < lanes; ++lane) ramp[lane] = static_cast<uint64_t>(lane);
  const int64_t begin = first / 4, end = (first + n + 3) / 4;
  for (int64_t block = begin; block < end; block += blocks_at_once) {
    for (int i = 0; i < blocks_at_once; i += lanes) {
      PhiloxLanes::Word c0 = ramp + static_cast<uint64_t>(block + i), c1 = PhiloxLanes::Word{} + draw;
      PhiloxLanes::Word c2 = PhiloxLanes::Word{} + stream, c3 = {};
      philox_rounds<PhiloxLanes>(key, c0, c1, c2, c3);
      memcpy(&words[0][i], &c0, sizeof c0);
      memcpy(&words[1][i], &c1, sizeof c1);
      memcpy(&words[2][i], &c2, sizeof c2);
      memcpy(&words[3][i], &c3, sizeof c3);
    }
    float* z = buffer + 4 * (block - begin);
#pragma omp simd
    for (int i = 0; i < blocks_at_once; ++i) {
      const auto word = [&](int w) { return static_cast<uint32_t>(words[w][i]); };
      philox_normal_pair(word(0), word(1), z + 4 * i, z + 4 * i + 1);
      philox_normal_pair(word(2), word(3), z + 4 * i + 2, z + 4 * i + 3);
    }
  }
  return buffer + first % 4;
}

// Calls body(begin, end) for a part of so many items on each thread; OpenMP takes its time even over one.
template <class Body>
void each_part(int64_t items, int threads, const Body& body) {
  if (threads == 1) return body(0, items);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) body(part * items / threads, (part + 1) * items / threads);
}

CALGUIDE_INLINE int64_t offset_of(const Operand& a, int64_t image, int64_t channel, int64_t pixel) {
  return image * a.image + channel * a.channel + pixel * a.pixel;
}

template <class Storage>
CALGUIDE_INLINE void gather(const Storage* from, int64_t stride, int64_t n, float* to) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = load_float(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = load_float(from[i * stride]);
  }
}

template <class Storage>
CALGUIDE_INLINE void scatter(const float* from, int64_t n, Storage* to, int64_t stride) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store_float(to + i, from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) store_float(to + i * stride, from[i]);
  }
}

// n values of an operand in fp32: in place where they lie so, else gathered into the buffer.
const float* fetch(const Operand& a, int64_t image, int64_t channel, int64_t pixel, int64_t n, float* buffer) {
  const int64_t at = offset_of(a, image, channel, pixel);
  if (a.type == storage_float32) {
    const float* from = static_cast<const float*>(a.data) + at;
    if (a.pixel == 1) return from;
    gather(from, a.pixel, n, buffer);
  } else if (a.type == storage_bfloat16) {
    gather(static_cast<const BFloat16*>(a.data) + at, a.pixel, n, buffer);
  } else {
    gather(static_cast<const Float16*>(a.data) + at, a.pixel, n, buffer);
  }
  return buffer;
}

enum Method { ddpm_fixed, ddpm_learned, ddpm_narrow, ddim };

template <int METHOD, Guide GUIDE, bool NOISY>
void step_run(const StepRow& row, float bound, float guide, float boost, const float* x, const float* eps,
              const float* v, const float* g, const float* z, float* out, int64_t n) {
  constexpr bool guided = GUIDE != Guide::none;
  constexpr bool learns = METHOD == ddpm_learned || METHOD == ddpm_narrow;
  constexpr Deviation deviation = static_cast<Deviation>(METHOD == ddim ? ddpm_fixed : METHOD);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float v_i = learns ? v[i] : 0.0f, g_i = guided ? g[i] : 0.0f, z_i = NOISY ? z[i] : 0.0f;
    out[i] = METHOD == ddim ? step_ddim<guided, NOISY>(row, bound, guide, x[i], eps[i], g_i, z_i)
                            : step_ddpm<deviation, GUIDE, NOISY>(row, bound, guide, boost, x[i], eps[i], v_i, g_i, z_i);
  }
}

using StepRun = decltype(&step_run<ddim, Guide::none, false>);

template <int METHOD, Guide GUIDE>
StepRun pick_run(bool noisy) {
  return noisy ? step_run<METHOD, GUIDE, true> : step_run<METHOD, GUIDE, false>;
}

template <int METHOD>
StepRun pick_run(Guide guide, bool noisy) {
  if (guide == Guide::none) return pick_run<METHOD, Guide::none>(noisy);
  return guide == Guide::plain ? pick_run<METHOD, Guide::plain>(noisy) : pick_run<METHOD, Guide::boosted>(noisy);
}

// Whether every v of a run is small; the bits of |v| order like |v|, with NaN above all.
bool all_small(const StepRow& row, const float* v, int64_t n) {
  int32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(v[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return is_small(row, float_of(static_cast<uint32_t>(largest)));
}

float first_variance(const StepArguments& a, const StepRow& row, int64_t image) {
  if (a.v.data == nullptr) return row.fixed_var;
  float buffer;
  const float sd = step_sd<Deviation::learned>(row, *fetch(a.v, image, 0, 0, 1, &buffer));
  return sd * sd;
}

// The sine boost of each image, from the running maximum of the variance at its own first pixel.
void update_boosts(const StepArguments& a, const StepRow& row, float* boost) {
  for (int64_t b = 0; b < a.batch; ++b) {
    boost[b] = 0.0f;
    if (a.variance_max == nullptr) continue;
    const float variance = first_variance(a, row, b), before = a.variance_max[b];
    a.variance_max[b] = running_maximum(before, variance);
    boost[b] = a.sine_boost * a.variance_max[b] * row.sine;
  }
}

}  // namespace

namespace CALGUIDE_ISA {

void guided_step(StepArguments a, ImageScalars images, int threads) {
  const StepRow row = step_row(a.coefficients);
  update_boosts(a, row, images.boost);

  const bool guided = a.gradient.data != nullptr;
  const bool noisy = (a.noise.data != nullptr || a.seeds != nullptr) && takes_noise(row, a.ddim);
  const bool learned = a.v.data != nullptr && !a.ddim && (guided || noisy);
  const Guide guide = !guided ? Guide::none : a.variance_max == nullptr ? Guide::plain : Guide::boosted;
  const StepRun run = a.ddim    ? pick_run<ddim>(guide, noisy)
                      : learned ? pick_run<ddpm_learned>(guide, noisy)
                                : pick_run<ddpm_fixed>(guide, noisy);
  const StepRun narrow_run = pick_run<ddpm_narrow>(guide, noisy);
  const float bound = a.clip ? 1.0f : __builtin_inff();
  flatten_channels(a);
  const int64_t runs = (a.pixels + run_length - 1) / run_length;

  each_part(a.batch * runs, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float buffers[5][run_length];
    alignas(64) float normals[normals_buffer];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / runs, pixel = item % runs * run_length;
      const int64_t n = a.pixels - pixel < run_length ? a.pixels - pixel : run_length;
      for (int64_t channel = 0; channel < a.channels; ++channel) {
        const float* x = fetch(a.x_t, b, channel, pixel, n, buffers[0]);
        const float* eps = fetch(a.eps, b, channel, pixel, n, buffers[1]);
        const float* v = learned ? fetch(a.v, b, channel, pixel, n, buffers[2]) : nullptr;
        const float* g = guided ? fetch(a.gradient, b, channel, pixel, n, buffers[3]) : nullptr;
        const float* z = nullptr;
        if (noisy && a.seeds != nullptr) {
          const PhiloxKey key = philox_key(static_cast<uint64_t>(a.seeds[b]));
          z = draw_normals(key, channel * a.pixels + pixel, n, row.draw, 0, normals);
        } else if (noisy) {
          z = fetch(a.noise, b, channel, pixel, n, buffers[4]);
        }
        float* out = static_cast<float*>(const_cast<void*>(a.out.data)) + offset_of(a.out, b, channel, pixel);
        const StepRun chosen = learned && all_small(row, v, n) ? narrow_run : run;
        chosen(row, bound, guided ? images.guide[b] : 0.0f, images.boost[b], x, eps, v, g, z, out, n);
      }
    }
  });
}

void predict_x0(StepArguments a, int threads) {
  const StepRow row = step_row(a.coefficients);
  const float bound = a.clip ? 1.0f : __builtin_inff();
  flatten_channels(a);
  const bool in_place = a.out.type == storage_float32 && a.out.pixel == 1;
  const int64_t runs = (a.pixels + run_length - 1) / run_length;

  each_part(a.batch * runs, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float buffers[2][run_length];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / runs, pixel = item % runs * run_length;
      const int64_t n = a.pixels - pixel < run_length ? a.pixels - pixel : run_length;
      for (int64_t channel = 0; channel < a.channels; ++channel) {
        const float* x = fetch(a.x_t, b, channel, pixel, n, buffers[0]);
        const float* eps = fetch(a.eps, b, channel, pixel, n, buffers[1]);
        void* out = const_cast<void*>(a.out.data);
        const int64_t at = offset_of(a.out, b, channel, pixel);
        float* x0 = in_place ? static_cast<float*>(out) + at : buffers[0];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) x0[i] = step_x0(row, x[i], eps[i], bound);
        if (a.out.type == storage_bfloat16) {
          scatter(x0, n, static_cast<BFloat16*>(out) + at, a.out.pixel);
        } else if (a.out.type == storage_float16) {
          scatter(x0, n, static_cast<Float16*>(out) + at, a.out.pixel);
        } else if (!in_place) {
          scatter(x0, n, static_cast<float*>(out) + at, a.out.pixel);
        }
      }
    }
  });
}

// (batch, elements) normals of one draw, elements in NCHW order.
void philox_normal(const int64_t* seeds, int64_t batch, int64_t elements, uint32_t draw, uint32_t stream, float* out,
                   int threads) {
  const int64_t runs = (elements + run_length - 1) / run_length;
  each_part(batch * runs, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float normals[normals_buffer];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / runs, first = item % runs * run_length;
      const int64_t n = elements - first < run_length ? elements - first : run_length;
      const PhiloxKey key = philox_key(static_cast<uint64_t>(seeds[b]));
      const float* z = draw_normals(key, first, n, draw, stream, normals);
      memcpy(out + b * elements + first, z, static_cast<size_t>(n) * sizeof(float));
    }
  });
}

}  // namespace CALGUIDE_ISA
}  // namespace calguide
