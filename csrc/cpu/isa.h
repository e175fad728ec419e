// Which instruction set the kernels run with, and how to call the kernel compiled for it.
#pragma once

namespace calguide {

enum class Isa { baseline, v3, v4 };

// The widest instruction set that was compiled and that this machine runs, or the one CALGUIDE_CPU_ISA names.
Isa active_isa();

}  // namespace calguide

// A kernel is compiled once per instruction set, each time in a namespace of that name (the macro CALGUIDE_ISA).
// Anything in a kernel source but its entry point is static or in an anonymous namespace: an inline function shared
// between the variants would let the linker pick wide instructions for the baseline.
#define CALGUIDE_DECLARE_KERNEL(...) \
  namespace calguide {               \
  namespace v4 {                     \
  __VA_ARGS__;                       \
  }                                  \
  namespace v3 {                     \
  __VA_ARGS__;                       \
  }                                  \
  namespace baseline {               \
  __VA_ARGS__;                       \
  }                                  \
  }

#ifdef CALGUIDE_HAS_V4
#define CALGUIDE_IF_V4(...) __VA_ARGS__
#else
#define CALGUIDE_IF_V4(...)
#endif

#ifdef CALGUIDE_HAS_V3
#define CALGUIDE_IF_V3(...) __VA_ARGS__
#else
#define CALGUIDE_IF_V3(...)
#endif

// CALGUIDE_DISPATCH(kernel(arguments)) returns the value of the active variant.
// clang-format off
#define CALGUIDE_DISPATCH(...)                                      \
  switch (::calguide::active_isa()) {                               \
    CALGUIDE_IF_V4(case ::calguide::Isa::v4: return v4::__VA_ARGS__;) \
    CALGUIDE_IF_V3(case ::calguide::Isa::v3: return v3::__VA_ARGS__;) \
    default: return baseline::__VA_ARGS__;                          \
  }
// clang-format on
