#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tinytrain {
namespace {

constexpr unsigned char kPattern = 0xA5, kGuard = 0x5C;
constexpr double kLargestGradient = 1e15, kLargestRate = 1e10;

bool coprime(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a == 1;
}

// A stride that visits all of `count` images, neighbours far apart: photos come class by class, and steps taken between them
// would forget one class over the next. (std::gcd would bring an instruction that the baseline has not.)
int64_t spread(int64_t count) {
  int64_t stride = std::max<int64_t>(1, count * 618 / 1000);
  while (!coprime(stride, count)) ++stride;
  return stride;
}

}  // namespace

// What one thread needs to take an image through a program.
template <class T>
struct Session<T>::Worker {
  char* workspace = nullptr;
  std::vector<T*> embed_slots, train_slots;
  std::vector<T*>* slots = nullptr;  // of the program that runs
  int done[kMaxLinks];               // rows produced by each link of a chain
  int loaded[kMaxLinks];             // padded input rows loaded by each dense link
  ImageSource<T> image;
  // Of a pass that no other thread shares: gradients add up where they belong at once, to the same bits.
  bool alone = false;
  double loss = 0;
  bool correct = false;
};

// One pass over many images.
template <class T>
struct Session<T>::Pass {
  Session* session;
  const Program* program;
  Images<T> images;
  const int64_t* labels = nullptr;
  T* prefix = nullptr;    // where to put the prefix's outputs, or null
  T* features = nullptr;  // embed
  bool sum_prototypes = false;
  char* save = nullptr;                  // forward: (N, saved bytes)
  const char* saved = nullptr;           // backward_saved: the same
  const T* feature_gradients = nullptr;  // backward
  double scale = 0, weight = 0;          // proto_backward
  bool exploded = false;                 // in-place SGD met a gradient that is not finite
  int64_t stride = 1;                    // from one turn's image to the next one's
  std::atomic<int64_t> next{0};
  ProtoResult result;
};

template <class T>
Session<T>::Session(const Graph& graph, const std::vector<LayerValues>& layers, const float mean[3], const float std_dev[3],
                    const PlanRequest& request, const std::string& isa)
    : plan_(make_plan(graph, request)), graph_(plan_.graph), kernels_(kernels<T>(isa)) {
  for (int c = 0; c < 3; ++c) {
    mean_[c] = mean[c];
    std_[c] = std_dev[c];
  }
  for (const Program* program : {&plan_.embed, &plan_.train}) {
    for (const Instruction& step : program->steps) {
      if (static_cast<int>(step.links.size()) > kMaxLinks) {
        throw std::invalid_argument("network: a chain of more than " + std::to_string(kMaxLinks) + " convolutions");
      }
    }
  }
  layers_.reserve(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    const Op& op = graph_.layer_op(static_cast<int>(l));
    const LayerUpdate* trained = nullptr;
    for (const LayerUpdate& u : plan_.updates) {
      if (u.layer == static_cast<int>(l) && !u.bias) trained = &u;
    }
    layers_.emplace_back(op, graph_.layer_input(static_cast<int>(l)), graph_.layer_output(static_cast<int>(l)), layers[l].weight,
                         layers[l].bias, plan_.needs_grad[op.inputs[0]] != 0, plan_.quantised(static_cast<int>(l)), trained,
                         kernels_);
  }
  arena_ = AlignedArray<char>(plan_.peak_bytes);
  std::memset(arena_.data(), kPattern, static_cast<size_t>(plan_.peak_bytes));
  const auto shared = [&](int slot) -> T* {
    if (slot < 0) return nullptr;
    const Slot& s = plan_.shared[slot];
    std::memset(arena_.data() + s.offset, 0, static_cast<size_t>(s.bytes));
    std::memset(arena_.data() + s.offset + s.bytes, kGuard, static_cast<size_t>(plan_.guard_bytes));
    return reinterpret_cast<T*>(arena_.data() + s.offset);
  };
  gradient_ = shared(plan_.gradient);
  first_moment_ = shared(plan_.first_moment);
  second_moment_ = shared(plan_.second_moment);
  fisher_ = shared(plan_.fisher);
  prototypes_ = shared(plan_.prototypes);
  kept_ = shared(plan_.kept);
  kept_labels_.resize(plan_.keep_images);
  for (int t = 0; t < plan_.threads; ++t) {
    auto worker = std::make_unique<Worker>();
    worker->workspace = arena_.data() + plan_.shared_bytes + t * plan_.workspace_stride;
    for (const Slot& s : plan_.embed.slots) worker->embed_slots.push_back(reinterpret_cast<T*>(worker->workspace + s.offset));
    for (const Slot& s : plan_.train.slots) worker->train_slots.push_back(reinterpret_cast<T*>(worker->workspace + s.offset));
    workers_.push_back(std::move(worker));
  }
  pool_ = std::make_unique<ThreadPool>(plan_.threads);
}

