// One kernel size, TT_KERNEL.
#include "isa.h"

namespace tinytrain::TT_ISA {
namespace {
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/depthwise.inl.h"
}  // namespace

template <>
bool depthwise_grad_weight_vector<TT_KERNEL>(const DepthwiseGradWeight<T>& d, int channel) {
  return depthwise_grad_vector<TT_KERNEL>(d, channel);
}

}  // namespace tinytrain::TT_ISA
