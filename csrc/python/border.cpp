#include "border.h"

#include <pybind11/stl.h>

#include <cmath>

namespace tinytrain {
namespace {

// (kind, inputs, activation, out_channels, kernel, stride, padding, depthwise)
using OpTuple = std::tuple<std::string, std::vector<int>, std::string, int, int, int, int, bool>;
// (layer, axis, channels, bias)
using UpdateTuple = std::tuple<int, std::string, std::vector<int32_t>, bool>;

template <class V>
V converted(const char* argument, const py::handle& from) {
  try {
    return from.cast<V>();
  } catch (const py::cast_error&) {
    throw py::type_error(std::string(argument) + ": expected " + py::detail::make_caster<V>::name.text + ", got " +
                         std::string(py::repr(from)));
  }
}

template <class V>
V field(const py::dict& request, const char* name) {
  if (!request.contains(name)) throw py::type_error(std::string("request: ") + name + " is missing");
  return converted<V>(name, request[name]);
}

}  // namespace

[[noreturn]] void bad_shape(const char* argument, const std::string& expected, const py::array& got) {
  std::string shape = "(";
  for (py::ssize_t i = 0; i < got.ndim(); ++i) shape += (i ? ", " : "") + std::to_string(got.shape(i));
  throw py::value_error(std::string(argument) + ": expected shape " + expected + ", got " + shape + ")");
}

void check_shape(const char* argument, const py::array& array, const std::vector<int64_t>& shape) {
  bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
  std::string expected = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    same = same && (shape[i] < 0 || array.shape(static_cast<py::ssize_t>(i)) == shape[i]);
    expected += (i ? ", " : "") + (shape[i] < 0 ? std::string("N") : std::to_string(shape[i]));
  }
  if (!same) bad_shape(argument, expected + ")", array);
}

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  throw py::value_error("activation: expected none, relu or relu6, got " + name);
}

Axis axis_of(const std::string& name) {
  if (name == "out") return Axis::kOut;
  if (name == "in") return Axis::kIn;
  throw py::value_error("axis: expected out or in, got " + name);
}

Graph make_graph(const py::dict& request) {
  Graph graph;
  graph.image_size = field<int>(request, "image_size");
  for (const auto& [kind, inputs, activation, out_channels, kernel, stride, padding, depthwise] :
       field<std::vector<OpTuple>>(request, "operations")) {
    Op op;
    if (kind == "conv") {
      op.kind = OpKind::kConv;
    } else if (kind == "add") {
      op.kind = OpKind::kAdd;
    } else if (kind == "max_pool" || kind == "average_pool") {
      op.kind = OpKind::kPool;
      op.pool = kind == "max_pool" ? PoolKind::kMax : PoolKind::kAverage;
    } else if (kind == "global_average_pool") {
      op.kind = OpKind::kGlobalAverage;
    } else {
      throw py::value_error("operation: unknown kind " + kind);
    }
    op.inputs = inputs;
    op.activation = activation_of(activation);
    op.out_channels = out_channels;
    op.kernel = kernel;
    op.stride = stride;
    op.padding = padding;
    op.depthwise = depthwise;
    graph.ops.push_back(op);
  }
  graph.finish();
  return graph;
}

