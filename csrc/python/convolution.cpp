// Convolution32 and Convolution64 of _core.pyi.
#include "border.h"

namespace tinytrain {
namespace {

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
  void set_weight(const Array<T>& values, const py::sequence& channels, const std::string& axis) {
    const LayerUpdate u = update_of(channels, axis);
    check_shape("values", values, selected_shape(u));
    conv_->set_selected(u, values.data());
  }

  void set_bias(const Array<T>& bias) {
    check_shape("bias", bias, {out_.channels});
    std::copy_n(bias.data(), out_.channels, conv_->bias());
  }

  // x (N, H, W, C), addend (N, H', W', O) or None -> y (N, H', W', O), ReLU bits (N, H' * W', ceil(O / 8))
  std::pair<Array<T>, Array<uint8_t>> forward(const Array<T>& x, const py::object& addend) const {
    check(x, "x", -1, in_);
    const int64_t count = x.shape(0);
    const T* addends = optional_values<T>("addend", addend, tensor(count, out_));
    Array<T> y({count, static_cast<int64_t>(out_.height), static_cast<int64_t>(out_.width), static_cast<int64_t>(out_.channels)});
    Array<uint8_t> mask({count, out_.pixels(), static_cast<int64_t>(mask_bytes(out_.channels))});
    AlignedArray<T> scratch(Convolution<T>::forward_scratch(conv_->op(), in_.width, in_.channels));
    Epilogue<T> e{};
    e.activation = conv_->op().activation;
    for (int64_t n = 0; n < count; ++n) {
      int loaded = 0;
      if (e.activation != Activation::kNone) e.mask_out = mask.mutable_data() + n * out_.pixels() * mask_bytes(out_.channels);
      if (addends) e.addend = addends + n * out_.count();
      conv_->forward({x.data() + n * in_.count(), in_.height}, {y.mutable_data() + n * out_.count(), out_.height}, nullptr, 0,
                     out_.height, scratch.data(), nullptr, &loaded, e);
    }
    return {y, mask};
  }

  // grad_output (N, H', W', O); of the *input* tensor: addend, values (N, H, W, C), mask bits -> grad_input, sums of values * grad (N, C)
  std::pair<Array<T>, Array<T>> grad_input(const Array<T>& grad_output, const py::object& addend, const py::object& mask,
                                           const py::object& values) const {
    check(grad_output, "grad_output", -1, out_);
    const int64_t count = grad_output.shape(0);
    const T* addends = optional_values<T>("addend", addend, tensor(count, in_));
    const T* inputs = optional_values<T>("values", values, tensor(count, in_));
    const uint8_t* bits = optional_values<uint8_t>("mask", mask, {count, in_.pixels(), mask_bytes(in_.channels)});
    Array<T> dx({count, static_cast<int64_t>(in_.height), static_cast<int64_t>(in_.width), static_cast<int64_t>(in_.channels)});
    Array<T> fisher({count, static_cast<int64_t>(in_.channels)});
    std::fill_n(fisher.mutable_data(), fisher.size(), T(0));
    AlignedArray<T> scratch(Convolution<T>::grad_input_scratch(conv_->op(), in_.width, out_.channels));
    for (int64_t n = 0; n < count; ++n) {
      Epilogue<T> e{};
      e.out = dx.mutable_data() + n * in_.count();
      e.out_stride = e.addend_stride = in_.channels;
      if (addends) e.addend = addends + n * in_.count();
      if (bits) e.mask_in = bits + n * in_.pixels() * mask_bytes(in_.channels);
      if (inputs) {
        e.values = inputs + n * in_.count();
        e.fisher = fisher.mutable_data() + n * in_.channels;
      }
      conv_->grad_input(grad_output.data() + n * out_.count(), scratch.data(), nullptr, e);
    }
    return {dx, fisher};
  }

