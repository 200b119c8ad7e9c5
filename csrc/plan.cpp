#include "plan.h"

#include <algorithm>
#include <climits>
#include <numeric>

#include "conv.h"

namespace tinytrain {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int kStripPixels = 64;  // pixels a strip should have at least: enough to reuse a panel of weights

int64_t align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Places slots largest first, each at the lowest offset that is free during its whole lifetime.
int64_t place(std::vector<Slot>& slots, int64_t guard_bytes) {
  std::vector<int> order(slots.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return slots[a].bytes > slots[b].bytes; });
  std::vector<int> placed;
  int64_t end = 0;
  for (int index : order) {
    Slot& slot = slots[index];
    std::vector<std::pair<int64_t, int64_t>> taken;
    for (int other : placed) {
      const Slot& s = slots[other];
      if (s.first <= slot.last && slot.first <= s.last) taken.emplace_back(s.offset, s.offset + s.bytes + guard_bytes);
    }
    std::sort(taken.begin(), taken.end());
    int64_t at = 0;
    for (const auto& [from, to] : taken) {
      if (at + slot.bytes + guard_bytes <= from) break;
      at = std::max(at, align(to));
    }
    slot.offset = at;
    placed.push_back(index);
    end = std::max(end, at + slot.bytes + guard_bytes);
  }
  return end;
}

// Convolutions [first, last] that run as one chain (with the add behind the last, if `add` >= 0), or one other operation.
struct Group {
  int first, last;
  int add = -1;
  int end() const { return add >= 0 ? add : last; }
};

std::vector<Group> make_groups(const Graph& graph) {
  std::vector<Group> groups;
  const int count = static_cast<int>(graph.ops.size());
  for (int i = 0; i < count;) {
    Group group{i, i};
    if (graph.ops[i].kind == OpKind::kConv) {
      bool depthwise_seen = graph.ops[i].depthwise;
      const auto feeds_next = [&](int op) {
        return op + 1 < count && graph.consumers[op + 1].size() == 1 && graph.consumers[op + 1][0] == op + 1;
      };
      // A chain ends with the pointwise convolution behind a depthwise one: an inverted residual, or a separable convolution.
      while (feeds_next(group.last) && graph.ops[group.last + 1].kind == OpKind::kConv &&
             !(depthwise_seen && !graph.ops[group.last].depthwise)) {
        ++group.last;
        depthwise_seen |= graph.ops[group.last].depthwise;
      }
      const Op& last = graph.ops[group.last];
      if (feeds_next(group.last) && graph.ops[group.last + 1].kind == OpKind::kAdd && last.activation == Activation::kNone) {
        // The shortcut must be whole when the chain starts.
        const Op& add = graph.ops[group.last + 1];
        const int other = add.inputs[0] == group.last + 1 ? add.inputs[1] : add.inputs[0];
        if (other <= group.first) group.add = group.last + 1;
      }
    }
    groups.push_back(group);
    i = group.end() + 1;
  }
  return groups;
}

class Builder {
 public:
  Builder(Plan& plan) : plan_(plan), graph_(plan.graph), groups_(make_groups(plan.graph)) {}

  void build() {
    find_needs_grad();
    find_cut();
    build_embed();
    if (plan_.gradient_count > 0 || plan_.fisher_count > 0) build_train();
    build_shared();
    plan_.workspace_bytes = std::max(plan_.embed.bytes, plan_.train.bytes);
    plan_.workspace_stride = align(plan_.workspace_bytes);
    plan_.peak_bytes = plan_.shared_bytes + (plan_.threads - 1) * plan_.workspace_stride + plan_.workspace_bytes;
  }

 private:
  struct Gradient {
    int slot = -1;     // contributions so far
    int missing = 0;   // contributions still to come
    bool raw = false;  // its producer's mask and Fisher are still to be applied
  };

  int update_of(int op, bool bias) const {
    for (size_t i = 0; i < plan_.updates.size(); ++i) {
      if (graph_.layers[plan_.updates[i].layer] == op && plan_.updates[i].bias == bias) return static_cast<int>(i);
    }
    return -1;
  }
  int fisher_of(int op) const {
    for (size_t i = 0; i < plan_.fisher_layers.size(); ++i) {
      if (graph_.layers[plan_.fisher_layers[i]] == op) return static_cast<int>(i);
    }
    return -1;
  }
  bool has_gradient(int op) const { return update_of(op, false) >= 0 || update_of(op, true) >= 0 || fisher_of(op) >= 0; }

