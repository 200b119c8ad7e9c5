// Which kernels run: the best instruction set this CPU has, chosen once; TINYTRAIN_ISA overrides.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace tinytrain {

// Names of the instruction sets that this build and this CPU both have, best first; always ends with "scalar".
std::vector<std::string> available_isas();

// What the CPU says it is, asked of itself: an emulator's or container's /proc/cpuinfo may be another machine's.
struct Cpu {
  std::string brand;   // x86-64: the name it was sold under
  uint64_t midr = 0;   // aarch64: the Main ID Register of the core this runs on; 0 where the system does not let a program read it
  uint64_t hwcap = 0;  // aarch64: AT_HWCAP
};
Cpu identify_cpu();

// The kernels called `isa`. "" means TINYTRAIN_ISA if it is set, else the best. Throws std::invalid_argument naming the choices.
const Kernels<float>& kernels_f32(const std::string& isa = "");

// The same source in double: scalar only, for exact comparisons.
const Kernels<double>& kernels_f64();

template <class T>
const Kernels<T>& kernels(const std::string& isa);
template <>
inline const Kernels<float>& kernels<float>(const std::string& isa) {
  return kernels_f32(isa);
}
template <>
inline const Kernels<double>& kernels<double>(const std::string&) {
  return kernels_f64();
}

}  // namespace tinytrain
