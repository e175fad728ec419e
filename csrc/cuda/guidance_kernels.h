// Logits to guidance gradient and score in one launch: each logit is read once and each gradient written once.
//
// A row belongs to a warp that keeps it in registers, or to a block that keeps it in shared memory, or, where it is too
// long for that, to a block that reads it anew for every pass. One body serves all three: the largest logit, the
// exponentials' sums, the class terms' sums where the divergence has such terms, and the gradient in the form of
// guidance_math.h. Exponentials are computed anew in every pass, which is cheaper than to keep them.
#pragma once

#include <type_traits>

#include "cuda/group.h"
#include "cuda/guidance.h"
#include "cuda/place.h"
#include "storage.h"

namespace calguide {

// stands for the label and for places beyond the row: like a masked class, it adds nothing
constexpr float absent = -INFINITY;

// sixteen bytes of a row at a time
template <class T>
constexpr int chunk = 16 / sizeof(T);

template <class T>
struct alignas(16) Pack {
  T values[chunk<T>];
};

// where in the chunk that begins at `first` the label is, else none of its places
template <class T>
CALGUIDE_DEVICE int place_in_chunk(int64_t label, int64_t first) {
  return label >= first && label < first + chunk<T> ? static_cast<int>(label - first) : chunk<T>;
}

// One row of the logits, without its label. Chunks lie on boundaries of sixteen bytes where classes are neighbours, so
// that the first of them may begin before the row, by `lead` places.
template <class T>
struct Source {
  const T* logits;
  int64_t stride, classes, label;
  int lead;
  bool vector;

  // capacity: places that a row has room for
  CALGUIDE_MEMBER Source(const GuidanceArguments& a, int64_t b, int64_t label, int64_t capacity)
      : logits(static_cast<const T*>(a.logits) + b * a.row_stride),
        stride(a.class_stride),
        classes(a.classes),
        label(label),
        lead(static_cast<int>(reinterpret_cast<uintptr_t>(logits) / sizeof(T) % chunk<T>)),
        vector(stride == 1 && classes + lead <= capacity) {
    if (!vector) lead = 0;
  }

  CALGUIDE_MEMBER bool whole(int64_t first) const { return first >= 0 && first + chunk<T> <= classes; }

  // A chunk as it is in memory; zeros unless all of it is read at once.
  CALGUIDE_MEMBER Pack<T> fetch(int64_t first) const {
    Pack<T> pack = {};
    if (vector && whole(first)) pack = *reinterpret_cast<const Pack<T>*>(logits + first);
    return pack;
  }

  // What fetch has left, and all in float: the other classes, and what they and the label show of the row.
  CALGUIDE_MEMBER void read(Pack<T>& pack, int64_t first, float (&x)[chunk<T>], float& max, float& finite_probe) const {
    unsigned others = ~0u;
    if (!vector || !whole(first)) {
      others = 0;
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        if (first + j < 0 || first + j >= classes) continue;
        pack.values[j] = logits[(first + j) * stride];
        others |= 1u << j;
      }
    }
    others &= ~(1u << place_in_chunk<T>(label, first));
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      const float value = load_float(pack.values[j]);
      // NaN from here on if a logit is not finite
      finite_probe += value * 0.0f;
      x[j] = (others >> j & 1u) != 0 ? value : absent;
      max = x[j] > max ? x[j] : max;
    }
  }

  // Calls body(first, x) for every chunk of a thread, so many of them on their way from memory at once.
  template <int AT_ONCE, class Body>
  CALGUIDE_MEMBER void each(int64_t begin, int64_t step, float& max, float& finite_probe, const Body& body) const {
    for (int64_t first = begin; first < classes; first += AT_ONCE * step) {
      Pack<T> packs[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) packs[k] = fetch(first + k * step);
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        float x[chunk<T>];
        read(packs[k], first + k * step, x, max, finite_probe);
        body(first + k * step, x);
      }
    }
  }
};

// Where a thread keeps its chunks of a row: each(body) calls body(first class, the chunk's logits) for every one of
// them. Sum is what it adds a row's terms up in: float where it has few of them. A row also knows the largest of the
// thread's logits, and whether all are finite.

template <class T, class Group, int LENGTH>
struct RegisterRow {
  template <class Real>
  using Sum = Real;
  static constexpr int64_t capacity = LENGTH, step = chunk<T> * Group::size;
  static constexpr int chunks = LENGTH / step;
  float x[chunks][chunk<T>];
  int64_t begin;
  float max = absent, finite_probe = 0.0f;

