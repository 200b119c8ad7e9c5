#include "conv.h"

#include <algorithm>

namespace tinytrain {
namespace {

// Weight gradients over more pixels go block by block, so that a block of inputs stays in the cache.
constexpr int kGradBlockPixels = 512;

// An epilogue at row 0, moved to row y.
template <class T>
Epilogue<T> at_row(Epilogue<T> e, Shape shape, int y, int held) {
  const int64_t pixel = static_cast<int64_t>(y) * shape.width;
  e.out += static_cast<int64_t>(y % held) * shape.width * shape.channels;
  if (e.addend) e.addend += pixel * shape.channels;
  if (e.values) e.values += pixel * shape.channels;
  if (e.mask_out) e.mask_out += pixel * mask_bytes(shape.channels);
  if (e.mask_in) e.mask_in += pixel * mask_bytes(shape.channels);
  return e;
}

}  // namespace

template <class T>
Convolution<T>::Convolution(const Op& op, Shape in, Shape out, const float* weight, const float* bias, bool with_backward,
                            const Kernels<T>& kernels)
    : op_(op), in_(in), out_(out), kernels_(kernels) {
  const int lanes = kernels.lanes, panel = kernels.lanes * kernels.panel_vectors, k = op.kernel;
  const int padded_out = (out.channels + lanes - 1) / lanes * lanes;
  bias_ = AlignedArray<T>(padded_out);
  std::copy(bias, bias + out.channels, bias_.data());
  if (op.depthwise) {
    depthwise_row_ = padded_out;
    depthwise_ = AlignedArray<T>(k * k * depthwise_row_);
  } else {
    forward_ = PackedMatrix<T>(k * k * in.channels, out.channels, lanes, panel);
    if (with_backward) backward_ = PackedMatrix<T>(k * k * out.channels, in.channels, lanes, panel);
  }
  const int fan_in = op.depthwise ? 1 : in.channels;
  for (int o = 0; o < out.channels; ++o) {
    for (int c = 0; c < fan_in; ++c) {
      for (int ky = 0; ky < k; ++ky) {
        for (int kx = 0; kx < k; ++kx) set_weight(o, c, ky, kx, static_cast<T>(*weight++));
      }
    }
  }
}

template <class T>
int64_t Convolution<T>::resident_bytes() const {
  return forward_.bytes() + backward_.bytes() + depthwise_.bytes() + bias_.bytes();
}

template <class T>
T Convolution<T>::weight(int out, int in, int ky, int kx) const {
  const int tap = ky * op_.kernel + kx;
  if (op_.depthwise) return depthwise_.data()[tap * depthwise_row_ + out];
  return forward_.at(static_cast<int64_t>(tap) * in_.channels + in, out);
}

template <class T>
void Convolution<T>::set_weight(int out, int in, int ky, int kx, T value) {
  const int tap = ky * op_.kernel + kx;
  if (op_.depthwise) {
    depthwise_.data()[tap * depthwise_row_ + out] = value;
    return;
  }
  forward_.at(static_cast<int64_t>(tap) * in_.channels + in, out) = value;
  if (backward_) {
    // Kernel rows keep their order (taps name them); columns turn round, so that the product slides forwards over grad_output.
    backward_.at(static_cast<int64_t>(ky * op_.kernel + op_.kernel - 1 - kx) * out_.channels + out, in) = value;
  }
}

template <class T>
void Convolution<T>::copy_weight(T* weight_out, T* bias_out) const {
  const int fan_in = op_.depthwise ? 1 : in_.channels;
  for (int o = 0; o < out_.channels; ++o) {
    for (int c = 0; c < fan_in; ++c) {
      for (int ky = 0; ky < op_.kernel; ++ky) {
        for (int kx = 0; kx < op_.kernel; ++kx) *weight_out++ = weight(o, c, ky, kx);
      }
    }
  }
  std::copy(bias_.data(), bias_.data() + out_.channels, bias_out);
}

template <class T>
void Convolution<T>::set_selected(const LayerUpdate& update, const T* values) {
  const bool columns = update.axis == Axis::kIn;
  const int selected = static_cast<int>(update.channels.size());
  const int outs = columns ? out_.channels : selected;
  const int ins = op_.depthwise ? 1 : columns ? selected : in_.channels;
  for (int o = 0; o < outs; ++o) {
    for (int c = 0; c < ins; ++c) {
      for (int ky = 0; ky < op_.kernel; ++ky) {
        for (int kx = 0; kx < op_.kernel; ++kx) {
          set_weight(columns ? o : update.channels[o], columns ? update.channels[c] : c, ky, kx, *values++);
        }
      }
    }
  }
}

template <class T>
int64_t Convolution<T>::forward_scratch(const Op& op, int in_width, int channels) {
  return op.dense() ? static_cast<int64_t>(op.kernel) * (in_width + 2 * op.padding) * channels : 0;
}

template <class T>
int64_t Convolution<T>::grad_input_scratch(const Op& op, int in_width, int out_channels) {
  return op.dense() ? static_cast<int64_t>(op.kernel) * (in_width + op.kernel - 1) * out_channels : 0;
}

template <class T>
bool Convolution<T>::needs_image_sum(const Op& op, Shape out) {
  return op.dense() || (op.pointwise() && out.pixels() > kGradBlockPixels);
}

// Copies one row, `spread - 1` zero pixels between its pixels, `before` and `after` zero pixels around it.
template <class T>
void Convolution<T>::load_row(const T* tensor, const ImageSource<T>* image, Shape shape, int y, int spread, T* out, int before,
                              int after) const {
  const int64_t channels = shape.channels;
  const int64_t width = static_cast<int64_t>(shape.width - 1) * spread + 1;
  out = std::fill_n(out, before * channels, T(0));
  std::fill_n(out + width * channels, after * channels, T(0));
  if (tensor) {
    const T* in = tensor + static_cast<int64_t>(y) * shape.width * channels;
    if (spread == 1) {
      std::copy_n(in, width * channels, out);
      return;
    }
    std::fill_n(out, width * channels, T(0));
    for (int x = 0; x < shape.width; ++x) std::copy_n(in + x * channels, channels, out + x * spread * channels);
    return;
  }
  const int source = y - image->shift_y;
  if (source < 0 || source >= shape.height) {
    std::fill_n(out, width * channels, T(0));
    return;
  }
  ImageRow<T> row = image->map;
  const int64_t at = static_cast<int64_t>(source) * shape.width * channels;
  row.bytes = image->bytes ? image->bytes + at : nullptr;
  row.values = image->values ? image->values + at : nullptr;
  row.width = shape.width;
  row.out = out;
  kernels_.image_row(row);
}

template <class T>
void Convolution<T>::forward(RowView<const T> in, RowView<T> out, const ImageSource<T>* image, int begin, int until, T* scratch,
                             int* loaded, const Epilogue<T>& epilogue) const {
  Epilogue<T> e = epilogue;
  e.out = out.data;
  e.out_stride = e.addend_stride = out_.channels;
  e.bias = bias_.data();
  if (op_.pointwise()) {
    forward_pointwise(in, out, begin, until, e);
  } else if (op_.depthwise) {
    forward_depthwise(in, out, begin, until, e);
  } else {
    forward_dense(in, out, image, begin, until, scratch, loaded, e);
  }
}

template <class T>
void Convolution<T>::forward_pointwise(RowView<const T> in, RowView<T> out, int begin, int until, const Epilogue<T>& e) const {
  const int tap = 0;
  for (int y = begin; y < until;) {
    // As many rows as lie side by side in both rings.
    const int run = std::min({until - y, in.held - y % in.held, out.held - y % out.held});
    const T* row = in.data + static_cast<int64_t>(y % in.held) * in_.width * in_.channels;
    Gemm<T> g{};
    g.rows = &row;
    g.taps = &tap;
    g.row_count = g.kernel_rows = 1;
    g.depth = in_.channels;
    g.pixel_stride = in_.channels;
    g.pixels = run * in_.width;
    g.weights = forward_.data();
    g.outputs = out_.channels;
    g.epilogue = at_row(e, out_, y, out.held);
    kernels_.gemm(g);
    y += run;
  }
}

template <class T>
void Convolution<T>::forward_depthwise(RowView<const T> in, RowView<T> out, int begin, int until, const Epilogue<T>& e) const {
  const T* rows[kMaxKernel];
  int taps[kMaxKernel];
  Depthwise<T> d{};
  d.rows = rows;
  d.taps = taps;
  d.weights = depthwise_.data();
  d.channels = in_.channels;
  d.kernel = op_.kernel;
  d.stride = op_.stride;
  d.padding = op_.padding;
  d.width_in = in_.width;
  d.width_out = out_.width;
  for (int y = begin; y < until; ++y) {
    d.row_count = 0;
    for (int ky = 0; ky < op_.kernel; ++ky) {
      const int iy = y * op_.stride + ky - op_.padding;
      if (iy < 0 || iy >= in_.height) continue;
      rows[d.row_count] = in.data + static_cast<int64_t>(iy % in.held) * in_.width * in_.channels;
      taps[d.row_count++] = ky;
    }
    d.epilogue = at_row(e, out_, y, out.held);
    kernels_.depthwise(d);
  }
}

template <class T>
void Convolution<T>::forward_dense(RowView<const T> in, RowView<T> out, const ImageSource<T>* image, int begin, int until,
                                   T* scratch, int* loaded, const Epilogue<T>& e) const {
  const T* rows[kMaxKernel];
  int taps[kMaxKernel];
  const int k = op_.kernel;
  const int64_t padded_row = static_cast<int64_t>(in_.width + 2 * op_.padding) * in_.channels;
  Gemm<T> g{};
  g.rows = rows;
  g.taps = taps;
  g.depth = k * in_.channels;
  g.pixel_stride = static_cast<int64_t>(op_.stride) * in_.channels;
  g.pixels = out_.width;
  g.weights = forward_.data();
  g.kernel_rows = k;
  g.outputs = out_.channels;
  for (int y = begin; y < until; ++y) {
    g.row_count = 0;
    for (int ky = 0; ky < k; ++ky) {
      const int iy = y * op_.stride + ky - op_.padding;
      if (iy < 0 || iy >= in_.height) continue;
      T* const row = scratch + (iy % k) * padded_row;
      if (iy >= *loaded) {
        load_row(in.data, image, in_, in.data ? iy % in.held : iy, 1, row, op_.padding, op_.padding);
        *loaded = iy + 1;
      }
      rows[g.row_count] = row;
      taps[g.row_count++] = ky;
    }
    g.epilogue = at_row(e, out_, y, out.held);
    kernels_.gemm(g);
  }
}

template <class T>
void Convolution<T>::grad_input(const T* grad_output, T* scratch, const Epilogue<T>& epilogue) const {
  const T* rows[kMaxKernel];
  int taps[kMaxKernel];
  const int k = op_.kernel;
  Gemm<T> g{};
  g.rows = rows;
  g.taps = taps;
  g.depth = k * out_.channels;
  g.pixel_stride = out_.channels;
  g.weights = backward_.data();
  g.kernel_rows = k;
  g.outputs = in_.channels;
  if (op_.pointwise()) {
    rows[0] = grad_output;
    taps[0] = 0;
    g.row_count = 1;
    g.pixels = static_cast<int>(in_.pixels());
    g.epilogue = epilogue;
    kernels_.gemm(g);
    return;
  }
  g.pixels = in_.width;
  Depthwise<T> d{};
  d.rows = rows;
  d.taps = taps;
  d.weights = depthwise_.data();
  d.channels = in_.channels;
  d.kernel = k;
  d.stride = op_.stride;
  d.padding = op_.padding;
  d.width_in = out_.width;
  d.width_out = in_.width;
  d.transposed = true;
  // Dense: rows of grad_output spread by the stride and padded, so that a flipped kernel slides over them one by one.
  const int64_t padded_row = static_cast<int64_t>(in_.width + k - 1) * out_.channels;
  const int before = k - 1 - op_.padding;
  const int after = in_.width + k - 1 - before - ((out_.width - 1) * op_.stride + 1);
  int loaded = 0;
  for (int y = 0; y < in_.height; ++y) {
    int count = 0;
    for (int ky = k - 1; ky >= 0; --ky) {  // output rows in ascending order
      const int shifted = y + op_.padding - ky;
      if (shifted < 0 || shifted % op_.stride != 0 || shifted / op_.stride >= out_.height) continue;
      const int oy = shifted / op_.stride;
      if (op_.depthwise) {
        rows[count] = grad_output + static_cast<int64_t>(oy) * out_.width * out_.channels;
      } else {
        T* const row = scratch + (oy % k) * padded_row;
        if (oy >= loaded) {
          load_row(grad_output, nullptr, out_, oy, op_.stride, row, before, after);
          loaded = oy + 1;
        }
        rows[count] = row;
      }
      taps[count++] = ky;
    }
    if (op_.depthwise) {
      d.row_count = count;
      d.epilogue = at_row(epilogue, in_, y, in_.height);
      kernels_.depthwise(d);
    } else {
      g.row_count = count;
      g.epilogue = at_row(epilogue, in_, y, in_.height);
      kernels_.gemm(g);
    }
  }
}

template <class T>
void Convolution<T>::grad_weight(const LayerUpdate& update, const T* grad_output, const T* input, const ImageSource<T>* image,
                                 T* image_sum, T* padded, T* total) const {
  const int selected = static_cast<int>(update.channels.size());
  const bool columns = update.axis == Axis::kIn;
  if (op_.depthwise) {
    DepthwiseGradWeight<T> d{};
    d.grad_output = grad_output;
    d.input = input;
    d.height_in = in_.height;
    d.width_in = in_.width;
    d.height_out = out_.height;
    d.width_out = out_.width;
    d.selected = selected;
    d.kernel = op_.kernel;
    d.stride = op_.stride;
    d.padding = op_.padding;
    d.grad = total;
    kernels_.depthwise_grad_weight(d);
    return;
  }
  Shape in = in_;
  if (columns) in.channels = selected;
  GemmGradWeight<T> g{};
  g.selected = columns ? out_.channels : selected;
  g.grad_output_stride = g.selected;
  g.depth = op_.kernel * in.channels;
  g.input_stride = static_cast<int64_t>(op_.stride) * in.channels;
  g.grad_stride = static_cast<int64_t>(op_.kernel) * g.depth;
  g.grad = image_sum ? image_sum : total;
  if (image_sum) std::fill_n(image_sum, update.count, T(0));
  if (op_.pointwise()) {
    const int64_t block = image_sum ? kGradBlockPixels : out_.pixels();
    for (int64_t pixel = 0; pixel < out_.pixels(); pixel += block) {
      g.grad_output = grad_output + pixel * g.grad_output_stride;
      g.input = input + pixel * g.input_stride;
      g.pixels = static_cast<int>(std::min(block, out_.pixels() - pixel));
      kernels_.gemm_grad_weight(g);
    }
  } else {
    const int64_t padded_row = static_cast<int64_t>(in.width + 2 * op_.padding) * in.channels;
    g.pixels = out_.width;
    int loaded = 0;
    for (int y = 0; y < out_.height; ++y) {
      g.grad_output = grad_output + static_cast<int64_t>(y) * out_.width * g.grad_output_stride;
      for (int ky = 0; ky < op_.kernel; ++ky) {
        const int iy = y * op_.stride + ky - op_.padding;
        if (iy < 0 || iy >= in.height) continue;
        T* const row = padded + (iy % op_.kernel) * padded_row;
        if (iy >= loaded) {
          load_row(input, image, in, iy, 1, row, op_.padding, op_.padding);
          loaded = iy + 1;
        }
        g.input = row;
        g.grad = image_sum + static_cast<int64_t>(ky) * g.depth;
        kernels_.gemm_grad_weight(g);
      }
    }
  }
  if (image_sum) kernels_.accumulate(image_sum, update.count, total);
}

template class Convolution<float>;
template class Convolution<double>;

}  // namespace tinytrain
