// The step kernels: predict_x0, guided_step and the noise they draw, each in one launch.
//
// A thread takes four elements of an image at a time, in the order of NCHW: the normals of one Philox counter, and
// sixteen bytes of an operand that lies so. Any other stride is read element by element. What an image's elements share
// is worked out once per block.
#include "cuda/step.h"

#include "cuda/place.h"
#include "cuda/tilt_kernels.h"
#include "cuda/tuning.h"
#include "philox.h"
#include "step_math.h"
#include "storage.h"

namespace calguide {
namespace {

constexpr int step_threads = CALGUIDE_STEP_THREADS;
using Block = BlockGroup<step_threads>;

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

// Four elements of an image: which they are, and whether they are neighbours in one channel.
struct Quad {
  int64_t image, channel, pixel, channels, pixels;
  int count;  // fewer than four at the image's end
  bool together;
};

CALGUIDE_DEVICE Quad quad_at(const StepArguments& a, int64_t image, int64_t block) {
  const int64_t element = 4 * block, left = a.channels * a.pixels - element;
  Quad quad = {image, 0, element, a.channels, a.pixels, static_cast<int>(left < 4 ? left : 4), false};
  if (a.channels > 1) {
    quad.channel = element / a.pixels;
    quad.pixel = element - quad.channel * a.pixels;
  }
  quad.together = quad.count == 4 && quad.pixel + 4 <= a.pixels;
  return quad;
}

// Calls body(j, offset in the operand) for each of the four elements that exist.
template <class Body>
CALGUIDE_DEVICE void each_element(const Operand& of, const Quad& quad, const Body& body) {
  int64_t channel = quad.channel, pixel = quad.pixel;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < quad.count) body(j, quad.image * of.image + channel * of.channel + pixel * of.pixel);
    if (++pixel == quad.pixels) {
      pixel = 0;
      ++channel;
    }
  }
}

// where the four elements begin if they lie side by side on a boundary of all four, else null
template <class T>
CALGUIDE_DEVICE T* side_by_side(const Operand& of, const Quad& quad) {
  const T* data = static_cast<const T*>(of.data);
  const T* at = data + quad.image * of.image + quad.channel * of.channel + quad.pixel * of.pixel;
  const bool aligned = reinterpret_cast<uintptr_t>(at) % (4 * sizeof(T)) == 0;
  return quad.together && of.pixel == 1 && aligned ? const_cast<T*>(at) : nullptr;
}

// Four elements of an operand as they are in memory, of any storage type.
struct alignas(16) Raw {
  uint32_t words[4];
};

template <class T>
CALGUIDE_DEVICE Four<T> fetch_as(const Operand& of, const Quad& quad) {
  if (const T* at = side_by_side<T>(of, quad)) return *reinterpret_cast<const Four<T>*>(at);
  Four<T> four = {};
  const T* data = static_cast<const T*>(of.data);
  each_element(of, quad, [&](int j, int64_t offset) { four.values[j] = data[offset]; });
  return four;
}

// Fetched apart from being read as floats, so that all operands are on their way before the first is waited for; an
// absent operand is 0.
CALGUIDE_DEVICE Raw fetch(const Operand& of, const Quad& quad) {
  Raw raw = {};
  if (of.data == nullptr) return raw;
  with_storage(of.type, [&](auto type) {
    const auto four = fetch_as<decltype(type)>(of, quad);
    memcpy(&raw, &four, sizeof four);
  });
  return raw;
}

CALGUIDE_DEVICE void read(const Operand& of, const Raw& raw, float (&x)[4]) {
  with_storage(of.type, [&](auto type) {
    Four<decltype(type)> four;
    memcpy(&four, &raw, sizeof four);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = load_float(four.values[j]);
  });
}

template <class T>
CALGUIDE_DEVICE void store_as(const Operand& of, const Quad& quad, const float (&x)[4]) {
  if (T* at = side_by_side<T>(of, quad)) {
    Four<T> four;
#pragma unroll
    for (int j = 0; j < 4; ++j) store_float(four.values + j, x[j]);
    *reinterpret_cast<Four<T>*>(at) = four;
  } else {
    T* data = static_cast<T*>(const_cast<void*>(of.data));
    each_element(of, quad, [&](int j, int64_t offset) { store_float(data + offset, x[j]); });
  }
}

CALGUIDE_DEVICE void store(const Operand& of, const Quad& quad, const float (&x)[4]) {
  with_storage(of.type, [&](auto type) { store_as<decltype(type)>(of, quad, x); });
}

// The blocks of a grid are dealt to the images, so many for each; a thread's quads lie a whole image's threads apart.
struct Share {
  unsigned blocks_an_image;
  int64_t quads;  // of an image

  CALGUIDE_MEMBER int64_t image() const { return blockIdx.x / blocks_an_image; }
  CALGUIDE_MEMBER int64_t part() const { return blockIdx.x % blocks_an_image; }

