// The border to Python: check, drop the GIL, call. Policies, messages and defaults live in Python (session.py).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <optional>

#include "dispatch.h"
#include "session.h"

namespace py = pybind11;

namespace tinytrain {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

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

// (kind, inputs, activation, out_channels, kernel, stride, padding, depthwise)
using OpTuple = std::tuple<std::string, std::vector<int>, std::string, int, int, int, int, bool>;
// (layer, axis, channels, bias)
using UpdateTuple = std::tuple<int, std::string, std::vector<int32_t>, bool>;

Graph make_graph(int image_size, const std::vector<OpTuple>& operations) {
  Graph graph;
  graph.image_size = image_size;
  for (const auto& [kind, inputs, activation, out_channels, kernel, stride, padding, depthwise] : operations) {
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

PlanRequest make_request(const std::vector<UpdateTuple>& updates, const std::vector<int>& fisher_layers,
                         const std::string& optimizer, int max_ways, int keep_images, int threads, int64_t memory_bytes,
                         int64_t guard_bytes, int value_bytes, int quantised_panel) {
  PlanRequest request;
  for (const auto& [layer, axis, channels, bias] : updates) {
    LayerUpdate u;
    u.layer = layer;
    u.axis = axis_of(axis);
    u.channels = channels;
    u.bias = bias;
    request.updates.push_back(u);
  }
  request.fisher_layers = fisher_layers;
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
  request.max_ways = max_ways;
  request.keep_images = keep_images;
  request.threads = threads;
  request.memory_bytes = memory_bytes;
  request.guard_bytes = guard_bytes;
  request.value_bytes = value_bytes;
  request.quantised_panel = quantised_panel;
  return request;
}

template <class T>
int panel_columns(const std::string& frozen_weights, const Kernels<T>& kernels) {
  if (frozen_weights == "float32") return 0;
  if (frozen_weights == "int8") return kernels.lanes * kernels.panel_vectors;
  throw py::value_error("frozen_weights: expected float32 or int8, got " + frozen_weights);
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
  d["embed_bytes"] = plan.embed.bytes;
  d["train_bytes"] = plan.train.bytes;
  d["peak_bytes"] = plan.peak_bytes;
  d["threads"] = plan.threads;
  d["keep_images"] = plan.keep_images;
  d["recompute"] = plan.recompute;
  d["thin_strips"] = plan.thin_strips;
  d["gradient_count"] = plan.gradient_count;
  d["saved_bytes"] = plan.train.saved_bytes;
  d["first_tail_operation"] =
      plan.embed.tail < static_cast<int>(plan.embed.steps.size()) ? plan.embed.steps[plan.embed.tail].op : -1;
  return d;
}

std::vector<LayerValues> layer_values(const Graph& graph, const std::vector<Array<float>>& weights,
                                      const std::vector<Array<float>>& biases) {
  const size_t layers = graph.layers.size();
  if (weights.size() != layers || biases.size() != layers) {
    throw py::value_error("weights, biases: expected " + std::to_string(layers) + " of each, got " +
                          std::to_string(weights.size()) + " and " + std::to_string(biases.size()));
  }
  std::vector<LayerValues> values;
  for (size_t l = 0; l < layers; ++l) {
    const Op& op = graph.layer_op(static_cast<int>(l));
    const int64_t in = op.depthwise ? 1 : graph.layer_input(static_cast<int>(l)).channels;
    check_shape("weights", weights[l], {op.out_channels, in, op.kernel, op.kernel});
    check_shape("biases", biases[l], {op.out_channels});
    values.push_back({weights[l].data(), biases[l].data()});
  }
  return values;
}

// A call into a session: one at a time, whatever Python threads do, and with the GIL dropped. (Waiting for the lock with the GIL
// held would not deadlock either: the core never asks for it.)
struct ExclusiveCall {
  explicit ExclusiveCall(std::mutex& mutex) : lock(mutex) {}
  py::gil_scoped_release release;
  std::lock_guard<std::mutex> lock;
};

template <class T>
class PySession {
 public:
  PySession(int image_size, const std::vector<OpTuple>& operations, const std::vector<Array<float>>& weights,
            const std::vector<Array<float>>& biases, std::array<float, 3> mean, std::array<float, 3> std_dev,
            const std::vector<UpdateTuple>& updates, const std::vector<int>& fisher_layers, const std::string& optimizer,
            int max_ways, int keep_images, int threads, int64_t memory_bytes, int64_t guard_bytes, const std::string& isa,
            const std::string& frozen_weights) {
    const Graph graph = make_graph(image_size, operations);
    const std::vector<LayerValues> values = layer_values(graph, weights, biases);
    const PlanRequest request = make_request(updates, fisher_layers, optimizer, max_ways, keep_images, threads, memory_bytes,
                                             guard_bytes, sizeof(T), panel_columns(frozen_weights, kernels<T>(isa)));
    py::gil_scoped_release release;
    session_ = std::make_unique<Session<T>>(graph, values, mean.data(), std_dev.data(), request, isa);
  }

  py::dict plan() const { return describe(session_->plan()); }
  std::string isa() const { return session_->isa(); }
  int64_t resident_weight_bytes() const { return session_->resident_weight_bytes(); }

  // Height, width and channels at the cut; zeros without a prefix.
  std::array<int, 3> prefix_shape() const {
    const Shape shape = session_->prefix_shape();
    return {shape.height, shape.width, shape.channels};
  }

  void prefix(const py::array& images, const std::optional<Array<float>>& augmentation, Array<T>& outputs) {
    const Images<T> in = view(images, false, augmentation);
    const Shape shape = session_->prefix_shape();
    check_shape("out", outputs, {in.count, shape.height, shape.width, shape.channels});
    T* out = outputs.mutable_data();  // throws where it is read-only
    const ExclusiveCall call(mutex_);
    session_->prefix(in, out);
  }

  Array<T> embed(const py::array& images, bool prefix) {
    const Images<T> in = view(images, prefix, std::nullopt);
    Array<T> features({in.count, static_cast<int64_t>(graph().features())});
    T* out = features.mutable_data();
    const ExclusiveCall call(mutex_);
    session_->embed(in, out);
    return features;
  }

  void set_prototypes(const py::array& images, bool prefix, const Array<int64_t>& labels, int ways, bool keep) {
    const Images<T> in = view(images, prefix, std::nullopt);
    if (ways < 1 || ways > session_->plan().max_ways) {
      throw py::value_error("ways: expected 1 to " + std::to_string(session_->plan().max_ways) + ", got " + std::to_string(ways));
    }
    check_labels(labels, in.count, ways);
    const int64_t* label_values = labels.data();
    const ExclusiveCall call(mutex_);
    session_->set_prototypes(in, label_values, ways, keep);
  }

  bool keeps_prefix() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return session_->keeps_prefix();
  }

  void update_prototypes() {
    if (!keeps_prefix()) throw py::value_error("update_prototypes: no prefix outputs are kept; call set_prototypes");
    const ExclusiveCall call(mutex_);
    session_->update_prototypes();
  }

  Array<T> prototypes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    Array<T> out({static_cast<int64_t>(session_->ways()), static_cast<int64_t>(graph().features())});
    std::copy_n(session_->prototypes(), out.size(), out.mutable_data());
    return out;
  }

  std::pair<double, int64_t> proto_backward(const py::array& images, bool prefix, const Array<int64_t>& labels,
                                            const std::optional<Array<float>>& augmentation, double scale, double weight) {
    const Images<T> in = view(images, prefix, augmentation);
    need_training("proto_backward");
    if (session_->ways() == 0) throw py::value_error("proto_backward: call set_prototypes first");
    check_labels(labels, in.count, session_->ways());
    const int64_t* label_values = labels.data();
    const ExclusiveCall call(mutex_);
    const ProtoResult result = session_->proto_backward(in, label_values, scale, weight);
    return {result.loss_sum, result.correct};
  }

  void backward(const py::array& images, bool prefix, const Array<T>& grad_features,
                const std::optional<Array<float>>& augmentation) {
    const Images<T> in = view(images, prefix, augmentation);
    need_training("backward");
    check_shape("grad_features", grad_features, {in.count, graph().features()});
    const T* grads = grad_features.data();
    const ExclusiveCall call(mutex_);
    session_->backward(in, grads);
  }

  // -> features (N, m), what each image leaves to its backward pass (N, saved bytes)
  std::pair<Array<T>, Array<uint8_t>> forward(const py::array& images, bool prefix) {
    const Images<T> in = view(images, prefix, std::nullopt);
    need_training("forward");
    Array<T> features({in.count, static_cast<int64_t>(graph().features())});
    Array<uint8_t> saved({in.count, session_->plan().train.saved_bytes});
    T* out = features.mutable_data();
    char* bytes = reinterpret_cast<char*>(saved.mutable_data());
    const ExclusiveCall call(mutex_);
    session_->forward(in, out, bytes);
    return {features, saved};
  }

  // images: those of the forward, needed where there is no frozen prefix.
  void backward_saved(const std::optional<py::array>& images, const Array<uint8_t>& saved, const Array<T>& grad_features) {
    need_training("backward_saved");
    Images<T> in;
    in.count = saved.ndim() > 0 ? saved.shape(0) : 0;
    check_shape("saved", saved, {in.count, session_->plan().train.saved_bytes});
    check_shape("grad_features", grad_features, {in.count, graph().features()});
    if (images) {
      in = view(*images, false, std::nullopt);
      check_shape("images", *images, {saved.shape(0), graph().image_size, graph().image_size, 3});
    } else if (session_->plan().train.tail == 0) {
      throw py::value_error("images: this plan has no frozen prefix, its backward pass reads the images again");
    }
    const char* bytes = reinterpret_cast<const char*>(saved.data());
    const T* grads = grad_features.data();
    const ExclusiveCall call(mutex_);
    session_->backward_saved(in, bytes, grads);
  }

  void set_selected(const Array<T>& values) {
    check_shape("values", values, {session_->plan().gradient_count});
    const std::lock_guard<std::mutex> lock(mutex_);
    session_->set_selected(values.data());
  }

  void zero_grad() {
    const std::lock_guard<std::mutex> lock(mutex_);
    session_->zero_grad();
  }

  void step(double learning_rate, double momentum) {
    const ExclusiveCall call(mutex_);
    session_->step(learning_rate, momentum);
  }

  void set_in_place_rate(double learning_rate) {
    const std::lock_guard<std::mutex> lock(mutex_);
    session_->set_in_place_rate(learning_rate);
  }

  Array<T> gradient(int index) const {
    Array<T> out(gradient_shape(index));
    if (session_->plan().gradient < 0) throw py::value_error("gradient: was applied in place and is not kept");
    const std::lock_guard<std::mutex> lock(mutex_);
    session_->copy_gradient(index, out.mutable_data());
    return out;
  }

  // All of them one after another.
  Array<T> flat_gradient() const {
    const Plan& plan = session_->plan();
    Array<T> out(plan.gradient_count);
    T* const values = out.mutable_data();
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < plan.updates.size(); ++i) session_->copy_gradient(static_cast<int>(i), values + plan.updates[i].offset);
    return out;
  }

