// The scheduler behind emulation.h. Blocks run one after the other; a block's threads are fibers, of which one runs
// until it meets a barrier, a warp operation or its end. A warp that runs goes on as far as it can before another is
// taken: the distance between warps at which a missing barrier shows.
#include "emulator.h"

#include <stdio.h>

#include <mutex>
#include <numeric>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

enum State { ready, at_barrier, at_warp_operation, finished };

struct Lane {
  State state;
  WarpOperation operation;
  unsigned mask;
  uint64_t value, result;
  int source;
};

struct Warp {
  unsigned existing, ready, waiting;  // lanes; waiting: at a warp operation
  Lane lanes[warpSize];
};

// Shared memory between two margins that no thread may touch.
struct SharedArray {
  static constexpr size_t margin = 64;
  const void* key;
  size_t bytes;
  std::vector<unsigned char> memory;
  unsigned char* data;
};

// the launch that runs
struct Running {
  const Launch* launch = nullptr;
  bool in_order;
  uint64_t random;
  std::string error;
  size_t shared_limit;
  std::vector<SharedArray> shared;  // the dynamic one first
  std::vector<uint3> indices;       // of every thread of a block
  Warp warps[max_threads / warpSize];
  unsigned ready_warps;
  int threads, alive, arrived;  // in the block; arrived: at the barrier
  int warp, lane;               // of the thread that runs
  Fiber scheduler;
} now;

std::mutex one_launch_at_a_time;

Fiber* new_fibers() {
  Fiber* const fibers = new Fiber[max_threads];
  for (int thread = 0; thread < max_threads; ++thread) allocate_stack(fibers[thread], 256 << 10);
  return fibers;
}

Fiber& fiber_of(int thread) {
  static Fiber* const fibers = new_fibers();
  return fibers[thread];
}

// splitmix64
uint32_t random_bits() {
  uint64_t z = now.random += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>(z >> 32);
}

// the number of one of the set bits
int pick(unsigned bits) {
  if (now.in_order) return __builtin_ctz(bits);
  const int turn = random_bits() % 31 + 1;
  return (__builtin_ctz(bits >> turn | bits << (32 - turn)) + turn) % 32;
}

int thread_number() { return now.warp * warpSize + now.lane; }

Lane& lane_of(int thread) { return now.warps[thread / warpSize].lanes[thread % warpSize]; }

void wait() { switch_fiber(fiber_of(thread_number()), now.scheduler); }

UNSANITIZED void run_thread() {
  fiber_started(now.scheduler);
  now.launch->thread();
  lane_of(thread_number()).state = finished;
  --now.alive;
  switch_fiber(fiber_of(thread_number()), now.scheduler, true);
  abort();
}

void resume(int warp, int lane) {
  now.warp = warp;
  now.lane = lane;
  threadIdx = now.indices[thread_number()];
  switch_fiber(now.scheduler, fiber_of(thread_number()));
}

void make_ready(int warp, unsigned lanes) {
  now.warps[warp].ready |= lanes;
  now.ready_warps |= 1u << warp;
  for (; lanes; lanes &= lanes - 1) now.warps[warp].lanes[__builtin_ctz(lanes)].state = ready;
}

std::string format(const char* pattern, unsigned a = 0, unsigned b = 0, unsigned c = 0) {
  char text[160];
  snprintf(text, sizeof text, pattern, a, b, c);
  return text;
}

// Ends the launch from within a thread, which never goes on.
void fail(const std::string& error) {
  now.error = error;
  wait();
}

std::string what_waits(const Lane& lane) {
  static const char* const operations[] = {"__syncwarp", "a shuffle", "a vote"};
  if (lane.state == at_barrier) return "at __syncthreads";
  if (lane.state == finished) return "exited";
  return std::string("at ") + operations[lane.operation] + format(" of lanes 0x%08x", lane.mask);
}

