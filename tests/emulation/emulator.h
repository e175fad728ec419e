// What the scheduler and the host functions of the emulated CUDA share.
#pragma once

#include <map>
#include <string>

#include "emulation.h"

namespace emulation {

constexpr int max_threads = 1024;
constexpr size_t shared_without_opt_in = 48 << 10;

// what tests may set, by name
inline std::map<std::string, long> settings = {
    {"seed", 0},  // 0: blocks, warps and lanes in order; any other: an order of its own
    {"shared_limit", 227 << 10},
    {"multiprocessors", 4},
    {"compute_capability", 90},
    {"device_count", 1},
    {"device", 0},  // the current one
    {"driver_version", 13000},
    {"launches", 0},  // counted
};

// what kernels have opted in to
inline std::map<const void*, size_t> dynamic_shared_limits;

inline cudaError_t last_error = cudaSuccess;
inline std::string failure_message;  // of cudaErrorLaunchFailure

}  // namespace emulation