template <class T>
Session<T>::~Session() = default;

// ---- weights ----

template <class T>
void Session<T>::copy_weight(int layer, T* weight, T* bias) const {
  layers_[layer].copy_weight(weight, bias);
}

template <class T>
int64_t Session<T>::resident_weight_bytes() const {
  int64_t bytes = 0;
  for (const Convolution<T>& layer : layers_) bytes += layer.resident_bytes();
  return bytes;
}

template <class T>
void Session<T>::copy_gradient(int update, T* out) const {
  const LayerUpdate& u = plan_.updates[update];
  const T* grad = gradient_ + u.offset;
  if (u.bias) {
    std::copy_n(grad, u.count, out);
    return;
  }
  const Op& op = graph_.layer_op(u.layer);
  const int64_t selected = static_cast<int64_t>(u.channels.size());
  copy_compact(op, u, op.depthwise ? 1 : u.axis == Axis::kIn ? selected : graph_.layer_input(u.layer).channels, grad, out);
}

template <class T>
void Session<T>::set_selected(const T* values) {
  if (!std::isfinite(kernels_.magnitude(values, plan_.gradient_count))) {
    throw NonFinite("set_selected: a value is not finite; weights were left as they are");
  }
  for (const LayerUpdate& u : plan_.updates) {
    if (u.bias) {
      std::copy_n(values + u.offset, u.count, layers_[u.layer].bias());
    } else {
      layers_[u.layer].set_selected(u, values + u.offset);
    }
  }
}

// ---- the optimiser ----

template <class T>
void Session<T>::step(double learning_rate, double momentum) {
  // With gradients and rate below these, no update, moment or sum of moments can overflow, whatever the weights: a step that
  // passes the check cannot write a value that is not finite.
  if (learning_rate > kLargestRate || !(kernels_.magnitude(gradient_, plan_.gradient_count) <= T(kLargestGradient))) {
    zero_grad();
    throw NonFinite("step: a gradient is not finite or has exploded (above 1e15); weights were left as they are");
  }
  ++steps_taken_;
  const double beta1 = 0.9, beta2 = 0.999, t = static_cast<double>(steps_taken_);
  Adam<T> adam{};
  adam.learning_rate = static_cast<T>(learning_rate);
  adam.beta1 = static_cast<T>(beta1);
  adam.beta2 = static_cast<T>(beta2);
  adam.epsilon = static_cast<T>(1e-8);
  adam.correction1 = static_cast<T>(1 / (1 - std::pow(beta1, t)));
  adam.correction2 = static_cast<T>(1 / (1 - std::pow(beta2, t)));
  Sgd<T> sgd{};
  sgd.learning_rate = static_cast<T>(learning_rate);
  sgd.momentum = static_cast<T>(momentum);
  const auto update = [&](T* weight, int64_t offset, int64_t count) {
    if (plan_.optimizer == Optimizer::kAdam) {
      adam.weight = weight;
      adam.grad = gradient_ + offset;
      adam.first_moment = first_moment_ + offset;
      adam.second_moment = second_moment_ + offset;
      adam.count = count;
      kernels_.adam(adam);
    } else {
      sgd.weight = weight;
      sgd.grad = gradient_ + offset;
      sgd.velocity = first_moment_ ? first_moment_ + offset : nullptr;
      sgd.count = count;
      kernels_.sgd(sgd);
    }
  };
  for (const LayerUpdate& u : plan_.updates) {
    if (u.bias) {
      update(layers_[u.layer].bias(), u.offset, u.count);
    } else {
      layers_[u.layer].update_weights(u, update);
    }
  }
}

