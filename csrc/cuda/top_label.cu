// Logits to the confidence in the top class, and back: each logit read once, each gradient written once.
//
// A row belongs to a thread, a warp or a block, by its length. A thread sums the exponentials of its logits relative to
// the largest that it has seen so far, so that it needs to keep none of them.
#include "cuda/top_label.h"

#include "cuda/place.h"
#include "cuda/rows.h"

namespace calguide {
namespace {

constexpr int64_t no_label = -1;
constexpr float log2_e = 1.4426950408889634f;
// chunks on their way from memory at once
constexpr int at_once = 2;

// from which exponentials are measured: where all logits are masked, any number
CALGUIDE_DEVICE float origin(float max) { return max > absent ? max : 0.0f; }

template <class T, class Group>
CALGUIDE_DEVICE void label_row(const TopLabelArguments& a, const Group& group, int64_t b) {
  const Source<T> source(a, b, no_label, INT64_MAX);
  float seen = absent, probe = 0.0f, own_max = absent;
  double own_sum = 0.0;
  int64_t own_top = 0;
  // seen is the largest up to the chunk that is looked at
  const auto add = [&](int64_t first, const float (&x)[chunk<T>]) {
    if (seen > own_max) {
      own_sum *= exp2_product(own_max - seen, log2_e);
      own_max = seen;
      bool found = false;
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        if (!found && x[j] == seen) own_top = first + j;
        found = found || x[j] == seen;
      }
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) sum += exp2_product(x[j] - origin(own_max), log2_e);
    own_sum += sum;
  };
  source.template each<at_once>(group.rank() * chunk<T> - source.lead, chunk<T> * Group::size, seen, probe, add);

  const float max = group.max(own_max);
  double sum[1] = {own_sum * exp2_product(own_max - origin(max), log2_e)};
  group.sum(sum);
  // the first of equal ones; a double holds any place
  const int64_t top = static_cast<int64_t>(-group.max(own_max == max ? -static_cast<double>(own_top) : -INFINITY));
  if (group.rank() != 0) return;
  const int64_t label = a.labels[b * a.label_stride];
  // not the sum of a row with NaN or an infinite largest logit, which is NaN, nor that of a masked one, which is 0
  const bool valid = sum[0] > 0.0 && label >= 0 && label < a.classes;
  a.confidence[b] = valid ? static_cast<float>(1.0 / sum[0]) : NAN;
  a.top[b] = top;
  a.correct[b] = valid && top == label;
}

// g confidence (1[i = top] - p_i), with p_i = exp(f_i - f_top) confidence
template <class T, class Group>
CALGUIDE_DEVICE void pull_row(const TopLabelBackwardArguments& a, const Group& group, int64_t b) {
  const Source<T> source(a, b, no_label, INT64_MAX);
  T* const grad = static_cast<T*>(a.grad) + b * a.classes;
  const int64_t top = a.top[b];
  const float max = load_float(source.logits[top * source.stride]), p = a.confidence[b];
  const float scale = a.grad_confidence[b * a.grad_stride] * p;
  const int64_t begin = group.rank() * chunk<T> - source.lead;
  const Target<T, int64_t> target(grad, begin, a.classes);
  float seen = absent, probe = 0.0f;
  const auto write = [&](int64_t first, const float (&x)[chunk<T>]) {
    const int own = place_in_chunk<T, int64_t>(top, first);
    float g[chunk<T>];
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      g[j] = j == own ? scale * (1.0f - p) : -scale * p * exp2_product(x[j] - max, log2_e);
    }
    target.store(first, g);
  };
  source.template each<at_once>(begin, chunk<T> * Group::size, seen, probe, write);
}

constexpr int64_t thread_classes = 32, warp_classes = 1024;
constexpr int block_threads = 256;
using Block = BlockGroup<block_threads>;

// calls body(b) for the rows of the group that is the block's threadIdx.y-th
template <class Body>
CALGUIDE_DEVICE void each_row(int64_t batch, const Body& body) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; b < batch; b += step) body(b);
}

template <class T, class Group>
__global__ void __launch_bounds__(block_threads) label_rows(const TopLabelArguments a) {
  each_row(a.batch, [&](int64_t b) { label_row<T>(a, Group(), b); });
}

template <class T>
__global__ void __launch_bounds__(block_threads) label_block_rows(const TopLabelArguments a) {
  CALGUIDE_SHARED(double, scratch, Block::scratch_length);
  each_row(a.batch, [&](int64_t b) { label_row<T>(a, Block{scratch}, b); });
}

template <class T, class Group>
__global__ void __launch_bounds__(block_threads) pull_rows(const TopLabelBackwardArguments a) {
  each_row(a.batch, [&](int64_t b) { pull_row<T>(a, Group(), b); });
}

// groups of so many threads, as many in a block as make it up unless there are too few of them for all multiprocessors
struct Shape {
  dim3 grid, block;

  Shape(int64_t batch, int group) {
    const int most = block_threads / group, few = group < warp_size ? warp_size / group : 1;
    const int rows = batch > 512 * most ? most : few;
    const int64_t blocks = (batch + rows - 1) / rows;
    grid = dim3(static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff));
    block = dim3(group, rows);
  }
};

template <class T>
void launch(const TopLabelArguments& a, const Place& place) {
  if (a.classes <= thread_classes) {
    const Shape shape(a.batch, 1);
    CALGUIDE_LAUNCH((label_rows<T, ThreadGroup>), shape.grid, shape.block, 0, place.stream(), a);
  } else if (a.classes <= warp_classes) {
    const Shape shape(a.batch, warp_size);
    CALGUIDE_LAUNCH((label_rows<T, WarpGroup>), shape.grid, shape.block, 0, place.stream(), a);
  } else {
    const Shape shape(a.batch, block_threads);
    CALGUIDE_LAUNCH((label_block_rows<T>), shape.grid, shape.block, 0, place.stream(), a);
  }
}

template <class T>
void launch(const TopLabelBackwardArguments& a, const Place& place) {
  if (a.classes <= thread_classes) {
    const Shape shape(a.batch, 1);
    CALGUIDE_LAUNCH((pull_rows<T, ThreadGroup>), shape.grid, shape.block, 0, place.stream(), a);
  } else if (a.classes <= warp_classes) {
    const Shape shape(a.batch, warp_size);
    CALGUIDE_LAUNCH((pull_rows<T, WarpGroup>), shape.grid, shape.block, 0, place.stream(), a);
  } else {
    const Shape shape(a.batch, block_threads);
    CALGUIDE_LAUNCH((pull_rows<T, Block>), shape.grid, shape.block, 0, place.stream(), a);
  }
}

template <class Arguments>
void launch_for_storage(const Arguments& arguments, const Place& place, const char* what) {
  if (arguments.batch == 0) return;
  with_storage(arguments.storage, [&](auto type) { launch<decltype(type)>(arguments, place); });
  check(cudaGetLastError(), what);
}

}  // namespace

void launch_top_label(const TopLabelArguments& arguments, const Place& place) {
  launch_for_storage(arguments, place, "launch top_label");
}

void launch_top_label_backward(const TopLabelBackwardArguments& arguments, const Place& place) {
  launch_for_storage(arguments, place, "launch top_label_backward");
}

}  // namespace calguide
