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
#include "cuda/rows.h"
#include "cuda/tuning.h"

namespace calguide {

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

constexpr int most_rows_a_block = CALGUIDE_GUIDE_WARPS;

// LENGTH is the longest row that the registers of a warp hold
template <class T, Summation S, int LENGTH>
__global__ void __launch_bounds__(warp_size* most_rows_a_block, S == sum_of_doubles ? 0 : CALGUIDE_GUIDE_WARP_BLOCKS)
    guide_warp_rows(const Task<RealOf<S>> task) {
  using Row = RegisterRow<T, WarpGroup, LENGTH>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; b < task.arguments.batch; b += step) {
    guide_row<S, T, WarpGroup, Row>(task, WarpGroup(), b, nullptr);
  }
}

constexpr int block_threads = CALGUIDE_GUIDE_THREADS;
using RowBlock = BlockGroup<block_threads>;

template <class T, Summation S, template <class, class> class Row>
__global__ void __launch_bounds__(block_threads, S == sum_of_doubles ? 1 : CALGUIDE_GUIDE_BLOCKS)
    guide_block_rows(const Task<RealOf<S>> task) {
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
  const int rows = batch > CALGUIDE_GUIDE_MANY_ROWS ? most_rows_a_block : 1;
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
  if (bytes > most || bytes > CALGUIDE_GUIDE_SHARED_BYTES) {
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
    constexpr int most = CALGUIDE_GUIDE_WARP_CLASSES;
    if (arguments.classes <= most) return launch_warp_rows<T, S, most>(task, place);
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