  // (S, C / groups, k, k), (O, S, k, k) or (O)
  std::vector<int64_t> gradient_shape(int index) const {
    const auto& updates = session_->plan().updates;
    if (index < 0 || index >= static_cast<int>(updates.size())) throw py::index_error("gradient: no such update");
    const LayerUpdate& u = updates[index];
    const Op& op = graph().layer_op(u.layer);
    const int64_t selected = static_cast<int64_t>(u.channels.size()), k = op.kernel;
    if (u.bias) return {op.out_channels};
    const int64_t in = op.depthwise ? 1 : graph().layer_input(u.layer).channels;
    if (u.axis == Axis::kIn) return {op.out_channels, selected, k, k};
    return {selected, in, k, k};
  }

  py::list fisher() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    py::list result;
    const Plan& plan = session_->plan();
    for (size_t i = 0; i < plan.fisher_layers.size(); ++i) {
      Array<T> sums(static_cast<int64_t>(graph().layer_output(plan.fisher_layers[i]).channels));
      std::copy_n(session_->fisher() + plan.fisher_offsets[i], sums.size(), sums.mutable_data());
      result.append(sums);
    }
    return result;
  }

  std::pair<Array<T>, Array<T>> layer(int number) const {
    if (number < 0 || number >= static_cast<int>(graph().layers.size())) throw py::index_error("layer: no such convolution");
    const Op& op = graph().layer_op(number);
    const int64_t in = op.depthwise ? 1 : graph().layer_input(number).channels;
    Array<T> weight({static_cast<int64_t>(op.out_channels), in, static_cast<int64_t>(op.kernel), static_cast<int64_t>(op.kernel)});
    Array<T> bias(static_cast<int64_t>(op.out_channels));
    const std::lock_guard<std::mutex> lock(mutex_);
    session_->copy_weight(number, weight.mutable_data(), bias.mutable_data());
    return {weight, bias};
  }

  int64_t arena_high_water() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return session_->arena_high_water();
  }
  std::string broken_guard() const { return session_->broken_guard(); }

 private:
  const Graph& graph() const { return session_->plan().graph; }

  Images<T> view(const py::array& images, bool prefix, const std::optional<Array<float>>& augmentation) const {
    Images<T> in;
    if (prefix) {
      const Shape shape = session_->prefix_shape();
      if (!Array<T>::check_(images)) throw py::type_error("prefix: expected a C-contiguous array of the session's dtype");
      check_shape("prefix", images, {-1, shape.height, shape.width, shape.channels});
      if (augmentation) throw py::value_error("augmentation: the prefix has seen the images already");
      in.prefix = static_cast<const T*>(images.data());
      in.count = images.shape(0);
      return in;
    }
    const int64_t size = graph().image_size;
    check_shape("images", images, {-1, size, size, 3});
    in.count = images.shape(0);
    if (Array<uint8_t>::check_(images)) {
      in.bytes = static_cast<const uint8_t*>(images.data());
    } else if (Array<float>::check_(images)) {
      in.values = static_cast<const float*>(images.data());
    } else {
      throw py::type_error("images: expected a C-contiguous uint8 or float32 array");
    }
    if (augmentation) {
      check_shape("augmentation", *augmentation, {in.count, 6});
      for (py::ssize_t i = 0; i < augmentation->size(); ++i) {
        if (!std::isfinite(augmentation->data()[i])) throw py::value_error("augmentation: expected finite numbers");
      }
      in.augmentation = reinterpret_cast<const AugmentationRow*>(augmentation->data());
    }
    return in;
  }

  static void check_labels(const Array<int64_t>& labels, int64_t count, int ways) {
    check_shape("labels", labels, {count});
    for (int64_t i = 0; i < count; ++i) {
      if (labels.data()[i] < 0 || labels.data()[i] >= ways) {
        throw py::value_error("labels: expected 0 to " + std::to_string(ways - 1) + ", got " + std::to_string(labels.data()[i]));
      }
    }
  }

  void need_training(const char* call) const {
    if (session_->plan().train.steps.empty()) {
      throw py::value_error(std::string(call) + ": this session updates nothing and inspects nothing");
    }
  }

  std::unique_ptr<Session<T>> session_;
  mutable std::mutex mutex_;
};

