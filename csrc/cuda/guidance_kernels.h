// Logits to guidance gradient and score in one launch: each logit is read once and each gradient written once.
//
// A row belongs to a warp that keeps it in registers, or to a block that keeps it in shared memory, or, where it is too
// long for that, to a block that reads it anew for every pass. One body serves all three: the largest logit, the
// exponentials' sums, the class terms' sums where the divergence has such terms, and the gradient in the form of
// guidance_math.h. A row of registers keeps what the next pass needs; elsewhere it is computed anew, which is cheaper.
#pragma once

#include <type_traits>

#include "cuda/group.h"
#include "cuda/guidance.h"
#include "cuda/place.h"
#include "cuda/rows.h"
#include "cuda/tuning.h"

namespace calguide {

// a class's distance below the maximum; beyond the range of floats it is only very far
constexpr float farthest = -1e30f;
template <class Real>
CALGUIDE_DEVICE Real distance(float x, float max) {
  return fmax(static_cast<Real>(x) - max, static_cast<Real>(farthest));
}

template <class Real>
struct Exponentials {
  Real e, e2;
};

// A value of which the compiler does not know that it had it before: what it has made of it is made anew rather than
// kept in registers.
template <class Real>
CALGUIDE_DEVICE Real anew(Real value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Real) == sizeof(float)) asm volatile("" : "+f"(value));
#endif
  return value;
}

// that from which the others are had, and which is kept from pass to pass
template <Marginal M, class Real>
CALGUIDE_DEVICE Real first_exponential(Real d) {
  const Real log2_e = static_cast<Real>(1.4426950408889634);
  return exp2_product(d, M == marginal_half ? log2_e / 2 : log2_e);
}

template <Marginal M, class Real>
CALGUIDE_DEVICE Exponentials<Real> exponentials(Real first, Real d, Real temperature) {
  if constexpr (M == marginal_half) return {first * first, first};
  if constexpr (M == marginal_same) return {first, first};
  return {first, exp2_product(d, temperature * static_cast<Real>(1.4426950408889634))};
}

template <Summation S>
using RealOf = std::conditional_t<S == sum_of_doubles, double, float>;

// the arguments in the precision that the divergence needs, and what is the same for every row
template <class Real>
struct Task {
  GuidanceArguments arguments;
  GuidanceSettings<Real> settings;
  Prior<Real> prior;  // where no class is masked
  bool has_log;       // whether the gradient has a term in e d
};

// What the loops over a row need not ask of each class: how e2 is had, whether all logits are tame, so that none is
// masked, and whether the gradient has a term in e d.
template <Marginal M, bool TAME, bool HAS_LOG>
struct Path {
  static constexpr Marginal marginal = M;
  static constexpr bool tame = TAME, has_log = HAS_LOG;
};

// Calls body with the Path of a row: that of the usual rows, or, for all others and in double, where code is long, the
// one that asks for everything.
template <class Real, class Body>
CALGUIDE_DEVICE void with_path(const Task<Real>& task, bool tame, const Body& body) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    const Marginal marginal = marginal_of(task.settings.marginal_temperature);
    const bool has_log = task.has_log;
    if (tame && marginal == marginal_half) {
      return has_log ? body(Path<marginal_half, true, true>()) : body(Path<marginal_half, true, false>());
    }
    if (tame && marginal == marginal_same) {
      return has_log ? body(Path<marginal_same, true, true>()) : body(Path<marginal_same, true, false>());
    }
  }
  body(Path<marginal_general, false, true>());
}

