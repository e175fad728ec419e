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

// The device is the current one while this lives, and the one before is again afterwards.
class Place {
 public:
  Place(int device, void* stream) : stream_(static_cast<cudaStream_t>(stream)) {
    check(cudaGetDevice(&previous_), "name the current device");
    changed_ = previous_ != device;
    if (changed_) check(cudaSetDevice(device), "choose the device");
  }
  ~Place() {
    if (changed_) cudaSetDevice(previous_);
  }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  cudaStream_t stream() const { return stream_; }

  static int attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "name the current device");
    check(cudaDeviceGetAttribute(&value, attribute, device), "describe the device");
    return value;
  }

 private:
  cudaStream_t stream_;
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace calguide