  void find_needs_grad() {
    plan_.needs_grad.assign(graph_.shapes.size(), 0);
    for (size_t i = 0; i < graph_.ops.size(); ++i) {
      bool needs = has_gradient(static_cast<int>(i));
      for (int input : graph_.ops[i].inputs) needs |= plan_.needs_grad[input] != 0;
      plan_.needs_grad[i + 1] = needs;
    }
  }

  // The cut: the last start of a group, not behind the earliest gradient, where only one tensor is alive.
  void find_cut() {
    const int count = static_cast<int>(graph_.ops.size());
    int earliest = count;
    for (int i = count - 1; i >= 0; --i) {
      if (has_gradient(i)) earliest = i;
    }
    first_tail_group_ = 0;
    for (size_t g = 0; g < groups_.size(); ++g) {
      const int at = groups_[g].first;
      if (at > earliest || graph_.ops[at].kind == OpKind::kGlobalAverage) break;
      int alive = 0;
      for (int tensor = 0; tensor <= at; ++tensor) alive += graph_.consumers[tensor].back() >= at;
      if (alive == 1) first_tail_group_ = static_cast<int>(g);
    }
  }

  // ---- slots ----

  int slot(const std::string& name, const char* kind, int64_t bytes) {
    Slot s;
    s.name = name;
    s.kind = kind;
    s.bytes = bytes;
    s.first = INT_MAX;
    s.last = -1;
    program_->slots.push_back(s);
    return static_cast<int>(program_->slots.size()) - 1;
  }
  int values(const std::string& name, const char* kind, int64_t count) { return slot(name, kind, count * plan_.value_bytes); }
  void touch(int slot) {
    if (slot < 0) return;
    const int now = static_cast<int>(program_->steps.size());
    Slot& s = program_->slots[slot];
    s.first = std::min(s.first, now);
    s.last = std::max(s.last, now);
  }
  void emit(Instruction instruction) {
    for (int s : {instruction.in, instruction.out, instruction.grad, instruction.addend, instruction.mask, instruction.values,
                  instruction.scratch, instruction.scratch2, instruction.scratch3, instruction.expanded}) {
      touch(s);
    }
    for (const Link& link : instruction.links) {
      for (int s : {link.out, link.padded, link.addend, link.mask}) touch(s);
    }
    program_->steps.push_back(std::move(instruction));
  }
  static Instruction instruction(Step step, int op) {
    Instruction i;
    i.step = step;
    i.op = op;
    return i;
  }

  std::string label(int op) const {
    const Op& o = graph_.ops[op];
    switch (o.kind) {
      case OpKind::kConv: return "layer " + std::to_string(o.layer);
      case OpKind::kAdd: return "add " + std::to_string(op);
      case OpKind::kPool: return "pool " + std::to_string(op);
      default: return "features";
    }
  }
  int tensor_slot(int tensor) {
    if (tensor == 0) return -1;
    if (tensors_[tensor] < 0) tensors_[tensor] = values(label(tensor - 1) + " output", "activation", graph_.shapes[tensor].count());
    return tensors_[tensor];
  }

  // Rows of padded input that a dense convolution slides over; -1 for others.
  int padded_rows(int op, int channels) {
    const Op& o = graph_.ops[op];
    const int64_t count = Convolution<float>::forward_scratch(o, graph_.shapes[o.inputs[0]].width, channels);
    return count == 0 ? -1 : values(label(op) + " padded rows", "scratch", count);
  }

  // Room to expand a panel of quantised weights of any of `ops`; `backward`: of the matrix for grad_input.
  int expanded_panel(const std::vector<int>& ops, bool backward = false) {
    int64_t count = 0;
    for (int op : ops) {
      const Op& o = graph_.ops[op];
      if (!plan_.quantised(o.layer)) continue;
      const int inputs = graph_.shapes[o.inputs[0]].channels, outputs = graph_.shapes[op + 1].channels;
      count = std::max(count, Convolution<float>::expanded_scratch(o, backward ? outputs : inputs, plan_.quantised_panel));
    }
    return count == 0 ? -1 : values(label(ops.back()) + " expanded weights", "scratch", count);
  }

  // ---- forward ----

