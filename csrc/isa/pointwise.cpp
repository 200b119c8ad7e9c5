#include "isa.h"

namespace tinytrain::TT_ISA {
namespace {
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/pointwise.inl.h"
}  // namespace

void add_pointwise(Kernels<T>& table) {
  table.panel_vectors = kPanelVectors;
  table.pairs_depth = kPairsDepth;
  table.gemm = gemm;
  table.expand_panel = expand_panel;
  table.gemm_grad_weight = gemm_grad_weight;
}

}  // namespace tinytrain::TT_ISA
