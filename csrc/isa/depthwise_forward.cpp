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
bool depthwise_forward<TT_KERNEL>(const Depthwise<T>& d) {
#if defined(TT_NEON) && TT_KERNEL == 3
  if (depthwise_rolling<false>(d)) return true;
#endif
  return depthwise_rows<TT_KERNEL, false>(d);
}

}  // namespace tinytrain::TT_ISA