  CALGUIDE_MEMBER RegisterRow(const Source<T>& source, const Group& group, float*)
      : begin(group.rank() * chunk<T> - source.lead) {
    Pack<T> packs[chunks];
#pragma unroll
    for (int c = 0; c < chunks; ++c) packs[c] = source.fetch(begin + c * step);
#pragma unroll
    for (int c = 0; c < chunks; ++c) source.read(packs[c], begin + c * step, x[c], max, finite_probe);
  }

  template <class Body>
  CALGUIDE_MEMBER void each(const Body& body) const {
#pragma unroll
    for (int c = 0; c < chunks; ++c) body(begin + c * step, x[c]);
  }
};

// A thread reads back only what it wrote itself, so that this needs no barrier; sixteen bytes at a time, those of
// neighbouring threads side by side.
template <class T, class Group>
struct SharedRow {
  template <class>
  using Sum = double;
  static constexpr int64_t capacity = INT64_MAX, step = chunk<T> * Group::size;
  static constexpr int packs = chunk<T> / 4, at_once = 4;
  Pack<float>* own;
  int64_t begin, classes;
  float max = absent, finite_probe = 0.0f;

  // shared memory that a row of so many classes takes, wherever its first chunk begins
  static int64_t bytes(int64_t classes) {
    const int64_t round = at_once * step;
    return (classes + chunk<T> - 1 + round - 1) / round * round * sizeof(float);
  }

  CALGUIDE_MEMBER SharedRow(const Source<T>& source, const Group& group, float* shared)
      : own(reinterpret_cast<Pack<float>*>(shared) + group.rank()),
        begin(group.rank() * chunk<T> - source.lead),
        classes(source.classes) {
    Pack<float>* to = own;
    source.template each<at_once>(begin, step, max, finite_probe, [&](int64_t, const float (&x)[chunk<T>]) {
#pragma unroll
      for (int k = 0; k < packs; ++k, to += Group::size) *to = {x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]};
    });
  }

  template <class Body>
  CALGUIDE_MEMBER void each(const Body& body) const {
    const Pack<float>* from = own;
    for (int64_t first = begin; first < classes; first += step) {
      float x[chunk<T>];
#pragma unroll
      for (int k = 0; k < packs; ++k, from += Group::size) {
        const Pack<float> pack = *from;
#pragma unroll
        for (int j = 0; j < 4; ++j) x[4 * k + j] = pack.values[j];
      }
      body(first, x);
    }
  }
};

template <class T, class Group>
struct GlobalRow {
  template <class>
  using Sum = double;
  static constexpr int64_t capacity = INT64_MAX, step = chunk<T> * Group::size;
  static constexpr int at_once = 2;
  const Source<T>& source;
  int64_t begin;
  float max = absent, finite_probe = 0.0f;

  CALGUIDE_MEMBER GlobalRow(const Source<T>& source, const Group& group, float*)
      : source(source), begin(group.rank() * chunk<T> - source.lead) {
    source.template each<at_once>(begin, step, max, finite_probe, [](int64_t, const float (&)[chunk<T>]) {});
  }

  template <class Body>
  CALGUIDE_MEMBER void each(const Body& body) const {
    float seen = absent, probed = 0.0f;
    source.template each<at_once>(begin, step, seen, probed, body);
  }
};

// a class's distance below the maximum; beyond the range of floats it is only very far
template <class Real>
CALGUIDE_DEVICE Real distance(float x, float max) {
  const Real d = static_cast<Real>(x) - max;
  return d < -1e30f ? -1e30f : d;
}

template <class Real>
struct Exponentials {
  Real e, e2;
};

template <Marginal M, class Real>
CALGUIDE_DEVICE Exponentials<Real> exponentials(Real d, Real temperature) {
  const Real log2_e = static_cast<Real>(1.4426950408889634);
  if constexpr (M == marginal_half) {
    const Real half = exp2_product(d, log2_e / 2);
    return {half * half, half};
  } else {
    const Real e = exp2_product(d, log2_e);
    return {e, M == marginal_general ? exp2_product(d, temperature * log2_e) : e};
  }
}

template <Marginal M>
struct MarginalCode {
  static constexpr Marginal value = M;
};

