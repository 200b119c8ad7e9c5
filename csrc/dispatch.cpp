#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace tinytrain {

const Kernels<float>* scalar_kernels();
const Kernels<double>* exact_kernels();
#if defined(__x86_64__)
const Kernels<float>* avx2_kernels();
const Kernels<float>* avx512_kernels();
#elif defined(__aarch64__)
const Kernels<float>* neon_kernels();
#endif

namespace {

std::vector<const Kernels<float>*> usable() {
  std::vector<const Kernels<float>*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(avx512_kernels());
  }
  if (avx2) found.push_back(avx2_kernels());
#elif defined(__aarch64__)
  found.push_back(neon_kernels());  // Advanced SIMD is part of ARMv8.0-A: nothing to ask the CPU
#endif
  found.push_back(scalar_kernels());
  return found;
}

const Kernels<float>& choose(const std::string& name, const char* source) {
  std::string known;
  for (const Kernels<float>* kernels : usable()) {
    if (name.empty() || name == kernels->isa) return *kernels;
    known += known.empty() ? kernels->isa : std::string(", ") + kernels->isa;
  }
  throw std::invalid_argument(std::string(source) + ": unknown instruction set '" + name + "'; this machine has " + known);
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels<float>* kernels : usable()) names.emplace_back(kernels->isa);
  return names;
}

const Kernels<float>& kernels_f32(const std::string& isa) {
  if (!isa.empty()) return choose(isa, "isa");
  const char* wanted = std::getenv("TINYTRAIN_ISA");
  return choose(wanted ? wanted : "", "TINYTRAIN_ISA");
}

const Kernels<double>& kernels_f64() { return *exact_kernels(); }

}  // namespace tinytrain
