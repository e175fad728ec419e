#include "cuda/guidance_kernels.h"

namespace calguide {

template void launch_guidance_rows<float>(const GuidanceTask& task, const Place& place);

}  // namespace calguide
