#include "conv.h"

#include <algorithm>
#include <cmath>

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

// The scale that turns one output's weights into bytes. Weights that were bytes times a scale before, as those of a quantised
// release file, are found to be so: the largest is a whole number of scales, and that is tried from 128 down.
float byte_scale(const float* weight, int64_t count) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(weight[i]));
  for (int steps = 128; steps > 0; --steps) {
    const float scale = largest / static_cast<float>(steps);
    // The quotient is rounded: the scale that made the largest weight may be a neighbour.
    for (const float candidate : {scale, std::nextafter(scale, 0.0f), std::nextafter(scale, largest)}) {
      int64_t exact = 0;
      while (exact < count) {
        const float byte = std::nearbyint(weight[exact] / candidate);
        if (!(byte >= -128 && byte <= 127 && byte * candidate == weight[exact])) break;
        ++exact;
      }
      if (exact == count) return candidate;
    }
  }
  return largest / 127;
}

}  // namespace

template <class T>
Convolution<T>::Convolution(const Op& op, Shape in, Shape out, const float* weight, const float* bias, bool with_backward,
                            bool quantised, const LayerUpdate* update, const Kernels<T>& kernels)
    : op_(op), in_(in), out_(out), kernels_(kernels) {
  const int lanes = kernels.lanes, k = op.kernel;
  const Packing packing{lanes, lanes * kernels.panel_vectors, kernels.pairs_depth};
  const int padded_out = (out.channels + lanes - 1) / lanes * lanes;
  bias_ = AlignedArray<T>(padded_out);
  std::copy(bias, bias + out.channels, bias_.data());
  const int fan_in = op.depthwise ? 1 : in.channels;
  if (op.depthwise) {
    depthwise_row_ = padded_out;
    depthwise_ = AlignedArray<T>(k * k * depthwise_row_);
  } else if (quantised) {
    forward_bytes_ = PackedMatrix<int8_t>(k * k * in.channels, out.channels, packing);
    if (with_backward) backward_bytes_ = PackedMatrix<int8_t>(k * k * out.channels, in.channels, packing);
    scales_ = AlignedArray<float>(padded_out);
    const int64_t count = static_cast<int64_t>(fan_in) * k * k;
    for (int o = 0; o < out.channels; ++o) scales_.data()[o] = byte_scale(weight + o * count, count);
    if (update) {
      update_ = *update;
      trained_ = AlignedArray<T>(update->count);
    }
  } else {
    forward_ = PackedMatrix<T>(k * k * in.channels, out.channels, packing);
    if (with_backward) backward_ = PackedMatrix<T>(k * k * out.channels, in.channels, packing);
  }
  if (forward_) {
    pack(weight);
    return;
  }
  for (int o = 0; o < out.channels; ++o) {
    for (int c = 0; c < fan_in; ++c) {
      for (int ky = 0; ky < k; ++ky) {
        for (int kx = 0; kx < k; ++kx) set_weight(o, c, ky, kx, static_cast<T>(*weight++));
      }
    }
  }
}

// What set_weight does for all weights, a column and a row at a time: making a session is mostly this.
template <class T>
void Convolution<T>::pack(const float* weight) {
  const int taps = op_.kernel * op_.kernel, ins = in_.channels;
  for (int o = 0; o < out_.channels; ++o, weight += static_cast<int64_t>(ins) * taps) {
    const PackedColumn<T> column = forward_.column(o);
    for (int tap = 0; tap < taps; ++tap) {
      for (int c = 0; c < ins; ++c) column[static_cast<int64_t>(tap) * ins + c] = static_cast<T>(weight[c * taps + tap]);
      const int64_t row = backward_row(tap / op_.kernel, tap % op_.kernel, o);
      for (int c = 0, count, stride; backward_ && c < ins; c += count) {
        T* const run = backward_.run(row, c, &count, &stride);
        for (int i = 0; i < count; ++i) run[i * stride] = static_cast<T>(weight[(c + i) * taps + tap]);
      }
    }
  }
}

template <class T>
int64_t Convolution<T>::resident_bytes() const {
  return forward_.bytes() + backward_.bytes() + forward_bytes_.bytes() + backward_bytes_.bytes() + scales_.bytes() +
         trained_.bytes() + depthwise_.bytes() + bias_.bytes();
}

