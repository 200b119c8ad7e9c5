// Execution of a plan: one image at a time through the network, forward and backward, in memory that was all planned before.
// After construction nothing allocates and nothing throws but the faults named below; results are the same bits for any
// number of threads.
#pragma once

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv.h"
#include "dispatch.h"
#include "parallel.h"
#include "plan.h"

namespace tinytrain {

// A loss, gradient or new weight that is not finite. Weights are untouched; gradients have been cleared.
struct NonFinite : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One draw of an image's augmentation, in the order of images.Augmentation.
struct AugmentationRow {
  float flip, shift_x, shift_y, brightness, saturation, contrast;
};

// What a pass reads: images, or what the frozen prefix made of them before.
template <class T>
struct Images {
  const uint8_t* bytes = nullptr;  // (N, size, size, 3), or
  const float* values = nullptr;   // the same, already normalised, or
  const T* prefix = nullptr;       // (N, height, width, channels) at the cut
  int64_t count = 0;
  const AugmentationRow* augmentation = nullptr;  // (N), or null
};

struct LayerValues {
  const float* weight;  // (O, C / groups, k, k)
  const float* bias;    // (O)
};

struct ProtoResult {
  double loss_sum = 0;
  int64_t correct = 0;
};

template <class T>
class Session {
 public:
  Session(const Graph& graph, const std::vector<LayerValues>& layers, const float mean[3], const float std_dev[3],
          const PlanRequest& request, const std::string& isa);
  ~Session();

  const Plan& plan() const { return plan_; }
  const char* isa() const { return kernels_.isa; }
  int64_t resident_weight_bytes() const;

  void embed(const Images<T>& images, T* features);
  // The frozen prefix's outputs, for later passes over the same images. Only where there is a prefix: prefix_shape().
  void prefix(const Images<T>& images, T* outputs);
  // Shape at the cut; 0 channels if nothing comes before it.
  Shape prefix_shape() const;
  // Class means of the features, L2-normalised. `keep` stores the frozen prefix's outputs for update_prototypes().
  void set_prototypes(const Images<T>& images, const int64_t* labels, int ways, bool keep);
  void update_prototypes();
  bool keeps_prefix() const { return kept_images_ > 0; }
  // What was kept, in the images' place.
  Images<T> kept() const;
  const T* prototypes() const { return prototypes_; }
  int ways() const { return ways_; }

  // ProtoNet cross-entropy against the prototypes as they are: adds weight * d loss / d w to the gradients, and the images'
  // squared sums to the Fisher sums. `losses` (N) receives each image's loss.
  ProtoResult proto_backward(const Images<T>& images, const int64_t* labels, double scale, double weight);
  // The same with the caller's gradient of each feature (N, m).
  void backward(const Images<T>& images, const T* feature_gradients);

  // The two halves of backward, for callers whose loss comes between them: `saved` (N, plan().train.saved_bytes) is what the
  // forward leaves to the backward, which reads the images again only where the plan has no frozen prefix.
  void forward(const Images<T>& images, T* features, char* saved);
  void backward_saved(const Images<T>& images, const char* saved, const T* feature_gradients);

  void zero_grad();
  // One step of the optimiser; all or nothing. Not with in-place SGD, whose backward passes take their steps themselves, at this
  // rate (0 at first); they stop updating at the first layer whose gradient is not finite, and then throw NonFinite.
  void step(double learning_rate, double momentum);
  void set_in_place_rate(double learning_rate) { in_place_rate_ = learning_rate; }

  // Dense copies for the caller: gradient `update` in the layout (S, C / groups, k, k), (O, S, k, k) or (O).
  void copy_gradient(int update, T* out) const;
  // Overwrites every selected weight and bias: all updates one after another, each in that layout.
  void set_selected(const T* values);
  const T* fisher() const { return fisher_; }
  void copy_weight(int layer, T* weight, T* bias) const;

  int64_t arena_high_water() const;
  // The name of a slot whose guard bytes were overwritten, or "".
  std::string broken_guard() const;

 private:
  struct Worker;
  struct Pass;
  static constexpr int kMaxLinks = 64;

  static void run_worker(void* context, int worker);
  void run_pass(Pass& pass);
  void run_image(Worker& worker, Pass& pass, int64_t image, int64_t turn);
  void prepare_image(Worker& worker, const Pass& pass, int64_t image);
  void run_steps(Worker& worker, Pass& pass, const Program& program, int from, int to, int64_t image);
  void collect(Worker& worker, Pass& pass, const Program& program, int64_t image, int64_t turn);
  void head(Worker& worker, Pass& pass, const Program& program, int64_t image);
  void normalise_prototypes();

  void chain(Worker& worker, const Instruction& step);
  void produce(Worker& worker, const Instruction& step, int link, int until);
  void grad_weight(Worker& worker, const Instruction& step);
  void apply(Pass& pass, const LayerUpdate& update, const T* gradient);
  T* gradient_of(Worker& worker, const Instruction& step);
  Epilogue<T> backward_epilogue(Worker& worker, const Instruction& step, int channels);

  Plan plan_;
  const Graph& graph_;  // plan_.graph
  const Kernels<T>& kernels_;
  double mean_[3], std_[3];
  std::vector<Convolution<T>> layers_;
  AlignedArray<char> arena_;
  T *gradient_ = nullptr, *first_moment_ = nullptr, *second_moment_ = nullptr, *fisher_ = nullptr, *prototypes_ = nullptr,
    *kept_ = nullptr;
  std::vector<int64_t> kept_labels_;
  int64_t kept_images_ = 0;
  int ways_ = 0;
  long steps_taken_ = 0;
  double in_place_rate_ = 0;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::unique_ptr<ThreadPool> pool_;
  Turnstile turnstile_;
  std::atomic<const Slot*> broken_guard_{nullptr};
};

extern template class Session<float>;
extern template class Session<double>;

}  // namespace tinytrain
