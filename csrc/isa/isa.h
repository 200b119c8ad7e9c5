// What the sources of this folder share. Each is compiled once for every instruction set, in a namespace of that name and with its
// compiler flags; CMakeLists.txt defines TT_SCALAR, TT_EXACT (scalar in double), TT_NEON, TT_AVX2 or TT_AVX512.
//
// Nothing here may become a weak symbol (docs/DESIGN.md, "One shared object, several instruction sets"): what is inline or a
// template stays in the anonymous namespaces of the sources; what they call across files is declared below.
#pragma once

#include "../kernels.h"

#if defined(TT_AVX2)
#include <immintrin.h>
#define TT_ISA avx2
#elif defined(TT_AVX512)
#include <immintrin.h>
#define TT_ISA avx512
#elif defined(TT_NEON)
#include <arm_neon.h>
#define TT_ISA neon
#elif defined(TT_EXACT)
#define TT_SCALAR
#define TT_ISA exact
#else
#define TT_ISA scalar
#endif

namespace tinytrain::TT_ISA {

#if defined(TT_EXACT)
using T = double;
#else
using T = float;
#endif

#if defined(TT_AVX512)
constexpr int kLanes = 16;
#elif defined(TT_AVX2)
constexpr int kLanes = 8;
#elif defined(TT_NEON)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 1;
#endif

// Each file's kernels, put into the table of this instruction set.
void add_pointwise(Kernels<T>& table);
void add_depthwise(Kernels<T>& table);
void add_elementwise(Kernels<T>& table);

// Depthwise kernels for one kernel size, common shapes only; `count` rows of outputs; false: nothing was done.
template <int K>
bool depthwise_forward(const Depthwise<T>* d, int count);
template <int K>
bool depthwise_grad_input(const Depthwise<T>* d, int count);
template <int K>
bool depthwise_grad_weight_vector(const DepthwiseGradWeight<T>& d, int channel);

}  // namespace tinytrain::TT_ISA
