// The kernels for x86-64 with AVX2 and FMA (compiled with exactly those flags; chosen at run time by dispatch.cpp).
#include <immintrin.h>

#include "../kernels.h"

#define TT_AVX2
#define TT_ISA_NAME "avx2"

namespace tinytrain {
namespace {
using T = float;
constexpr int kLanes = 8;
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/pointwise.inl.h"
#include "../ops/depthwise.inl.h"
#include "../ops/elementwise.inl.h"
#include "../ops/table.inl.h"
}  // namespace

const Kernels<float>* avx2_kernels() { return &kTable; }

}  // namespace tinytrain
