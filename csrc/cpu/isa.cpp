#include "cpu/isa.h"

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace calguide {
namespace {

struct NamedIsa {
  const char* name;
  Isa isa;
};

// widest first
std::vector<NamedIsa> runnable_isas() {
  std::vector<NamedIsa> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  CALGUIDE_IF_V4(if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vl")) found.push_back({"v4", Isa::v4});)
  CALGUIDE_IF_V3(if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
                     found.push_back({"v3", Isa::v3});)
#endif
  found.push_back({"baseline", Isa::baseline});
  return found;
}

NamedIsa choose() {
  const std::vector<NamedIsa> isas = runnable_isas();
  const char* wanted = std::getenv("CALGUIDE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas.front();
  std::string names;
  for (const NamedIsa& candidate : isas) {
    if (std::string(wanted) == candidate.name) return candidate;
    names += std::string(names.empty() ? "" : ", ") + candidate.name;
  }
  throw std::runtime_error("CALGUIDE_CPU_ISA is '" + std::string(wanted) +
                           "'; this machine and build can run: " + names);
}

const NamedIsa& chosen() {
  static const NamedIsa isa = choose();
  return isa;
}

}  // namespace

Isa active_isa() { return chosen().isa; }

void bind_isa(pybind11::module_& module) {
  chosen();
  module.def("isa", [] { return chosen().name; }, "Instruction set the kernels run with: v4, v3 or baseline.");
  module.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const NamedIsa& candidate : runnable_isas()) names.push_back(candidate.name);
        pybind11::list result;
        for (const std::string& name : names) result.append(name);
        return result;
      },
      "Instruction sets this build and this machine can run, widest first.");
  module.def(
      "openmp",
      [] {
#ifdef _OPENMP
        return true;
#else
        return false;
#endif
      },
      "Whether the kernels can use more than one thread.");
}

}  // namespace calguide
