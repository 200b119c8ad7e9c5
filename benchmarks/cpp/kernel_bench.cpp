// The kernels without Python: times of every different convolution of the three networks on one random image, three passes each,
// one JSON line a row with the keys of `tinytrain bench kernels --json`. Linked statically: one file to copy to a board.
//
//   kernel_bench [--network NAME] [--rounds N] [--isa NAME] [--cpu N] [--list]
//
// Before a kernel is timed its result is compared with the scalar kernel's; the exit code is 1 if one differs by more than rounding.

#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv.h"
#include "dispatch.h"

namespace tinytrain {
namespace {

struct Layer {
  const char* network;
  const char* name;
  int in_channels, out_channels, height, width, kernel, stride, padding;
  bool depthwise;
};

constexpr Layer kLayers[] = {
#include "layers.inc"
};

constexpr double kSecondsARound = 0.002;  // of one row at least, so that the clock's step does not count
constexpr double kTolerance = 1e-4;       // of the largest value: sums of up to some thousand products in another order

using Values = AlignedArray<float>;

Values random_values(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  Values values(count);
  std::generate_n(values.data(), count, [&] { return normal(generator); });
  return values;
}

// One convolution with the operands and results of its three passes.
class Job {
 public:
  Job(const Layer& layer, const std::string& isa)
      : op_(op_of(layer)),
        in_{layer.height, layer.width, layer.in_channels},
        out_{output(layer.height, layer), output(layer.width, layer), layer.out_channels},
        fan_in_(int64_t{layer.kernel} * layer.kernel * (layer.depthwise ? 1 : layer.in_channels)),
        image_(random_values(in_.count(), 1)),
        grad_output_(random_values(out_.count(), 2)),
        y_(out_.count()),
        grad_input_(in_.count()),
        grad_weight_(fan_in_ * layer.out_channels),
        image_sum_(grad_weight_.count()),
        forward_scratch_(Convolution<float>::forward_scratch(op_, in_.width, in_.channels)),
        grad_scratch_(Convolution<float>::grad_input_scratch(op_, in_.width, out_.channels)),
        conv_(op_, in_, out_, random_values(grad_weight_.count(), 0).data(), Values(out_.channels).data(), true, false, nullptr,
              kernels_f32(isa)) {
    update_.channels.resize(static_cast<size_t>(out_.channels));
    std::iota(update_.channels.begin(), update_.channels.end(), 0);
    update_.count = grad_weight_.count();
  }

  int64_t macs() const { return fan_in_ * out_.count(); }

  const Values& forward() {
    int loaded = 0;
    conv_.forward({image_.data(), in_.height}, {y_.data(), out_.height}, nullptr, 0, out_.height, forward_scratch_.data(), nullptr,
                  &loaded, Epilogue<float>{});
    return y_;
  }

  const Values& grad_input() {
    Epilogue<float> e{};
    e.out = grad_input_.data();
    e.out_stride = in_.channels;
    conv_.grad_input(grad_output_.data(), grad_scratch_.data(), nullptr, e);
    return grad_input_;
  }

  const Values& grad_weight() {
    std::fill_n(grad_weight_.data(), grad_weight_.count(), 0.0F);
    float* const sum = Convolution<float>::needs_image_sum(op_, out_) ? image_sum_.data() : nullptr;
    conv_.grad_weight(update_, grad_output_.data(), image_.data(), nullptr, sum, forward_scratch_.data(), grad_weight_.data());
    return grad_weight_;
  }

 private:
  static Op op_of(const Layer& layer) {
    Op op;
    op.inputs = {1};
    op.kernel = layer.kernel;
    op.stride = layer.stride;
    op.padding = layer.padding;
    op.depthwise = layer.depthwise;
    op.out_channels = layer.out_channels;
    return op;
  }
  static int output(int size, const Layer& layer) { return (size + 2 * layer.padding - layer.kernel) / layer.stride + 1; }

