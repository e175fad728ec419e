// Cosine sums on an even grid in two stages, of each kernel source and instruction set its own.
#pragma once

#include "cpu/kernels/buffer.h"
#include "smooth_ece_math.h"

namespace calguide {
namespace CALGUIDE_ISA {
namespace {

// Sums over j < count of weight[j] cos(pi k j / intervals) for k = 0, 1, 2, ...
//
// With j = c + columns r a wave is one in c, e^(i pi k c / intervals), times one in r that k has in common with every
// k + 2 rows, where rows is the number of intervals over that of columns. Sums over r are taken once for each of these
// k, and the sums over c are all that is left for each k: as with two steps of a Fourier transform.
class EvenCosineSums {
 public:
  // intervals is a multiple of columns, and columns one of 8
  EvenCosineSums(const double* weight, int64_t count, int64_t intervals, int64_t columns)
      : intervals_(intervals),
        columns_(columns),
        rows_(intervals / columns),
        down_(2 * columns * (rows_ + 1)),
        step_(2 * columns),
        wave_(2 * columns) {
    waves(1, columns, step_, step_ + columns);
    sum_down(weight, count);
  }

  // Sums for every k below `end`, after those already in `sums`.
  void extend(int64_t end, double* sums) {
    double *const real = wave_, *const imaginary = real + columns_;
    for (; known_ < end; ++known_) {
      // now and then anew, so that rounding does not gather
      if (known_ % 128 == 0) {
        waves(known_, columns_, real, imaginary);
      }
      // waves down the columns with k beyond rows are the mirror images of those below
      const int64_t q = known_ % (2 * rows_);
      const bool mirrored = q > rows_;
      const double* const down = down_ + 2 * columns_ * (mirrored ? 2 * rows_ - q : q);
      sums[known_] = turn(down, mirrored ? -1.0 : 1.0, real, imaginary);
    }
  }

 private:
  // e^(i pi k j / intervals) for j < count
  void waves(int64_t k, int64_t count, double* real, double* imaginary) const {
    const double turns = static_cast<double>(k) / static_cast<double>(intervals_);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      // less an even number, in [-1, 1]
      const double all = turns * static_cast<double>(j), rest = all - 2.0 * rint(0.5 * all), size = fabs(rest);
      real[j] = cos_pi(size);
      imaginary[j] = copysign(sin_pi(size), rest);
    }
  }

  // For each k up to rows a row of cosine sums down the columns, and one of sine sums.
  void sum_down(const double* weight, int64_t count) {
    // four rows of weights at a time, the last of them filled up
    const int64_t n = columns_, period = 2 * rows_, length = (count + 4 * n - 1) / (4 * n) * (4 * n);
    Buffer filled(length), cosine(period), sine(period);
    for (int64_t j = 0; j < length; ++j) filled[j] = j < count ? weight[j] : 0.0;
    waves(n, period, cosine, sine);
    for (int64_t q = 0; q <= rows_; ++q) {
      double *const real = down_ + 2 * n * q, *const imaginary = real + n;
      for (int64_t c = 0; c < 2 * n; ++c) real[c] = 0.0;
      int64_t m = 0;
      for (const double* row = filled; row < filled + length; row += 4 * n) {
        double a[4], b[4];
        for (int r = 0; r < 4; ++r) {
          a[r] = cosine[m], b[r] = sine[m];
          m += m + q < period ? q : q - period;
        }
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
          const double w0 = row[c], w1 = row[n + c], w2 = row[2 * n + c], w3 = row[3 * n + c];
          real[c] += (a[0] * w0 + a[1] * w1) + (a[2] * w2 + a[3] * w3);
          imaginary[c] += (b[0] * w0 + b[1] * w1) + (b[2] * w2 + b[3] * w3);
        }
      }
    }
  }

  // The real part of the sum over columns of a wave times what is down them; then the wave turns to the next k.
  double turn(const double* down, double sign, double* real, double* imaginary) const {
    const double *const down_imaginary = down + columns_, *const a = step_, *const b = a + columns_;
    double with_real = 0.0, with_imaginary = 0.0;
#pragma omp simd reduction(+ : with_real, with_imaginary)
    for (int64_t c = 0; c < columns_; ++c) {
      const double x = real[c], y = imaginary[c];
      with_real += x * down[c];
      with_imaginary += y * down_imaginary[c];
      real[c] = x * a[c] - y * b[c];
      imaginary[c] = x * b[c] + y * a[c];
    }
    return with_real - sign * with_imaginary;
  }

  int64_t intervals_, columns_, rows_, known_ = 0;
  Buffer down_, step_, wave_;
};

}  // namespace
}  // namespace CALGUIDE_ISA
}  // namespace calguide
