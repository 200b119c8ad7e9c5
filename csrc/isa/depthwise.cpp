#include "isa.h"

namespace tinytrain::TT_ISA {
namespace {
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/depthwise_general.inl.h"
}  // namespace

void add_depthwise(Kernels<T>& table) {
  table.depthwise = depthwise;
#if defined(TT_NEON)
  table.paired_kernel = 3;
#else
  table.paired_kernel = 0;
#endif
  table.depthwise_grad_weight = depthwise_grad_weight;
}

}  // namespace tinytrain::TT_ISA
