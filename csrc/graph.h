// A network as data: operations over numbered tensors. Tensor 0 is the image; operation i writes tensor i + 1.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace tinytrain {

enum class OpKind { kConv, kAdd, kPool, kGlobalAverage };

struct Shape {
  int height = 0, width = 0, channels = 0;
  int64_t pixels() const { return static_cast<int64_t>(height) * width; }
  int64_t count() const { return pixels() * channels; }
};

struct Op {
  OpKind kind = OpKind::kConv;
  std::vector<int> inputs;
  Activation activation = Activation::kNone;
  PoolKind pool = PoolKind::kMax;
  int out_channels = 0;  // conv
  int kernel = 1, stride = 1, padding = 0;
  bool depthwise = false;  // conv
  int layer = -1;          // number of the convolution, -1 for other operations

  // One matrix product over all pixels. Every other convolution that is not depthwise goes row by row through a padded copy
  // (`dense`): larger kernels, strides, and whatever reads the image, whose bytes are converted row by row anyway.
  bool pointwise() const {
    return kind == OpKind::kConv && !depthwise && kernel == 1 && stride == 1 && padding == 0 && inputs[0] != 0;
  }
  bool dense() const { return kind == OpKind::kConv && !depthwise && !pointwise(); }
};

struct Graph {
  int image_size = 0;
  std::vector<Op> ops;
  // Derived by finish():
  std::vector<Shape> shapes;                // of every tensor
  std::vector<int> layers;                  // layer -> operation
  std::vector<std::vector<int>> consumers;  // tensor -> operations that read it

  // Checks the graph and fills in what is derived; throws std::invalid_argument naming the operation.
  void finish();

  const Op& layer_op(int layer) const { return ops[layers[layer]]; }
  Shape layer_input(int layer) const { return shapes[layer_op(layer).inputs[0]]; }
  Shape layer_output(int layer) const { return shapes[layers[layer] + 1]; }
  // Values of one output channel's weights.
  int fan_in(int layer) const {
    const Op& op = layer_op(layer);
    return op.kernel * op.kernel * (op.depthwise ? 1 : layer_input(layer).channels);
  }
  int features() const { return shapes.back().channels; }
};

}  // namespace tinytrain
