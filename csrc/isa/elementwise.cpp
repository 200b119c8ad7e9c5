#include "isa.h"

namespace tinytrain::TT_ISA {
namespace {
#include "../simd.h"
#include "../ops/epilogue.inl.h"
#include "../ops/elementwise.inl.h"
}  // namespace

void add_elementwise(Kernels<T>& table) {
  table.apply_epilogue = apply_epilogue;
  table.fisher_sum = fisher_sum;
  table.grad_bias = grad_bias;
  table.gather_columns = gather_columns;
  table.pool = pool;
  table.pool_backward = pool_backward;
  table.global_average = global_average;
  table.image_sum = image_sum;
  table.image_row = image_row;
  table.adam = adam;
  table.sgd = sgd;
  table.magnitude = magnitude;
  table.accumulate = accumulate;
  table.fma_peak = fma_peak;
}

}  // namespace tinytrain::TT_ISA
