#include "cuda/guidance.h"

#include "cuda/place.h"
#include "storage.h"

namespace calguide {

void launch_guidance_gradient(const GuidanceArguments& arguments, const Place& place) {
  if (arguments.batch == 0) return;
  switch (arguments.storage) {
    case storage_bfloat16: launch_guidance_rows<BFloat16>(arguments, place); break;
    case storage_float16: launch_guidance_rows<Float16>(arguments, place); break;
    default: launch_guidance_rows<float>(arguments, place);
  }
  check(cudaGetLastError(), "launch guidance_gradient");
}

}  // namespace calguide
