// Small kernels, right and wrong, that try what the emulator promises; test_emulator.py calls run().
#include "emulation.h"

__device__ int linear_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

__device__ int linear_block() { return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z); }

// out[block] = sum of the block's part of `in`, by shuffles and shared memory
template <class T>
__global__ void block_sum(const T* in, T* out) {
  CALGUIDE_SHARED(T, partial, 32);
  const int thread = linear_thread(), threads = blockDim.x * blockDim.y * blockDim.z;
  T sum = in[linear_block() * threads + thread];
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (thread % 32 == 0) partial[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    T total = 0;
    for (int warp = 0; warp < threads / 32; ++warp) total += partial[warp];
    out[linear_block()] = total;
  }
}

// reverses each row of 32 x 32 twice through dynamic shared memory, with or without the barriers that this takes
template <bool before_write, bool after_write>
__global__ void reverse_rows(const float* in, float* out) {
  CALGUIDE_DYNAMIC_SHARED(float, tile);
  const int thread = threadIdx.x;
  float value = in[thread];
  for (int round = 0; round < 2; ++round) {
    if (before_write) __syncthreads();
    tile[thread] = value;
    if (after_write) __syncthreads();
    value = tile[blockDim.x - 1 - thread] + 1.0f;
  }
  out[thread] = value;
}

// the neighbour's value through shared memory: lanes of a warp wait for each other, or do not
template <bool wait>
__global__ void next_lane(const float* in, float* out) {
  CALGUIDE_SHARED(float, values, 32);
  values[threadIdx.x] = in[threadIdx.x];
  if (wait) __syncwarp();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 32];
}

// order[i] = the i-th thread to come here
__global__ void arrival_order(int* order, int* count) { order[(*count)++] = linear_block() * blockDim.x + threadIdx.x; }

__global__ void every_shuffle(int* out) {
  const unsigned all = 0xffffffffu;
  const int lane = threadIdx.x;
  int* mine = out + lane * 8;
  mine[0] = __shfl_sync(all, lane, 5);
  mine[1] = __shfl_sync(all, lane, lane + 1, 8);
  mine[2] = __shfl_down_sync(all, lane, 3);
  mine[3] = __shfl_up_sync(all, lane, 3, 16);
  mine[4] = __shfl_xor_sync(all, lane, 9);
  mine[5] = static_cast<int>(__shfl_xor_sync(all, lane * 0x1.0000000001p40, 1) / 0x1.0000000001p40);
  mine[6] = static_cast<int>(__ballot_sync(all, lane % 3 == 0));
  mine[7] = __any_sync(all, lane == 7) + 2 * __all_sync(all, lane < 32);
  mine[7] += 4 * __any_sync(all, lane == 32) + 8 * __all_sync(all, lane != 7);
}

// halves of a warp that never meet each other
__global__ void halves(int* out) {
  const unsigned half = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  int value = threadIdx.x;
  for (int round = 0; round < (threadIdx.x < 16 ? 1 : 3); ++round) value = __shfl_xor_sync(half, value, 15);
  out[threadIdx.x] = value;
}

__global__ void barrier_for_some() {
  if (threadIdx.x < 64) __syncthreads();
}