  // Convolutions [group.first, group.last] as one chain; inner tensors are rings.
  void emit_chain(const Group& group) {
    const int out_tensor = group.end() + 1;
    const Shape out = graph_.shapes[out_tensor];
    Instruction chain = instruction(Step::kChain, group.first);
    chain.in = tensor_slot(graph_.ops[group.first].inputs[0]);
    const int wanted = plan_.thin_strips ? 1 : (kStripPixels + out.width - 1) / out.width;
    chain.strip_rows = group.first == group.last ? out.height : std::min(out.height, wanted);
    // Backwards: how many rows each link is asked for at once, hence how many its ring must hold.
    int rows = chain.strip_rows;
    for (int op = group.last; op >= group.first; --op) {
      Link link;
      link.op = op;
      const Shape shape = graph_.shapes[op + 1];
      const bool last = op == group.last;
      link.ring_rows = last ? shape.height : std::min(shape.height, rows);
      if (last) {
        link.add = group.add;
        if (group.add >= 0) link.addend = tensor_slot(other_input(group.add, op + 1));
        link.out = tensor_slot(out_tensor);
      } else {
        link.out = values(label(op) + " strip", "strip", static_cast<int64_t>(link.ring_rows) * shape.width * shape.channels);
      }
      link.padded = padded_rows(op, graph_.shapes[graph_.ops[op].inputs[0]].channels);
      rows = (std::min(rows, shape.height) - 1) * graph_.ops[op].stride + graph_.ops[op].kernel;
      chain.links.insert(chain.links.begin(), link);
    }
    std::vector<int> convolutions(group.last - group.first + 1);
    std::iota(convolutions.begin(), convolutions.end(), group.first);
    chain.expanded = expanded_panel(convolutions);
    emit(std::move(chain));
  }

  int other_input(int add, int tensor) const {
    const Op& op = graph_.ops[add];
    return op.inputs[0] == tensor ? op.inputs[1] : op.inputs[0];
  }

  void emit_plain(int op, int mask = -1) {
    const Op& o = graph_.ops[op];
    Instruction i = instruction(o.kind == OpKind::kAdd    ? Step::kAdd
                                : o.kind == OpKind::kPool ? Step::kPool
                                                          : Step::kGlobalAverage,
                                op);
    i.in = tensor_slot(o.inputs[0]);
    i.mask = mask;
    if (o.kind == OpKind::kAdd) i.addend = tensor_slot(o.inputs[1]);
    if (o.kind == OpKind::kGlobalAverage) {
      i.out = program_->feature = values("feature", "feature", graph_.features());
    } else {
      i.out = tensor_slot(op + 1);
    }
    emit(std::move(i));
  }

  void forward_groups(size_t from, size_t to) {
    for (size_t g = from; g < to; ++g) {
      if (graph_.ops[groups_[g].first].kind == OpKind::kConv) {
        emit_chain(groups_[g]);
      } else {
        emit_plain(groups_[g].first);
      }
    }
  }

  // Operation by operation with whole tensors, saving what the backward needs.
  void forward_saving(int from, int to) {
    for (int op = from; op < to; ++op) {
      const Op& o = graph_.ops[op];
      if (o.kind != OpKind::kConv) {
        emit_plain(op, o.kind == OpKind::kAdd ? mask_slot(op + 1) : -1);
        continue;
      }
      Instruction chain = instruction(Step::kChain, op);
      chain.in = tensor_slot(o.inputs[0]);
      Link link;
      link.op = op;
      int out_tensor = op + 1;
      // A residual add is fused unless the convolution's own output is wanted for its Fisher information.
      const bool sole = graph_.consumers[op + 1].size() == 1 && graph_.consumers[op + 1][0] == op + 1;
      if (op + 1 < to && sole && graph_.ops[op + 1].kind == OpKind::kAdd && o.activation == Activation::kNone &&
          fisher_of(op) < 0) {
        link.add = op + 1;
        link.addend = tensor_slot(other_input(op + 1, op + 1));
        out_tensor = op + 2;
      }
      link.out = tensor_slot(out_tensor);
      link.mask = mask_slot(out_tensor);
      link.ring_rows = chain.strip_rows = graph_.shapes[op + 1].height;
      link.padded = padded_rows(op, graph_.shapes[o.inputs[0]].channels);
      chain.links.push_back(link);
      chain.expanded = expanded_panel({op});
      const int in = chain.in;
      emit(std::move(chain));
      save_input(op, in);
      if (link.add >= 0) ++op;
    }
  }

