// Samples to bins: each residual is shared out among the four nearest nodes, in integers, so that neither the order of
// the samples nor that of the threads shows.
#pragma once

#include "cuda/group.h"
#include "cuda/smooth_ece_samples.h"
#include "cuda/tuning.h"

namespace calguide {

using PrepareBlock = BlockGroup<256>;
using DepositBlock = BlockGroup<CALGUIDE_DEPOSIT_THREADS>;

// The grid's own table.
struct GlobalTable {
  unsigned long long* nodes;

  CALGUIDE_MEMBER void clear() const {}
  CALGUIDE_MEMBER void add(int node, int64_t value) const {
    atomicAdd(nodes + node, static_cast<unsigned long long>(value));
  }
  CALGUIDE_MEMBER void finish() const {}
};

// A block's own table in shared memory, which has no addition of 64 bits: two of 32, the first of which tells its
// carry.
struct SharedTable {
  static constexpr size_t bytes = 2 * sizeof(unsigned) * (deposit_bins + 1);

  unsigned long long* nodes;
  unsigned *low, *high;

  CALGUIDE_MEMBER explicit SharedTable(unsigned long long* nodes) : nodes(nodes) {
    CALGUIDE_DYNAMIC_SHARED(unsigned, words);
    low = words, high = words + deposit_bins + 1;
  }

  CALGUIDE_MEMBER void clear() const {
    for (int i = threadIdx.x; i < 2 * (deposit_bins + 1); i += DepositBlock::size) low[i] = 0;
    __syncthreads();
  }
  CALGUIDE_MEMBER void add(int node, int64_t value) const {
    const unsigned added = static_cast<unsigned>(value), before = atomicAdd(low + node, added);
    atomicAdd(high + node, static_cast<unsigned>(value >> 32) + (before + added < before ? 1u : 0u));
  }
  CALGUIDE_MEMBER void finish() const {
    __syncthreads();
    for (int i = threadIdx.x; i <= deposit_bins; i += DepositBlock::size) {
      const unsigned long long sum = static_cast<unsigned long long>(high[i]) << 32 | low[i];
      if (sum != 0) atomicAdd(nodes + i, sum);
    }
  }
};

// A thread's samples of one bin after another. A classifier that is sure puts most samples into one bin, and these
// need not queue for it.
template <class Table>
struct Run {
  const Table& table;
  int bin;
  int64_t sums[4];

  CALGUIDE_MEMBER explicit Run(const Table& table) : table(table), bin(0), sums{} {}

  CALGUIDE_MEMBER void add(int to, double offset, double weight) {
    if (to != bin) {
      finish();
      bin = to;
    }
#pragma unroll
    for (int node = 0; node < 4; ++node) {
      const double share = ((share_coefficients[3][node] * offset + share_coefficients[2][node]) * offset +
                            share_coefficients[1][node]) *
                               offset +
                           share_coefficients[0][node];
      sums[node] += llrint(weight * share);
    }
  }

  CALGUIDE_MEMBER void finish() {
    // cosines are even about 0 and 1, and so a node beyond is the one before
    const int nodes[4] = {bin > 0 ? bin - 1 : 1, bin, bin + 1, bin + 2 <= deposit_bins ? bin + 2 : deposit_bins - 1};
#pragma unroll
    for (int node = 0; node < 4; ++node) {
      if (sums[node] != 0) table.add(nodes[node], sums[node]);
      sums[node] = 0;
    }
  }
};

// The total weight, the same in every block; NaN or infinite if a weight is.
CALGUIDE_DEVICE double total_weight(const SmoothEceArguments& a, const SmoothEceScratch* scratch, int parts,
                                    const DepositBlock& group) {
  if (a.weights == nullptr) return static_cast<double>(a.count);
  double total[1] = {group.rank() < parts ? scratch->weights[group.rank()] : 0.0};
  group.sum(total);
  return total[0];
}

// Clears the grid's table, and sums the weights in as many parts as there are blocks.
template <class Real>
__global__ void __launch_bounds__(PrepareBlock::size)
    prepare_kernel(const SmoothEceArguments a, SmoothEceScratch* scratch) {
  CALGUIDE_SHARED(double, sums, PrepareBlock::scratch_length);
  const PrepareBlock group = {sums};
  const int64_t first = static_cast<int64_t>(blockIdx.x) * PrepareBlock::size + group.rank();
  const int64_t step = static_cast<int64_t>(gridDim.x) * PrepareBlock::size;
  for (int64_t node = first; node <= deposit_bins; node += step) scratch->nodes[node] = 0;
  if (first == 0) scratch->spoilt = 0;
  if (a.weights == nullptr) return;
  double total[1] = {0.0};
  for (int64_t i = first; i < a.count; i += step) total[0] += weight_at<Real>(a, i);
  group.sum(total);
  if (group.rank() == 0) scratch->weights[blockIdx.x] = total[0];
}

template <class Real, class Table>
__global__ void __launch_bounds__(DepositBlock::size)
    deposit_kernel(const SmoothEceArguments a, SmoothEceScratch* scratch, int parts) {
  CALGUIDE_SHARED(double, sums, DepositBlock::scratch_length);
  const DepositBlock group = {sums};
  const double total = total_weight(a, scratch, parts, group);
  if (group.rank() == 0 && blockIdx.x == 0) scratch->total = total;
  // the whole block leaves, and the search sees why
  if (!is_total_allowed(total)) return;
  const double inverse = 1.0 / total;
  const Table table{scratch->nodes};
  table.clear();
  Run<Table> run(table);
  bool allowed = true;
  const int64_t step = static_cast<int64_t>(gridDim.x) * DepositBlock::size;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * DepositBlock::size + group.rank(); i < a.count; i += step) {
    const double confidence = confidence_at<Real>(a, i), weight = weight_at<Real>(a, i);
    if (!(confidence >= 0.0 && confidence <= 1.0 && weight >= 0.0)) {
      allowed = false;
      continue;
    }
    const double position = confidence * deposit_bins;
    const int whole = static_cast<int>(position), bin = whole < deposit_bins ? whole : deposit_bins - 1;
    run.add(bin, position - bin - 0.5, inverse * weight * (residual_at<Real>(a, i) / deposit_unit));
  }
  run.finish();
  if (!allowed) atomicOr(&scratch->spoilt, 1u);
  table.finish();
}

}  // namespace calguide
