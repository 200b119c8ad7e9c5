// Tests of the core that need C++: what allocates, gradients by finite differences, instruction sets against each other.
// Everything that can be compared with torch is tested from Python.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "session.h"

namespace {

int failures = 0;

void check(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
  ++failures;
}
#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
#define CHECK_THROWS(expression, message) \
  check(throws([&] { (void)(expression); }, message), #expression " throws " message, __FILE__, __LINE__)

bool throws(const std::function<void()>& body, const char* message) {
  try {
    body();
  } catch (const std::exception& e) {
    if (std::strstr(e.what(), message)) return true;
    std::fprintf(stderr, "threw: %s\n", e.what());
  }
  return false;
}

std::atomic<long> allocations{0};

}  // namespace

// ---- every allocation is counted: operator new here, the C functions by the linker's --wrap (CMakeLists.txt) ----

#if defined(TINYTRAIN_COUNT_ALLOCATIONS)
// NOLINTBEGIN(bugprone-reserved-identifier,clang-analyzer-unix.MismatchedDeallocator): --wrap's names; new is malloc here
extern "C" {
void* __real_malloc(size_t size);
void* __real_calloc(size_t count, size_t size);
void* __real_realloc(void* old, size_t size);
void* __real_aligned_alloc(size_t alignment, size_t size);
int __real_posix_memalign(void** out, size_t alignment, size_t size);

void* __wrap_malloc(size_t size) {
  ++allocations;
  return __real_malloc(size);
}
void* __wrap_calloc(size_t count, size_t size) {
  ++allocations;
  return __real_calloc(count, size);
}
void* __wrap_realloc(void* old, size_t size) {
  ++allocations;
  return __real_realloc(old, size);
}
void* __wrap_aligned_alloc(size_t alignment, size_t size) {
  ++allocations;
  return __real_aligned_alloc(alignment, size);
}
int __wrap_posix_memalign(void** out, size_t alignment, size_t size) {
  ++allocations;
  return __real_posix_memalign(out, alignment, size);
}
}

// Out of line: GCC takes a `free` that it sees behind a `new` for a mistake.
__attribute__((noinline)) void release(void* p) noexcept { std::free(p); }

void* operator new(size_t size) {
  ++allocations;
  void* p = __real_malloc(size == 0 ? 1 : size);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void* operator new[](size_t size) { return operator new(size); }
void* operator new(size_t size, std::align_val_t alignment) {
  ++allocations;
  const size_t unit = static_cast<size_t>(alignment);
  void* p = __real_aligned_alloc(unit, (size + unit - 1) / unit * unit);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void* operator new[](size_t size, std::align_val_t alignment) { return operator new(size, alignment); }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, size_t) noexcept { release(p); }
void operator delete[](void* p, size_t) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, size_t, std::align_val_t) noexcept { release(p); }
// NOLINTEND(bugprone-reserved-identifier,clang-analyzer-unix.MismatchedDeallocator)
#endif

namespace tinytrain {
namespace {

constexpr int kSize = 18, kWays = 3, kImages = 6;
const float kMean[3] = {0.5f, 0.5f, 0.5f}, kStd[3] = {0.5f, 0.5f, 0.5f};

std::mt19937 seeded(unsigned seed) { return std::mt19937(seed); }

Op conv(int input, int out, int kernel, int stride, bool depthwise, Activation activation) {
  Op op;
  op.inputs = {input};
  op.out_channels = out;
  op.kernel = kernel;
  op.stride = stride;
  op.padding = (kernel - 1) / 2;
  op.depthwise = depthwise;
  op.activation = activation;
  return op;
}

Op pool(int input, PoolKind kind, int kernel, int stride) {
  Op op;
  op.kind = OpKind::kPool;
  op.inputs = {input};
  op.pool = kind;
  op.kernel = kernel;
  op.stride = stride;
  return op;
}

Op add(int first, int second, Activation activation) {
  Op op;
  op.kind = OpKind::kAdd;
  op.inputs = {first, second};
  op.activation = activation;
  return op;
}

Op global_average(int input) {
  Op op;
  op.kind = OpKind::kGlobalAverage;
  op.inputs = {input};
  return op;
}

// Every kind of operation: an inverted residual, a dense convolution behind an add with ReLU, both pools, odd channel counts.
Graph small_graph() {
  Graph g;
  g.image_size = kSize;
  g.ops = {conv(0, 8, 3, 2, false, Activation::kRelu6),
           conv(1, 20, 1, 1, false, Activation::kRelu6),
           conv(2, 20, 5, 1, true, Activation::kRelu6),
           conv(3, 8, 1, 1, false, Activation::kNone),
           add(1, 4, Activation::kNone),
           pool(5, PoolKind::kMax, 2, 1),
           conv(6, 17, 3, 1, false, Activation::kRelu),
           conv(7, 17, 3, 1, false, Activation::kNone),
           add(7, 8, Activation::kRelu),
           pool(9, PoolKind::kAverage, 2, 2),
           conv(10, 17, 3, 2, true, Activation::kRelu6),
           conv(11, 24, 1, 1, false, Activation::kNone),
           global_average(12)};
  g.finish();
  return g;
}

struct Network {
  Graph graph;
  std::vector<std::vector<float>> weights, biases;

