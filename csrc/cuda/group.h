// The threads that work on one row, or one image, and what they add up: always in the same order, so that every run
// gives the same bits.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cuda/device.h"

namespace calguide {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int warp_size = 32;

// Values of all lanes, combined in every lane.
template <int N, class Real>
CALGUIDE_DEVICE void warp_sum(Real (&values)[N]) {
  for (int distance = warp_size / 2; distance > 0; distance /= 2) {
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(all_lanes, values[i], distance);
  }
}

template <class Real>
CALGUIDE_DEVICE Real warp_max(Real value) {
  for (int distance = warp_size / 2; distance > 0; distance /= 2) {
    value = fmax(value, __shfl_xor_sync(all_lanes, value, distance));
  }
  return value;
}

// One thread, which has the row to itself.
struct ThreadGroup {
  static constexpr int size = 1;

  CALGUIDE_MEMBER int rank() const { return 0; }
  template <int N, class Real>
  CALGUIDE_MEMBER void sum(Real (&)[N]) const {}
  template <class Real>
  CALGUIDE_MEMBER Real max(Real value) const {
    return value;
  }
};

// One warp, along x.
struct WarpGroup {
  static constexpr int size = warp_size;

  CALGUIDE_MEMBER int rank() const { return static_cast<int>(threadIdx.x); }
  CALGUIDE_MEMBER bool any(bool condition) const { return __any_sync(all_lanes, condition) != 0; }
  template <int N, class Real>
  CALGUIDE_MEMBER void sum(Real (&values)[N]) const {
    warp_sum(values);
  }
  template <class Real>
  CALGUIDE_MEMBER Real max(Real value) const {
    return warp_max(value);
  }
};

// What an operation makes of the values of the threads before one, and of all threads.
struct Scan {
  int before, all;
};

// A whole block of THREADS along x.
template <int THREADS>
struct BlockGroup {
  static constexpr int size = THREADS;
  static constexpr int warps = THREADS / warp_size;
  static constexpr int scratch_length = 4 * warps;

  double* scratch;  // shared, scratch_length

  CALGUIDE_MEMBER int rank() const { return static_cast<int>(threadIdx.x); }

  CALGUIDE_MEMBER bool any(bool condition) const {
    double count[1] = {__any_sync(all_lanes, condition) != 0 ? 1.0 : 0.0};
    share(count);
    for (int warp = 0; warp < warps; ++warp) condition = condition || scratch[warp] != 0.0;
    __syncthreads();
    return condition;
  }

  template <int N>
  CALGUIDE_MEMBER void sum(double (&values)[N]) const {
    static_assert(N * warps <= scratch_length, "more values than the scratch memory holds");
    warp_sum(values);
    share(values);
    for (int i = 0; i < N; ++i) {
      values[i] = 0.0;
      for (int warp = 0; warp < warps; ++warp) values[i] += scratch[warp * N + i];
    }
    // the next use may not overwrite what another warp still reads
    __syncthreads();
  }

  template <class Real>
  CALGUIDE_MEMBER Real max(Real value) const {
    double values[1] = {warp_max(value)};
    share(values);
    for (int warp = 0; warp < warps; ++warp) {
      const Real other = static_cast<Real>(scratch[warp]);
      value = other > value ? other : value;
    }
    __syncthreads();
    return value;
  }

  // none: what the operation makes of no values
  template <class Operation>
  CALGUIDE_MEMBER Scan scan(int value, int none, const Operation& operation) const {
    const int lane = rank() % warp_size;
    for (int distance = 1; distance < warp_size; distance *= 2) {
      const int other = __shfl_up_sync(all_lanes, value, distance);
      if (lane >= distance) value = operation(other, value);
    }
    const int lanes_before = __shfl_up_sync(all_lanes, value, 1);
    const double last[1] = {static_cast<double>(__shfl_sync(all_lanes, value, warp_size - 1))};
    share(last);
    Scan scan = {none, none};
    for (int warp = 0; warp < warps; ++warp) {
      if (warp == rank() / warp_size) scan.before = scan.all;
      scan.all = operation(scan.all, static_cast<int>(scratch[warp]));
    }
    if (lane > 0) scan.before = operation(scan.before, lanes_before);
    __syncthreads();
    return scan;
  }

 private:
  template <int N>
  CALGUIDE_MEMBER void share(const double (&values)[N]) const {
    if (rank() % warp_size == 0) {
      for (int i = 0; i < N; ++i) scratch[rank() / warp_size * N + i] = values[i];
    }
    __syncthreads();
  }
};

}  // namespace calguide
