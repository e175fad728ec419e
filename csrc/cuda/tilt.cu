#include "cuda/tilt.h"

#include "cuda/place.h"
#include "cuda/tilt_kernels.h"

namespace calguide {
namespace {

using Block = BlockGroup<256>;

__global__ void __launch_bounds__(Block::size) tilt_kernel(const TiltArguments a, float* weights) {
  CALGUIDE_SHARED(double, scratch, Block::scratch_length);
  const Block group = {scratch};
  const Tilt tilt = tilt_of(a, group);
  for (int64_t b = group.rank(); b < a.count; b += Block::size) weights[b] = tilt_weight(a, tilt, b);
}

}  // namespace

void launch_tilt_weights(const TiltArguments& arguments, float* weights, const Place& place) {
  if (arguments.count == 0) return;
  CALGUIDE_LAUNCH((tilt_kernel), dim3(1), dim3(Block::size), 0, place.stream(), arguments, weights);
  check(cudaGetLastError(), "launch tilt_weights");
}

}  // namespace calguide
