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
bool depthwise_forward<TT_KERNEL>(const Depthwise<T>* d, int count) {
#if defined(TT_NEON)
  return depthwise_passes<TT_KERNEL, false>(d, count);
#else
  return count == 1 && depthwise_rows<TT_KERNEL, false>(*d);
#endif
}

}  // namespace tinytrain::TT_ISA