// Runs of threads in the same state, such as "threads 0-31 at __syncthreads, threads 32-63 exited".
std::string what_threads_wait_for() {
  std::string text;
  for (int first = 0, next; first < now.threads; first = next) {
    const std::string waits = what_waits(lane_of(first));
    for (next = first + 1; next < now.threads && what_waits(lane_of(next)) == waits; ++next) {
    }
    text += first ? ", " : "";
    text += next == first + 1 ? format("thread %u ", first) : format("threads %u-%u ", first, next - 1);
    text += waits;
  }
  return text;
}

void guard_margins(const SharedArray& array, bool guarded) {
#if defined(__SANITIZE_ADDRESS__)
  const auto set = guarded ? __asan_poison_memory_region : __asan_unpoison_memory_region;
  set(array.data - array.margin, array.margin);
  set(array.data + array.bytes, array.margin);
#else
  (void)array, (void)guarded;
#endif
}

// all bytes 0xff: a NaN in every float type
void poison(SharedArray& array) {
  guard_margins(array, false);
  std::fill(array.data - array.margin, array.data + array.bytes + array.margin, 0xff);
  guard_margins(array, true);
}

bool margins_are_whole(const SharedArray& array) {
  guard_margins(array, false);
  const auto whole = [](const unsigned char* margin) {
    return std::all_of(margin, margin + SharedArray::margin, [](unsigned char byte) { return byte == 0xff; });
  };
  return whole(array.data - array.margin) && whole(array.data + array.bytes);
}

SharedArray& add_shared(const void* key, size_t bytes, size_t alignment) {
  const size_t margin = SharedArray::margin;
  now.shared.push_back({key, bytes, std::vector<unsigned char>(margin + alignment + bytes + margin), nullptr});
  SharedArray& array = now.shared.back();
  const size_t start = reinterpret_cast<size_t>(array.memory.data()) + margin;
  array.data = reinterpret_cast<unsigned char*>((start + alignment - 1) / alignment * alignment);
  return array;
}

void start_block() {
  now.threads = now.alive = static_cast<int>(now.indices.size());
  now.arrived = 0;
  now.ready_warps = 0;
  for (SharedArray& array : now.shared) poison(array);
  for (int first = 0; first < now.threads; first += warpSize) {
    const int lanes = std::min(warpSize, now.threads - first);
    Warp& warp = now.warps[first / warpSize];
    warp.existing = lanes == warpSize ? ~0u : (1u << lanes) - 1;
    warp.ready = warp.waiting = 0;
    make_ready(first / warpSize, warp.existing);
  }
  // stacks that start at different distances from a page do not share the same few cache sets
  for (int thread = 0; thread < now.threads; ++thread) {
    prepare_fiber(fiber_of(thread), run_thread, static_cast<size_t>(thread % 16 * 192));
  }
}

void run_block() {
  start_block();
  for (int warp = 0; now.alive && now.error.empty();) {
    if (!now.ready_warps) {
      now.error = "deadlock: " + what_threads_wait_for();
      break;
    }
    if (!(now.ready_warps >> warp & 1)) warp = pick(now.ready_warps);
    unsigned& ready_lanes = now.warps[warp].ready;
    const int lane = pick(ready_lanes);
    ready_lanes &= ~(1u << lane);
    if (!ready_lanes) now.ready_warps &= ~(1u << warp);
    resume(warp, lane);
  }
  for (const SharedArray& array : now.shared) {
    if (!margins_are_whole(array) && now.error.empty()) now.error = "a write beyond the ends of a shared array";
  }
}

void run_grid() {
  const dim3 grid = now.launch->grid;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  // a step that shares no factor with their number comes to every block once
  size_t block = 0, step = 1;
  if (!now.in_order) {
    block = random_bits() % blocks;
    do {
      step = random_bits() % blocks + 1;
    } while (std::gcd(step, blocks) != 1);
  }
  for (size_t count = 0; count < blocks && now.error.empty(); ++count, block = (block + step) % blocks) {
    blockIdx = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
    run_block();
  }
}

cudaError_t refusal(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > max_threads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) return cudaErrorInvalidConfiguration;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  const auto opted = dynamic_shared_limits.find(launch.kernel);
  const size_t limit = opted == dynamic_shared_limits.end() ? 0 : opted->second;
  return launch.dynamic_shared > std::max(limit, shared_without_opt_in) ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