  // -> (S, C / groups, k, k) for axis out, (O, S, k, k) for axis in: summed over images. Where only the selected channels of x are
  // read (depthwise, axis in) and are fewer, x may hold them alone: (N, H, W, S).
  Array<T> grad_weight(const Array<T>& grad_output, const Array<T>& x, const py::sequence& channels,
                       const std::string& axis) const {
    check(grad_output, "grad_output", -1, out_);
    const Op& op = conv_->op();
    LayerUpdate u = update_of(channels, axis);
    const bool columns = u.axis == Axis::kIn;
    const int64_t selected = static_cast<int64_t>(u.channels.size());
    Shape in_shape = in_;
    const bool gathered = (columns || op.depthwise) && selected < in_.channels && x.ndim() == 4 && x.shape(3) == selected;
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
        kernels_.gather_columns(grad, out_.pixels(), out_.channels, u.channels.data(), static_cast<int>(selected), g.data());
        grad = g.data();
      }
      if ((columns || op.depthwise) && !gathered) {
        kernels_.gather_columns(in, in_.pixels(), in_.channels, u.channels.data(), static_cast<int>(selected), input.data());
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
  static std::pair<Array<T>, Array<T>> grad_rectify(const Array<T>& grad, const py::object& mask, const py::object& values) {
    check_shape("grad", grad, {-1, -1, -1});
    const int64_t count = grad.shape(0), pixels = grad.shape(1);
    const int channels = static_cast<int>(grad.shape(2));
    const uint8_t* bits = optional_values<uint8_t>("mask", mask, {count, pixels, mask_bytes(channels)});
    const T* inputs = optional_values<T>("values", values, {count, pixels, channels});
    Array<T> masked({count, pixels, grad.shape(2)}), fisher({count, grad.shape(2)});
    std::fill_n(fisher.mutable_data(), fisher.size(), T(0));
    for (int64_t n = 0; n < count; ++n) {
      Epilogue<T> e{};
      e.out = masked.mutable_data() + n * pixels * channels;
      e.out_stride = channels;
      if (bits) e.mask_in = bits + n * pixels * mask_bytes(channels);
      if (inputs) {
        e.values = inputs + n * pixels * channels;
        e.fisher = fisher.mutable_data() + n * channels;
      }
      kernels<T>("").apply_epilogue(grad.data() + n * pixels * channels, pixels, channels, e);
    }
    return {masked, fisher};
  }

 private:
  LayerUpdate update_of(const py::sequence& channels, const std::string& axis) const {
    LayerUpdate u;
    u.axis = axis_of(axis);
    u.channels = channel_numbers(channels);
    if (u.axis == Axis::kIn && conv_->op().depthwise) throw py::value_error("axis: a depthwise convolution has only axis out");
    const int limit = u.axis == Axis::kIn ? in_.channels : out_.channels;
    for (int32_t c : u.channels) {
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

  static std::vector<int64_t> tensor(int64_t images, Shape shape) { return {images, shape.height, shape.width, shape.channels}; }
  static void check(const Array<T>& array, const char* name, int64_t images, Shape shape) {
    check_shape(name, array, tensor(images, shape));
  }

  const Kernels<T>& kernels_;
  Shape in_, out_;
  std::unique_ptr<Convolution<T>> conv_;
};

}  // namespace

template <>
void bind_convolution<TT_REAL>(py::module_& m) {
  using C = PyConvolution<TT_REAL>;
  py::class_<C>(m, sizeof(TT_REAL) == 4 ? "Convolution32" : "Convolution64")
      .def(py::init<const Array<float>&, const Array<float>&, int, int, int, int, bool, const std::string&, const std::string&>(),
           py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::kw_only(), py::arg("height"), py::arg("width"),
           py::arg("stride"), py::arg("padding"), py::arg("depthwise"), py::arg("activation"), py::arg("isa"))
      .def("set_weight", &C::set_weight, py::arg("values").noconvert(), py::arg("channels"), py::arg("axis"))
      .def("set_bias", &C::set_bias, py::arg("bias").noconvert())
      .def_static("rectify", &C::rectify, py::arg("x").noconvert(), py::arg("activation"))
      .def_static("grad_rectify", &C::grad_rectify, py::arg("grad").noconvert(), py::arg("mask"), py::arg("values"))
      .def("forward", &C::forward, py::arg("x").noconvert(), py::arg("addend") = py::none())
      .def("grad_input", &C::grad_input, py::arg("grad_output").noconvert(), py::kw_only(), py::arg("addend") = py::none(),
           py::arg("mask") = py::none(), py::arg("values") = py::none())
      .def("grad_weight", &C::grad_weight, py::arg("grad_output").noconvert(), py::arg("x").noconvert(), py::arg("channels"),
           py::arg("axis"));
}

}  // namespace tinytrain