// How many of the other classes are finite, or -1 if one is NaN or infinite.
template <class T, class Group, class Row, class Index>
CALGUIDE_DEVICE int64_t finite_classes(const Row& row, const Group& group, const Source<T, Index>& source) {
  typename Row::template Sum<float> census[2] = {};  // finite, spoilt
  row.each([&](Index first, const float (&x)[chunk<T>], int) {
    for (int j = 0; j < chunk<T>; ++j) {
      if (!within<Index>(first + j, source.classes) || first + j == source.label) continue;
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

// Whether a class is the peak of a row that has one (see peaks): all others together have less than half of its e = 1.
template <class Real>
CALGUIDE_DEVICE bool is_peak(Real e) {
  return e > static_cast<Real>(0.5);
}

// what is known of a row before its passes
template <class Real>
struct RowStart {
  int64_t b, y;
  float max;
  Label<Real> label;
  Prior<Real> prior;
};

// The passes over a row. All of them are on one path, so that what one has made of a class serves the next as far as
// registers go.
template <class Path, Summation S, class T, class Group, class Row>
CALGUIDE_DEVICE void guide_classes(const Task<RealOf<S>>& task, const Group& group, const Row& row,
                                   const RowStart<RealOf<S>>& start) {
  using Real = RealOf<S>;
  using Sum = typename Row::template Sum<Real>;
  using Index = typename Row::Index;
  const GuidanceArguments& arguments = task.arguments;
  const GuidanceSettings<Real>& settings = task.settings;
  const Label<Real>& label = start.label;
  const Prior<Real>& prior = start.prior;
  const float max = start.max;

  // of a class, where it is neither the label nor masked nor beyond the row
  const auto present = [](float x, Real d) { return Path::tame ? d > farthest : x > absent; };
  constexpr bool keeps = Row::keeps && Path::tame;
  const auto distance_of = [&](float x) { return distance<Real>(keeps ? x : anew(x), max); };
  typename Row::template Kept<Real> firsts = {};
  const auto exponentials_of = [&](int c, int j, Real d) {
    if constexpr (!keeps) firsts.of[c][j] = first_exponential<Path::marginal>(d);
    return exponentials<Path::marginal>(anew(firsts.of[c][j]), d, settings.marginal_temperature);
  };

  // the sum of distances is for the reverse KL alone
  constexpr int sum_count = S == sum_of_kls ? 4 : 3;
  Sum exp_sums[sum_count] = {};
  row.each([&](Index, const float (&x)[chunk<T>], int c) {
    Real s = 0, s2 = 0, ed = 0, sum_d = 0;
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      const Real d = distance_of(x[j]);
      firsts.of[c][j] = first_exponential<Path::marginal>(d);
      const Exponentials<Real> of = exponentials<Path::marginal>(firsts.of[c][j], d, settings.marginal_temperature);
      s += of.e;
      s2 += of.e2;
      ed += of.e * d;
      // finite, so that this is one instruction less than a choice
      sum_d += d * (present(x[j], d) ? Real(1) : Real(0));
    }
    exp_sums[0] += s;
    exp_sums[1] += s2;
    exp_sums[2] += ed;
    if constexpr (sum_count == 4) exp_sums[3] += sum_d;
  });
  group.sum(exp_sums);
  ExpSums<Real> sums = {static_cast<Real>(exp_sums[0]), static_cast<Real>(exp_sums[1]), static_cast<Real>(exp_sums[2]),
                        Real(0), label.present ? prior.n - 1 : prior.n};
  if constexpr (sum_count == 4) sums.d = static_cast<Real>(exp_sums[3]);
  const RowScalars<Real> scalars = row_scalars(settings, prior, label, sums);

  T* const grad = static_cast<T*>(arguments.grad) + start.b * arguments.classes;
  const Target<T, Index> target(grad, row.begin, static_cast<Index>(arguments.classes));
  GradientForm<Real> form = {};
  // w_of(c, j, d, e): the class term of the gradient
  const auto finish = [&](const DivergenceShare<Real>& share, const auto& w_of) {
    set_form(settings, label, scalars, share, form);
    if (group.rank() == 0) {
      store_statistics(settings, label, scalars, share.value, arguments.stats, arguments.batch, start.b);
    }
    row.each([&](Index first, const float (&x)[chunk<T>], int c) {
      float g[chunk<T>];
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        const Real d = distance_of(x[j]);
        const Exponentials<Real> of = exponentials_of(c, j, d);
        const Real w = w_of(c, j, d, of.e);
        Real value = gradient_of<Path::marginal, Path::has_log, S != sum_of_kls>(form, of.e, of.e2, d, w);
        // only powers of p / q overflow
        if (S == sum_of_doubles && form.overflows) {
          value = overflowing_gradient_of(form, Path::marginal, of.e, of.e2, d, w);
        }
        if (S != sum_of_kls && form.has_peak && is_peak(of.e)) value = form.at_peak;
        g[j] = Path::tame || x[j] > absent ? static_cast<float>(value) : 0.0f;
      }
      target.store(first, g);
    });
    // by the thread that has written its chunk
    if (row.holds(static_cast<Index>(start.y))) {
      store_float(grad + start.y, static_cast<float>(form.label));
    }
  };

  if constexpr (S == sum_of_kls) {
    finish(kl_share(settings, prior, label, sums, scalars), [](int, int, Real, Real) { return Real(0); });
  } else {
    const ClassWeight<Real> other = other_weight<Real>(settings, prior, scalars);
    const ClassTerms<Real> own = label_terms<Real>(settings, prior, label, scalars);
    with_divergence<Real>(settings.divergence, [&](auto code) {
      constexpr int D = decltype(code)::value;
      // in the registers of the distances, where these are done with
      constexpr bool keeps_w = keeps && !Path::has_log;
      typename Row::template Kept<Real> ws = {};
      const auto w_of = [&](int c, int j, Real d, Real e) {
        return keeps_w ? ws.of[c][j] : class_terms<D>(anew(e), anew(d), other).w;
      };
      Sum term_sums[2] = {};
      row.each([&](Index, const float (&x)[chunk<T>], int c) {
#pragma unroll
        for (int j = 0; j < chunk<T>; ++j) {
          const Real d = distance_of(x[j]);
          const ClassTerms<Real> terms = class_terms<D>(exponentials_of(c, j, d).e, d, other);
          ws.of[c][j] = terms.w;
          if (present(x[j], d)) {
            term_sums[0] += terms.w;
            term_sums[1] += terms.value;
          }
        }
      });
      group.sum(term_sums);
      const TermSums<Real> others = {static_cast<Real>(term_sums[0]), static_cast<Real>(term_sums[1])};
      const DivergenceShare<Real> share = term_share(settings, label, scalars, others, own, form);
      if (peaks(form, label, scalars)) {
        Sum peak_sums[3] = {};
        row.each([&](Index, const float (&x)[chunk<T>], int c) {
#pragma unroll
          for (int j = 0; j < chunk<T>; ++j) {
            const Real d = distance_of(x[j]), e = exponentials_of(c, j, d).e, w = w_of(c, j, d, e);
            const bool peak = is_peak(e);
            if (!Path::tame && !(x[j] > absent)) continue;
            peak_sums[0] += peak ? w : Real(0);
            peak_sums[1] += peak ? Real(0) : w;
            peak_sums[2] += peak ? Real(0) : e;
          }
        });
        group.sum(peak_sums);
        const PeakSums<Real> peak = {static_cast<Real>(peak_sums[0]), static_cast<Real>(peak_sums[1]),
                                     static_cast<Real>(peak_sums[2])};
        set_peak(settings, scalars, peak, own, form);
      }
      finish(share, w_of);
    });
  }
}

template <Summation S, class T, class Group, class Row>
CALGUIDE_DEVICE void guide_row(const Task<RealOf<S>>& task, const Group& group, int64_t b, float* shared) {
  using Real = RealOf<S>;
  const GuidanceArguments& arguments = task.arguments;
  const int64_t y = arguments.labels[b * arguments.label_stride];
  if (y < 0 || y >= arguments.classes) return fill_invalid<T>(arguments, group, b);

  const Source<T, typename Row::Index> source(arguments, b, y, Row::capacity);
  const float label_x = load_float(source.logits[y * source.stride]);
  const Row row(source, group, shared);
  const bool all_tame = !group.any(!tame(row.probe) || !tame(label_x * tame_scale));
  const float max = group.max(label_x > row.max ? label_x : row.max);
  const bool has_label = label_x > -INFINITY;
  const Label<Real> label = {has_label, has_label ? distance<Real>(label_x, max) : -INFINITY, label_x};
  RowStart<Real> start = {b, y, max, label, task.prior};
  if (!all_tame) {
    const int64_t others = finite_classes(row, group, source);
    const bool spoilt = others < 0 || !(label_x < INFINITY) || (others == 0 && !label.present);
    if (spoilt) return fill_invalid<T>(arguments, group, b);
    start.prior = make_prior(task.settings, static_cast<Real>(others + (label.present ? 1 : 0)), label.present);
  }
  with_path(task, all_tame, [&](auto path) { guide_classes<decltype(path), S, T>(task, group, row, start); });
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
  const bool has_log =
      divergence_traits(arguments.settings.divergence).forward_kl || arguments.settings.entropy_weight != 0.0;
  const Task<Real> task = {arguments, settings_in<Real>(arguments.settings), prior_in<Real>(prior), has_log};
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