  // The slot of a tensor's ReLU bits, if its gradient will pass through a ReLU.
  int mask_slot(int tensor) {
    const Op& producer = graph_.ops[tensor - 1];
    if (producer.activation == Activation::kNone || !plan_.needs_grad[tensor]) return -1;
    if (masks_[tensor] < 0) {
      masks_[tensor] =
          slot(label(tensor - 1) + " mask", "mask", graph_.shapes[tensor].pixels() * mask_bytes(graph_.shapes[tensor].channels));
    }
    return masks_[tensor];
  }

  // True if the weight gradient needs only some columns of the input.
  bool saves_columns(int op, const LayerUpdate& update) const {
    const int channels = graph_.shapes[graph_.ops[op].inputs[0]].channels;
    return (graph_.ops[op].depthwise || update.axis == Axis::kIn) && static_cast<int>(update.channels.size()) < channels;
  }
  void save_input(int op, int in) {
    const int update = update_of(op, false);
    if (update < 0 || !saves_columns(op, plan_.updates[update])) return;
    Instruction gather = instruction(Step::kGather, op);
    gather.in = in;
    gather.update = update;
    gather.out = saved_[op] =
        values(label(op) + " saved input", "saved input",
               graph_.shapes[graph_.ops[op].inputs[0]].pixels() * static_cast<int64_t>(plan_.updates[update].channels.size()));
    emit(std::move(gather));
  }

  // ---- backward ----

  int gradient_slot(int tensor) {
    return values(label(tensor - 1) + " gradient", "gradient of activations", graph_.shapes[tensor].count());
  }

  // A contribution to a tensor's gradient is about to be written by `i` (which can add, mask and sum Fisher on the way).
  void contribute(int tensor, Instruction i) {
    Gradient& g = gradients_[tensor];
    --g.missing;
    i.addend = g.slot;
    i.out = gradient_slot(tensor);
    if (g.missing == 0) {
      if (tensor - 1 >= range_first_) {
        i.mask = mask_slot(tensor);
        set_fisher(tensor, i);
      } else {
        g.raw = true;
      }
    }
    g.slot = i.out;
    emit(std::move(i));
  }
  // A contribution that exists already: the gradient of an add's output passes to both inputs as it is.
  void contribute_existing(int tensor, int slot) {
    Gradient& g = gradients_[tensor];
    --g.missing;
    if (g.slot >= 0) {
      Instruction sum = instruction(Step::kSumGradients, tensor - 1);
      sum.in = slot;
      sum.addend = g.slot;
      sum.out = gradient_slot(tensor);
      g.slot = sum.out;
      emit(std::move(sum));
    } else {
      g.slot = slot;
    }
    if (g.missing == 0) g.raw = true;
  }
  // Fisher of a layer with a ReLU: values and gradient behind the ReLU serve, since masked elements are zero.
  void set_fisher(int tensor, Instruction& i) {
    const int fisher = fisher_of(tensor - 1);
    if (fisher < 0 || graph_.ops[tensor - 1].activation == Activation::kNone) return;
    i.fisher = fisher;
    i.values = tensor_slot(tensor);
  }
  // The gradient of `op`'s output before its activation, finished.
  int finished_gradient(int op) {
    Gradient& g = gradients_[op + 1];
    if (g.raw && graph_.ops[op].activation != Activation::kNone) {
      Instruction i = instruction(Step::kEpilogue, op);
      i.in = g.slot;
      i.out = gradient_slot(op + 1);
      i.mask = mask_slot(op + 1);
      set_fisher(op + 1, i);
      g.slot = i.out;
      emit(std::move(i));
    }
    g.raw = false;
    return g.slot;
  }

  void backward(int from, int to) {
    range_first_ = from;
    for (int op = to - 1; op >= from; --op) {
      if (!plan_.needs_grad[op + 1]) continue;
      const Op& o = graph_.ops[op];
      if (o.kind == OpKind::kGlobalAverage) {
        Instruction i = instruction(Step::kGlobalAverageBackward, op);
        i.grad = program_->feature_grad;
        contribute(o.inputs[0], std::move(i));
        continue;
      }
      const int grad = finished_gradient(op);
      if (o.kind == OpKind::kAdd) {
        for (int input : o.inputs) {
          if (plan_.needs_grad[input]) contribute_existing(input, grad);
        }
      } else if (o.kind == OpKind::kPool) {
        Instruction i = instruction(Step::kPoolBackward, op);
        i.grad = grad;
        i.in = o.pool == PoolKind::kMax ? tensor_slot(o.inputs[0]) : -1;
        i.scratch = values(label(op) + " gradient of its input", "scratch", graph_.shapes[o.inputs[0]].count());
        contribute(o.inputs[0], std::move(i));
      } else {
        backward_conv(op, grad);
      }
    }
  }