__global__ void shuffle_for_some() {
  if (threadIdx.x % 32 != 3) __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void shuffle_from_nowhere() { __shfl_xor_sync(0xffffffffu, 1, 16); }

__global__ void shuffle_from_an_outsider() {
  if (threadIdx.x < 8) __shfl_sync(0xffu, 1, 9);
}

__global__ void mask_without_itself() { __syncwarp(0x7fffffffu); }

__global__ void shuffle_meets_vote() {
  if (threadIdx.x == 0)
    __ballot_sync(0xffffffffu, 1);
  else
    __shfl_sync(0xffffffffu, 1, 2);
}

__global__ void unwritten_shared(float* out) {
  CALGUIDE_SHARED(float, fixed, 4);
  CALGUIDE_DYNAMIC_SHARED(float, dynamic);
  out[linear_block() * 2] = fixed[3];
  out[linear_block() * 2 + 1] = dynamic[3];
  fixed[3] = dynamic[3] = 1.0f;
}

__global__ void write_beyond(int past) {
  CALGUIDE_DYNAMIC_SHARED(float, dynamic);
  dynamic[32 + past] = 0.0f;
}

__global__ void misaligned(const float* in, float* out) { *out = reinterpret_cast<const float4*>(in + 1)->x; }

__global__ void much_static_shared() {
  CALGUIDE_SHARED(char, bytes, 1024);
  bytes[0] = 0;
}

__global__ void nothing() {}

static int run(const char* name, int x, int y, int z, int threads_x, int threads_y, int threads_z, int dynamic,
               const void* in, void* out) {
  const dim3 grid(x, y, z), block(threads_x, threads_y, threads_z);
  const auto is = [name](const char* other) { return strcmp(name, other) == 0; };
  const float* floats = static_cast<const float*>(in);
  float* to = static_cast<float*>(out);
  int* ints = static_cast<int*>(out);
  cudaStream_t stream = nullptr;
  if (is("block_sum_float")) {
    CALGUIDE_LAUNCH(block_sum<float>, grid, block, dynamic, stream, floats, to);
  } else if (is("block_sum_int64")) {
    const int64_t* from = static_cast<const int64_t*>(in);
    CALGUIDE_LAUNCH(block_sum<int64_t>, grid, block, dynamic, stream, from, static_cast<int64_t*>(out));
  } else if (is("reverse_rows")) {
    CALGUIDE_LAUNCH((reverse_rows<true, true>), grid, block, dynamic, stream, floats, to);
  } else if (is("reverse_rows_without_first_barrier")) {
    CALGUIDE_LAUNCH((reverse_rows<false, true>), grid, block, dynamic, stream, floats, to);
  } else if (is("reverse_rows_without_second_barrier")) {
    CALGUIDE_LAUNCH((reverse_rows<true, false>), grid, block, dynamic, stream, floats, to);
  } else if (is("next_lane")) {
    CALGUIDE_LAUNCH(next_lane<true>, grid, block, dynamic, stream, floats, to);
  } else if (is("next_lane_without_wait")) {
    CALGUIDE_LAUNCH(next_lane<false>, grid, block, dynamic, stream, floats, to);
  } else if (is("arrival_order")) {
    int count = 0;
    CALGUIDE_LAUNCH(arrival_order, grid, block, dynamic, stream, ints, &count);
  } else if (is("every_shuffle")) {
    CALGUIDE_LAUNCH(every_shuffle, grid, block, dynamic, stream, ints);
  } else if (is("halves")) {
    CALGUIDE_LAUNCH(halves, grid, block, dynamic, stream, ints);
  } else if (is("barrier_for_some")) {
    CALGUIDE_LAUNCH(barrier_for_some, grid, block, dynamic, stream);
  } else if (is("shuffle_for_some")) {
    CALGUIDE_LAUNCH(shuffle_for_some, grid, block, dynamic, stream);
  } else if (is("shuffle_from_nowhere")) {
    CALGUIDE_LAUNCH(shuffle_from_nowhere, grid, block, dynamic, stream);
  } else if (is("shuffle_from_an_outsider")) {
    CALGUIDE_LAUNCH(shuffle_from_an_outsider, grid, block, dynamic, stream);
  } else if (is("mask_without_itself")) {
    CALGUIDE_LAUNCH(mask_without_itself, grid, block, dynamic, stream);
  } else if (is("shuffle_meets_vote")) {
    CALGUIDE_LAUNCH(shuffle_meets_vote, grid, block, dynamic, stream);
  } else if (is("unwritten_shared")) {
    CALGUIDE_LAUNCH(unwritten_shared, grid, block, dynamic, stream, to);
  } else if (is("write_beyond") || is("write_before")) {
    CALGUIDE_LAUNCH(write_beyond, grid, block, dynamic, stream, is("write_beyond") ? 0 : -33);
  } else if (is("misaligned")) {
    CALGUIDE_LAUNCH(misaligned, grid, block, dynamic, stream, floats, to);
  } else if (is("much_static_shared")) {
    CALGUIDE_LAUNCH(much_static_shared, grid, block, dynamic, stream);
  } else if (is("nothing")) {
    CALGUIDE_LAUNCH(nothing, grid, block, dynamic, stream);
  } else if (is("opt_in")) {
    return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic);
  } else {
    return -1;
  }
  return cudaPeekAtLastError();
}

// Launches the kernel of this name: 0, or the error whose message last_message() then gives.
extern "C" __attribute__((visibility("default"))) int run_kernel(const char* name, const int* shape, int dynamic,
                                                                 const void* in, void* out) {
  return run(name, shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], dynamic, in, out);
}

// of the last error, which is then forgotten
extern "C" __attribute__((visibility("default"))) const char* last_message() {
  return cudaGetErrorString(cudaGetLastError());
}