// Calls body with the MarginalCode of the given marginal; in double, where code is long, always with the general one.
template <class Real, class Body>
CALGUIDE_DEVICE void with_marginal(Marginal marginal, const Body& body) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    return body(MarginalCode<marginal_general>());
  } else {
    switch (marginal) {
      case marginal_same: return body(MarginalCode<marginal_same>());
      case marginal_half: return body(MarginalCode<marginal_half>());
      default: return body(MarginalCode<marginal_general>());
    }
  }
}

// a chunk of the gradient, sixteen bytes at once where it lies so
template <class T>
CALGUIDE_DEVICE void store_chunk(T* grad, int64_t first, int64_t classes, const float (&g)[chunk<T>]) {
  if (first >= 0 && first + chunk<T> <= classes && reinterpret_cast<uintptr_t>(grad + first) % 16 == 0) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) store_float(pack.values + j, g[j]);
    *reinterpret_cast<Pack<T>*>(grad + first) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      if (first + j >= 0 && first + j < classes) store_float(grad + first + j, g[j]);
    }
  }
}

// How many of the other classes are finite, or -1 if one is NaN or infinite.
template <class T, class Group, class Row>
CALGUIDE_DEVICE int64_t finite_classes(const Row& row, const Group& group, const Source<T>& source) {
  typename Row::template Sum<float> census[2] = {};  // finite, spoilt
  row.each([&](int64_t first, const float (&x)[chunk<T>]) {
    for (int j = 0; j < chunk<T>; ++j) {
      if (first + j < 0 || first + j >= source.classes || first + j == source.label) continue;
      census[0] += x[j] > -INFINITY && x[j] < INFINITY ? 1.0f : 0.0f;
      census[1] += x[j] < INFINITY ? 0.0f : 1.0f;
    }
  });
  group.sum(census);
  return census[1] > 0 ? -1 : static_cast<int64_t>(census[0]);
}

template <class T, class Group>
CALGUIDE_DEVICE void fill_invalid(const GuidanceArguments& arguments, const Group& group, int64_t b) {
  T* const grad = static_cast<T*>(arguments.grad) + b * arguments.classes;
  for (int64_t i = group.rank(); i < arguments.classes; i += Group::size) store_float(grad + i, NAN);
  if (group.rank() < guidance_statistics) arguments.stats[group.rank() * arguments.batch + b] = NAN;
}

template <Summation S>
using RealOf = std::conditional_t<S == sum_of_doubles, double, float>;

// the arguments in the precision that the divergence needs, and what is the same for every row
template <class Real>
struct Task {
  GuidanceArguments arguments;
  GuidanceSettings<Real> settings;
  Prior<Real> prior;  // where no class is masked
};

