#include "cuda/guidance_kernels.h"

namespace calguide {

template void launch_guidance_rows<Float16>(const GuidanceArguments& arguments, const Place& place);

}  // namespace calguide
