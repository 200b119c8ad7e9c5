// The kernels one value at a time: the reference every machine has, in float for comparison with the vector ISAs and in
// double so that gradients can be checked and whole networks compared to rounding error.
#include "../kernels.h"

#define TT_SCALAR
#define TT_ISA_NAME "scalar"

namespace tinytrain {
namespace {
namespace single {
using T = float;
constexpr int kLanes = 1;
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/pointwise.inl.h"
#include "../ops/depthwise.inl.h"
#include "../ops/elementwise.inl.h"
#include "../ops/table.inl.h"
}  // namespace single

#undef TT_INLINE
#undef TT_EACH
#undef TT_EACH_J
namespace exact {
using T = double;
constexpr int kLanes = 1;
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/pointwise.inl.h"
#include "../ops/depthwise.inl.h"
#include "../ops/elementwise.inl.h"
#include "../ops/table.inl.h"
}  // namespace exact
}  // namespace

const Kernels<float>* scalar_kernels() { return &single::kTable; }
const Kernels<double>* exact_kernels() { return &exact::kTable; }

}  // namespace tinytrain