template <Summation S, class T, class Group, class Row>
CALGUIDE_DEVICE void guide_row(const Task<RealOf<S>>& task, const Group& group, int64_t b, float* shared) {
  using Real = RealOf<S>;
  using Sum = typename Row::template Sum<Real>;
  const GuidanceArguments& arguments = task.arguments;
  const GuidanceSettings<Real>& settings = task.settings;
  const int64_t classes = arguments.classes, y = arguments.labels[b * arguments.label_stride];
  if (y < 0 || y >= classes) return fill_invalid<T>(arguments, group, b);

  const Source<T> source(arguments, b, y, Row::capacity);
  const float label_x = load_float(source.logits[y * source.stride]);
  const Row row(source, group, shared);
  const bool all_finite = !group.any(row.finite_probe != 0.0f || label_x * 0.0f != 0.0f);
  const float max = group.max(label_x > row.max ? label_x : row.max);
  const bool has_label = label_x > -INFINITY;
  const Label<Real> label = {has_label, has_label ? distance<Real>(label_x, max) : -INFINITY, label_x};
  Prior<Real> prior = task.prior;
  if (!all_finite) {
    const int64_t others = finite_classes(row, group, source);
    const bool spoilt = others < 0 || !(label_x < INFINITY) || (others == 0 && !label.present);
    if (spoilt) return fill_invalid<T>(arguments, group, b);
    prior = make_prior(settings, static_cast<Real>(others + (label.present ? 1 : 0)), label.present);
  }

  const Marginal marginal = marginal_of(settings.marginal_temperature);
  Sum exp_sums[4] = {};
  with_marginal<Real>(marginal, [&](auto code) {
    row.each([&](int64_t, const float (&x)[chunk<T>]) {
      Real s = 0, s2 = 0, ed = 0, sum_d = 0;
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        const Real d = distance<Real>(x[j], max);
        const Exponentials<Real> of = exponentials<decltype(code)::value>(d, settings.marginal_temperature);
        s += of.e;
        s2 += of.e2;
        ed += of.e * d;
        sum_d += x[j] > absent ? d : Real(0);
      }
      exp_sums[0] += s;
      exp_sums[1] += s2;
      exp_sums[2] += ed;
      exp_sums[3] += sum_d;
    });
  });
  group.sum(exp_sums);
  const ExpSums<Real> sums = {static_cast<Real>(exp_sums[0]), static_cast<Real>(exp_sums[1]),
                              static_cast<Real>(exp_sums[2]), static_cast<Real>(exp_sums[3]),
                              label.present ? prior.n - 1 : prior.n};
  const RowScalars<Real> scalars = row_scalars(settings, prior, label, sums);

  GradientForm<Real> form = {};
  DivergenceShare<Real> share;
  const ClassWeight<Real> other = other_weight<Real>(settings, prior, scalars);
  if constexpr (S == sum_of_kls) {
    share = kl_share(settings, prior, label, sums, scalars);
  } else {
    const ClassTerms<Real> own = label_terms<Real>(settings, prior, label, scalars);
    with_divergence<Real>(settings.divergence, [&](auto code) {
      constexpr int D = decltype(code)::value;
      // calls body(terms, d, e) for every class but the label
      const auto each_term = [&](const auto& body) {
        row.each([&](int64_t, const float (&x)[chunk<T>]) {
#pragma unroll
          for (int j = 0; j < chunk<T>; ++j) {
            const Real d = distance<Real>(x[j], max), e = exponentials<marginal_same>(d, Real(1)).e;
            if (x[j] > absent) body(class_terms<D>(e, d, other), d, e);
          }
        });
      };
      Sum term_sums[2] = {};
      each_term([&](const ClassTerms<Real>& terms, Real, Real) {
        term_sums[0] += terms.w;
        term_sums[1] += terms.value;
      });
      group.sum(term_sums);
      const TermSums<Real> others = {static_cast<Real>(term_sums[0]), static_cast<Real>(term_sums[1])};
      share = term_share(settings, label, scalars, others, own, form);
      if (!peaks(form, label, scalars)) return;

      Sum peak_sums[3] = {};
      each_term([&](const ClassTerms<Real>& terms, Real d, Real e) {
        const bool peak = d == 0;
        peak_sums[0] += peak ? terms.w : Real(0);
        peak_sums[1] += peak ? Real(0) : terms.w;
        peak_sums[2] += peak ? Real(0) : e;
      });
      group.sum(peak_sums);
      const PeakSums<Real> peak = {static_cast<Real>(peak_sums[0]), static_cast<Real>(peak_sums[1]),
                                   static_cast<Real>(peak_sums[2])};
      set_peak(settings, scalars, peak, own, form);
    });
  }
  set_form(settings, label, scalars, share, form);
  if (group.rank() == 0) {
    store_statistics(settings, label, scalars, share.value, arguments.stats, arguments.batch, b);
  }

  T* const grad = static_cast<T*>(arguments.grad) + b * classes;
  const auto write = [&](auto of_marginal, const auto& w_of) {
    constexpr Marginal M = decltype(of_marginal)::value;
    row.each([&](int64_t first, const float (&x)[chunk<T>]) {
      float g[chunk<T>];
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        const Real d = distance<Real>(x[j], max);
        const Exponentials<Real> of = exponentials<M>(d, settings.marginal_temperature);
        const Real w = w_of(of.e, d);
        Real value = gradient_of<M, true, S != sum_of_kls>(form, of.e, of.e2, d, w);
        // only powers of p / q overflow
        if (S == sum_of_doubles && form.overflows) value = overflowing_gradient_of(form, M, of.e, of.e2, d, w);
        if (S != sum_of_kls && form.has_peak && d == 0) value = form.at_peak;
        g[j] = x[j] > absent ? static_cast<float>(value) : 0.0f;
      }
      const int own = place_in_chunk<T>(y, first);
      if (own < chunk<T>) {
#pragma unroll
        for (int j = 0; j < chunk<T>; ++j) g[j] = j == own ? static_cast<float>(form.label) : g[j];
      }
      store_chunk(grad, first, classes, g);
    });
  };
  with_marginal<Real>(marginal, [&](auto of_marginal) {
    if constexpr (S == sum_of_kls) {
      write(of_marginal, [](Real, Real) { return Real(0); });
    } else {
      with_divergence<Real>(settings.divergence, [&](auto code) {
        write(of_marginal, [&](Real e, Real d) { return class_terms<decltype(code)::value>(e, d, other).w; });
      });
    }
  });
}

