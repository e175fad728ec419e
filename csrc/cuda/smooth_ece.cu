#include "cuda/smooth_ece.h"

#include "cuda/place.h"
#include "cuda/smooth_ece_deposit.h"
#include "cuda/smooth_ece_gradient.h"
#include "cuda/smooth_ece_search.h"
#include "cuda/tuning.h"

namespace calguide {
namespace {

// the blocks that sum the weights follow from the samples alone, so that every device gives the same bits
constexpr int64_t samples_per_part = 4096, least_parts = 16;

int64_t ceiling(int64_t count, int64_t by) { return (count + by - 1) / by; }

int64_t within(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

template <class Real>
void deposit(const SmoothEceArguments& a, SmoothEceScratch* scratch, int parts, const Place& place) {
  const int64_t multiprocessors = place.attribute(cudaDevAttrMultiProcessorCount);
  const int64_t blocks = within(ceiling(a.count, DepositBlock::size), 1, 2 * multiprocessors);
  const dim3 block(DepositBlock::size);
  if (a.count < CALGUIDE_DEPOSIT_SHARED_SAMPLES ||
      place.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) < static_cast<int>(SharedTable::bytes)) {
    CALGUIDE_LAUNCH((deposit_kernel<Real, GlobalTable>), dim3(static_cast<unsigned>(blocks)), block, 0, place.stream(),
                    a, scratch, parts);
    return;
  }
  const auto kernel = deposit_kernel<Real, SharedTable>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SharedTable::bytes),
        "reserve shared memory");
  // a multiprocessor holds one such table
  const dim3 grid(static_cast<unsigned>(within(blocks, 1, multiprocessors)));
  CALGUIDE_LAUNCH((deposit_kernel<Real, SharedTable>), grid, block, SharedTable::bytes, place.stream(), a, scratch,
                  parts);
}

template <class Real>
void launch(const SmoothEceArguments& a, SmoothEceScratch* scratch, const Place& place) {
  const int parts = static_cast<int>(within(ceiling(a.count, samples_per_part), least_parts, weight_parts));
  CALGUIDE_LAUNCH((prepare_kernel<Real>), dim3(parts), dim3(PrepareBlock::size), 0, place.stream(), a, scratch);
  deposit<Real>(a, scratch, parts, place);
  CALGUIDE_LAUNCH((column_waves_kernel), dim3(moment_rows + 1), dim3(moment_columns), 0, place.stream(), scratch);
  CALGUIDE_LAUNCH((search_kernel), dim3(1), dim3(SearchBlock::size), most_terms * sizeof(double), place.stream(), a,
                  scratch);
}

template <class T>
void launch_gradient(const SmoothEceGradientArguments& a, SmoothEceGradientScratch* scratch, const Place& place) {
  // as many cells as there can be: the blocks beyond those that there are end at once
  const unsigned node_blocks = static_cast<unsigned>(ceiling(most_cells + 1, curve_threads));
  CALGUIDE_LAUNCH((curve_kernel), dim3(node_blocks), dim3(curve_threads), 0, place.stream(), a.curve, scratch);
  const int64_t wanted = 32 * static_cast<int64_t>(place.attribute(cudaDevAttrMultiProcessorCount));
  const int64_t blocks = within(ceiling(a.count, gradient_threads), 1, wanted);
  CALGUIDE_LAUNCH((gradient_kernel<T>), dim3(static_cast<unsigned>(blocks)), dim3(gradient_threads), 0, place.stream(),
                  a, scratch);
}

}  // namespace

void launch_smooth_ece(const SmoothEceArguments& arguments, SmoothEceScratch* scratch, const Place& place) {
  if (arguments.wide) {
    launch<double>(arguments, scratch, place);
  } else {
    launch<float>(arguments, scratch, place);
  }
  check(cudaGetLastError(), "launch smooth_ece");
}

void launch_smooth_ece_gradient(const SmoothEceGradientArguments& arguments, SmoothEceGradientScratch* scratch,
                                const Place& place) {
  if (arguments.wide) {
    launch_gradient<double>(arguments, scratch, place);
  } else {
    with_storage(arguments.storage, [&](auto type) { launch_gradient<decltype(type)>(arguments, scratch, place); });
  }
  check(cudaGetLastError(), "launch smooth_ece_gradient");
}

}  // namespace calguide
