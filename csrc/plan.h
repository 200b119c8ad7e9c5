// The memory plan: every byte of training memory named, placed and summed before anything runs.
//
// A plan compiles (graph, what to update, what to inspect) into two straight-line programs for one image:
//   embed   image -> frozen prefix -> tail -> feature
//   train   image -> frozen prefix -> tail, saving what its backward needs -> feature -> loss -> backward
// The prefix is everything before the *cut*, the start of the fused block that holds the earliest layer with a gradient. Chains of
// convolutions run fused, by strips of rows: inner tensors exist as rings of a few rows only. The tail's tensors are whole.
//
// Buffers are slots with a lifetime in steps; slots whose lifetimes do not overlap share bytes. Layout of the arena:
//   [shared: gradients, optimiser state, Fisher sums, prototypes, kept prefixes] [workspace of thread 0] [workspace of thread 1] ...
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "graph.h"

namespace tinytrain {

enum class Axis { kOut, kIn };

// Which weights of one layer are updated. Gradients are compact: (S, k, k, C) for axis out, (O, k, k, S) for axis in,
// (k, k, S) for a depthwise layer; (O) for a bias.
struct LayerUpdate {
  int layer = 0;
  Axis axis = Axis::kOut;
  std::vector<int32_t> channels;  // sorted, unique; empty for a bias
  bool bias = false;              // the layer's whole bias instead of weights
  // Derived by make_plan:
  int64_t offset = 0;  // first value in the compact gradient
  int64_t count = 0;   // values
};

// kInPlaceSgd has no gradient buffer either: each layer's gradient of one image is applied as soon as the backward has done with
// its weights, an image at a time.
enum class Optimizer { kInPlaceSgd, kSgd, kMomentum, kAdam };
inline int state_words(Optimizer optimizer) {
  return optimizer == Optimizer::kAdam ? 2 : optimizer == Optimizer::kMomentum ? 1 : 0;
}

struct PlanRequest {
  std::vector<LayerUpdate> updates;
  std::vector<int> fisher_layers;
  Optimizer optimizer = Optimizer::kAdam;
  int max_ways = 50;
  int keep_images = 0;  // images whose prefix output should be kept
  int threads = 1;
  int64_t memory_bytes = 0;  // hard limit; 0: none
  int value_bytes = 4;       // of the session's scalar type
  int quantised_panel = 0;   // columns in a panel of packed weights, if frozen weights are to be kept as bytes
  int64_t guard_bytes = 0;   // tests: bytes behind every slot that nothing may touch
};

struct Slot {
  std::string name, kind;
  int64_t bytes = 0;
  int first = 0, last = 0;  // steps of its program; -1, -1: shared, lives as long as the session
  int64_t offset = 0;       // in the shared region or in a thread's workspace
};

enum class Step {
  kChain,  // fused convolutions, by strips
  kAdd,
  kPool,
  kGlobalAverage,
  kGather,  // save selected columns of an input
  kHead,    // loss, or the caller's gradient -> gradient of the feature
  kGlobalAverageBackward,
  kPoolBackward,
  kGradBias,
  kGradWeight,
  kGradInput,
  kApply,  // in-place SGD: a layer's gradient onto its weights
  kFisherSum,
  kEpilogue,  // mask (and Fisher) where no other step could apply it
  kSumGradients,
};

// One convolution of a chain. Inner outputs are rings of `ring_rows` rows; the last one is whole.
struct Link {
  int op = -1;
  int add = -1;       // residual add fused behind it
  int out = -1;       // slot: ring or whole tensor
  int ring_rows = 0;  // rows in `out`
  int padded = -1;    // dense only: slot of k padded input rows
  int addend = -1;    // slot of the shortcut
  int mask = -1;      // slot of the ReLU's bits, if the backward needs them
};

struct Instruction {
  Step step;
  int op = -1;
  int in = -1, out = -1;  // slots; in = -1 in a chain: the image
  int grad = -1;          // gradient coming in
  int addend = -1, mask = -1, values = -1;
  int scratch = -1, scratch2 = -1, scratch3 = -1;
  int update = -1;     // index into updates
  int fisher = -1;     // index into fisher_layers
  int strip_rows = 0;  // chain: rows of its last output at a time
  int expanded = -1;   // slot of one panel of quantised weights
  std::vector<Link> links;
};

struct Program {
  std::vector<Instruction> steps;
  std::vector<Slot> slots;
  int tail = 0;       // first step behind the cut
  int cut_slot = -1;  // the prefix's output; -1: the image itself
  int feature = -1;
  int feature_grad = -1;    // train only
  int logits = -1;          // train only
  int image_gradient = -1;  // this thread's gradient of one image (several threads only)
  int fisher_image = -1;    // per-image Fisher sums
  int head = -1;            // train only: the step between forward and backward
  std::vector<int> saved;   // train only: slots that an image's forward leaves to its backward
  int64_t saved_bytes = 0;  // of them together
  int64_t bytes = 0;        // end of the highest slot
};

struct Plan {
  Graph graph;
  std::vector<LayerUpdate> updates;
  std::vector<int> fisher_layers;
  std::vector<int64_t> fisher_offsets;
  Optimizer optimizer = Optimizer::kAdam;
  int max_ways = 0, threads = 1, keep_images = 0;
  int64_t guard_bytes = 0;
  bool recompute = false;    // Fisher block by block, recomputing
  bool thin_strips = false;  // one row at a time
  int value_bytes = 4;
  int quantised_panel = 0;
  int64_t gradient_count = 0, fisher_count = 0;
  std::vector<char> needs_grad;  // per tensor

  std::vector<Slot> shared;
  int gradient = -1, first_moment = -1, second_moment = -1, fisher = -1, prototypes = -1, kept = -1;
  Program embed, train;  // train.steps is empty if nothing is updated or inspected
  int64_t shared_bytes = 0, workspace_stride = 0, workspace_bytes = 0;
  int64_t peak_bytes = 0;

  // Whether a layer's frozen weights are kept as bytes: all but the depthwise ones, which are few.
  bool quantised(int layer) const;
};

struct BudgetError : std::runtime_error {
  BudgetError(int64_t limit, int64_t needed);
  int64_t needed_bytes;
};

// Plans within `memory_bytes`, giving up in this order what costs time but not results: the kept prefixes, wide strips, threads,
// the Fisher pass's saved activations. Throws BudgetError with the smallest feasible size, std::invalid_argument for a bad request.
Plan make_plan(const Graph& graph, const PlanRequest& request);

}  // namespace tinytrain
