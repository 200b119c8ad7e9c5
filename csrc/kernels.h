// The contract of every kernel: maths, shapes, layout, aliasing, order of reduction.
//
// All tensors of one image are NHWC without the N and without padding: element (y, x, c) lies at (y * W + x) * C + c. Kernels are
// stateless: they never allocate, lock, throw or start threads, and they read nothing but their arguments. The session tiles
// the work into rows and strips; a result never depends on that tiling, because every output element is reduced in one fixed
// order whatever tile it falls into: kernel row, kernel column, channel, ascending; for channels that gemm reads in pairs of rows
// (pack.h) even and odd positions apart.
//
// This header holds plain data only: it is included by the ISA files, which must not emit a symbol that baseline code could
// link against (docs/DESIGN.md, "One shared object, several instruction sets").
#pragma once

#include <stdint.h>

namespace tinytrain {

enum class Activation : int { kNone = 0, kRelu = 1, kRelu6 = 2 };

// A ReLU's derivative, one bit an element: bit (c % 8) of byte mask[pixel * mask_bytes(C) + c / 8].
constexpr int mask_bytes(int channels) { return (channels + 7) / 8; }

// What happens to a sum, in this order; null pointers skip a step. Used by forward and backward alike.
//   v += bias[c] (before its first product, where pairs of rows allow);  v += addend[pixel, c];  mask_out[pixel, c] = (0 < v [< 6]);
//   v = activation(v);  v = mask_in[pixel, c] ? v : 0;  fisher[c] += values[pixel, c] * v;  out[pixel, c] = v
template <class T>
struct Epilogue {
  T* out;  // (pixels, C), rows `out_stride` apart; may equal addend
  int64_t out_stride;
  const T* bias;    // (C rounded up to lanes); zero behind C
  const T* addend;  // (pixels, C): the shortcut, or a gradient that arrived by another way
  int64_t addend_stride;
  uint8_t* mask_out;       // (pixels, mask_bytes(C))
  const uint8_t* mask_in;  // (pixels, mask_bytes(C))
  const T* values;         // (pixels, C): the activation whose gradient is being written
  T* fisher;               // (C): sum over pixels of activation * gradient (inner sum of Eq. 2)
  Activation activation;
};

// Pointwise and dense convolution, and their input gradients: one row of output pixels (or any run of pixels, if pointwise):
//   out[p, o] = epilogue(sum_r sum_{j < depth} rows[r][p * pixel_stride + j] * W[taps[r]][j][o])
// Pointwise: one row, depth = C. Dense k x k: one row per kernel row inside the image, depth = k * C, rows padded with zeros.
// Grad-input: W packed with input and output exchanged (dense: and the kernel turned by 180 degrees).
template <class T>
struct Gemm {
  const T* const* rows;  // `row_count` pointers to the first pixel's first value
  const int* taps;       // kernel row of each
  int row_count;
  int depth;
  int64_t pixel_stride;
  int pixels;
  const T* weights;      // packed: panels of outputs, each [kernel row][depth][panel]; see pack.h
  int kernel_rows;       // kernel rows in the packed weights
  int outputs;           // O
  int first, until;      // outputs to compute; `weights` starts with the panel of `first`, until is O or the end of a panel
  Epilogue<T> epilogue;  // at the first pixel, for all outputs
};

// A panel of weights kept as bytes, expanded for gemm: out[row, i] = bytes[row, i] * its output's scale. In a forward pass the
// layer's outputs are columns, in grad_input rows, where they come round once a tap.
template <class T>
struct ExpandPanel {
  const int8_t* bytes;  // (rows, width)
  int64_t rows;
  int width;
  bool paired;  // (rows / 2, width, 2), see pack.h
  const float* scales;
  int scaled_rows;  // outputs of the layer if scales belong to rows, 0 if to the panel's columns
  T* out;           // as bytes
};

// grad_weight of a pointwise or dense convolution, selected rows only:
//   grad[s, j] += sum_p grad_output[p, s] * input[p, j]           in order of p, summed from zero, then added once
template <class T>
struct GemmGradWeight {
  const T* grad_output;  // (pixels, S), rows `grad_output_stride` apart
  int64_t grad_output_stride;
  const T* input;  // (pixels, depth), rows `input_stride` apart
  int64_t input_stride;
  int pixels;
  int selected;  // S
  int depth;
  T* grad;  // (S, depth), rows `grad_stride` apart
  int64_t grad_stride;
};

// Depthwise convolution, one output row, and (transposed) its input gradient:
//   forward     out[x, c] = epilogue(sum_r sum_j rows[r][x * stride + j - padding, c] * W[taps[r]][j][c])
//   transposed  out[x, c] = epilogue(sum_r sum_j rows[r][(x + padding - j) / stride, c] * W[taps[r]][j][c]), whole quotients only
// Columns outside the row contribute nothing and are not read.
template <class T>
struct Depthwise {
  const T* const* rows;  // `row_count` pointers to rows of (width_in, C)
  const int* taps;
  int row_count;
  const T* weights;  // (k, k, C rounded up to lanes)
  int channels;
  int kernel, stride, padding;
  int width_in, width_out;  // of rows and of out
  bool transposed;
  Epilogue<T> epilogue;  // at out[0]
};

// grad_weight of a depthwise convolution over compact operands (selected channels side by side):
//   grad[ky, kx, s] += sum_{oy, ox} grad_output[oy, ox, s] * input[oy * stride + ky - padding, ox * stride + kx - padding, s]
// summed from zero in order of (oy, ox), then added once.
template <class T>
struct DepthwiseGradWeight {
  const T* grad_output;  // (height_out, width_out, S)
  const T* input;        // (height_in, width_in, S)
  int height_in, width_in, height_out, width_out;
  int selected;  // S
  int kernel, stride, padding;
  T* grad;  // (k, k, S)
};

enum class PoolKind : int { kMax = 0, kAverage = 1 };

// Pooling with zero-free borders: maximum over, or mean of, the window's elements inside the image (count_include_pad = False).
template <class T>
struct Pool {
  PoolKind kind;
  const T* input;  // (height_in, width_in, C)
  int height_in, width_in, height_out, width_out, channels;
  int kernel, stride, padding;
  T* out;                // forward: (height_out, width_out, C)
  const T* grad_output;  // backward: (height_out, width_out, C); a maximum's first winner in row order gets it all
  T* grad_input;         // backward: (height_in, width_in, C), overwritten
};

// One image row as the stem wants it: u8 (or already normalised float) RGB -> normalised, augmented, optionally mirrored.
//   y[c] = scale[c] * x[c] + offset[c] + grey_scale . x           (brightness, saturation and contrast folded into one affine map)
template <class T>
struct ImageRow {
  const uint8_t* bytes;  // (width, 3), or null
  const float* values;   // (width, 3) if bytes is null
  int width;
  int shift;    // content moves right by `shift` pixels; uncovered pixels become 0
  bool mirror;  // before the shift
  bool grey;    // grey_scale is not zero
  T scale[3], offset[3], grey_scale[3];
  T* out;  // (width, 3)
};

// Optimisers on a compact run of values; gradients are means already.
template <class T>
struct Adam {
  T* weight;  // (count)
  const T* grad;
  T* first_moment;
  T* second_moment;
  int64_t count;
  T learning_rate, beta1, beta2, epsilon;
  T correction1, correction2;  // 1 / (1 - beta^t)
};
template <class T>
struct Sgd {
  T* weight;  // (count)
  const T* grad;
  T* velocity;  // (count), or null without momentum: v = momentum * v + g; w -= learning_rate * v
  int64_t count;
  T learning_rate, momentum;
};

template <class T>
struct Kernels {
  const char* isa;
  int lanes;          // values in a vector
  int panel_vectors;  // vectors in a full panel of packed weights
  bool pairs_depth;   // whether gemm reads a rest of half a vector in pairs of rows; see pack.h
  void (*gemm)(const Gemm<T>&);
  void (*expand_panel)(const ExpandPanel<T>&);
  void (*gemm_grad_weight)(const GemmGradWeight<T>&);
  // The first of `count` rows of outputs, one below the other in one layer, or the first two: returns how many.
  int (*depthwise)(const Depthwise<T>*, int count);
  int paired_kernel;  // the kernel size of layers whose rows it may take by twos; 0: none
  void (*depthwise_grad_weight)(const DepthwiseGradWeight<T>&);
  // Element-wise epilogue on existing sums: (pixels, C) -> (pixels, C); `input` may equal epilogue.out.
  void (*apply_epilogue)(const T* input, int64_t pixels, int channels, const Epilogue<T>&);
  // fisher[c] += sum over pixels of a[p, c] * g[p, c]
  void (*fisher_sum)(const T* a, const T* g, int64_t pixels, int channels, T* fisher);
  // bias gradient: grad[c] += sum over pixels of g[p, c]
  void (*grad_bias)(const T* g, int64_t pixels, int channels, T* grad);
  // out[p, s] = in[p, columns[s]]; rows of `in` are `stride` apart, rows of `out` `count` apart
  void (*gather_columns)(const T* in, int64_t pixels, int64_t stride, const int32_t* columns, int count, T* out);
  void (*pool)(const Pool<T>&);
  void (*pool_backward)(const Pool<T>&);
  // out[c] = mean over pixels of in[p, c]
  void (*global_average)(const T* in, int64_t pixels, int channels, T* out);
  // sums[c] = sum over pixels of a byte or float image (pixels, 3)
  void (*image_sum)(const uint8_t* bytes, const float* values, int64_t pixels, double* sums);
  void (*image_row)(const ImageRow<T>&);
  void (*adam)(const Adam<T>&);
  void (*sgd)(const Sgd<T>&);
  // The largest |x[i]|; infinity if any is not finite.
  T (*magnitude)(const T* x, int64_t count);
  // y[i] += x[i]
  void (*accumulate)(const T* x, int64_t count, T* y);
  // Benchmarks: `rounds` times an FMA in each of enough independent vectors to fill the ports; returns how many values that were.
  int64_t (*fma_peak)(int64_t rounds, T* result);
};

}  // namespace tinytrain