  Op op_;
  Shape in_, out_;
  int64_t fan_in_;
  Values image_, grad_output_, y_, grad_input_, grad_weight_, image_sum_, forward_scratch_, grad_scratch_;
  Convolution<float> conv_;
  LayerUpdate update_;
};

struct Pass {
  const char* name;
  const Values& (Job::*run)();
};
constexpr Pass kPasses[] = {{"forward", &Job::forward}, {"grad_input", &Job::grad_input}, {"grad_weight", &Job::grad_weight}};

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double seconds_of(int64_t repeats, const std::function<void()>& call) {
  const double start = cpu_seconds();
  for (int64_t i = 0; i < repeats; ++i) call();
  return (cpu_seconds() - start) / static_cast<double>(repeats);
}

// GFLOP/s of one core that does nothing but multiply and add.
double fma_gflops(const Kernels<float>& kernels) {
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    float value = 0;
    int64_t count = 0;
    const double seconds = seconds_of(1, [&] { count = kernels.fma_peak(500000, &value); });
    best = std::max(best, 2e-9 * static_cast<double>(count) / seconds);
  }
  return best;
}

// The largest difference between two results, over the largest value.
double difference(const Values& got, const Values& wanted) {
  double worst = 0, largest = 0;
  for (int64_t i = 0; i < got.count(); ++i) {
    const double distance = std::abs(double{got.data()[i]} - double{wanted.data()[i]});
    worst = std::isnan(distance) ? HUGE_VAL : std::max(worst, distance);
    largest = std::max(largest, std::abs(double{wanted.data()[i]}));
  }
  return worst / largest;
}

// ---- the machine ----

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= ' ') out += c;
  }
  return out + '"';
}

// The first line of a file as a JSON value, or null. scale != 0: a number, times it.
std::string file_value(const std::string& path, double scale = 0) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line) || line.empty()) return "null";
  return scale == 0 ? quoted(line) : std::to_string(std::strtod(line.c_str(), nullptr) * scale);
}

std::string state(int cpu) {
  const std::string clock = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/cpufreq/";
  return "{\"celsius\": " + file_value("/sys/class/thermal/thermal_zone0/temp", 1e-3) +
         ", \"megahertz\": " + file_value(clock + "scaling_cur_freq", 1e-3) +
         ", \"governor\": " + file_value(clock + "scaling_governor") +
         ", \"get_throttled\": " + file_value("/sys/devices/platform/soc/soc:firmware/get_throttled") + "}";
}

std::string device(const char* isa) {
  const Cpu cpu = identify_cpu();
  utsname names{};
  uname(&names);
  char registers[80];
  std::snprintf(registers, sizeof registers, "\"midr\": \"%#llx\", \"hwcap\": \"%#llx\"", static_cast<unsigned long long>(cpu.midr),
                static_cast<unsigned long long>(cpu.hwcap));
  return "{\"model\": " + file_value("/proc/device-tree/model") + ", \"brand\": " + quoted(cpu.brand) + ", " + registers +
         ", \"machine\": " + quoted(names.machine) + ", \"isa\": " + quoted(isa) +
         ", \"cpus\": " + std::to_string(sysconf(_SC_NPROCESSORS_ONLN)) + "}";
}

// Binds this thread to `cpu`, or to the first it may use; returns which.
int pin(int cpu) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) throw std::runtime_error("sched_getaffinity failed");
  for (int i = 0; cpu < 0 && i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &allowed)) cpu = i;
  }
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  if (sched_setaffinity(0, sizeof one, &one) != 0) {
    throw std::runtime_error("--cpu " + std::to_string(cpu) + ": " + std::strerror(errno));
  }
  return cpu;
}

// ---- command line ----

struct Options {
  std::string network, isa;
  int rounds = 7, cpu = -1;
  bool list = false;
};

int number(const std::string& option, const char* text, int least) {
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (*text == 0 || *end != 0 || value < least || value >= CPU_SETSIZE) {
    throw std::invalid_argument(option + ": expected " + std::to_string(least) + " to " + std::to_string(CPU_SETSIZE - 1) +
                                ", got " + text);
  }
  return static_cast<int>(value);
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string option = arguments[i];
    if (option == "--list") {
      options.list = true;
      continue;
    }
    if (i + 1 == count) throw std::invalid_argument(option + ": unknown, or without its value");
    const char* const value = arguments[++i];
    if (option == "--network") {
      options.network = value;
    } else if (option == "--isa") {
      options.isa = value;
    } else if (option == "--rounds") {
      options.rounds = number(option, value, 1);
    } else if (option == "--cpu") {
      options.cpu = number(option, value, 0);
    } else {
      throw std::invalid_argument(option + ": unknown; there are --network, --rounds, --isa, --cpu and --list");
    }
  }
  return options;
}

