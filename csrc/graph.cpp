#include "graph.h"

#include <stdexcept>

namespace tinytrain {
namespace {

[[noreturn]] void fail(size_t op, const std::string& what) {
  throw std::invalid_argument("operation " + std::to_string(op) + ": " + what);
}

int window_output(int size, const Op& op) { return (size + 2 * op.padding - op.kernel) / op.stride + 1; }

}  // namespace

void Graph::finish() {
  if (image_size < 1 || image_size > 4096) {
    throw std::invalid_argument("image_size: expected 1 to 4096, got " + std::to_string(image_size));
  }
  if (ops.empty() || ops.back().kind != OpKind::kGlobalAverage) {
    throw std::invalid_argument("operations: the last one must be a global average pool");
  }
  shapes.assign(1, Shape{image_size, image_size, 3});
  layers.clear();
  consumers.assign(ops.size() + 1, {});
  for (size_t i = 0; i < ops.size(); ++i) {
    Op& op = ops[i];
    const size_t expected_inputs = op.kind == OpKind::kAdd ? 2 : 1;
    if (op.inputs.size() != expected_inputs) {
      fail(i, "expected " + std::to_string(expected_inputs) + " inputs, got " + std::to_string(op.inputs.size()));
    }
    for (int input : op.inputs) {
      if (input < 0 || input > static_cast<int>(i)) fail(i, "reads tensor " + std::to_string(input) + ", which is not written yet");
      if (input == 0 && !(op.kind == OpKind::kConv && !op.depthwise)) {
        fail(i, "reads the image; only a dense or pointwise convolution can");
      }
      consumers[input].push_back(static_cast<int>(i));
    }
    const Shape in = shapes[op.inputs[0]];
    Shape out = in;
    if (op.kind == OpKind::kConv || op.kind == OpKind::kPool) {
      if (op.kernel < 1 || op.kernel > 15 || op.stride < 1 || op.stride > 8 || op.padding < 0 || op.padding >= op.kernel) {
        fail(i, "kernel, stride, padding: expected 1 to 15, 1 to 8, 0 to kernel - 1; got " + std::to_string(op.kernel) + ", " +
                    std::to_string(op.stride) + ", " + std::to_string(op.padding));
      }
      if (in.height + 2 * op.padding < op.kernel) fail(i, "its window is larger than its input");
      out.height = window_output(in.height, op);
      out.width = window_output(in.width, op);
    }
    if (op.kind == OpKind::kConv) {
      if (op.out_channels < 1 || op.out_channels > 65536) fail(i, "out_channels: expected 1 to 65536");
      if (op.depthwise && op.out_channels != in.channels) {
        fail(i, "depthwise: expected " + std::to_string(in.channels) + " output channels, got " + std::to_string(op.out_channels));
      }
      out.channels = op.out_channels;
      op.layer = static_cast<int>(layers.size());
      layers.push_back(static_cast<int>(i));
    } else if (op.kind == OpKind::kAdd) {
      const Shape other = shapes[op.inputs[1]];
      if (other.height != in.height || other.width != in.width || other.channels != in.channels)
        fail(i, "adds tensors of different shapes");
      if (op.inputs[0] == op.inputs[1]) fail(i, "adds a tensor to itself");
    } else if (op.kind == OpKind::kGlobalAverage) {
      if (i + 1 != ops.size()) fail(i, "a global average pool must be the last operation");
      out.height = out.width = 1;
    }
    shapes.push_back(out);
  }
  if (consumers[0].size() != 1) throw std::invalid_argument("operations: expected exactly one that reads the image");
  for (size_t tensor = 0; tensor < ops.size(); ++tensor) {
    if (consumers[tensor].empty()) {
      throw std::invalid_argument("tensor " + std::to_string(tensor) + " is never read");
    }
  }
}

}  // namespace tinytrain
