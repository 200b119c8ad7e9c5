#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tinytrain {

// csrc/isa/table.cpp, compiled once for each.
namespace scalar {
Kernels<float> kernels();
}
namespace exact {
Kernels<double> kernels();
}
#if defined(__x86_64__)
namespace avx2 {
Kernels<float> kernels();
}
namespace avx512 {
Kernels<float> kernels();
}
#elif defined(__aarch64__)
namespace neon {
Kernels<float> kernels();
}
#endif

namespace {

std::vector<const Kernels<float>*> usable() {
  std::vector<const Kernels<float>*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    static const Kernels<float> table = avx512::kernels();
    found.push_back(&table);
  }
  if (has_avx2) {
    static const Kernels<float> table = avx2::kernels();
    found.push_back(&table);
  }
#elif defined(__aarch64__)
  static const Kernels<float> neon_table = neon::kernels();  // part of ARMv8.0-A: nothing to ask the CPU
  found.push_back(&neon_table);
#endif
  static const Kernels<float> scalar_table = scalar::kernels();
  found.push_back(&scalar_table);
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

Cpu identify_cpu() {
  Cpu cpu;
#if defined(__x86_64__)
  char brand[49] = {};
  for (unsigned part = 0; part < 3; ++part) {
    unsigned words[4];
    if (!__get_cpuid(0x80000002 + part, &words[0], &words[1], &words[2], &words[3])) break;
    std::memcpy(brand + 16 * part, words, sizeof words);
  }
  cpu.brand = brand;
#elif defined(__aarch64__)
  cpu.hwcap = getauxval(AT_HWCAP);
  if (cpu.hwcap & HWCAP_CPUID) asm("mrs %0, midr_el1" : "=r"(cpu.midr));
#endif
  return cpu;
}

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

const Kernels<double>& kernels_f64() {
  static const Kernels<double> table = exact::kernels();
  return table;
}

}  // namespace tinytrain
