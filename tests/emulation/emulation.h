// What csrc/cuda/device.h takes from CUDA, for g++ on a CPU: device code runs there as ordinary code, each thread of a
// block a fiber that the scheduler of emulator.cpp switches at barriers and warp operations. For tests only.
//
// It is stricter than a GPU: shared memory starts as NaN, the lanes of a warp do not move together, and what a GPU
// leaves undefined (a barrier that not all threads reach, a shuffle from a lane that takes no part, a misaligned
// vector, a write beyond shared memory) is a launch error with a message that says where.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// a store as caches are used by default
template <class T>
void __stwb(T* at, T value) {
  *at = value;
}

constexpr int warpSize = 32;
// those of the thread that runs; the scheduler sets them at every switch
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

typedef struct CUstream_st* cudaStream_t;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719
};

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

// Nothing here waits for the device: a path that would stop the host does not compile.
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace emulation {

enum WarpOperation { warp_sync, warp_shuffle, warp_vote };

struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_shared;
  std::function<void()> thread;
};

// Runs every block to its end before it returns; what goes wrong is left for cudaGetLastError.
void launch(const Launch& launch);

cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes);
// memory of the running block that belongs to the declaration whose variable `key` is
void* static_shared(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();
void barrier();
// Waits for all lanes of `mask`. A shuffle gives the value of lane `source`, a vote the lanes whose value is not 0.
uint64_t warp_meeting(WarpOperation operation, unsigned mask, uint64_t value, int source);
int lane();

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t,
            Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> parameters(static_cast<Arguments&&>(arguments)...);
  const auto thread = [&] { std::apply(kernel, parameters); };
  launch({name, reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared, thread});
}

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = warp_meeting(warp_shuffle, mask, bits, source);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return emulation::set_dynamic_shared_limit(reinterpret_cast<const void*>(kernel), value);
}

inline void __syncthreads() { emulation::barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::warp_meeting(emulation::warp_sync, mask, 0, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  return emulation::shuffle(mask, value, (emulation::lane() & -width) | (source & (width - 1)));
}

// beyond its group of `width` lanes a lane gets its own value
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  const int lane = emulation::lane(), source = lane ^ lanes;
  return emulation::shuffle(mask, value, source < (lane & -width) + width ? source : lane);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = warpSize) {
  const int lane = emulation::lane(), source = lane + static_cast<int>(lanes);
  return emulation::shuffle(mask, value, source < (lane & -width) + width ? source : lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = warpSize) {
  const int lane = emulation::lane(), source = lane - static_cast<int>(lanes);
  return emulation::shuffle(mask, value, source >= (lane & -width) ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(emulation::warp_meeting(emulation::warp_vote, mask, predicate != 0, 0));
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
T __ldg(const T* at) {
  return *at;
}

// One thread runs at a time, and is not switched in here.
template <class T>
T atomicAdd(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at += value;
  return before;
}

inline unsigned atomicOr(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at |= value;
  return before;
}

// the stream and the kernel's arguments come last
#define CALGUIDE_LAUNCH(kernel, grid, block, dynamic_shared_bytes, ...) \
  ::emulation::launch(#kernel, kernel, grid, block, dynamic_shared_bytes, __VA_ARGS__)

#define CALGUIDE_SHARED(T, name, n) \
  static char name##_key;           \
  T(&name)[n] = *static_cast<T(*)[n]>(::emulation::static_shared(&name##_key, sizeof(T[n]), alignof(T)))

#define CALGUIDE_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::emulation::dynamic_shared())
