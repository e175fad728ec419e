// Logits to guidance gradient and score in one launch: each logit is read once and each gradient written once.
//
// A row belongs to a warp that keeps it in registers, or to a block that keeps it in shared memory, or, where it is too long
// for that, to a block that reads it anew for every pass. One body serves all three: the largest logit, the exponentials'
// sums, the class terms' sums where the divergence has such terms, and the gradient in the form of guidance_math.h.
#pragma once

#include <type_traits>

#include "cuda/group.h"
#include "cuda/guidance.h"
#include "cuda/place.h"
#include "storage.h"

namespace calguide {

// what stands for classes that are not there: like a masked logit, it adds nothing
constexpr float absent = -INFINITY;

// sixteen bytes of a row at a time
template <class T>
constexpr int chunk = 16 / sizeof(T);

template <class T>
struct alignas(16) Pack {
  T values[chunk<T>];
};

// one row of the logits
template <class T>
struct Source {
  const T* logits;
  int64_t stride, classes;
  bool vector;  // whether its chunks lie on boundaries of sixteen bytes

  CALGUIDE_MEMBER void load(int64_t first, float (&x)[chunk<T>]) const {
    if (vector && first + chunk<T> <= classes) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(logits + first);
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) x[j] = load_float(pack.values[j]);
    } else {
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        x[j] = first + j < classes ? load_float(logits[(first + j) * stride]) : absent;
      }
    }
  }
};

// Where a thread keeps its chunks of a row: each(body) calls body(first class, the chunk's logits) for every one of them.

template <class T, class Group, int LENGTH>
struct RegisterRow {
  static constexpr int chunks = LENGTH / (chunk<T> * Group::size);
  float x[chunks][chunk<T>];
  int64_t begin;

  CALGUIDE_MEMBER RegisterRow(const Source<T>& source, const Group& group, float*) : begin(group.rank() * chunk<T>) {
#pragma unroll
    for (int c = 0; c < chunks; ++c) source.load(begin + c * (chunk<T> * Group::size), x[c]);
  }

  template <class Body>
  CALGUIDE_MEMBER void each(const Body& body) const {
#pragma unroll
    for (int c = 0; c < chunks; ++c) body(begin + c * (chunk<T> * Group::size), x[c]);
  }
};

// a thread reads back only what it wrote itself, so that this needs no barrier
template <class T, class Group>
struct SharedRow {
  float* shared;
  int64_t begin, classes;

  CALGUIDE_MEMBER SharedRow(const Source<T>& source, const Group& group, float* shared)
      : shared(shared), begin(group.rank() * chunk<T>), classes(source.classes) {
    for (int64_t first = begin; first < classes; first += chunk<T> * Group::size) {
      float x[chunk<T>];
      source.load(first, x);
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) shared[first + j] = x[j];
    }
  }

  template <class Body>
  CALGUIDE_MEMBER void each(const Body& body) const {
    for (int64_t first = begin; first < classes; first += chunk<T> * Group::size) {
      float x[chunk<T>];
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) x[j] = shared[first + j];
      body(first, x);
    }
  }
};

template <class T, class Group>
struct GlobalRow {
  const Source<T>& source;
  int64_t begin;

  CALGUIDE_MEMBER GlobalRow(const Source<T>& source, const Group& group, float*)
      : source(source), begin(group.rank() * chunk<T>) {}

  template <class Body>
  CALGUIDE_MEMBER void each(const Body& body) const {
    for (int64_t first = begin; first < source.classes; first += chunk<T> * Group::size) {
      float x[chunk<T>];
      source.load(first, x);
      body(first, x);
    }
  }
};

// what a class is known by: its distance below the maximum, and the exponentials of guidance_math.h
template <class Real>
struct Class {
  Real d, e, e2;
};

template <class Real>
struct Exponentials {
  float max;
  Marginal marginal;
  Real temperature;

  CALGUIDE_MEMBER Class<Real> operator()(float x) const {
    const Real log2_e = static_cast<Real>(1.4426950408889634);
    // a gap beyond the range of floats is only very wide
    const float gap = x - max;
    Class<Real> found;
    found.d = gap < -1e30f ? -1e30f : gap;
    if (marginal == marginal_half) {
      found.e2 = exp2_product(found.d, log2_e / 2);
      found.e = found.e2 * found.e2;
    } else {
      found.e = exp2_product(found.d, log2_e);
      found.e2 = marginal == marginal_general ? exp2_product(found.d, temperature * log2_e) : found.e;
    }
    return found;
  }
};

// where in its chunk the label is, else none of its places
template <class T>
CALGUIDE_DEVICE int place_of(int64_t label, int64_t first) {
  return label >= first && label < first + chunk<T> ? static_cast<int>(label - first) : chunk<T>;
}

// a chunk of the gradient, sixteen bytes at once where it lies so
template <class T>
CALGUIDE_DEVICE void store_chunk(T* grad, int64_t first, int64_t classes, const float (&g)[chunk<T>]) {
  if (first + chunk<T> <= classes && reinterpret_cast<uintptr_t>(grad + first) % 16 == 0) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) store_float(pack.values + j, g[j]);
    *reinterpret_cast<Pack<T>*>(grad + first) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      if (first + j < classes) store_float(grad + first + j, g[j]);
    }
  }
}