template <class T>
void Session<T>::apply(Pass& pass, const LayerUpdate& update, const T* gradient) {
  pass.exploded = pass.exploded || !(kernels_.magnitude(gradient, update.count) <= T(kLargestGradient));
  if (pass.exploded) return;
  Sgd<T> sgd{};
  sgd.learning_rate = static_cast<T>(in_place_rate_);
  const auto step = [&](T* weight, int64_t offset, int64_t count) {
    sgd.weight = weight;
    sgd.grad = gradient + (offset - update.offset);
    sgd.count = count;
    kernels_.sgd(sgd);
  };
  if (update.bias) {
    step(layers_[update.layer].bias(), update.offset, update.count);
  } else {
    layers_[update.layer].update_weights(update, step);
  }
}

template <class T>
void Session<T>::zero_grad() {
  if (gradient_) std::memset(gradient_, 0, static_cast<size_t>(plan_.gradient_count) * sizeof(T));
  if (fisher_) std::memset(fisher_, 0, static_cast<size_t>(plan_.fisher_count) * sizeof(T));
}

// ---- passes over images ----

template <class T>
void Session<T>::embed(const Images<T>& images, T* features) {
  Pass pass{};
  pass.program = &plan_.embed;
  pass.images = images;
  pass.features = features;
  run_pass(pass);
}

template <class T>
void Session<T>::prefix(const Images<T>& images, T* outputs) {
  Pass pass{};
  pass.program = &plan_.embed;
  pass.images = images;
  pass.prefix = outputs;
  run_pass(pass);
}

template <class T>
Shape Session<T>::prefix_shape() const {
  if (plan_.embed.cut_slot < 0) return {};
  return graph_.shapes[graph_.ops[plan_.embed.steps[plan_.embed.tail].op].inputs[0]];
}

template <class T>
void Session<T>::set_prototypes(const Images<T>& images, const int64_t* labels, int ways, bool keep) {
  Pass pass{};
  pass.program = &plan_.embed;
  pass.images = images;
  pass.labels = labels;
  pass.sum_prototypes = true;
  ways_ = ways;
  kept_images_ = 0;
  keep = keep && !images.prefix && images.count <= plan_.keep_images;
  if (keep) {
    prefix(images, kept_);
    std::copy(labels, labels + images.count, kept_labels_.begin());
    kept_images_ = images.count;
    pass.images = kept();
  }
  run_pass(pass);
}

template <class T>
Images<T> Session<T>::kept() const {
  Images<T> images;
  images.prefix = kept_;
  images.count = kept_images_;
  return images;
}

template <class T>
void Session<T>::update_prototypes() {
  Pass pass{};
  pass.program = &plan_.embed;
  pass.images = kept();
  pass.labels = kept_labels_.data();
  pass.sum_prototypes = true;
  run_pass(pass);
}

template <class T>
ProtoResult Session<T>::proto_backward(const Images<T>& images, const int64_t* labels, double scale, double weight) {
  Pass pass{};
  pass.program = &plan_.train;
  pass.images = images;
  pass.labels = labels;
  pass.scale = scale;
  pass.weight = weight;
  run_pass(pass);
  if (!std::isfinite(pass.result.loss_sum)) {
    zero_grad();
    throw NonFinite("proto_backward: the loss is not finite; gradients were cleared, weights left as they are");
  }
  return pass.result;
}

template <class T>
void Session<T>::backward(const Images<T>& images, const T* feature_gradients) {
  Pass pass{};
  pass.program = &plan_.train;
  pass.images = images;
  pass.feature_gradients = feature_gradients;
  run_pass(pass);
}