  template <class Body>
  CALGUIDE_MEMBER void each_quad(const Body& body) const {
    const int64_t step = static_cast<int64_t>(blocks_an_image) * step_threads;
    for (int64_t quad = part() * step_threads + threadIdx.x; quad < quads; quad += step) body(quad);
  }
};

// what the elements of an image share
struct ImageStep {
  StepRow row;
  float guide;  // scale times weight times tilt
  float boost;  // the sine boost of the variance that guides
};

CALGUIDE_DEVICE float first_variance(const StepArguments& a, const StepRow& row, int64_t image) {
  if (a.v.data == nullptr) return row.fixed_var;
  float v[4];
  read(a.v, fetch(a.v, {image, 0, 0, a.channels, a.pixels, 1, false}), v);
  const float sd = step_sd<Deviation::learned>(row, v[0]);
  return sd * sd;
}

// Every block of an image finds the same running maximum, whether the first one has stored it yet or not.
CALGUIDE_DEVICE float sine_boost(const StepArguments& a, const StepRow& row, int64_t image, bool stores) {
  if (a.variance_max == nullptr) return 0.0f;
  const float largest = running_maximum(a.variance_max[image], first_variance(a, row, image));
  if (stores) a.variance_max[image] = largest;
  return a.sine_boost * largest * row.sine;
}

enum class Method { ddpm_fixed, ddpm_learned, ddim };

template <Method METHOD, Guide GUIDE, bool NOISY>
CALGUIDE_DEVICE float step_element(const ImageStep& image, float bound, float x, float eps, float v, float g, float z) {
  if constexpr (METHOD == Method::ddim) {
    return step_ddim<GUIDE != Guide::none, NOISY>(image.row, bound, image.guide, x, eps, g, z);
  } else {
    constexpr Deviation deviation = METHOD == Method::ddpm_learned ? Deviation::learned : Deviation::fixed;
    return step_ddpm<deviation, GUIDE, NOISY>(image.row, bound, image.guide, image.boost, x, eps, v, g, z);
  }
}

template <Method METHOD, Guide GUIDE>
CALGUIDE_DEVICE float step_element(const ImageStep& image, bool noisy, float bound, float x, float eps, float v,
                                   float g, float z) {
  return noisy ? step_element<METHOD, GUIDE, true>(image, bound, x, eps, v, g, z)
               : step_element<METHOD, GUIDE, false>(image, bound, x, eps, v, g, z);
}

template <Method METHOD>
CALGUIDE_DEVICE float step_element(const ImageStep& image, Guide guide, bool noisy, float bound, float x, float eps,
                                   float v, float g, float z) {
  switch (guide) {
    case Guide::none: return step_element<METHOD, Guide::none>(image, noisy, bound, x, eps, v, g, z);
    case Guide::plain: return step_element<METHOD, Guide::plain>(image, noisy, bound, x, eps, v, g, z);
    default: return step_element<METHOD, Guide::boosted>(image, noisy, bound, x, eps, v, g, z);
  }
}

template <Method METHOD>
__global__ void __launch_bounds__(step_threads) step_kernel(const StepArguments a, const Share share) {
  CALGUIDE_SHARED(double, scratch, Block::scratch_length);
  CALGUIDE_SHARED(ImageStep, image_step, 1);
  const Block group = {scratch};
  const int64_t image = share.image();
  Tilt tilt = {};
  if (a.tilt.scores != nullptr) tilt = tilt_of(a.tilt, group);
  if (group.rank() == 0) {
    image_step->row = step_row(a.coefficients);
    image_step->guide = a.scale;
    if (a.tilt.scores != nullptr) image_step->guide *= tilt_weight(a.tilt, tilt, image);
    if (a.weights != nullptr) image_step->guide *= a.weights[image];
    image_step->boost = sine_boost(a, image_step->row, image, share.part() == 0);
  }
  __syncthreads();
  const ImageStep of = *image_step;

  const bool guided = a.gradient.data != nullptr;
  const bool noisy = (a.noise.data != nullptr || a.seeds != nullptr) && takes_noise(of.row, a.ddim);
  const Guide guide = !guided ? Guide::none : a.variance_max == nullptr ? Guide::plain : Guide::boosted;
  const float bound = a.clip ? 1.0f : INFINITY;
  const PhiloxKey key = philox_key(a.seeds != nullptr ? static_cast<uint64_t>(a.seeds[image]) : 0);

  share.each_quad([&](int64_t block) {
    const Quad quad = quad_at(a, image, block);
    const Raw raw_x = fetch(a.x_t, quad), raw_eps = fetch(a.eps, quad), raw_g = fetch(a.gradient, quad);
    const Raw raw_v = METHOD == Method::ddpm_learned ? fetch(a.v, quad) : Raw{};
    const Raw raw_z = noisy ? fetch(a.noise, quad) : Raw{};
    float x[4], eps[4], v[4], g[4], z[4], x_prev[4];
    read(a.noise, raw_z, z);
    if (noisy && a.seeds != nullptr) philox_normal_block(key, static_cast<uint32_t>(block), of.row.draw, 0, z);
    read(a.x_t, raw_x, x);
    read(a.eps, raw_eps, eps);
    read(a.v, raw_v, v);
    read(a.gradient, raw_g, g);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x_prev[j] = step_element<METHOD>(of, guide, noisy, bound, x[j], eps[j], v[j], g[j], z[j]);
    }
    store(a.out, quad, x_prev);
  });
}