  explicit Network(Graph g) : graph(std::move(g)) {
    std::mt19937 random = seeded(1);
    std::normal_distribution<float> normal;
    for (size_t l = 0; l < graph.layers.size(); ++l) {
      const int fan_in = graph.fan_in(static_cast<int>(l)), out = graph.layer_output(static_cast<int>(l)).channels;
      weights.emplace_back(static_cast<size_t>(fan_in) * out);
      for (float& w : weights.back()) w = normal(random) * std::sqrt(2.0f / static_cast<float>(fan_in));
      biases.emplace_back(out);
      for (float& b : biases.back()) b = 0.3f * normal(random);
    }
  }

  std::vector<LayerValues> values() const {
    std::vector<LayerValues> all;
    all.reserve(weights.size());
    for (size_t l = 0; l < weights.size(); ++l) all.push_back({weights[l].data(), biases[l].data()});
    return all;
  }
};

struct Task {
  std::vector<uint8_t> bytes = std::vector<uint8_t>(kImages * kSize * kSize * 3);
  std::vector<int64_t> labels;
  std::vector<AugmentationRow> augmentation;

  Task() {
    std::mt19937 random = seeded(2);
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(random());
    for (int i = 0; i < kImages; ++i) {
      labels.push_back(i % kWays);
      augmentation.push_back({static_cast<float>(i % 2), static_cast<float>(i - 3), static_cast<float>(2 - i), 0.1f, 1.3f, 0.8f});
    }
  }
  template <class T = float>
  Images<T> images(bool augmented = false) const {
    Images<T> images;
    images.bytes = bytes.data();
    images.count = kImages;
    if (augmented) images.augmentation = augmentation.data();
    return images;
  }
};

LayerUpdate rows(int layer, Axis axis, std::vector<int32_t> channels) {
  LayerUpdate u;
  u.layer = layer;
  u.axis = axis;
  u.channels = std::move(channels);
  return u;
}

LayerUpdate bias(int layer) {
  LayerUpdate u;
  u.layer = layer;
  u.bias = true;
  return u;
}

std::vector<int32_t> all_channels(int count) {
  std::vector<int32_t> channels(count);
  std::iota(channels.begin(), channels.end(), 0);
  return channels;
}

// Every weight and every bias.
PlanRequest full_request(const Graph& graph) {
  PlanRequest request;
  request.max_ways = kWays;
  for (int l = 0; l < static_cast<int>(graph.layers.size()); ++l) {
    request.updates.push_back(rows(l, Axis::kOut, all_channels(graph.layer_output(l).channels)));
    request.updates.push_back(bias(l));
    request.fisher_layers.push_back(l);
  }
  return request;
}

// Some rows, some columns, a bias; a frozen prefix before them.
PlanRequest sparse_request() {
  PlanRequest request;
  request.max_ways = kWays;
  request.updates = {rows(4, Axis::kOut, {1, 5, 16}), rows(5, Axis::kIn, {0, 3, 4, 9}), rows(6, Axis::kOut, {2, 3}),
                     rows(7, Axis::kOut, {0, 23}), bias(7)};
  request.fisher_layers = {4, 5, 7};
  request.keep_images = kImages;
  return request;
}

template <class T>
std::vector<T> gradients(const Session<T>& session) {
  std::vector<T> all;
  for (size_t i = 0; i < session.plan().updates.size(); ++i) {
    const size_t start = all.size();
    all.resize(start + static_cast<size_t>(session.plan().updates[i].count));
    session.copy_gradient(static_cast<int>(i), all.data() + start);
  }
  return all;
}

// ---- tests ----

void test_nothing_allocates_after_construction() {
#if defined(TINYTRAIN_COUNT_ALLOCATIONS)
  const Network network(small_graph());
  const Task task;
  for (int threads : {1, 2}) {
    for (const PlanRequest& wanted : {sparse_request(), full_request(network.graph)}) {
      PlanRequest request = wanted;
      request.threads = threads;
      Session<float> session(network.graph, network.values(), kMean, kStd, request, "");
      std::vector<float> features(static_cast<size_t>(kImages) * network.graph.features());
      const std::vector<float> feature_gradients(features.size(), 0.01f);
      std::vector<float> outputs(static_cast<size_t>(kImages * session.prefix_shape().count()));
      Images<float> behind_prefix;
      behind_prefix.prefix = outputs.data();
      behind_prefix.count = kImages;
      const long before = allocations;
      session.embed(task.images(), features.data());
      session.set_prototypes(task.images(), task.labels.data(), kWays, true);
      for (int step = 0; step < 3; ++step) {
        session.zero_grad();
        session.proto_backward(task.images(true), task.labels.data(), 10, 1.0 / kImages);
        session.backward(task.images(), feature_gradients.data());
        session.step(1e-3, 0.9);
        if (session.keeps_prefix()) session.update_prototypes();
        if (!outputs.empty()) {
          session.prefix(task.images(true), outputs.data());
          session.proto_backward(behind_prefix, task.labels.data(), 10, 1.0 / kImages);
        }
      }
      CHECK(allocations == before);
      CHECK(session.keeps_prefix() == (session.plan().keep_images > 0));
    }
  }
  // The counter counts (through pointers: a compiler may drop an allocation that nobody looks at).
  void* (*volatile by_new)(size_t) = operator new;
  void* (*volatile by_malloc)(size_t) = std::malloc;
  void* (*volatile aligned)(size_t, size_t) = std::aligned_alloc;
  const long before = allocations;
  operator delete(by_new(8));
  std::free(by_malloc(8));
  std::free(aligned(64, 64));
  CHECK(allocations == before + 3);
#endif
}

// The gradient of sum_i grad_i * feature_i by every kind of weight, against central differences.
void test_gradients_by_finite_differences() {
  Network network(small_graph());
  const Task task;
  const int m = network.graph.features();
  std::vector<double> feature_gradients(static_cast<size_t>(kImages) * m);
  std::mt19937 random = seeded(3);
  std::normal_distribution<double> normal;
  for (double& g : feature_gradients) g = normal(random);

  PlanRequest request = full_request(network.graph);
  request.value_bytes = sizeof(double);
  Session<double> session(network.graph, network.values(), kMean, kStd, request, "");
  session.backward(task.images<double>(), feature_gradients.data());
  const std::vector<double> found = gradients(session);

  const auto loss = [&] {
    PlanRequest nothing;
    nothing.value_bytes = sizeof(double);
    Session<double> run(network.graph, network.values(), kMean, kStd, nothing, "");
    std::vector<double> features(feature_gradients.size());
    run.embed(task.images<double>(), features.data());
    double sum = 0;
    for (size_t i = 0; i < features.size(); ++i) sum += features[i] * feature_gradients[i];
    return sum;
  };
  double scale = 0;
  for (double g : found) scale = std::max(scale, std::abs(g));
  const auto difference = [&](float& value, double delta) {
    const float old = value;
    value = static_cast<float>(old + delta);
    const double above = loss(), high = value;
    value = static_cast<float>(old - delta);
    const double below = loss(), low = value;
    value = old;
    return (above - below) / (high - low);
  };
  size_t start = 0;
  for (size_t l = 0; l < network.weights.size(); ++l) {
    for (std::vector<float>* values : {&network.weights[l], &network.biases[l]}) {
      for (int sample = 0; sample < 8; ++sample) {
        const size_t at = random() % values->size();
        const double wide = difference((*values)[at], 1e-4), narrow = difference((*values)[at], 2e-5);
        // Where two step widths disagree, a ReLU or a maximum switched between them.
        if (std::abs(wide - narrow) > 1e-5 * scale) continue;
        CHECK(std::abs(found[start + at] - narrow) <= 1e-5 * scale);
      }
      start += values->size();
    }
  }
  CHECK(start == found.size());
}

void test_instruction_sets_agree() {
  const Network network(small_graph());
  const Task task;
  const auto run = [&](const std::string& isa) {
    Session<float> session(network.graph, network.values(), kMean, kStd, full_request(network.graph), isa);
    CHECK(session.isa() == isa);
    session.set_prototypes(task.images(), task.labels.data(), kWays, false);
    session.proto_backward(task.images(true), task.labels.data(), 10, 1.0 / kImages);
    std::vector<float> all = gradients(session);
    all.insert(all.end(), session.fisher(), session.fisher() + session.plan().fisher_count);
    session.step(1e-3, 0.9);
    std::vector<float> features(static_cast<size_t>(kImages) * network.graph.features());
    session.embed(task.images(), features.data());
    all.insert(all.end(), features.begin(), features.end());
    return all;
  };
  const std::vector<float> reference = run("scalar");
  float scale = 0;
  for (float x : reference) scale = std::max(scale, std::abs(x));
  CHECK(available_isas().back() == "scalar");
  for (const std::string& isa : available_isas()) {
    const std::vector<float> found = run(isa);
    CHECK(found.size() == reference.size());
    float worst = 0;
    for (size_t i = 0; i < found.size(); ++i) worst = std::max(worst, std::abs(found[i] - reference[i]));
    CHECK(worst <= 1e-4f * scale);
  }
  CHECK_THROWS(kernels_f32("sse9"), "isa: unknown instruction set 'sse9'");
}

// Every element has a place of its own, however it is reached; also where half a vector of columns holds its rows in pairs.
void test_packed_matrices() {
  constexpr int kLanes = 16;
  for (const bool pairs : {false, true}) {
    for (const int rows : {1, 6, 9}) {
      for (int columns = 1; columns < 70; ++columns) {
        PackedMatrix<float> matrix(rows, columns, {kLanes, 3 * kLanes, pairs});
        const int rest = columns % kLanes;
        const bool halved = pairs && rows % 2 == 0 && rest > 0 && rest <= kLanes / 2;
        const int padded = halved ? columns - rest + kLanes / 2 : (columns + kLanes - 1) / kLanes * kLanes;
        bool sound = matrix.bytes() == static_cast<int64_t>(sizeof(float)) * rows * padded && matrix.paired(columns - 1) == halved;
        const auto value = [&](int row, int column) { return static_cast<float>(row * columns + column); };
        for (int r = 0; r < rows; ++r) {
          for (int c = 0; c < columns; ++c) matrix.at(r, c) = value(r, c);
        }
        for (int r = 0; r < rows; ++r) {
          for (int c = 0, count, stride; c < columns; c += count) {
            const float* run = matrix.run(r, c, &count, &stride);
            for (int i = 0; i < count; ++i) sound = sound && run[i * stride] == value(r, c + i);
          }
          for (int c = 0; c < columns; ++c) sound = sound && matrix.column(c)[r] == value(r, c);
        }
        CHECK(sound);
      }
    }
  }
}

void test_threads_give_the_same_bits() {
  const Network network(small_graph());
  const Task task;
  const auto run = [&](int threads) {
    PlanRequest request = sparse_request();
    request.threads = threads;
    request.guard_bytes = 64;
    Session<float> session(network.graph, network.values(), kMean, kStd, request, "");
    std::vector<float> all;
    session.set_prototypes(task.images(), task.labels.data(), kWays, true);
    for (int step = 0; step < 3; ++step) {
      session.zero_grad();
      const ProtoResult result = session.proto_backward(task.images(true), task.labels.data(), 10, 1.0 / kImages);
      all.push_back(static_cast<float>(result.loss_sum));
      session.step(1e-2, 0.9);
      session.update_prototypes();
      for (float g : gradients(session)) all.push_back(g);
      all.insert(all.end(), session.fisher(), session.fisher() + session.plan().fisher_count);
      all.insert(all.end(), session.prototypes(), session.prototypes() + kWays * network.graph.features());
      Images<float> single = task.images(true);  // no work for a second thread
      single.count = 1;
      session.proto_backward(single, task.labels.data(), 10, 1);
      for (float g : gradients(session)) all.push_back(g);
    }
    CHECK(session.broken_guard().empty());
    return all;
  };
  const std::vector<float> one = run(1);
  for (int threads : {2, 4}) {
    const std::vector<float> more = run(threads);
    CHECK(more.size() == one.size() && std::memcmp(more.data(), one.data(), one.size() * sizeof(float)) == 0);
  }
}

void test_budgets() {
  const Graph graph = small_graph();
  PlanRequest request = full_request(graph);
  request.memory_bytes = 1;
  CHECK_THROWS(make_plan(graph, request), "memory_bytes: 1 bytes are too few; the smallest feasible plan needs");
  int64_t needed = 0;
  try {
    make_plan(graph, request);
  } catch (const BudgetError& e) {
    needed = e.needed_bytes;
  }
  request.memory_bytes = needed;
  CHECK(make_plan(graph, request).peak_bytes == needed);
  request.memory_bytes = needed - 1;
  CHECK_THROWS(make_plan(graph, request), "the smallest feasible plan needs");
}

void test_faults_change_no_weight() {
  const Network network(small_graph());
  const Task task;
  Session<float> session(network.graph, network.values(), kMean, kStd, full_request(network.graph), "");
  std::vector<float> feature_gradients(static_cast<size_t>(kImages) * network.graph.features(), 1.0f);
  feature_gradients[5] = NAN;
  session.backward(task.images(), feature_gradients.data());
  CHECK_THROWS(session.step(1e-3, 0.9), "step: a gradient is not finite");
  for (size_t l = 0; l < network.weights.size(); ++l) {
    std::vector<float> weight(network.weights[l].size()), bias(network.biases[l].size());
    session.copy_weight(static_cast<int>(l), weight.data(), bias.data());
    CHECK(weight == network.weights[l]);
    CHECK(bias == network.biases[l]);
  }
  for (float g : gradients(session)) CHECK(g == 0);
}

Graph changed(const std::function<void(Graph&)>& change) {
  Graph g = small_graph();
  change(g);
  g.finish();
  return g;
}

void test_bad_graphs_throw() {
  CHECK_THROWS(changed([](Graph& g) { g.image_size = 0; }), "image_size: expected 1 to 4096, got 0");
  CHECK_THROWS(changed([](Graph& g) { g.ops.clear(); }), "the last one must be a global average pool");
  CHECK_THROWS(changed([](Graph& g) { g.ops.pop_back(); }), "the last one must be a global average pool");
  CHECK_THROWS(changed([](Graph& g) { g.ops[1].inputs = {2}; }), "operation 1: reads tensor 2, which is not written yet");
  CHECK_THROWS(changed([](Graph& g) { g.ops[1].inputs = {-1}; }), "operation 1: reads tensor -1");
  CHECK_THROWS(changed([](Graph& g) { g.ops[1].inputs = {1, 1}; }), "operation 1: expected 1 inputs, got 2");
  CHECK_THROWS(changed([](Graph& g) { g.ops[4].inputs = {4}; }), "operation 4: expected 2 inputs, got 1");
  CHECK_THROWS(changed([](Graph& g) { g.ops[4].inputs = {4, 4}; }), "operation 4: adds a tensor to itself");
  CHECK_THROWS(changed([](Graph& g) { g.ops[4].inputs = {2, 4}; }), "operation 4: adds tensors of different shapes");
  CHECK_THROWS(changed([](Graph& g) { g.ops[2].out_channels = 21; }), "operation 2: depthwise: expected 20 output channels");
  CHECK_THROWS(changed([](Graph& g) { g.ops[0].depthwise = true; }), "operation 0: reads the image");
  CHECK_THROWS(changed([](Graph& g) { g.ops[0].out_channels = 0; }), "operation 0: out_channels: expected 1 to 65536");
  CHECK_THROWS(changed([](Graph& g) { g.ops[0].kernel = 16; }), "operation 0: kernel, stride, padding");
  CHECK_THROWS(changed([](Graph& g) { g.ops[0].stride = 0; }), "operation 0: kernel, stride, padding");
  CHECK_THROWS(changed([](Graph& g) { g.ops[0].padding = 3; }), "operation 0: kernel, stride, padding");
  CHECK_THROWS(changed([](Graph& g) {
                 g.image_size = 2;
                 g.ops[0].padding = 0;
               }),
               "operation 0: its window is larger");
  CHECK_THROWS(changed([](Graph& g) { g.ops[6].inputs = {0}; }), "exactly one that reads the image");
  CHECK_THROWS(changed([](Graph& g) { g.ops[12].inputs = {11}; }), "tensor 12 is never read");
  CHECK_THROWS(changed([](Graph& g) { g.ops.insert(g.ops.begin() + 1, global_average(1)); }), "must be the last operation");

  const Graph graph = small_graph();
  const auto plan = [&](LayerUpdate update) {
    PlanRequest request;
    request.updates = {std::move(update)};
    return make_plan(graph, request);
  };
  CHECK_THROWS(plan(rows(99, Axis::kOut, {0})), "policy: layer 99: expected 0 to 7");
  CHECK_THROWS(plan(rows(0, Axis::kOut, {8})), "policy: layer 0: channels must be sorted, unique and below 8");
  CHECK_THROWS(plan(rows(0, Axis::kOut, {2, 1})), "policy: layer 0: channels must be sorted");
  CHECK_THROWS(plan(rows(0, Axis::kOut, {})), "policy: layer 0: no channels");
  CHECK_THROWS(plan(rows(0, Axis::kIn, {0})), "policy: layer 0: axis 'in' cannot select colours of the image");
  CHECK_THROWS(plan(rows(2, Axis::kIn, {0})), "policy: layer 2: axis 'in' is for dense and pointwise convolutions");
}

}  // namespace
}  // namespace tinytrain

int main() {
  using namespace tinytrain;
  test_nothing_allocates_after_construction();
  test_gradients_by_finite_differences();
  test_instruction_sets_agree();
  test_packed_matrices();
  test_threads_give_the_same_bits();
  test_budgets();
  test_faults_change_no_weight();
  test_bad_graphs_throw();
  if (failures == 0) std::printf("core_tests: all passed\n");
  return failures == 0 ? 0 : 1;
}