template <class T>
void Session<T>::forward(const Images<T>& images, T* features, char* saved) {
  Pass pass{};
  pass.program = &plan_.train;
  pass.images = images;
  pass.features = features;
  pass.save = saved;
  run_pass(pass);
}

template <class T>
void Session<T>::backward_saved(const Images<T>& images, const char* saved, const T* feature_gradients) {
  Pass pass{};
  pass.program = &plan_.train;
  pass.images = images;
  pass.feature_gradients = feature_gradients;
  pass.saved = saved;
  run_pass(pass);
}

template <class T>
void Session<T>::run_worker(void* context, int worker) {
  Pass& pass = *static_cast<Pass*>(context);
  for (;;) {
    const int64_t turn = pass.next.fetch_add(1, std::memory_order_relaxed);
    if (turn >= pass.images.count) return;
    pass.session->run_image(*pass.session->workers_[worker], pass, turn * pass.stride % pass.images.count, turn);
  }
}

template <class T>
void Session<T>::run_pass(Pass& pass) {
  pass.session = this;
  if (pass.sum_prototypes) {
    std::memset(prototypes_, 0, static_cast<size_t>(ways_) * graph_.features() * sizeof(T));
  }
  if (pass.program == &plan_.train && plan_.optimizer == Optimizer::kInPlaceSgd) pass.stride = spread(pass.images.count);
  turnstile_.reset();
  const int workers = static_cast<int>(std::min<int64_t>(plan_.threads, std::max<int64_t>(pass.images.count, 1)));
  for (int w = 0; w < workers; ++w) workers_[w]->alone = workers == 1;
  pool_->run(workers, &Session<T>::run_worker, &pass);
  if (pass.exploded) {
    throw NonFinite("backward: a gradient is not finite or has exploded (above 1e15); updates stopped before it");
  }
  if (pass.sum_prototypes) normalise_prototypes();
}

template <class T>
void Session<T>::normalise_prototypes() {
  const int m = graph_.features();
  for (int k = 0; k < ways_; ++k) {
    T* prototype = prototypes_ + static_cast<int64_t>(k) * m;
    double square = 0;
    for (int i = 0; i < m; ++i) square += static_cast<double>(prototype[i]) * static_cast<double>(prototype[i]);
    // The mean's length drops out: only its direction enters the cosine.
    const double scale = 1 / std::max(std::sqrt(square), 1e-12);
    for (int i = 0; i < m; ++i) prototype[i] = static_cast<T>(static_cast<double>(prototype[i]) * scale);
  }
}

template <class T>
void Session<T>::run_image(Worker& worker, Pass& pass, int64_t image, int64_t turn) {
  const Program& program = *pass.program;
  const bool training = pass.program == &plan_.train;
  worker.slots = training ? &worker.train_slots : &worker.embed_slots;
  const int steps = static_cast<int>(program.steps.size());
  if (program.image_gradient >= 0 && !worker.alone) {
    std::memset((*worker.slots)[program.image_gradient], 0, static_cast<size_t>(plan_.gradient_count) * sizeof(T));
  }
  if (program.fisher_image >= 0) {
    std::memset((*worker.slots)[program.fisher_image], 0, static_cast<size_t>(plan_.fisher_count) * sizeof(T));
  }
  // A prefix takes the place of the cut's slot: no step behind the cut writes to it.
  T** const cut = pass.images.prefix ? &(*worker.slots)[program.cut_slot] : nullptr;
  T* const place = cut ? *cut : nullptr;
  if (cut) *cut = const_cast<T*>(pass.images.prefix + image * prefix_shape().count());
  if (pass.images.bytes || pass.images.values) prepare_image(worker, pass, image);
  int64_t at = image * program.saved_bytes;
  if (pass.saved) {
    for (int s : program.saved) {
      std::memcpy((*worker.slots)[s], pass.saved + at, static_cast<size_t>(program.slots[s].bytes));
      at += program.slots[s].bytes;
    }
  }
  run_steps(worker, pass, program,
            pass.saved ? program.head
            : cut      ? program.tail
                       : 0,
            pass.prefix ? program.tail
            : pass.save ? program.head
                        : steps,
            image);
  if (pass.save) {
    for (int s : program.saved) {
      std::memcpy(pass.save + at, (*worker.slots)[s], static_cast<size_t>(program.slots[s].bytes));
      at += program.slots[s].bytes;
    }
  }
  if (cut) *cut = place;
  if (pass.prefix) {
    std::copy_n((*worker.slots)[program.cut_slot], prefix_shape().count(), pass.prefix + image * prefix_shape().count());
    return;
  }
  collect(worker, pass, program, image, turn);
}

