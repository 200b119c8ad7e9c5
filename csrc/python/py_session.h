// A session as Python sees it. Bound in two sources, so that neither takes a compiler too much memory (border.h).
#pragma once

#include <cmath>
#include <mutex>

#include "border.h"

namespace tinytrain {

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
  PySession(const py::dict& request, const py::sequence& weights, const py::sequence& biases, const py::sequence& mean,
            const py::sequence& std_dev, const std::string& isa) {
    const Graph graph = make_graph(request);
    const std::vector<LayerValues> values = layer_values(graph, weights, biases);
    const std::array<float, 3> means = three_numbers("mean", mean), deviations = three_numbers("std", std_dev);
    const PlanRequest limits = make_request(request, sizeof(T), panel_columns(kernels<T>(isa)));
    py::gil_scoped_release release;
    session_ = std::make_unique<Session<T>>(graph, values, means.data(), deviations.data(), limits, isa);
  }

  py::dict plan() const { return describe(session_->plan()); }
  std::string isa() const { return session_->isa(); }
  int64_t resident_weight_bytes() const { return session_->resident_weight_bytes(); }

  // Height, width and channels at the cut; zeros without a prefix.
  py::tuple prefix_shape() const {
    const Shape shape = session_->prefix_shape();
    return py::make_tuple(shape.height, shape.width, shape.channels);
  }

  void prefix(const py::array& images, const py::object& augmentation, Array<T>& outputs) {
    const Images<T> in = view(images, false, augmentation);
    const Shape shape = session_->prefix_shape();
    check_shape("out", outputs, {in.count, shape.height, shape.width, shape.channels});
    T* out = outputs.mutable_data();  // throws where it is read-only
    const ExclusiveCall call(mutex_);
    session_->prefix(in, out);
  }

  Array<T> embed(const py::array& images, bool prefix, const py::object& augmentation) {
    const Images<T> in = view(images, prefix, augmentation);
    Array<T> features({in.count, static_cast<int64_t>(graph().features())});
    T* out = features.mutable_data();
    const ExclusiveCall call(mutex_);
    session_->embed(in, out);
    return features;
  }

  void set_prototypes(const py::array& images, bool prefix, const Array<int64_t>& labels, int ways, bool keep) {
    const Images<T> in = view(images, prefix, py::none());
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
    need_kept("update_prototypes");
    const ExclusiveCall call(mutex_);
    session_->update_prototypes();
  }

  Array<T> kept_features() {
    need_kept("kept_features");
    Array<T> features({session_->kept().count, static_cast<int64_t>(graph().features())});
    T* out = features.mutable_data();
    const ExclusiveCall call(mutex_);
    session_->embed(session_->kept(), out);
    return features;
  }

  Array<T> prototypes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    Array<T> out({static_cast<int64_t>(session_->ways()), static_cast<int64_t>(graph().features())});
    std::copy_n(session_->prototypes(), out.size(), out.mutable_data());
    return out;
  }

  std::pair<double, int64_t> proto_backward(const py::array& images, bool prefix, const Array<int64_t>& labels,
                                            const py::object& augmentation, double scale, double weight) {
    const Images<T> in = view(images, prefix, augmentation);
    need_training("proto_backward");
    if (session_->ways() == 0) throw py::value_error("proto_backward: call set_prototypes first");
    check_labels(labels, in.count, session_->ways());
    const int64_t* label_values = labels.data();
    const ExclusiveCall call(mutex_);
    const ProtoResult result = session_->proto_backward(in, label_values, scale, weight);
    return {result.loss_sum, result.correct};
  }

  void backward(const py::array& images, bool prefix, const Array<T>& grad_features, const py::object& augmentation) {
    const Images<T> in = view(images, prefix, augmentation);
    need_training("backward");
    check_shape("grad_features", grad_features, {in.count, graph().features()});
    const T* grads = grad_features.data();
    const ExclusiveCall call(mutex_);
    session_->backward(in, grads);
  }

  // -> features (N, m), what each image leaves to its backward pass (N, saved bytes)
  std::pair<Array<T>, Array<uint8_t>> forward(const py::array& images, bool prefix) {
    const Images<T> in = view(images, prefix, py::none());
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
  void backward_saved(const py::object& images, const Array<uint8_t>& saved, const Array<T>& grad_features) {
    need_training("backward_saved");
    Images<T> in;
    in.count = saved.ndim() > 0 ? saved.shape(0) : 0;
    check_shape("saved", saved, {in.count, session_->plan().train.saved_bytes});
    check_shape("grad_features", grad_features, {in.count, graph().features()});
    if (!images.is_none()) {
      const py::array given = py::array::ensure(images);
      if (!given) throw py::type_error("images: expected None or an array");
      in = view(given, false, py::none());
      check_shape("images", given, {saved.shape(0), graph().image_size, graph().image_size, 3});
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
    need_gradients();
    Array<T> out(gradient_shape(index));
    if (session_->plan().gradient < 0) throw py::value_error("gradient: was applied in place and is not kept");
    const std::lock_guard<std::mutex> lock(mutex_);
    session_->copy_gradient(index, out.mutable_data());
    return out;
  }

  // All of them one after another.
  Array<T> flat_gradient() const {
    need_gradients();
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

  Images<T> view(const py::array& images, bool prefix, const py::object& augmentation) const {
    Images<T> in;
    if (prefix) {
      const Shape shape = session_->prefix_shape();
      if (!Array<T>::check_(images)) throw py::type_error("prefix: expected a C-contiguous array of the session's dtype");
      check_shape("prefix", images, {-1, shape.height, shape.width, shape.channels});
      if (!augmentation.is_none()) throw py::value_error("augmentation: the prefix has seen the images already");
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
    if (const float* rows = optional_values<float>("augmentation", augmentation, {in.count, 6})) {
      for (int64_t i = 0; i < in.count * 6; ++i) {
        if (!std::isfinite(rows[i])) throw py::value_error("augmentation: expected finite numbers");
      }
      in.augmentation = reinterpret_cast<const AugmentationRow*>(rows);
    }
    return in;
  }

  void need_kept(const char* call) const {
    if (!keeps_prefix()) throw py::value_error(std::string(call) + ": no prefix outputs are kept; call set_prototypes");
  }

  void need_gradients() const {
    if (session_->plan().optimizer == Optimizer::kInPlaceSgd) throw py::value_error("gradients: in_place_sgd keeps none");
  }

  void need_training(const char* call) const {
    if (session_->plan().train.steps.empty()) {
      throw py::value_error(std::string(call) + ": this session updates nothing and inspects nothing");
    }
  }

  std::unique_ptr<Session<T>> session_;
  mutable std::mutex mutex_;
};

template <class T>
using SessionClass = py::class_<PySession<T>>;

// session_state.cpp: what does not run a pass.
template <class T>
void bind_session_state(SessionClass<T>& session);

}  // namespace tinytrain
