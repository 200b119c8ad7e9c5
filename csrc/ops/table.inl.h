// The table of one ISA (or scalar type); included last.
const Kernels<T> kTable = {
    TT_ISA_NAME,    kLanes,        kPanelVectors,         gemm,           gemm_grad_weight,
    depthwise,      depthwise_grad_weight, apply_epilogue, fisher_sum,     grad_bias,
    gather_columns, pool,          pool_backward,         global_average, image_sum,
    image_row,      adam,          sgd,                   magnitude,      accumulate,
};
