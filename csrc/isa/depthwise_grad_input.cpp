// One kernel size, TT_KERNEL.
#include "isa.h"

namespace tinytrain::TT_ISA {
namespace {
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/depthwise.inl.h"
}  // namespace

template <>
bool depthwise_grad_input<TT_KERNEL>(const Depthwise<T>& d) {
  return depthwise_rows<TT_KERNEL, true>(d);
}

}  // namespace tinytrain::TT_ISA
