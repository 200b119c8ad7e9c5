// The kernels for AArch64: Advanced SIMD belongs to ARMv8.0-A, so this is baseline code, tuned for the Cortex-A53.
#include <arm_neon.h>

#include "../kernels.h"

#define TT_NEON
#define TT_ISA_NAME "neon"

namespace tinytrain {
namespace {
using T = float;
constexpr int kLanes = 4;
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/pointwise.inl.h"
#include "../ops/depthwise.inl.h"
#include "../ops/elementwise.inl.h"
#include "../ops/table.inl.h"
}  // namespace

const Kernels<float>* neon_kernels() { return &kTable; }

}  // namespace tinytrain