// What an image leaves behind, added in the order of images whichever thread comes first.
template <class T>
void Session<T>::collect(Worker& worker, Pass& pass, const Program& program, int64_t image, int64_t turn) {
  const int m = graph_.features();
  const T* feature = (*worker.slots)[program.feature];
  if (pass.features) {
    std::memcpy(pass.features + image * m, feature, static_cast<size_t>(m) * sizeof(T));
    return;
  }
  turnstile_.pass(turn, [&] {
    if (pass.sum_prototypes) {
      kernels_.accumulate(feature, m, prototypes_ + pass.labels[image] * m);
      return;
    }
    pass.result.loss_sum += worker.loss;
    pass.result.correct += worker.correct;
    if (program.image_gradient >= 0 && !worker.alone) {
      kernels_.accumulate((*worker.slots)[program.image_gradient], plan_.gradient_count, gradient_);
    }
    if (program.fisher_image >= 0) {
      const T* sums = (*worker.slots)[program.fisher_image];
      for (int64_t i = 0; i < plan_.fisher_count; ++i) fisher_[i] += sums[i] * sums[i];
    }
  });
}

// Normalisation and the draw of the augmentation as one affine map of the image's values (docs: images.Augmentation).
template <class T>
void Session<T>::prepare_image(Worker& worker, const Pass& pass, int64_t image) {
  const int size = graph_.image_size;
  const int64_t values = static_cast<int64_t>(size) * size * 3;
  ImageSource<T>& source = worker.image;
  source.bytes = pass.images.bytes ? pass.images.bytes + image * values : nullptr;
  source.values = pass.images.values ? pass.images.values + image * values : nullptr;
  source.shift_y = 0;
  double scale[3] = {1, 1, 1}, offset[3] = {0, 0, 0};
  if (source.bytes) {
    for (int c = 0; c < 3; ++c) {
      scale[c] = 1 / (255 * std_[c]);
      offset[c] = -mean_[c] / std_[c];
    }
  }
  ImageRow<T>& row = source.map;
  row = ImageRow<T>{};
  double saturation = 1, contrast = 1, grey_offset = 0, level = 0;
  if (pass.images.augmentation) {
    const AugmentationRow& a = pass.images.augmentation[image];
    row.mirror = a.flip != 0;
    const auto shift = [size](float pixels) {  // past the border is past the border, and fits an int
      return static_cast<int>(std::clamp(pixels, static_cast<float>(-size), static_cast<float>(size)));
    };
    row.shift = shift(a.shift_x);
    source.shift_y = shift(a.shift_y);
    saturation = static_cast<double>(a.saturation);
    contrast = static_cast<double>(a.contrast);
    for (double& o : offset) o += static_cast<double>(a.brightness);
    grey_offset = (offset[0] + offset[1] + offset[2]) / 3;
    if (contrast != 1) {
      double sums[3];
      kernels_.image_sum(source.bytes, source.values, static_cast<int64_t>(size) * size, sums);
      for (int c = 0; c < 3; ++c) level += scale[c] * sums[c] / (3.0 * size * size);
      level += grey_offset;
    }
  }
  const double grey_share = contrast * (1 - saturation);
  row.grey = grey_share != 0;
  for (int c = 0; c < 3; ++c) {
    row.scale[c] = static_cast<T>(contrast * saturation * scale[c]);
    row.grey_scale[c] = static_cast<T>(grey_share * scale[c] / 3);
    row.offset[c] = static_cast<T>(contrast * saturation * offset[c] + grey_share * grey_offset + (1 - contrast) * level);
  }
}