// One convolution on whole tensors: what tests compare kernel by kernel, and what drop-in layers are made of.
template <class T>
class PyConvolution {
 public:
  PyConvolution(const Array<float>& weight, const Array<float>& bias, int height, int width, int stride, int padding,
                bool depthwise, const std::string& activation, const std::string& isa)
      : kernels_(kernels<T>(isa)) {
    if (weight.ndim() != 4 || weight.shape(2) != weight.shape(3) || weight.size() == 0 || (depthwise && weight.shape(1) != 1)) {
      bad_shape("weight", depthwise ? "(O, 1, k, k)" : "(O, C, k, k)", weight);
    }
    const int kernel = static_cast<int>(weight.shape(2));
    if (kernel > Convolution<T>::kMaxKernel || stride < 1 || padding < 0 || padding >= kernel) {
      throw py::value_error("kernel, stride, padding: expected 1 to " + std::to_string(Convolution<T>::kMaxKernel) +
                            ", 1 or more, 0 to kernel - 1; got " + std::to_string(kernel) + ", " + std::to_string(stride) + ", " +
                            std::to_string(padding));
    }
    if (std::min(height, width) < 1 || std::min(height, width) + 2 * padding < kernel) {
      throw py::value_error("height, width: expected at least the kernel without its padding, " +
                            std::to_string(std::max(kernel - 2 * padding, 1)) + ", got " + std::to_string(height) + ", " +
                            std::to_string(width));
    }
    Op op;
    op.inputs = {1};
    op.kernel = kernel;
    op.stride = stride;
    op.padding = padding;
    op.depthwise = depthwise;
    op.out_channels = static_cast<int>(weight.shape(0));
    op.activation = activation_of(activation);
    check_shape("bias", bias, {op.out_channels});
    in_ = {height, width, depthwise ? op.out_channels : static_cast<int>(weight.shape(1))};
    out_ = {(height + 2 * padding - op.kernel) / stride + 1, (width + 2 * padding - op.kernel) / stride + 1, op.out_channels};
    conv_ = std::make_unique<Convolution<T>>(op, in_, out_, weight.data(), bias.data(), true, false, nullptr, kernels_);
  }