PlanRequest make_request(const py::dict& given, int value_bytes, int panel_columns) {
  PlanRequest request;
  for (const auto& [layer, axis, channels, bias] : field<std::vector<UpdateTuple>>(given, "updates")) {
    LayerUpdate u;
    u.layer = layer;
    u.axis = axis_of(axis);
    u.channels = channels;
    u.bias = bias;
    request.updates.push_back(u);
  }
  request.fisher_layers = field<std::vector<int>>(given, "fisher_layers");
  const auto optimizer = field<std::string>(given, "optimizer");
  if (optimizer == "in_place_sgd") {
    request.optimizer = Optimizer::kInPlaceSgd;
  } else if (optimizer == "sgd") {
    request.optimizer = Optimizer::kSgd;
  } else if (optimizer == "momentum") {
    request.optimizer = Optimizer::kMomentum;
  } else if (optimizer == "adam") {
    request.optimizer = Optimizer::kAdam;
  } else {
    throw py::value_error("optimizer: expected adam, sgd, momentum or in_place_sgd, got " + optimizer);
  }
  request.max_ways = field<int>(given, "max_ways");
  request.keep_images = field<int>(given, "keep_images");
  request.threads = field<int>(given, "threads");
  request.memory_bytes = field<int64_t>(given, "memory_bytes");
  request.guard_bytes = field<int64_t>(given, "guard_bytes");
  request.value_bytes = value_bytes;
  const auto frozen_weights = field<std::string>(given, "frozen_weights");
  if (frozen_weights == "int8") {
    request.quantised_panel = panel_columns;
  } else if (frozen_weights != "float32") {
    throw py::value_error("frozen_weights: expected float32 or int8, got " + frozen_weights);
  }
  return request;
}

py::dict describe(const Plan& plan) {
  py::list slots;
  const auto add = [&](const char* program, const std::vector<Slot>& from, int64_t base) {
    for (const Slot& s : from) {
      slots.append(py::make_tuple(program, s.name, s.kind, s.offset + base, s.bytes, s.first, s.last));
    }
  };
  add("shared", plan.shared, 0);
  add("embed", plan.embed.slots, plan.shared_bytes);
  add("train", plan.train.slots, plan.shared_bytes);
  py::dict d;
  d["slots"] = slots;
  d["shared_bytes"] = plan.shared_bytes;
  d["workspace_bytes"] = plan.workspace_bytes;
  d["peak_bytes"] = plan.peak_bytes;
  d["threads"] = plan.threads;
  d["keep_images"] = plan.keep_images;
  d["recompute"] = plan.recompute;
  d["saved_bytes"] = plan.train.saved_bytes;
  d["first_tail_operation"] =
      plan.embed.tail < static_cast<int>(plan.embed.steps.size()) ? plan.embed.steps[plan.embed.tail].op : -1;
  return d;
}

std::vector<LayerValues> layer_values(const Graph& graph, const py::sequence& weights, const py::sequence& biases) {
  const size_t layers = graph.layers.size();
  if (weights.size() != layers || biases.size() != layers) {
    throw py::value_error("weights, biases: expected " + std::to_string(layers) + " of each, got " +
                          std::to_string(weights.size()) + " and " + std::to_string(biases.size()));
  }
  const auto float_array = [](const char* argument, const py::object& item) {
    if (!Array<float>::check_(item)) {
      throw py::type_error(std::string(argument) + ": expected C-contiguous float32 arrays");
    }
    return py::reinterpret_borrow<py::array>(item);
  };
  std::vector<LayerValues> values;
  for (size_t l = 0; l < layers; ++l) {
    const Op& op = graph.layer_op(static_cast<int>(l));
    const int64_t in = op.depthwise ? 1 : graph.layer_input(static_cast<int>(l)).channels;
    const py::array weight = float_array("weights", weights[l]), bias = float_array("biases", biases[l]);
    check_shape("weights", weight, {op.out_channels, in, op.kernel, op.kernel});
    check_shape("biases", bias, {op.out_channels});
    values.push_back({static_cast<const float*>(weight.data()), static_cast<const float*>(bias.data())});
  }
  return values;
}

std::vector<int32_t> channel_numbers(const py::sequence& channels) { return converted<std::vector<int32_t>>("channels", channels); }

std::array<float, 3> three_numbers(const char* argument, const py::sequence& numbers) {
  return converted<std::array<float, 3>>(argument, numbers);
}

void check_labels(const Array<int64_t>& labels, int64_t count, int ways) {
  check_shape("labels", labels, {count});
  for (int64_t i = 0; i < count; ++i) {
    if (labels.data()[i] < 0 || labels.data()[i] >= ways) {
      throw py::value_error("labels: expected 0 to " + std::to_string(ways - 1) + ", got " + std::to_string(labels.data()[i]));
    }
  }
}

}  // namespace tinytrain