__global__ void __launch_bounds__(step_threads) x0_kernel(const StepArguments a, const Share share) {
  CALGUIDE_SHARED(StepRow, step, 1);
  if (threadIdx.x == 0) *step = step_row(a.coefficients);
  __syncthreads();
  const StepRow row = *step;
  const float bound = a.clip ? 1.0f : INFINITY;
  const int64_t image = share.image();
  share.each_quad([&](int64_t block) {
    const Quad quad = quad_at(a, image, block);
    const Raw raw_x = fetch(a.x_t, quad), raw_eps = fetch(a.eps, quad);
    float x[4], eps[4], x0[4];
    read(a.x_t, raw_x, x);
    read(a.eps, raw_eps, eps);
#pragma unroll
    for (int j = 0; j < 4; ++j) x0[j] = step_x0(row, x[j], eps[j], bound);
    store(a.out, quad, x0);
  });
}

__global__ void __launch_bounds__(step_threads) normal_kernel(const int64_t* seeds, const Operand out, int64_t elements,
                                                              uint32_t draw, uint32_t stream, const Share share) {
  const int64_t image = share.image();
  const PhiloxKey key = philox_key(static_cast<uint64_t>(seeds[image]));
  share.each_quad([&](int64_t block) {
    const int64_t left = elements - 4 * block;
    const Quad quad = {image, 0, 4 * block, 1, elements, static_cast<int>(left < 4 ? left : 4), left >= 4};
    float z[4];
    philox_normal_block(key, static_cast<uint32_t>(block), draw, stream, z);
    store(out, quad, z);
  });
}

struct Grid {
  Share share;
  dim3 blocks;
};

// Enough blocks to fill the device several times over; beyond that a thread takes more quads, so that what a block
// works out for its image is worked out less often.
Grid grid_for(int64_t batch, int64_t elements, const Place& place) {
  const int64_t quads = (elements + 3) / 4, needed = (quads + step_threads - 1) / step_threads;
  const int64_t wanted = CALGUIDE_STEP_BLOCKS * static_cast<int64_t>(place.attribute(cudaDevAttrMultiProcessorCount));
  const int64_t fair = (wanted + batch - 1) / batch;
  const int64_t least = (needed + CALGUIDE_STEP_QUADS - 1) / CALGUIDE_STEP_QUADS;
  int64_t blocks = needed < fair ? needed : fair;
  blocks = blocks < least ? least : blocks;
  if (batch * blocks > 0x7fffffff) throw std::runtime_error("the batch has more images than CUDA's grids hold");
  return {{static_cast<unsigned>(blocks), quads}, dim3(static_cast<unsigned>(batch * blocks))};
}

}  // namespace

void launch_guided_step(StepArguments a, const Place& place) {
  flatten_channels(a);
  const Grid grid = grid_for(a.batch, a.channels * a.pixels, place);
  const auto kernel = a.ddim                ? step_kernel<Method::ddim>
                      : a.v.data != nullptr ? step_kernel<Method::ddpm_learned>
                                            : step_kernel<Method::ddpm_fixed>;
  CALGUIDE_LAUNCH((kernel), grid.blocks, dim3(step_threads), 0, place.stream(), a, grid.share);
  check(cudaGetLastError(), "launch guided_step");
}

void launch_predict_x0(StepArguments a, const Place& place) {
  flatten_channels(a);
  const Grid grid = grid_for(a.batch, a.channels * a.pixels, place);
  CALGUIDE_LAUNCH((x0_kernel), grid.blocks, dim3(step_threads), 0, place.stream(), a, grid.share);
  check(cudaGetLastError(), "launch predict_x0");
}

void launch_philox_normal(const int64_t* seeds, int64_t batch, int64_t elements, uint32_t draw, uint32_t stream,
                          float* out, const Place& place) {
  if (batch * elements == 0) return;
  const Grid grid = grid_for(batch, elements, place);
  const Operand to = {out, storage_float32, elements, elements, 1};
  CALGUIDE_LAUNCH((normal_kernel), grid.blocks, dim3(step_threads), 0, place.stream(), seeds, to, elements, draw,
                  stream, grid.share);
  check(cudaGetLastError(), "launch philox_normal");
}

}  // namespace calguide