constexpr int most_rows_a_block = 4;

// LENGTH is the longest row that the registers of a warp hold
template <class T, Summation S, int LENGTH>
__global__ void __launch_bounds__(warp_size* most_rows_a_block) guide_warp_rows(const Task<RealOf<S>> task) {
  using Row = RegisterRow<T, WarpGroup, LENGTH>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; b < task.arguments.batch; b += step) {
    guide_row<S, T, WarpGroup, Row>(task, WarpGroup(), b, nullptr);
  }
}

constexpr int block_threads = 256;
using RowBlock = BlockGroup<block_threads>;

template <class T, Summation S, template <class, class> class Row>
__global__ void __launch_bounds__(block_threads, 1) guide_block_rows(const Task<RealOf<S>> task) {
  CALGUIDE_SHARED(double, scratch, RowBlock::scratch_length);
  CALGUIDE_DYNAMIC_SHARED(float, shared);
  for (int64_t b = blockIdx.x; b < task.arguments.batch; b += gridDim.x) {
    guide_row<S, T, RowBlock, Row<T, RowBlock>>(task, RowBlock{scratch}, b, shared);
  }
}

constexpr int64_t most_blocks = 0x7fffffff;

template <class T, Summation S, int LENGTH>
static void launch_warp_rows(const Task<RealOf<S>>& task, const Place& place) {
  const int64_t batch = task.arguments.batch;
  // few rows are spread over all multiprocessors, one warp a block
  const int rows = batch > 2048 ? most_rows_a_block : 1;
  const int64_t blocks = (batch + rows - 1) / rows;
  const dim3 grid(static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks)), block(warp_size, rows);
  CALGUIDE_LAUNCH((guide_warp_rows<T, S, LENGTH>), grid, block, 0, place.stream(), task);
}

template <class T, Summation S>
static void launch_block_rows(const Task<RealOf<S>>& task, const Place& place) {
  const int64_t batch = task.arguments.batch;
  const dim3 grid(static_cast<unsigned>(batch < most_blocks ? batch : most_blocks)), block(block_threads);
  const int64_t bytes = SharedRow<T, RowBlock>::bytes(task.arguments.classes);
  // beside what the kernel has of its own, and the system
  const int64_t most = place.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) -
                       static_cast<int64_t>(RowBlock::scratch_length * sizeof(double)) - 1024;
  if (bytes > most) {
    CALGUIDE_LAUNCH((guide_block_rows<T, S, GlobalRow>), grid, block, 0, place.stream(), task);
    return;
  }
  const auto kernel = guide_block_rows<T, S, SharedRow>;
  // always the most, so that no call takes away what another one needs
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)),
        "reserve shared memory");
  CALGUIDE_LAUNCH((guide_block_rows<T, S, SharedRow>), grid, block, bytes, place.stream(), task);
}

template <class T, Summation S>
static void launch_rows(const GuidanceArguments& arguments, const Place& place) {
  using Real = RealOf<S>;
  const Prior<double> prior = make_prior(arguments.settings, static_cast<double>(arguments.classes), true);
  const Task<Real> task = {arguments, settings_in<Real>(arguments.settings), prior_in<Real>(prior)};
  if (arguments.classes <= 256) return launch_warp_rows<T, S, 256>(task, place);
  // in double a longer row would not fit the registers
  if constexpr (S != sum_of_doubles) {
    if (arguments.classes <= 1024) return launch_warp_rows<T, S, 1024>(task, place);
  }
  launch_block_rows<T, S>(task, place);
}

template <class T>
void launch_guidance_rows(const GuidanceArguments& arguments, const Place& place) {
  switch (divergence_traits(arguments.settings.divergence).summation) {
    case sum_of_kls: return launch_rows<T, sum_of_kls>(arguments, place);
    case sum_of_floats: return launch_rows<T, sum_of_floats>(arguments, place);
    case sum_of_doubles: return launch_rows<T, sum_of_doubles>(arguments, place);
  }
}

}  // namespace calguide