  // values: the selected weights, (S, C / groups, k, k) of axis out, (O, S, k, k) of axis in
  void set_weight(const Array<T>& values, const std::vector<int32_t>& channels, const std::string& axis) {
    const LayerUpdate u = update_of(channels, axis);
    check_shape("values", values, selected_shape(u));
    conv_->set_selected(u, values.data());
  }

  void set_bias(const Array<T>& bias) {
    check_shape("bias", bias, {out_.channels});
    std::copy_n(bias.data(), out_.channels, conv_->bias());
  }

  // x (N, H, W, C), addend (N, H', W', O) or None -> y (N, H', W', O), ReLU bits (N, H' * W', ceil(O / 8))
  std::pair<Array<T>, Array<uint8_t>> forward(const Array<T>& x, const std::optional<Array<T>>& addend) const {
    check(x, "x", -1, in_);
    const int64_t count = x.shape(0);
    if (addend) check(*addend, "addend", count, out_);
    Array<T> y({count, static_cast<int64_t>(out_.height), static_cast<int64_t>(out_.width), static_cast<int64_t>(out_.channels)});
    Array<uint8_t> mask({count, out_.pixels(), static_cast<int64_t>(mask_bytes(out_.channels))});
    AlignedArray<T> scratch(Convolution<T>::forward_scratch(conv_->op(), in_.width, in_.channels));
    Epilogue<T> e{};
    e.activation = conv_->op().activation;
    for (int64_t n = 0; n < count; ++n) {
      int loaded = 0;
      if (e.activation != Activation::kNone) e.mask_out = mask.mutable_data() + n * out_.pixels() * mask_bytes(out_.channels);
      if (addend) e.addend = addend->data() + n * out_.count();
      conv_->forward({x.data() + n * in_.count(), in_.height}, {y.mutable_data() + n * out_.count(), out_.height}, nullptr, 0,
                     out_.height, scratch.data(), nullptr, &loaded, e);
    }
    return {y, mask};
  }