template <class T>
T Convolution<T>::weight(int out, int in, int ky, int kx) const {
  const int tap = ky * op_.kernel + kx;
  if (op_.depthwise) return depthwise_.data()[tap * depthwise_row_ + out];
  const int64_t row = static_cast<int64_t>(tap) * in_.channels + in;
  if (const int64_t trained = trained_index(out, in, tap); trained >= 0) return trained_.data()[trained];
  if (forward_bytes_) return static_cast<T>(scales_.data()[out] * static_cast<float>(forward_bytes_.at(row, out)));
  return forward_.at(row, out);
}

// Where a weight lies in `trained_`; -1 if it is not there.
template <class T>
int64_t Convolution<T>::trained_index(int out, int in, int tap) const {
  if (!trained_) return -1;
  const bool columns = update_.axis == Axis::kIn;
  const std::vector<int32_t>& channels = update_.channels;
  const auto at = std::lower_bound(channels.begin(), channels.end(), columns ? in : out);
  if (at == channels.end() || *at != (columns ? in : out)) return -1;
  const int64_t taps = static_cast<int64_t>(op_.kernel) * op_.kernel, s = at - channels.begin();
  return columns ? (out * taps + tap) * static_cast<int64_t>(channels.size()) + s : (s * taps + tap) * in_.channels + in;
}

template <class T>
void Convolution<T>::set_weight(int out, int in, int ky, int kx, T value) {
  const int tap = ky * op_.kernel + kx;
  if (op_.depthwise) {
    depthwise_.data()[tap * depthwise_row_ + out] = value;
    return;
  }
  const int64_t row = static_cast<int64_t>(tap) * in_.channels + in;
  if (const int64_t trained = trained_index(out, in, tap); trained >= 0) {
    trained_.data()[trained] = value;
    return;
  }
  if (forward_bytes_) {
    const float scale = scales_.data()[out];
    const float byte = scale > 0 ? std::nearbyint(static_cast<float>(value) / scale) : 0;
    forward_bytes_.at(row, out) = static_cast<int8_t>(std::clamp(byte, -128.0f, 127.0f));
    if (backward_bytes_) backward_bytes_.at(backward_row(ky, kx, out), in) = forward_bytes_.at(row, out);
    return;
  }
  forward_.at(row, out) = value;
  if (backward_) backward_.at(backward_row(ky, kx, out), in) = value;
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
  const int64_t taps = static_cast<int64_t>(op_.kernel) * op_.kernel;
  const int64_t ins = op_.depthwise ? 1 : update.axis == Axis::kIn ? static_cast<int64_t>(update.channels.size()) : in_.channels;
  const int64_t outs = update.axis == Axis::kIn ? out_.channels : static_cast<int64_t>(update.channels.size());
  AlignedArray<T> compact(taps > 1 ? outs * ins * taps : 0);
  for (int64_t o = 0; o < (taps > 1 ? outs : 0); ++o) {
    for (int64_t c = 0; c < ins; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        compact.data()[op_.depthwise ? tap * outs + o : (o * taps + tap) * ins + c] = values[(o * ins + c) * taps + tap];
      }
    }
  }
  const T* const from = taps > 1 ? compact.data() : values;
  update_weights(update, [&](T* run, int64_t offset, int64_t count) { std::copy_n(from + (offset - update.offset), count, run); });
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
int64_t Convolution<T>::expanded_scratch(const Op& op, int inputs, int panel) {
  return can_quantise(op) ? static_cast<int64_t>(op.kernel) * op.kernel * inputs * panel : 0;
}

// One matrix product with the weights of one direction.
template <class T>
void Convolution<T>::product(Gemm<T>& g, bool forward, T* expanded) const {
  g.kernel_rows = op_.kernel;
  g.until = g.outputs;
  if (!forward_bytes_) {
    g.weights = forward ? forward_.data() : backward_.data();
    kernels_.gemm(g);
    return;
  }
  // A panel at a time is expanded and used for all pixels.
  const PackedMatrix<int8_t>& bytes = forward ? forward_bytes_ : backward_bytes_;
  ExpandPanel<T> e{};
  e.bytes = bytes.data();
  e.rows = static_cast<int64_t>(g.kernel_rows) * g.depth;
  e.out = expanded;
  g.weights = expanded;
  const int columns = g.outputs;
  for (g.first = 0; g.first < columns; g.first = g.until) {
    e.width = bytes.width(g.first);
    e.paired = bytes.paired(g.first);
    e.scales = scales_.data() + (forward ? g.first : 0);
    e.scaled_rows = forward ? 0 : out_.channels;
    kernels_.expand_panel(e);
    if (trained_) insert_trained(expanded, forward, g.first);
    g.until = std::min(columns, g.first + e.width);
    kernels_.gemm(g);
    e.bytes += e.rows * e.width;
  }
}

