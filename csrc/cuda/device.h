// The seam between the kernels and what runs them: a GPU, or, in the tests, an emulation of one on the CPU.
#pragma once

#ifdef CALGUIDE_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>

// CALGUIDE_LAUNCH((kernel<T, N>), grid, block, dynamic shared bytes, stream, arguments...)
#define CALGUIDE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

#define CALGUIDE_SHARED(T, name, n) __shared__ T name[n]

#define CALGUIDE_DYNAMIC_SHARED(T, name)                        \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)
#endif

// a device function that may use what only a device has
#define CALGUIDE_DEVICE static __device__ __forceinline__
#define CALGUIDE_MEMBER __device__ __forceinline__