  // grad_output (N, H', W', O); of the *input* tensor: addend, values (N, H, W, C), mask bits -> grad_input, sums of values * grad (N, C)
  std::pair<Array<T>, Array<T>> grad_input(const Array<T>& grad_output, const std::optional<Array<T>>& addend,
                                           const std::optional<Array<uint8_t>>& mask, const std::optional<Array<T>>& values) const {
    check(grad_output, "grad_output", -1, out_);
    const int64_t count = grad_output.shape(0);
    if (addend) check(*addend, "addend", count, in_);
    if (values) check(*values, "values", count, in_);
    if (mask) check_shape("mask", *mask, {count, in_.pixels(), mask_bytes(in_.channels)});
    Array<T> dx({count, static_cast<int64_t>(in_.height), static_cast<int64_t>(in_.width), static_cast<int64_t>(in_.channels)});
    Array<T> fisher({count, static_cast<int64_t>(in_.channels)});
    std::fill_n(fisher.mutable_data(), fisher.size(), T(0));
    AlignedArray<T> scratch(Convolution<T>::grad_input_scratch(conv_->op(), in_.width, out_.channels));
    for (int64_t n = 0; n < count; ++n) {
      Epilogue<T> e{};
      e.out = dx.mutable_data() + n * in_.count();
      e.out_stride = e.addend_stride = in_.channels;
      if (addend) e.addend = addend->data() + n * in_.count();
      if (mask) e.mask_in = mask->data() + n * in_.pixels() * mask_bytes(in_.channels);
      if (values) {
        e.values = values->data() + n * in_.count();
        e.fisher = fisher.mutable_data() + n * in_.channels;
      }
      conv_->grad_input(grad_output.data() + n * out_.count(), scratch.data(), nullptr, e);
    }
    return {dx, fisher};
  }

