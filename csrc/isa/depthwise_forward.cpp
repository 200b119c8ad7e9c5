// One kernel size, TT_KERNEL.
#include "isa.h"

namespace tinytrain::TT_ISA {
namespace {
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/depthwise.inl.h"
}  // namespace

template <>
bool depthwise_forward<TT_KERNEL>(const Depthwise<T>& d) {
  return depthwise_rows<TT_KERNEL, false>(d);
}

}  // namespace tinytrain::TT_ISA
