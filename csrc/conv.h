// One convolution: its packed weights, and its three passes (forward, grad_input, grad_weight) as calls of kernels.
// Pointwise layers are one matrix product; depthwise layers go row by row over unpadded tensors; every other one ("dense") row
// by row over padded copies of its input rows.
#pragma once

#include <algorithm>

#include "graph.h"
#include "pack.h"
#include "plan.h"

namespace tinytrain {

// Where an image's rows come from: bytes or normalised floats, through one affine map per image (normalisation and the draw of
// the augmentation, see images.Augmentation in Python).
template <class T>
struct ImageSource {
  const uint8_t* bytes = nullptr;  // (height, width, 3), or
  const float* values = nullptr;
  ImageRow<T> map{};  // scale, offset, mirror, shift; pointers unset
  int shift_y = 0;    // content moves down; uncovered rows become 0
};

// Rows of a tensor (height, width, channels) of which `held` are in memory: row y lies at y % held. data == nullptr: the image.
template <class T>
struct RowView {
  T* data = nullptr;
  int held = 0;
};

// A compact weight gradient as its users want it: `ins` weights a kernel position, (outputs, ins, k, k).
template <class T>
void copy_compact(const Op& op, const LayerUpdate& update, int64_t ins, const T* grad, T* out) {
  if (update.count == 0) return;  // no channel selected
  const int64_t taps = static_cast<int64_t>(op.kernel) * op.kernel;
  if (taps == 1) {  // the two layouts are the same
    std::copy_n(grad, update.count, out);
    return;
  }
  const int64_t outs = update.count / (ins * taps);
  for (int64_t o = 0; o < outs; ++o) {
    for (int64_t c = 0; c < ins; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        *out++ = op.depthwise ? grad[tap * outs + o] : grad[(o * taps + tap) * ins + c];
      }
    }
  }
}

template <class T>
class Convolution {
 public:
  static constexpr int kMaxKernel = 15;

  // `weight` (O, C / groups, k, k), `bias` (O); with_backward also packs the weights for grad_input. quantised: keep frozen
  // weights as bytes with a scale for each output, exactly if they came from bytes, and those that `update` selects (if it is
  // not null) as they are; the passes then need expanded_scratch.
  Convolution(const Op& op, Shape in, Shape out, const float* weight, const float* bias, bool with_backward, bool quantised,
              const LayerUpdate* update, const Kernels<T>& kernels);
  static bool can_quantise(const Op& op) { return !op.depthwise; }

  const Op& op() const { return op_; }
  int64_t resident_bytes() const;
  T* bias() { return bias_.data(); }
  T weight(int out, int in, int ky, int kx) const;
  void set_weight(int out, int in, int ky, int kx, T value);
  void copy_weight(T* weight, T* bias) const;
  // Overwrites the selected weights: (S, C / groups, k, k) of axis out, (O, S, k, k) of axis in.
  void set_selected(const LayerUpdate& update, const T* values);
  // Calls step(weights, offset, count) for runs of the selected weights, `offset` their place in the compact gradient; what step
  // writes becomes the weights.
  template <class F>
  void update_weights(const LayerUpdate& update, F&& step);

  // Values of scratch that the passes need: `k` padded rows (dense), none otherwise.
  static int64_t forward_scratch(const Op& op, int in_width, int channels);
  static int64_t grad_input_scratch(const Op& op, int in_width, int out_channels);
  // The same for one panel of `panel` columns of a matrix with `inputs` channels to sum over, where weights are quantised.
  static int64_t expanded_scratch(const Op& op, int inputs, int panel);

  // Output rows [begin, until). `loaded` remembers across calls which padded input rows are there; start with 0. `epilogue` is
  // completed by bias, and by output rows: its pointers are those of row 0, its `out` a ring of out.held rows.
  void forward(RowView<const T> in, RowView<T> out, const ImageSource<T>* image, int begin, int until, T* scratch, T* expanded,
               int* loaded, const Epilogue<T>& epilogue) const;

  // Whole tensors; `epilogue` at the first pixel of grad_input.
  void grad_input(const T* grad_output, T* scratch, T* expanded, const Epilogue<T>& epilogue) const;

  // Adds the gradient of the selected weights to `total`, in the compact layout of LayerUpdate. `grad_output` holds the selected
  // channels only, side by side, if the axis is out or the layer depthwise; `input` likewise if the axis is in or the layer
  // depthwise. image_sum (update.count values) and padded (forward_scratch) may be null where needs_image_sum / dense are false.
  void grad_weight(const LayerUpdate& update, const T* grad_output, const T* input, const ImageSource<T>* image, T* image_sum,
                   T* padded, T* total) const;
  // Whether one image's gradient is summed over several kernel calls and needs a place of its own first.
  static bool needs_image_sum(const Op& op, Shape out);

