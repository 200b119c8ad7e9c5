// The kernels for x86-64 with AVX-512F, BW, DQ and VL (compiled with exactly those flags; chosen at run time by dispatch.cpp).
#include <immintrin.h>

#include "../kernels.h"

#define TT_AVX512
#define TT_ISA_NAME "avx512"

namespace tinytrain {
namespace {
using T = float;
constexpr int kLanes = 16;
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/pointwise.inl.h"
#include "../ops/depthwise.inl.h"
#include "../ops/elementwise.inl.h"
#include "../ops/table.inl.h"
}  // namespace

const Kernels<float>* avx512_kernels() { return &kTable; }

}  // namespace tinytrain