// Trained weights over the bytes' values in the expanded panel that starts with column `first`.
template <class T>
void Convolution<T>::insert_trained(T* panel, bool forward, int first) const {
  const PackedMatrix<int8_t>& bytes = forward ? forward_bytes_ : backward_bytes_;
  const int width = bytes.width(first), paired = bytes.paired(first);
  const int k = op_.kernel, taps = k * k, rows = forward ? in_.channels : out_.channels;
  const int until = std::min(first + width, forward ? out_.channels : in_.channels);
  const bool outs = update_.axis == Axis::kOut, trained_columns = forward == outs;
  const int selected = static_cast<int>(update_.channels.size());
  for (int s = 0; s < selected; ++s) {
    const int channel = update_.channels[s];
    if (trained_columns && (channel < first || channel >= until)) continue;
    for (int tap = 0; tap < taps; ++tap) {
      const int64_t first_row = static_cast<int64_t>(forward ? tap : tap / k * k + k - 1 - tap % k) * rows;
      // The other channels of this one: rows of its column, or columns of its row.
      const int begin = trained_columns ? 0 : first, end = trained_columns ? rows : until;
      const T* from = trained_.data() + (outs ? (static_cast<int64_t>(s) * taps + tap) * in_.channels : tap * selected + s);
      const int64_t stride = outs ? 1 : static_cast<int64_t>(taps) * selected;
      for (int other = begin; other < end; ++other) {
        const int column = (trained_columns ? channel : other) - first;
        const PackedColumn<T> to{panel + (column << paired), static_cast<int64_t>(width) << paired, paired};
        to[first_row + (trained_columns ? other : channel)] = from[other * stride];
      }
    }
  }
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
                             T* expanded, int* loaded, const Epilogue<T>& epilogue) const {
  Epilogue<T> e = epilogue;
  e.out = out.data;
  e.out_stride = e.addend_stride = out_.channels;
  e.bias = bias_.data();
  if (op_.pointwise()) {
    forward_pointwise(in, out, begin, until, expanded, e);
  } else if (op_.depthwise) {
    forward_depthwise(in, out, begin, until, e);
  } else {
    forward_dense(in, out, image, begin, until, scratch, expanded, loaded, e);
  }
}

template <class T>
void Convolution<T>::forward_pointwise(RowView<const T> in, RowView<T> out, int begin, int until, T* expanded,
                                       const Epilogue<T>& e) const {
  const int tap = 0;
  for (int y = begin; y < until;) {
    // As many rows as lie side by side in both rings.
    const int run = std::min({until - y, in.held - y % in.held, out.held - y % out.held});
    const T* row = in.data + static_cast<int64_t>(y % in.held) * in_.width * in_.channels;
    Gemm<T> g{};
    g.rows = &row;
    g.taps = &tap;
    g.row_count = 1;
    g.depth = in_.channels;
    g.pixel_stride = in_.channels;
    g.pixels = run * in_.width;
    g.outputs = out_.channels;
    g.epilogue = at_row(e, out_, y, out.held);
    product(g, true, expanded);
    y += run;
  }
}

template <class T>
template <class F>
void Convolution<T>::depthwise_rows(const Depthwise<T>& layer, const Epilogue<T>& epilogue, Shape out, int held, int begin,
                                    int until, F&& describe) const {
  constexpr int kMost = 2;  // and one where no kernel takes two: a row's description costs a few per cent of a small map
  const T* rows[kMost][kMaxKernel];
  int taps[kMost][kMaxKernel];
  Depthwise<T> d[kMost] = {layer, layer};
  const int most = layer.kernel == kernels_.paired_kernel ? kMost : 1;
  for (int y = begin; y < until;) {
    const int count = std::min(most, until - y);
    for (int i = 0; i < count; ++i) {
      d[i].row_count = describe(y + i, rows[i], taps[i]);
      d[i].rows = rows[i];
      d[i].taps = taps[i];
      d[i].epilogue = at_row(epilogue, out, y + i, held);
    }
    y += kernels_.depthwise(d, count);
  }
}