std::vector<Layer> chosen_layers(const std::string& network) {
  std::vector<Layer> layers;
  std::copy_if(std::begin(kLayers), std::end(kLayers), std::back_inserter(layers),
               [&](const Layer& layer) { return network.empty() || network == layer.network; });
  if (layers.empty()) throw std::invalid_argument("--network: expected mcunet, mobilenetv2 or proxylessnas, got " + network);
  return layers;
}

// The rows of one layer, without the conditions they hold under; adds up how many kernels are wrong.
std::vector<std::string> rows_of(const Layer& layer, const Options& options, double peak, int* wrong) {
  Job job(layer, options.isa), reference(layer, "scalar");
  constexpr size_t kCount = std::size(kPasses);
  double worst[kCount];
  int64_t repeats[kCount];
  std::vector<double> times[kCount];
  for (size_t p = 0; p < kCount; ++p) {
    worst[p] = difference((job.*kPasses[p].run)(), (reference.*kPasses[p].run)());
    if (!(worst[p] <= kTolerance)) {
      std::fprintf(stderr, "%s %s: differs from the scalar kernel by %g of the largest value\n", layer.name, kPasses[p].name,
                   worst[p]);
      ++*wrong;
    }
    const double alone = seconds_of(1, [&] { (job.*kPasses[p].run)(); });
    repeats[p] = std::max<int64_t>(1, std::llround(std::ceil(kSecondsARound / std::max(alone, 1e-7))));
  }
  for (int round = 0; round < options.rounds; ++round) {
    for (size_t p = 0; p < kCount; ++p) times[p].push_back(seconds_of(repeats[p], [&] { (job.*kPasses[p].run)(); }));
  }
  std::vector<std::string> rows;
  for (size_t p = 0; p < kCount; ++p) {
    std::sort(times[p].begin(), times[p].end());
    const size_t rounds = times[p].size();
    const double median = (times[p][(rounds - 1) / 2] + times[p][rounds / 2]) / 2;
    char row[512];
    std::snprintf(row, sizeof row,
                  "\"name\": \"%s\", \"network\": \"%s\", \"batch\": 1, \"method\": \"%s\", \"implementation\": \"tinytrain\", "
                  "\"unit\": \"us\", \"median\": %.3f, \"low\": %.3f, \"high\": %.3f, \"rounds\": %zu, \"macs\": %lld, "
                  "\"share_of_peak\": %.4f, \"difference\": %.2g",
                  layer.name, layer.network, kPasses[p].name, 1e6 * median, 1e6 * times[p].front(), 1e6 * times[p].back(), rounds,
                  static_cast<long long>(job.macs()), 2e-9 * static_cast<double>(job.macs()) / median / peak, worst[p]);
    rows.emplace_back(row);
  }
  return rows;
}

int run(const Options& options) {
  const std::vector<Layer> layers = chosen_layers(options.network);
  if (options.list) {
    for (const Layer& layer : layers) std::printf("%s %s\n", layer.network, layer.name);
    return 0;
  }
  const Kernels<float>& kernels = kernels_f32(options.isa);
  const int cpu = pin(options.cpu);
  const std::string before = state(cpu);
  const double peak = fma_gflops(kernels);
  int wrong = 0;
  std::vector<std::string> rows;
  for (const Layer& layer : layers) {
    for (std::string& row : rows_of(layer, options, peak, &wrong)) rows.push_back(std::move(row));
  }
  const std::string conditions =
      "\"bench\": \"kernels\", \"device\": " + device(kernels.isa) + ", \"threads\": 1, \"pinned_to\": [" + std::to_string(cpu) +
      "], \"fma_peak_gflops\": " + std::to_string(peak) + ", \"before\": " + before + ", \"after\": " + state(cpu);
  for (const std::string& row : rows) std::printf("{%s, %s}\n", row.c_str(), conditions.c_str());
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace tinytrain

int main(int count, char** arguments) {
  try {
    return tinytrain::run(tinytrain::parse(count, arguments));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "kernel_bench: %s\n", e.what());
    return 2;
  }
}
