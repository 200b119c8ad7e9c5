// Every convolution of the three networks forward by XNNPACK (Debian's, NHWC, one thread): regions for the counting plugin.
// Standard input: one layer a line, "in_channels out_channels height width kernel stride padding depthwise".
#include <xnnpack.h>

#include <sys/prctl.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

int main() {
  constexpr unsigned long kMark = 0x74746d6b, kStart = 1, kStop = 2;
  if (xnn_initialize(nullptr) != xnn_status_success) return 1;
  unsigned in, out, height, width, kernel, stride, padding, depthwise;
  for (unsigned long region = 0;
       std::scanf("%u %u %u %u %u %u %u %u", &in, &out, &height, &width, &kernel, &stride, &padding, &depthwise) == 8; ++region) {
    const unsigned groups = depthwise ? in : 1;
    const unsigned out_height = (height + 2 * padding - kernel) / stride + 1,
                   out_width = (width + 2 * padding - kernel) / stride + 1;
    const std::vector<float> weights(static_cast<size_t>(out) * kernel * kernel * in / groups, 0.1f), bias(out, 0.1f);
    const std::vector<float> x(static_cast<size_t>(height) * width * in + 64, 0.1f);  // it reads behind the end
    std::vector<float> y(static_cast<size_t>(out_height) * out_width * out);
    xnn_operator_t op = nullptr;
    if (xnn_create_convolution2d_nhwc_f32(padding, padding, padding, padding, kernel, kernel, stride, stride, 1, 1, groups,
                                          in / groups, out / groups, in, out, weights.data(), bias.data(), 0, 6, 0,
                                          &op) != xnn_status_success ||
        xnn_setup_convolution2d_nhwc_f32(op, 1, height, width, x.data(), y.data(), nullptr) != xnn_status_success) {
      return 1;
    }
    xnn_run_operator(op, nullptr);
    prctl(kMark, kStart, region, 0, 0);
    xnn_run_operator(op, nullptr);
    prctl(kMark, kStop, region, 0, 0);
    xnn_delete_operator(op);
  }
  return 0;
}
