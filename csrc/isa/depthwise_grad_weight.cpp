// One kernel size, TT_KERNEL.
#include "isa.h"

namespace tinytrain::TT_ISA {
namespace {
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/depthwise.inl.h"
#if defined(TT_NEON)
#include "../ops/depthwise_rolling.inl.h"
#endif
}  // namespace

template <>
bool depthwise_grad_weight_vector<TT_KERNEL>(const DepthwiseGradWeight<T>& d, int channel) {
#if defined(TT_NEON) && TT_KERNEL == 3
  if (depthwise_rolling_grad(d, channel)) return true;
#endif
  return depthwise_grad_vector<TT_KERNEL>(d, channel);
}

}  // namespace tinytrain::TT_ISA