template <Summation S>
using RealOf = std::conditional_t<S == sum_of_doubles, double, float>;

template <Summation S, class T, class Group, class Row>
CALGUIDE_DEVICE void guide_row(const GuidanceTask& task, const Group& group, int64_t b, float* shared) {
  using Real = RealOf<S>;
  const GuidanceArguments& arguments = task.arguments;
  const GuidanceSettings& settings = arguments.settings;
  const int64_t classes = arguments.classes, y = arguments.labels[b * arguments.label_stride];
  T* const grad = static_cast<T*>(arguments.grad) + b * classes;
  const T* const logits = static_cast<const T*>(arguments.logits) + b * arguments.row_stride;
  const bool vector = arguments.class_stride == 1 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const Source<T> source = {logits, arguments.class_stride, classes, vector};
  const Row row(source, group, shared);

  float max = absent;
  double census[3] = {};  // finite logits, spoilt ones, and the label's own
  row.each([&](int64_t first, const float(&x)[chunk<T>]) {
    const int own = place_of<T>(y, first);
    float finite = 0.0f, spoilt = 0.0f;
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      finite += x[j] > absent && x[j] < INFINITY ? 1.0f : 0.0f;
      spoilt += x[j] < INFINITY ? 0.0f : 1.0f;
      max = x[j] > max ? x[j] : max;
      if (j == own) census[2] = x[j];
    }
    census[0] += finite;
    census[1] += spoilt;
  });
  max = group.max(max);
  group.sum(census);
  if (census[1] > 0.0 || census[0] == 0.0 || y < 0 || y >= classes) {
    row.each([&](int64_t first, const float(&)[chunk<T>]) {
      float g[chunk<T>];
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) g[j] = NAN;
      store_chunk(grad, first, classes, g);
    });
    if (group.rank() < guidance_statistics) arguments.stats[group.rank() * arguments.batch + b] = NAN;
    return;
  }

  const int64_t n = static_cast<int64_t>(census[0]);
  const Label label = {census[2] > absent, census[2] - max, census[2]};
  const Prior prior = n == classes ? task.prior : make_prior(settings, n, label.present);
  const Exponentials<Real> exponentials = {max, marginal_of(settings.marginal_temperature),
                                           static_cast<Real>(settings.marginal_temperature)};

  double exp_sums[4] = {};
  row.each([&](int64_t first, const float(&x)[chunk<T>]) {
    const int own = place_of<T>(y, first);
    Real s = 0, s2 = 0, ed = 0, sum_d = 0;
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      if (x[j] == absent || j == own) continue;
      const Class<Real> of = exponentials(x[j]);
      s += of.e;
      s2 += of.e2;
      ed += of.e * of.d;
      sum_d += of.d;
    }
    exp_sums[0] += s;
    exp_sums[1] += s2;
    exp_sums[2] += ed;
    exp_sums[3] += sum_d;
  });
  group.sum(exp_sums);
  const ExpSums sums = {exp_sums[0], exp_sums[1], exp_sums[2], exp_sums[3],
                        static_cast<double>(label.present ? n - 1 : n)};
  const RowScalars scalars = row_scalars(settings, prior, label, sums);

  GradientForm<Real> form = {};
  DivergenceShare share;
  const ClassWeight<Real> other = other_weight<Real>(settings, prior, scalars);
  if constexpr (S == sum_of_kls) {
    share = kl_share(settings, prior, label, sums, scalars);
  } else {
    const ClassTerms<Real> own_terms = label_terms<Real>(settings, prior, label, scalars);
    with_divergence<Real>(settings.divergence, [&](auto code) {
      double term_sums[2] = {};
      row.each([&](int64_t first, const float(&x)[chunk<T>]) {
        const int own = place_of<T>(y, first);
        Real w = 0, value = 0;
#pragma unroll
        for (int j = 0; j < chunk<T>; ++j) {
          if (x[j] == absent || j == own) continue;
          const Class<Real> of = exponentials(x[j]);
          const ClassTerms<Real> terms = class_terms<decltype(code)::value>(of.e, of.d, other);
          w += terms.w;
          value += terms.value;
        }
        term_sums[0] += w;
        term_sums[1] += value;
      });
      group.sum(term_sums);
      share = term_share(settings, label, scalars, {term_sums[0], term_sums[1]}, own_terms, form);
      if (!peaks(form, label, scalars)) return;

      double peak_sums[3] = {};
      row.each([&](int64_t first, const float(&x)[chunk<T>]) {
        const int own = place_of<T>(y, first);
#pragma unroll
        for (int j = 0; j < chunk<T>; ++j) {
          if (x[j] == absent || j == own) continue;
          const Class<Real> of = exponentials(x[j]);
          const ClassTerms<Real> terms = class_terms<decltype(code)::value>(of.e, of.d, other);
          const bool peak = of.d == 0;
          peak_sums[0] += peak ? terms.w : Real(0);
          peak_sums[1] += peak ? Real(0) : terms.w;
          peak_sums[2] += peak ? Real(0) : of.e;
        }
      });
      group.sum(peak_sums);
      set_peak(settings, scalars, {peak_sums[0], peak_sums[1], peak_sums[2]}, own_terms, form);
    });
  }
  set_form(settings, label, scalars, share, form);
  if (group.rank() == 0) {
    store_statistics(settings, label, scalars, share.value, arguments.stats, arguments.batch, b);
  }

  const auto write = [&](const auto& terms_of) {
    row.each([&](int64_t first, const float(&x)[chunk<T>]) {
      const int own = place_of<T>(y, first);
      float g[chunk<T>];
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        const Class<Real> of = exponentials(x[j]);
        const Real w = terms_of(of);
        Real value = gradient_of<marginal_general, true, S != sum_of_kls>(form, of.e, of.e2, of.d, w);
        // only powers of p / q overflow
        if (S == sum_of_doubles && form.overflows) {
          value = overflowing_gradient_of(form, exponentials.marginal, of.e, of.e2, of.d, w);
        }
        if (form.has_peak && of.d == 0) value = static_cast<Real>(form.at_peak);
        if (x[j] == absent) value = 0;
        if (j == own) value = static_cast<Real>(form.label);
        g[j] = static_cast<float>(value);
      }
      store_chunk(grad, first, classes, g);
    });
  };
  if constexpr (S == sum_of_kls) {
    write([](const Class<Real>&) { return Real(0); });
  } else {
    with_divergence<Real>(settings.divergence, [&](auto code) {
      write([&](const Class<Real>& of) { return class_terms<decltype(code)::value>(of.e, of.d, other).w; });
    });
  }
}