 private:
  void pack(const float* weight);
  // Kernel rows keep their order (taps name them); columns turn round, so that the product slides forwards over grad_output.
  int64_t backward_row(int ky, int kx, int out) const {
    return static_cast<int64_t>(ky * op_.kernel + op_.kernel - 1 - kx) * out_.channels + out;
  }
  void load_row(const T* tensor, const ImageSource<T>* image, Shape shape, int y, int spread, T* out, int before, int after) const;
  void product(Gemm<T>& g, bool forward, T* expanded) const;
  void insert_trained(T* panel, bool forward, int first) const;
  int64_t trained_index(int out, int in, int tap) const;
  void forward_pointwise(RowView<const T> in, RowView<T> out, int begin, int until, T* expanded, const Epilogue<T>& e) const;
  void forward_depthwise(RowView<const T> in, RowView<T> out, int begin, int until, const Epilogue<T>& e) const;
  // Rows [begin, until) of outputs; describe(y, rows, taps) writes what row y reads and returns how many rows that is.
  template <class F>
  void depthwise_rows(const Depthwise<T>& layer, const Epilogue<T>& epilogue, Shape out, int held, int begin, int until,
                      F&& describe) const;
  void forward_dense(RowView<const T> in, RowView<T> out, const ImageSource<T>* image, int begin, int until, T* scratch,
                     T* expanded, int* loaded, const Epilogue<T>& e) const;

  Op op_;
  Shape in_, out_;
  const Kernels<T>& kernels_;
  PackedMatrix<T> forward_, backward_;
  PackedMatrix<int8_t> forward_bytes_, backward_bytes_;  // instead of them, if quantised
  AlignedArray<float> scales_;
  LayerUpdate update_;         // quantised: of the weights that are no bytes, because they are trained
  AlignedArray<T> trained_;    // those, as in a compact gradient
  AlignedArray<T> depthwise_;  // (k, k, C rounded up to lanes), both directions
  int64_t depthwise_row_ = 0;
  AlignedArray<T> bias_;
};

template <class T>
template <class F>
void Convolution<T>::update_weights(const LayerUpdate& update, F&& step) {
  if (trained_) {
    step(trained_.data(), update.offset, update.count);
    return;
  }
  // A block of the inputs for all outputs, then the next: what lies side by side in the forward weights are outputs, and their
  // cache lines wait in L1 until each has its value.
  constexpr int kRun = 128;
  const int k = op_.kernel, taps = k * k, selected = static_cast<int>(update.channels.size());
  const bool columns = update.axis == Axis::kIn;
  const int outs = op_.depthwise ? 1 : columns ? out_.channels : selected;
  const int ins = op_.depthwise || columns ? selected : in_.channels;
  const bool whole = !columns && !op_.depthwise;  // all inputs of the selected outputs
  T apart[kRun];
  for (int tap = 0; tap < taps; ++tap) {
    const int64_t first = op_.depthwise ? 0 : static_cast<int64_t>(tap) * in_.channels;
    for (int c = 0, block; c < ins; c += block) {
      block = std::min(kRun, ins - c);
      if (whole && backward_) block = std::min(block, backward_.run_length(c));
      for (int s = 0; s < outs; ++s) {
        const int o = whole ? update.channels[s] : s;
        const int64_t offset = update.offset + (static_cast<int64_t>(s) * taps + tap) * ins + c;
        const PackedColumn<T> forward =
            op_.depthwise ? PackedColumn<T>{depthwise_.data() + tap * depthwise_row_, 1, 0} : forward_.column(o);
        const int64_t row = backward_row(tap / k, tap % k, o);
        if (!whole) {
          const int* const at = update.channels.data() + c;
          for (int i = 0; i < block; ++i) apart[i] = forward[first + at[i]];
          step(apart, offset, static_cast<int64_t>(block));
          for (int i = 0; i < block; ++i) forward[first + at[i]] = apart[i];
          for (int i = 0; backward_ && i < block; ++i) backward_.at(row, at[i]) = apart[i];
        } else if (backward_ && !backward_.paired(c)) {
          // In a row in the backward weights: updated there.
          T* const run = &backward_.at(row, c);
          step(run, offset, static_cast<int64_t>(block));
          forward.write(first + c, run, block);
        } else {
          forward.read(first + c, apart, block);
          step(apart, offset, static_cast<int64_t>(block));
          forward.write(first + c, apart, block);
          for (int i = 0; backward_ && i < block; ++i) backward_.at(row, c + i) = apart[i];
        }
      }
    }
  }
}

extern template class Convolution<float>;
extern template class Convolution<double>;

}  // namespace tinytrain