template <class T>
void Session<T>::run_steps(Worker& worker, Pass& pass, const Program& program, int from, int to, int64_t image) {
  const auto slot = [&](int index) -> T* { return index < 0 ? nullptr : (*worker.slots)[index]; };
  const auto guard = [&](int step, bool write) {
    for (const Slot& s : program.slots) {
      char* bytes = worker.workspace + s.offset + s.bytes;
      if (write && s.first == step) std::memset(bytes, kGuard, static_cast<size_t>(plan_.guard_bytes));
      // A pass that starts behind the prefix, or with the backward, never entered what lies before it.
      if (!write && s.last == step && s.first >= from) {
        for (int64_t i = 0; i < plan_.guard_bytes; ++i) {
          if (static_cast<unsigned char>(bytes[i]) != kGuard) broken_guard_ = &s;
        }
      }
    }
  };
  for (int i = from; i < to; ++i) {
    if (plan_.guard_bytes > 0) guard(i, true);
    const Instruction& step = program.steps[i];
    const Op& op = graph_.ops[step.op];
    const Shape out = graph_.shapes[step.op + 1];
    switch (step.step) {
      case Step::kChain: chain(worker, step); break;
      case Step::kAdd: {
        Epilogue<T> e{};
        e.out = slot(step.out);
        e.out_stride = e.addend_stride = out.channels;
        e.addend = slot(step.addend);
        e.activation = op.activation;
        e.mask_out = reinterpret_cast<uint8_t*>(slot(step.mask));
        kernels_.apply_epilogue(slot(step.in), out.pixels(), out.channels, e);
        break;
      }
      case Step::kPool:
      case Step::kPoolBackward: {
        const Shape in = graph_.shapes[op.inputs[0]];
        Pool<T> p{};
        p.kind = op.pool;
        p.input = slot(step.in);
        p.height_in = in.height;
        p.width_in = in.width;
        p.height_out = out.height;
        p.width_out = out.width;
        p.channels = in.channels;
        p.kernel = op.kernel;
        p.stride = op.stride;
        p.padding = op.padding;
        if (step.step == Step::kPool) {
          p.out = slot(step.out);
          kernels_.pool(p);
        } else {
          p.grad_output = slot(step.grad);
          p.grad_input = slot(step.scratch);
          kernels_.pool_backward(p);
          kernels_.apply_epilogue(slot(step.scratch), in.pixels(), in.channels, backward_epilogue(worker, step, in.channels));
        }
        break;
      }
      case Step::kGlobalAverage: {
        const Shape in = graph_.shapes[op.inputs[0]];
        kernels_.global_average(slot(step.in), in.pixels(), in.channels, slot(step.out));
        break;
      }
      case Step::kGather: {
        const Shape in = graph_.shapes[op.inputs[0]];
        const std::vector<int32_t>& channels = plan_.updates[step.update].channels;
        kernels_.gather_columns(slot(step.in), in.pixels(), in.channels, channels.data(), static_cast<int>(channels.size()),
                                slot(step.out));
        break;
      }
      case Step::kHead: head(worker, pass, program, image); break;
      case Step::kGlobalAverageBackward: {
        const Shape in = graph_.shapes[op.inputs[0]];
        const T* grad = slot(step.grad);
        T* to_fill = slot(step.out);
        const T share = T(1) / static_cast<T>(in.pixels());
        for (int64_t p = 0; p < in.pixels(); ++p) {
          for (int c = 0; c < in.channels; ++c) to_fill[p * in.channels + c] = grad[c] * share;
        }
        kernels_.apply_epilogue(to_fill, in.pixels(), in.channels, backward_epilogue(worker, step, in.channels));
        break;
      }
      case Step::kGradBias: kernels_.grad_bias(slot(step.grad), out.pixels(), out.channels, gradient_of(worker, step)); break;
      case Step::kApply: apply(pass, plan_.updates[step.update], slot(step.in)); break;
      case Step::kGradWeight: grad_weight(worker, step); break;
      case Step::kGradInput:
        layers_[op.layer].grad_input(slot(step.grad), slot(step.scratch), slot(step.expanded),
                                     backward_epilogue(worker, step, graph_.shapes[op.inputs[0]].channels));
        break;
      case Step::kFisherSum:
        kernels_.fisher_sum(slot(step.values), slot(step.grad), out.pixels(), out.channels,
                            slot(program.fisher_image) + plan_.fisher_offsets[step.fisher]);
        break;
      case Step::kEpilogue:
      case Step::kSumGradients:
        kernels_.apply_epilogue(slot(step.in), out.pixels(), out.channels, backward_epilogue(worker, step, out.channels));
        break;
    }
    if (plan_.guard_bytes > 0) guard(i, false);
  }
  if (plan_.guard_bytes > 0 && to == static_cast<int>(program.steps.size())) guard(to, false);
}