constexpr int most_rows_a_block = 4;

// LENGTH is the longest row that the registers of a warp hold
template <class T, Summation S, int LENGTH>
__global__ void __launch_bounds__(warp_size* most_rows_a_block) guide_warp_rows(const GuidanceTask task) {
  using Row = RegisterRow<T, WarpGroup, LENGTH>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; b < task.arguments.batch; b += step) {
    guide_row<S, T, WarpGroup, Row>(task, WarpGroup(), b, nullptr);
  }
}

constexpr int block_threads = 512;
using Block = BlockGroup<block_threads>;

template <class T, Summation S, template <class, class> class Row>
__global__ void __launch_bounds__(block_threads) guide_block_rows(const GuidanceTask task) {
  CALGUIDE_SHARED(double, scratch, Block::scratch_length);
  CALGUIDE_DYNAMIC_SHARED(float, shared);
  for (int64_t b = blockIdx.x; b < task.arguments.batch; b += gridDim.x) {
    guide_row<S, T, Block, Row<T, Block>>(task, Block{scratch}, b, shared);
  }
}

constexpr int64_t most_blocks = 0x7fffffff;

template <class T, Summation S, int LENGTH>
static void launch_warp_rows(const GuidanceTask& task, const Place& place) {
  const int64_t batch = task.arguments.batch;
  // few rows are spread over all multiprocessors, one warp a block
  const int rows = batch > 2048 ? most_rows_a_block : 1;
  const int64_t blocks = (batch + rows - 1) / rows;
  const dim3 grid(static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks)), block(warp_size, rows);
  CALGUIDE_LAUNCH((guide_warp_rows<T, S, LENGTH>), grid, block, 0, place.stream(), task);
}

template <class T, Summation S>
static void launch_block_rows(const GuidanceTask& task, const Place& place) {
  const int64_t batch = task.arguments.batch;
  const dim3 grid(static_cast<unsigned>(batch < most_blocks ? batch : most_blocks)), block(block_threads);
  const int64_t bytes = (task.arguments.classes + chunk<T> - 1) / chunk<T> * chunk<T> * sizeof(float);
  const int64_t reserved = Block::scratch_length * sizeof(double) + 1024;
  if (bytes + reserved > Place::attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) {
    CALGUIDE_LAUNCH((guide_block_rows<T, S, GlobalRow>), grid, block, 0, place.stream(), task);
    return;
  }
  const auto kernel = guide_block_rows<T, S, SharedRow>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "reserve shared memory");
  CALGUIDE_LAUNCH((guide_block_rows<T, S, SharedRow>), grid, block, bytes, place.stream(), task);
}

template <class T, Summation S>
static void launch_rows(const GuidanceTask& task, const Place& place) {
  if (task.arguments.classes <= 256) return launch_warp_rows<T, S, 256>(task, place);
  // in double a longer row would not fit the registers
  if constexpr (S != sum_of_doubles) {
    if (task.arguments.classes <= 1024) return launch_warp_rows<T, S, 1024>(task, place);
  }
  launch_block_rows<T, S>(task, place);
}

template <class T>
void launch_guidance_rows(const GuidanceTask& task, const Place& place) {
  switch (divergence_traits(task.arguments.settings.divergence).summation) {
    case sum_of_kls: return launch_rows<T, sum_of_kls>(task, place);
    case sum_of_floats: return launch_rows<T, sum_of_floats>(task, place);
    case sum_of_doubles: return launch_rows<T, sum_of_doubles>(task, place);
  }
}

}  // namespace calguide