  // In-place SGD: where one image's gradient of one layer waits until the layer's own weights have served the backward.
  int layer_gradient(int op, int update) {
    if (plan_.optimizer != Optimizer::kInPlaceSgd) return -1;
    layer_gradients_.resize(plan_.updates.size(), -1);
    return layer_gradients_[update] = values(label(op) + " gradient of its weights", "gradient", plan_.updates[update].count);
  }

  void backward_conv(int op, int grad) {
    const Op& o = graph_.ops[op];
    const Shape in = graph_.shapes[o.inputs[0]], out = graph_.shapes[op + 1];
    const int fisher = fisher_of(op);
    if (fisher >= 0 && o.activation == Activation::kNone) {
      Instruction i = instruction(Step::kFisherSum, op);
      i.values = tensor_slot(op + 1);
      i.grad = grad;
      i.fisher = fisher;
      emit(std::move(i));
    }
    const int bias = update_of(op, true);
    if (bias >= 0) {
      Instruction i = instruction(Step::kGradBias, op);
      i.grad = grad;
      i.update = bias;
      i.out = layer_gradient(op, bias);
      emit(std::move(i));
    }
    const int update = update_of(op, false);
    if (update >= 0) {
      const LayerUpdate& u = plan_.updates[update];
      const int selected = static_cast<int>(u.channels.size());
      Instruction i = instruction(Step::kGradWeight, op);
      i.grad = grad;
      i.update = update;
      i.in = saves_columns(op, u) ? saved_[op] : tensor_slot(o.inputs[0]);
      if ((o.depthwise || u.axis == Axis::kOut) && selected < out.channels) {
        i.scratch = values(label(op) + " selected gradients", "scratch", out.pixels() * selected);
      }
      if (Convolution<float>::needs_image_sum(o, out)) {
        // Summed over several calls: the image's own sum needs a place before it is added to the others'.
        i.scratch2 = values(label(op) + " gradient of one image", "scratch", u.count);
      }
      i.scratch3 = padded_rows(op, u.axis == Axis::kIn ? selected : in.channels);
      i.out = layer_gradient(op, update);
      emit(std::move(i));
    }
    if (plan_.needs_grad[o.inputs[0]]) {
      Instruction i = instruction(Step::kGradInput, op);
      i.grad = grad;
      const int64_t padded = Convolution<float>::grad_input_scratch(o, in.width, out.channels);
      if (padded > 0) i.scratch = values(label(op) + " padded gradient rows", "scratch", padded);
      i.expanded = expanded_panel({op}, true);
      contribute(o.inputs[0], std::move(i));
    }
    for (int u : {bias, update}) {
      if (u < 0 || layer_gradients_.empty()) continue;
      Instruction i = instruction(Step::kApply, op);
      i.in = layer_gradients_[u];
      i.update = u;
      emit(std::move(i));
    }
  }

  // ---- programs ----

  void start(Program& program) {
    program_ = &program;
    tensors_.assign(graph_.shapes.size(), -1);
    masks_.assign(graph_.shapes.size(), -1);
    saved_.assign(graph_.ops.size(), -1);
    gradients_.assign(graph_.shapes.size(), {});
  }
  void mark_cut() {
    program_->tail = static_cast<int>(program_->steps.size());
    const int tensor = graph_.ops[groups_[first_tail_group_].first].inputs[0];
    program_->cut_slot = tensor_slot(tensor);
  }
  void finish() {
    // What lives through the whole program.
    const int last = static_cast<int>(program_->steps.size());
    for (int s : {program_->image_gradient, program_->fisher_image, program_->logits, program_->feature}) {
      if (s < 0) continue;
      if (s != program_->feature) program_->slots[s].first = 0;
      program_->slots[s].last = last;
    }
    program_->bytes = place(program_->slots, plan_.guard_bytes);
  }

  void build_embed() {
    start(plan_.embed);
    forward_groups(0, first_tail_group_);
    mark_cut();
    forward_groups(first_tail_group_, groups_.size());
    finish();
  }

