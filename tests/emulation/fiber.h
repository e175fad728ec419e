// Fibers: threads of execution with stacks of their own, one of which runs until it switches to another.
#pragma once

#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define UNSANITIZED __attribute__((no_sanitize("address")))
#else
#define UNSANITIZED
#endif

// the assembly below is 10 times faster, but knows one machine only
#if !defined(__x86_64__) || defined(CALGUIDE_EMULATION_UCONTEXT)
#define USE_UCONTEXT
#include <ucontext.h>
#endif

namespace emulation {

struct Fiber {
#if defined(USE_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  void* stack = nullptr;  // lowest address
  size_t bytes = 0;
};

#if !defined(USE_UCONTEXT)
extern "C" void calguide_switch_stacks(void** save, void* load);
// pushes the registers that a callee keeps, changes stacks, and pops those found there
asm(R"(
  .text
  .local calguide_switch_stacks
  .type calguide_switch_stacks, @function
calguide_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size calguide_switch_stacks, . - calguide_switch_stacks
)");
#endif

// A stack with a page below it that traps.
inline void allocate_stack(Fiber& fiber, size_t bytes) {
  const size_t page = 4096;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, page + bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) abort();
  fiber.stack = static_cast<char*>(memory) + page;
  fiber.bytes = bytes;
}

// Makes the fiber start at `entry`, which must not return, `offset` bytes (a multiple of 16) below its stack's top.
inline void prepare_fiber(Fiber& fiber, void (*entry)(), size_t offset) {
#if defined(USE_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.bytes - offset;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // six registers, the entry to return to, and what would be the address that the entry itself returns to
  void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + fiber.bytes - offset) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top;
#endif
}

// Goes on with `to` until something switches back to `from`; a fiber that ends is not come back to. Its last frames
// never return, and AddressSanitizer must find nothing of them when the stack is used again.
UNSANITIZED inline void switch_fiber(Fiber& from, Fiber& to, bool from_ends = false) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &fake_stack, to.stack, to.bytes);
#else
  (void)from_ends;
#endif
#if defined(USE_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  calguide_switch_stacks(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// The first thing that a fiber does: `from` is who switched to it, whose stack may be the program's own.
inline void fiber_started(Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &from.bytes);
  from.stack = const_cast<void*>(stack);
#else
  (void)from;
#endif
}

// Forgets what a fiber that will not go on had on its stack.
inline void abandon_fiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, fiber.bytes);
#else
  (void)fiber;
#endif
}

}  // namespace emulation
