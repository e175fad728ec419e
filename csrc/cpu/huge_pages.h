// Memory of many pages costs the first write to each of them, more than the write itself.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace calguide {

// Asks for large pages under memory that is about to be written, where it is large and the system has them.
inline void want_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t huge = 1 << 21;
  constexpr size_t worth = 4 * huge;
  if (bytes < worth) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge * huge;
  // a wish, which the system may leave unheard
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace calguide