  // -> (S, C / groups, k, k) for axis out, (O, S, k, k) for axis in: summed over images. Where only the selected channels of x are
  // read (depthwise, axis in), x may hold them alone: (N, H, W, S).
  Array<T> grad_weight(const Array<T>& grad_output, const Array<T>& x, const std::vector<int32_t>& channels,
                       const std::string& axis) const {
    check(grad_output, "grad_output", -1, out_);
    const Op& op = conv_->op();
    LayerUpdate u = update_of(channels, axis);
    const bool columns = u.axis == Axis::kIn;
    const int64_t selected = static_cast<int64_t>(channels.size());
    Shape in_shape = in_;
    const bool gathered = (columns || op.depthwise) && x.ndim() == 4 && x.shape(3) == selected;
    if (gathered) in_shape.channels = static_cast<int>(selected);
    check(x, "x", grad_output.shape(0), in_shape);
    const std::vector<int64_t> shape = selected_shape(u);
    const int64_t ins = shape[1];
    u.count = shape[0] * shape[1] * shape[2] * shape[3];
    Array<T> result(shape);
    AlignedArray<T> total(u.count), image_sum(u.count), g(out_.pixels() * selected), input(in_.pixels() * selected),
        padded(Convolution<T>::forward_scratch(op, in_.width, columns ? static_cast<int>(selected) : in_.channels));
    const bool sum = Convolution<T>::needs_image_sum(op, out_);
    for (int64_t n = 0; n < x.shape(0) && selected > 0; ++n) {
      const T* grad = grad_output.data() + n * out_.count();
      const T* in = x.data() + n * in_shape.count();
      if (!columns) {
        kernels_.gather_columns(grad, out_.pixels(), out_.channels, channels.data(), static_cast<int>(selected), g.data());
        grad = g.data();
      }
      if ((columns || op.depthwise) && !gathered) {
        kernels_.gather_columns(in, in_.pixels(), in_.channels, channels.data(), static_cast<int>(selected), input.data());
        in = input.data();
      }
      conv_->grad_weight(u, grad, in, nullptr, sum ? image_sum.data() : nullptr, padded.data(), total.data());
    }
    copy_compact(op, u, ins, total.data(), result.mutable_data());
    return result;
  }

  // x (N, P, C) -> activation(x), its bits (N, P, ceil(C / 8))
  static std::pair<Array<T>, Array<uint8_t>> rectify(const Array<T>& x, const std::string& activation) {
    check_shape("x", x, {-1, -1, -1});
    const int64_t count = x.shape(0), pixels = x.shape(1);
    const int channels = static_cast<int>(x.shape(2));
    Array<T> y({count, pixels, x.shape(2)});
    Array<uint8_t> mask({count, pixels, static_cast<int64_t>(mask_bytes(channels))});
    Epilogue<T> e{};
    e.out = y.mutable_data();
    e.out_stride = channels;
    e.activation = activation_of(activation);
    if (e.activation == Activation::kNone) throw py::value_error("activation: expected relu or relu6, got none");
    e.mask_out = mask.mutable_data();
    kernels<T>("").apply_epilogue(x.data(), count * pixels, channels, e);
    return {y, mask};
  }

