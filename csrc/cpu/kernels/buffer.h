// Memory for doubles that vectors take whole, of each kernel source and instruction set its own.
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace calguide {
namespace CALGUIDE_ISA {
namespace {

class Buffer {
 public:
  explicit Buffer(int64_t length) : data_(static_cast<double*>(aligned_alloc(64, (8 * length + 127) / 64 * 64))) {
    if (data_ == nullptr) abort();
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator double*() { return data_; }
  operator const double*() const { return data_; }

 private:
  double* data_;
};

}  // namespace
}  // namespace CALGUIDE_ISA
}  // namespace calguide