template <class T>
void Convolution<T>::forward_depthwise(RowView<const T> in, RowView<T> out, int begin, int until, const Epilogue<T>& e) const {
  Depthwise<T> d{};
  d.weights = depthwise_.data();
  d.channels = in_.channels;
  d.kernel = op_.kernel;
  d.stride = op_.stride;
  d.padding = op_.padding;
  d.width_in = in_.width;
  d.width_out = out_.width;
  depthwise_rows(d, e, out_, out.held, begin, until, [&](int y, const T** rows, int* taps) {
    int count = 0;
    for (int ky = 0; ky < op_.kernel; ++ky) {
      const int iy = y * op_.stride + ky - op_.padding;
      if (iy < 0 || iy >= in_.height) continue;
      rows[count] = in.data + static_cast<int64_t>(iy % in.held) * in_.width * in_.channels;
      taps[count++] = ky;
    }
    return count;
  });
}

template <class T>
void Convolution<T>::forward_dense(RowView<const T> in, RowView<T> out, const ImageSource<T>* image, int begin, int until,
                                   T* scratch, T* expanded, int* loaded, const Epilogue<T>& e) const {
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
    product(g, true, expanded);
  }
}

template <class T>
void Convolution<T>::grad_input(const T* grad_output, T* scratch, T* expanded, const Epilogue<T>& epilogue) const {
  const int k = op_.kernel;
  // Calls with(oy, ky) for the rows of grad_output, in ascending order, that input row y reaches.
  const auto each_row = [&](int y, auto&& with) {
    for (int ky = k - 1; ky >= 0; --ky) {
      const int shifted = y + op_.padding - ky;
      if (shifted < 0 || shifted % op_.stride != 0 || shifted / op_.stride >= out_.height) continue;
      with(shifted / op_.stride, ky);
    }
  };
  if (op_.depthwise) {
    Depthwise<T> d{};
    d.weights = depthwise_.data();
    d.channels = in_.channels;
    d.kernel = k;
    d.stride = op_.stride;
    d.padding = op_.padding;
    d.width_in = out_.width;
    d.width_out = in_.width;
    d.transposed = true;
    depthwise_rows(d, epilogue, in_, in_.height, 0, in_.height, [&](int y, const T** rows, int* taps) {
      int count = 0;
      each_row(y, [&](int oy, int ky) {
        rows[count] = grad_output + static_cast<int64_t>(oy) * out_.width * out_.channels;
        taps[count++] = ky;
      });
      return count;
    });
    return;
  }
  const T* rows[kMaxKernel];
  int taps[kMaxKernel];
  Gemm<T> g{};
  g.rows = rows;
  g.taps = taps;
  g.depth = k * out_.channels;
  g.pixel_stride = out_.channels;
  g.outputs = in_.channels;
  if (op_.pointwise()) {
    rows[0] = grad_output;
    taps[0] = 0;
    g.row_count = 1;
    g.pixels = static_cast<int>(in_.pixels());
    g.epilogue = epilogue;
    product(g, false, expanded);
    return;
  }
  g.pixels = in_.width;
  // Rows of grad_output spread by the stride and padded, so that a flipped kernel slides over them one by one.
  const int64_t padded_row = static_cast<int64_t>(in_.width + k - 1) * out_.channels;
  const int before = k - 1 - op_.padding;
  const int after = in_.width + k - 1 - before - ((out_.width - 1) * op_.stride + 1);
  int loaded = 0;
  for (int y = 0; y < in_.height; ++y) {
    g.row_count = 0;
    each_row(y, [&](int oy, int ky) {
      T* const row = scratch + (oy % k) * padded_row;
      if (oy >= loaded) {
        load_row(grad_output, nullptr, out_, oy, op_.stride, row, before, after);
        loaded = oy + 1;
      }
      rows[g.row_count] = row;
      taps[g.row_count++] = ky;
    });
    g.epilogue = at_row(epilogue, in_, y, in_.height);
    product(g, false, expanded);
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