  // grad (N, P, C) where the mask's bits are set, 0 elsewhere; sums over P of values * that (N, C)
  static std::pair<Array<T>, Array<T>> grad_rectify(const Array<T>& grad, const std::optional<Array<uint8_t>>& mask,
                                                    const std::optional<Array<T>>& values) {
    check_shape("grad", grad, {-1, -1, -1});
    const int64_t count = grad.shape(0), pixels = grad.shape(1);
    const int channels = static_cast<int>(grad.shape(2));
    if (mask) check_shape("mask", *mask, {count, pixels, mask_bytes(channels)});
    if (values) check_shape("values", *values, {count, pixels, channels});
    Array<T> masked({count, pixels, grad.shape(2)}), fisher({count, grad.shape(2)});
    std::fill_n(fisher.mutable_data(), fisher.size(), T(0));
    for (int64_t n = 0; n < count; ++n) {
      Epilogue<T> e{};
      e.out = masked.mutable_data() + n * pixels * channels;
      e.out_stride = channels;
      if (mask) e.mask_in = mask->data() + n * pixels * mask_bytes(channels);
      if (values) {
        e.values = values->data() + n * pixels * channels;
        e.fisher = fisher.mutable_data() + n * channels;
      }
      kernels<T>("").apply_epilogue(grad.data() + n * pixels * channels, pixels, channels, e);
    }
    return {masked, fisher};
  }

 private:
  LayerUpdate update_of(const std::vector<int32_t>& channels, const std::string& axis) const {
    LayerUpdate u;
    u.axis = axis_of(axis);
    u.channels = channels;
    if (u.axis == Axis::kIn && conv_->op().depthwise) throw py::value_error("axis: a depthwise convolution has only axis out");
    const int limit = u.axis == Axis::kIn ? in_.channels : out_.channels;
    for (int32_t c : channels) {
      if (c < 0 || c >= limit)
        throw py::value_error("channels: expected 0 to " + std::to_string(limit - 1) + ", got " + std::to_string(c));
    }
    return u;
  }
  std::vector<int64_t> selected_shape(const LayerUpdate& u) const {
    const Op& op = conv_->op();
    const int64_t selected = static_cast<int64_t>(u.channels.size()), k = op.kernel;
    if (u.axis == Axis::kIn) return {out_.channels, selected, k, k};
    return {selected, op.depthwise ? 1 : in_.channels, k, k};
  }

  static void check(const Array<T>& array, const char* name, int64_t images, Shape shape) {
    check_shape(name, array, {images, shape.height, shape.width, shape.channels});
  }

  const Kernels<T>& kernels_;
  Shape in_, out_;
  std::unique_ptr<Convolution<T>> conv_;
};