  void build_train() {
    start(plan_.train);
    Program& p = plan_.train;
    p.feature_grad = values("feature gradient", "feature", graph_.features());
    p.logits = values("logits", "feature", plan_.max_ways);
    if (plan_.fisher_count > 0) p.fisher_image = values("Fisher sums of one image", "fisher", plan_.fisher_count);
    if (plan_.threads > 1 && plan_.gradient_count > 0) {
      p.image_gradient = values("gradient of one image", "gradient", plan_.gradient_count);
    }
    const int ops = static_cast<int>(graph_.ops.size());
    const int tail_first = groups_[first_tail_group_].first;
    for (int t = tail_first; t <= ops; ++t) gradients_[t].missing = static_cast<int>(graph_.consumers[t].size());

    forward_groups(0, first_tail_group_);
    mark_cut();
    if (plan_.recompute) {
      forward_groups(first_tail_group_, groups_.size());
    } else {
      forward_saving(tail_first, ops);
    }
    Instruction head = instruction(Step::kHead, ops - 1);
    head.in = p.feature;
    head.out = p.feature_grad;
    p.head = static_cast<int>(p.steps.size());
    emit(std::move(head));
    if (!plan_.recompute) {
      backward(tail_first, ops);
    } else {
      for (size_t g = groups_.size(); g-- > static_cast<size_t>(first_tail_group_);) {
        const int from = groups_[g].first, to = groups_[g].end() + 1;
        if (graph_.ops[from].kind != OpKind::kGlobalAverage) forward_saving(from, to);
        backward(from, to);
      }
    }
    for (int s = 0; s < static_cast<int>(p.slots.size()); ++s) {
      if (p.slots[s].first >= p.head || p.slots[s].last <= p.head) continue;
      p.saved.push_back(s);
      p.saved_bytes += p.slots[s].bytes;
    }
    finish();
  }

  int shared(const std::string& name, const char* kind, int64_t bytes) {
    if (bytes == 0) return -1;
    Slot s;
    s.name = name;
    s.kind = kind;
    s.bytes = bytes;
    s.first = s.last = -1;
    s.offset = plan_.shared_bytes;
    plan_.shared_bytes += align(bytes + plan_.guard_bytes);
    plan_.shared.push_back(s);
    return static_cast<int>(plan_.shared.size()) - 1;
  }
  void build_shared() {
    const int64_t gradient = plan_.gradient_count * plan_.value_bytes;
    if (plan_.optimizer != Optimizer::kInPlaceSgd) plan_.gradient = shared("gradients", "gradient", gradient);
    if (state_words(plan_.optimizer) > 0) {
      plan_.first_moment = shared(plan_.optimizer == Optimizer::kAdam ? "Adam first moment" : "momentum", "optimizer", gradient);
    }
    if (state_words(plan_.optimizer) > 1) plan_.second_moment = shared("Adam second moment", "optimizer", gradient);
    plan_.fisher = shared("Fisher sums", "fisher", plan_.fisher_count * plan_.value_bytes);
    plan_.prototypes =
        shared("prototypes", "feature", static_cast<int64_t>(plan_.max_ways) * graph_.features() * plan_.value_bytes);
    if (plan_.embed.cut_slot < 0) plan_.keep_images = 0;  // no prefix, nothing to keep
    if (plan_.keep_images > 0) {
      plan_.kept = shared("kept prefix outputs", "kept prefix", plan_.keep_images * plan_.embed.slots[plan_.embed.cut_slot].bytes);
    }
  }

  Plan& plan_;
  const Graph& graph_;
  std::vector<Group> groups_;
  int first_tail_group_ = 0;
  int range_first_ = 0;
  Program* program_ = nullptr;
  std::vector<int> tensors_, masks_, saved_;  // slots by tensor, tensor, operation
  std::vector<int> layer_gradients_;          // slots by update; empty unless gradients are applied in place
  std::vector<Gradient> gradients_;
};

