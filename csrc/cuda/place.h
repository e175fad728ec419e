// Where a kernel runs, and what becomes of CUDA's errors.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace calguide {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  // told here, so the next launch need not tell it again
  cudaGetLastError();
  throw std::runtime_error(std::string("CUDA could not ") + what + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

// Of the device that is current, as the caller sees to.
class Place {
 public:
  Place(int device, void* stream) : device_(device), stream_(static_cast<cudaStream_t>(stream)) {}

  cudaStream_t stream() const { return stream_; }

  int attribute(cudaDeviceAttr attribute) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device_), "describe the device");
    return value;
  }

 private:
  int device_;
  cudaStream_t stream_;
};

}  // namespace calguide