// ---- forward ----

template <class T>
void Session<T>::chain(Worker& worker, const Instruction& step) {
  const int last = static_cast<int>(step.links.size()) - 1;
  std::fill(worker.done, worker.done + last + 1, 0);
  std::fill(worker.loaded, worker.loaded + last + 1, 0);
  const int height = graph_.shapes[step.links[last].op + 1].height;
  for (int y = 0; y < height; y += step.strip_rows) produce(worker, step, last, std::min(height, y + step.strip_rows));
}

// Rows [done, until) of a link's output, and first those of its producers that they read.
template <class T>
void Session<T>::produce(Worker& worker, const Instruction& step, int index, int until) {
  if (worker.done[index] >= until) return;
  const Link& link = step.links[index];
  const Op& op = graph_.ops[link.op];
  const Shape in = graph_.shapes[op.inputs[0]];
  const auto slot = [&](int s) -> T* { return s < 0 ? nullptr : (*worker.slots)[s]; };
  RowView<const T> input;
  if (index > 0) {
    produce(worker, step, index - 1, std::min(in.height, (until - 1) * op.stride + op.kernel - op.padding));
    input = {slot(step.links[index - 1].out), step.links[index - 1].ring_rows};
  } else {
    input = {slot(step.in), in.height};
  }
  Epilogue<T> e{};
  e.activation = link.add >= 0 ? graph_.ops[link.add].activation : op.activation;
  e.addend = slot(link.addend);
  e.mask_out = reinterpret_cast<uint8_t*>(slot(link.mask));
  layers_[op.layer].forward(input, {slot(link.out), link.ring_rows}, &worker.image, worker.done[index], until, slot(link.padded),
                            slot(step.expanded), &worker.loaded[index], e);
  worker.done[index] = until;
}

// ---- loss ----

// Eq. 1 for one image: softmax over scale * cos(feature, prototype), cross-entropy, gradient of the feature.
template <class T>
void Session<T>::head(Worker& worker, Pass& pass, const Program& program, int64_t image) {
  const int m = graph_.features();
  const T* f = (*worker.slots)[program.feature];
  T* grad = (*worker.slots)[program.feature_grad];
  if (pass.feature_gradients) {
    std::memcpy(grad, pass.feature_gradients + image * m, static_cast<size_t>(m) * sizeof(T));
    worker.loss = 0;
    worker.correct = false;
    return;
  }
  T* cosines = (*worker.slots)[program.logits];
  const int label = static_cast<int>(pass.labels[image]);
  double square = 0;
  for (int i = 0; i < m; ++i) square += static_cast<double>(f[i]) * static_cast<double>(f[i]);
  const double inverse = 1 / std::max(std::sqrt(square), 1e-12);
  int best = 0;
  for (int k = 0; k < ways_; ++k) {
    const T* p = prototypes_ + static_cast<int64_t>(k) * m;
    double dot = 0;
    for (int i = 0; i < m; ++i) dot += static_cast<double>(f[i]) * static_cast<double>(p[i]);
    cosines[k] = static_cast<T>(dot * inverse);
    if (cosines[k] > cosines[best]) best = k;
  }
  const double top = pass.scale * static_cast<double>(cosines[best]);
  double sum = 0;
  for (int k = 0; k < ways_; ++k) sum += std::exp(pass.scale * static_cast<double>(cosines[k]) - top);
  worker.loss = std::log(sum) + top - pass.scale * static_cast<double>(cosines[label]);
  worker.correct = best == label;
  // d cos_k / d f = (p_k - cos_k f / |f|) / |f|
  double along = 0;
  std::fill(grad, grad + m, T(0));
  for (int k = 0; k < ways_; ++k) {
    const double probability = std::exp(pass.scale * static_cast<double>(cosines[k]) - top) / sum;
    const double d = (probability - (k == label ? 1 : 0)) * pass.scale * pass.weight * inverse;
    const T* p = prototypes_ + static_cast<int64_t>(k) * m;
    along += d * static_cast<double>(cosines[k]) * inverse;
    for (int i = 0; i < m; ++i) grad[i] += static_cast<T>(d) * p[i];
  }
  for (int i = 0; i < m; ++i) grad[i] -= static_cast<T>(along) * f[i];
}