void check(const Graph& graph, const PlanRequest& request) {
  const int layers = static_cast<int>(graph.layers.size());
  std::vector<char> seen(2 * layers, 0);
  for (const LayerUpdate& u : request.updates) {
    const std::string where = "policy: layer " + std::to_string(u.layer);
    if (u.layer < 0 || u.layer >= layers) {
      throw std::invalid_argument(where + ": expected 0 to " + std::to_string(layers - 1));
    }
    if (seen[2 * u.layer + u.bias]++) throw std::invalid_argument(where + " appears twice");
    if (u.bias) continue;
    const Op& op = graph.layer_op(u.layer);
    const int channels = u.axis == Axis::kIn ? graph.layer_input(u.layer).channels : graph.layer_output(u.layer).channels;
    if (u.axis == Axis::kIn && op.depthwise)
      throw std::invalid_argument(where + ": axis 'in' is for dense and pointwise convolutions");
    if (u.axis == Axis::kIn && op.inputs[0] == 0)
      throw std::invalid_argument(where + ": axis 'in' cannot select colours of the image");
    if (u.channels.empty()) throw std::invalid_argument(where + ": no channels");
    for (size_t i = 0; i < u.channels.size(); ++i) {
      if (u.channels[i] < 0 || u.channels[i] >= channels || (i > 0 && u.channels[i] <= u.channels[i - 1])) {
        throw std::invalid_argument(where + ": channels must be sorted, unique and below " + std::to_string(channels));
      }
    }
  }
  std::vector<char> inspected(layers, 0);
  for (int layer : request.fisher_layers) {
    if (layer < 0 || layer >= layers || inspected[layer]++) {
      throw std::invalid_argument("fisher_layers: expected distinct layers from 0 to " + std::to_string(layers - 1) + ", got " +
                                  std::to_string(layer));
    }
  }
  if (request.threads < 1 || request.threads > 64) {
    throw std::invalid_argument("threads: expected 1 to 64, got " + std::to_string(request.threads));
  }
  if (request.optimizer == Optimizer::kInPlaceSgd && request.threads > 1) {
    throw std::invalid_argument("threads: expected 1 with in-place SGD, whose weights change from image to image, got " +
                                std::to_string(request.threads));
  }
  if (request.max_ways < 1 || request.max_ways > 100000) {
    throw std::invalid_argument("max_ways: expected 1 to 100000, got " + std::to_string(request.max_ways));
  }
  if (request.keep_images < 0) throw std::invalid_argument("keep_images: expected 0 or more");
}

}  // namespace

BudgetError::BudgetError(int64_t limit, int64_t needed)
    : std::runtime_error("memory_bytes: " + std::to_string(limit) + " bytes are too few; the smallest feasible plan needs " +
                         std::to_string(needed)),
      needed_bytes(needed) {}

bool Plan::quantised(int layer) const { return quantised_panel > 0 && Convolution<float>::can_quantise(graph.layer_op(layer)); }

Plan make_plan(const Graph& graph, const PlanRequest& request) {
  check(graph, request);
  Plan base;
  base.graph = graph;
  base.updates = request.updates;
  base.fisher_layers = request.fisher_layers;
  base.optimizer = request.optimizer;
  base.max_ways = request.max_ways;
  base.value_bytes = request.value_bytes;
  base.guard_bytes = request.guard_bytes;
  base.quantised_panel = request.quantised_panel;
  for (LayerUpdate& u : base.updates) {
    u.offset = base.gradient_count;
    const int64_t out = graph.layer_output(u.layer).channels;
    const int64_t selected = static_cast<int64_t>(u.channels.size());
    u.count = u.bias                 ? out
              : u.axis == Axis::kOut ? selected * graph.fan_in(u.layer)
                                     : out * selected * graph.layer_op(u.layer).kernel * graph.layer_op(u.layer).kernel;
    base.gradient_count += u.count;
  }
  for (int layer : base.fisher_layers) {
    base.fisher_offsets.push_back(base.fisher_count);
    base.fisher_count += graph.layer_output(layer).channels;
  }

  int64_t smallest = INT64_MAX;
  // Recomputing adds up the Fisher sums in another order: it must not depend on the threads asked for, so they go first.
  for (int recompute = 0; recompute <= (base.fisher_layers.empty() ? 0 : 1); ++recompute) {
    for (int threads = request.threads; threads >= 1; --threads) {
      for (int thin = 0; thin <= 1; ++thin) {
        for (int keep : {request.keep_images, 0}) {
          Plan plan = base;
          plan.threads = threads;
          plan.recompute = recompute != 0;
          plan.thin_strips = thin != 0;
          plan.keep_images = keep;
          Builder(plan).build();
          if (request.memory_bytes == 0 || plan.peak_bytes <= request.memory_bytes) return plan;
          smallest = std::min(smallest, plan.peak_bytes);
        }
      }
    }
  }
  throw BudgetError(request.memory_bytes, smallest);
}

}  // namespace tinytrain
