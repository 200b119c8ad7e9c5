// The table of one instruction set.
#include "isa.h"

#define TT_STRING_(name) #name
#define TT_STRING(name) TT_STRING_(name)

namespace tinytrain::TT_ISA {

// By value: a static here would be initialised by code of this instruction set, and guarded by weak symbols.
Kernels<T> kernels() {
  Kernels<T> table{};
#if defined(TT_EXACT)
  table.isa = "scalar";
#else
  table.isa = TT_STRING(TT_ISA);
#endif
  table.lanes = kLanes;
  add_pointwise(table);
  add_depthwise(table);
  add_elementwise(table);
  return table;
}

}  // namespace tinytrain::TT_ISA