// ---- backward ----

template <class T>
Epilogue<T> Session<T>::backward_epilogue(Worker& worker, const Instruction& step, int channels) {
  const auto slot = [&](int index) -> T* { return index < 0 ? nullptr : (*worker.slots)[index]; };
  Epilogue<T> e{};
  e.out = slot(step.out);
  e.out_stride = e.addend_stride = channels;
  e.addend = slot(step.addend);
  e.mask_in = reinterpret_cast<uint8_t*>(slot(step.mask));
  if (step.fisher >= 0) {
    e.values = slot(step.values);
    e.fisher = (*worker.slots)[plan_.train.fisher_image] + plan_.fisher_offsets[step.fisher];
  }
  return e;
}

template <class T>
void Session<T>::grad_weight(Worker& worker, const Instruction& step) {
  const LayerUpdate& u = plan_.updates[step.update];
  const Shape out = graph_.shapes[step.op + 1];
  const auto slot = [&](int index) -> T* { return index < 0 ? nullptr : (*worker.slots)[index]; };
  const T* grad = slot(step.grad);
  if (step.scratch >= 0) {
    kernels_.gather_columns(grad, out.pixels(), out.channels, u.channels.data(), static_cast<int>(u.channels.size()),
                            slot(step.scratch));
    grad = slot(step.scratch);
  }
  layers_[u.layer].grad_weight(u, grad, slot(step.in), &worker.image, slot(step.scratch2), slot(step.scratch3),
                               gradient_of(worker, step));
}

// Where a layer's gradient is added: to that of all images, of one image where threads share the work, or to a fresh one that
// in-place SGD will apply.
template <class T>
T* Session<T>::gradient_of(Worker& worker, const Instruction& step) {
  const LayerUpdate& u = plan_.updates[step.update];
  if (step.out >= 0) {
    T* const fresh = (*worker.slots)[step.out];
    std::fill_n(fresh, u.count, T(0));
    return fresh;
  }
  const int image = worker.alone ? -1 : plan_.train.image_gradient;
  return (image >= 0 ? (*worker.slots)[image] : gradient_) + u.offset;
}

// ---- proofs about memory ----

template <class T>
int64_t Session<T>::arena_high_water() const {
  int64_t end = plan_.peak_bytes;
  while (end > 0 && static_cast<unsigned char>(arena_.data()[end - 1]) == kPattern) --end;
  return end;
}

template <class T>
std::string Session<T>::broken_guard() const {
  if (broken_guard_.load()) return broken_guard_.load()->name;
  for (const Slot& s : plan_.shared) {
    const char* bytes = arena_.data() + s.offset + s.bytes;
    for (int64_t i = 0; i < plan_.guard_bytes; ++i) {
      if (static_cast<unsigned char>(bytes[i]) != kGuard) return s.name;
    }
  }
  return "";
}

template class Session<float>;
template class Session<double>;

}  // namespace tinytrain