void launch(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  const long number = ++settings["launches"], seed = settings["seed"];
  if (const cudaError_t error = refusal(launch)) {
    last_error = error;
    return;
  }
  now.launch = &launch;
  now.in_order = seed == 0;
  now.random = static_cast<uint64_t>(seed) << 32 ^ static_cast<uint64_t>(number);
  now.error.clear();
  now.shared_limit = dynamic_shared_limits.count(launch.kernel) ? settings["shared_limit"] : shared_without_opt_in;
  now.shared.clear();
  add_shared(nullptr, launch.dynamic_shared, 16);
  blockDim = launch.block;
  gridDim = launch.grid;
  now.indices.clear();
  for (unsigned z = 0; z < blockDim.z; ++z) {
    for (unsigned y = 0; y < blockDim.y; ++y) {
      for (unsigned x = 0; x < blockDim.x; ++x) now.indices.push_back({x, y, z});
    }
  }
  run_grid();
  now.launch = nullptr;
  if (now.error.empty()) return;
  for (int thread = 0; thread < now.threads; ++thread) abandon_fiber(fiber_of(thread));
  last_error = cudaErrorLaunchFailure;
  failure_message = std::string("kernel ") + launch.name +
                    format(", block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z) + now.error;
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  size_t total = bytes;
  for (const SharedArray& array : now.shared) {
    if (array.key == key) return array.data;
    total += array.bytes;
  }
  if (total > now.shared_limit) fail(format("%u bytes of shared memory, the limit is %u", total, now.shared_limit));
  SharedArray& array = add_shared(key, bytes, alignment);
  poison(array);
  return array.data;
}

void* dynamic_shared() { return now.shared.front().data; }

int lane() { return now.lane; }

void barrier() {
  lane_of(thread_number()).state = at_barrier;
  // threads that have exited are still waited for
  if (++now.arrived == now.threads) {
    now.arrived = 0;
    for (int warp = 0; warp * warpSize < now.threads; ++warp) make_ready(warp, now.warps[warp].existing);
  }
  wait();
}

uint64_t warp_meeting(WarpOperation operation, unsigned mask, uint64_t value, int source) {
  Warp& warp = now.warps[now.warp];
  Lane& own = warp.lanes[now.lane];
  const int thread = thread_number();
  // lanes beyond the end of a block need not come; those that have exited are still waited for
  const unsigned named = mask & warp.existing;
  if (!(named >> now.lane & 1)) fail(format("thread %u is not of the lanes 0x%08x that it waits for", thread, mask));
  if (operation == warp_shuffle && !(named >> source & 1)) {
    fail(format("thread %u shuffles from lane %u, which takes no part", thread, source));
  }
  own = {at_warp_operation, operation, mask, value, 0, source};
  warp.waiting |= 1u << now.lane;
  if (!(named & ~warp.waiting)) {
    uint64_t votes = 0;
    for (unsigned left = named; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const Lane& other = warp.lanes[lane];
      if (other.mask != mask || other.operation != operation) {
        fail(format("threads %u and %u meet in different operations", thread, now.warp * warpSize + lane));
      }
      votes |= uint64_t{other.value != 0} << lane;
    }
    for (unsigned left = named; left; left &= left - 1) {
      Lane& other = warp.lanes[__builtin_ctz(left)];
      other.result = operation == warp_vote ? votes : warp.lanes[other.source].value;
    }
    warp.waiting &= ~named;
    make_ready(now.warp, named);
  }
  wait();
  return own.result;
}

}  // namespace emulation

#if !defined(__SANITIZE_ADDRESS__)
// The plain build has the checks of -fsanitize=alignment without their library: they end the launch.
extern "C" void __ubsan_handle_type_mismatch_v1(const void* check, size_t address) {
  struct Place {
    const char* file;
    unsigned line, column;
  };
  const Place* place = static_cast<const Place*>(check);
  const std::string error = std::string("misaligned access at ") + place->file +
                            emulation::format(":%u, to an address of %u modulo 16", place->line, address % 16);
  if (emulation::now.launch) emulation::fail(error);
  fprintf(stderr, "%s\n", error.c_str());
  abort();
}
#endif