template <class T>
void bind(py::module_& m, const char* session, const char* convolution) {
  using S = PySession<T>;
  py::class_<S>(m, session)
      .def(py::init<int, const std::vector<OpTuple>&, const std::vector<Array<float>>&, const std::vector<Array<float>>&,
                    std::array<float, 3>, std::array<float, 3>, const std::vector<UpdateTuple>&, const std::vector<int>&,
                    const std::string&, int, int, int, int64_t, int64_t, const std::string&, const std::string&>(),
           py::kw_only(), py::arg("image_size"), py::arg("operations"), py::arg("weights").noconvert(),
           py::arg("biases").noconvert(), py::arg("mean"), py::arg("std"), py::arg("updates"), py::arg("fisher_layers"),
           py::arg("optimizer"), py::arg("max_ways"), py::arg("keep_images"), py::arg("threads"), py::arg("memory_bytes"),
           py::arg("guard_bytes"), py::arg("isa"), py::arg("frozen_weights"))
      .def("plan", &S::plan)
      .def("isa", &S::isa)
      .def("resident_weight_bytes", &S::resident_weight_bytes)
      .def("prefix_shape", &S::prefix_shape)
      .def("prefix", &S::prefix, py::arg("images"), py::arg("augmentation").noconvert(), py::arg("out").noconvert())
      .def("embed", &S::embed, py::arg("images"), py::arg("prefix"))
      .def("set_prototypes", &S::set_prototypes, py::arg("images"), py::arg("prefix"), py::arg("labels").noconvert(),
           py::arg("ways"), py::arg("keep"))
      .def("keeps_prefix", &S::keeps_prefix)
      .def("update_prototypes", &S::update_prototypes)
      .def("prototypes", &S::prototypes)
      .def("proto_backward", &S::proto_backward, py::arg("images"), py::arg("prefix"), py::arg("labels").noconvert(),
           py::arg("augmentation").noconvert(), py::arg("scale"), py::arg("weight"))
      .def("backward", &S::backward, py::arg("images"), py::arg("prefix"), py::arg("grad_features").noconvert(),
           py::arg("augmentation").noconvert())
      .def("forward", &S::forward, py::arg("images"), py::arg("prefix"))
      .def("backward_saved", &S::backward_saved, py::arg("images"), py::arg("saved").noconvert(),
           py::arg("grad_features").noconvert())
      .def("set_selected", &S::set_selected, py::arg("values").noconvert())
      .def("zero_grad", &S::zero_grad)
      .def("step", &S::step, py::arg("learning_rate"), py::arg("momentum"))
      .def("set_in_place_rate", &S::set_in_place_rate, py::arg("learning_rate"))
      .def("gradient", &S::gradient, py::arg("index"))
      .def("flat_gradient", &S::flat_gradient)
      .def("fisher", &S::fisher)
      .def("layer", &S::layer, py::arg("number"))
      .def("arena_high_water", &S::arena_high_water)
      .def("broken_guard", &S::broken_guard);
  using C = PyConvolution<T>;
  py::class_<C>(m, convolution)
      .def(py::init<const Array<float>&, const Array<float>&, int, int, int, int, bool, const std::string&, const std::string&>(),
           py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::kw_only(), py::arg("height"), py::arg("width"),
           py::arg("stride"), py::arg("padding"), py::arg("depthwise"), py::arg("activation"), py::arg("isa"))
      .def("set_weight", &C::set_weight, py::arg("values").noconvert(), py::arg("channels"), py::arg("axis"))
      .def("set_bias", &C::set_bias, py::arg("bias").noconvert())
      .def_static("rectify", &C::rectify, py::arg("x").noconvert(), py::arg("activation"))
      .def_static("grad_rectify", &C::grad_rectify, py::arg("grad").noconvert(), py::arg("mask").noconvert(),
                  py::arg("values").noconvert())
      .def("forward", &C::forward, py::arg("x").noconvert(), py::arg("addend").noconvert() = py::none())
      .def("grad_input", &C::grad_input, py::arg("grad_output").noconvert(), py::kw_only(),
           py::arg("addend").noconvert() = py::none(), py::arg("mask").noconvert() = py::none(),
           py::arg("values").noconvert() = py::none())
      .def("grad_weight", &C::grad_weight, py::arg("grad_output").noconvert(), py::arg("x").noconvert(), py::arg("channels"),
           py::arg("axis"));
}

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native training core; see tinytrain_ext.session.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const BudgetError& e) {
      const py::object type = py::module_::import("tinytrain_ext.errors").attr("BudgetExceeded");
      const py::object error = type(e.what(), e.needed_bytes);
      PyErr_SetObject(type.ptr(), error.ptr());
    } catch (const NonFinite& e) {
      py::set_error(py::module_::import("tinytrain_ext.errors").attr("NonFiniteError"), e.what());
    }
  });
  m.def("available_isas", &available_isas);
  m.def("default_isa", [] { return std::string(kernels_f32().isa); });
  m.def(
      "fma_peak",
      [](const std::string& isa, int64_t rounds) {
        float value = 0.999f;
        py::gil_scoped_release release;
        return kernels_f32(isa).fma_peak(rounds, &value);
      },
      py::arg("isa"), py::arg("rounds"), "Runs FMAs at full rate; returns how many multiply-adds that were.");
  m.def(
      "plan",
      [](int image_size, const std::vector<OpTuple>& operations, const std::vector<UpdateTuple>& updates,
         const std::vector<int>& fisher_layers, const std::string& optimizer, int max_ways, int keep_images, int threads,
         int64_t memory_bytes, const std::string& frozen_weights) {
        return describe(make_plan(make_graph(image_size, operations),
                                  make_request(updates, fisher_layers, optimizer, max_ways, keep_images, threads, memory_bytes, 0,
                                               sizeof(float), panel_columns(frozen_weights, kernels_f32()))));
      },
      py::kw_only(), py::arg("image_size"), py::arg("operations"), py::arg("updates"), py::arg("fisher_layers"),
      py::arg("optimizer"), py::arg("max_ways"), py::arg("keep_images"), py::arg("threads"), py::arg("memory_bytes"),
      py::arg("frozen_weights"));
  bind<float>(m, "Session32", "Convolution32");
  bind<double>(m, "Session64", "Convolution64");
}

}  // namespace
}  // namespace tinytrain
