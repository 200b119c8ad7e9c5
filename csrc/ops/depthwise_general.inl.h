// Depthwise convolution of any shape, pixel by pixel, behind the fast kernels of the common ones. Those are compiled apart, a kernel
// size and a pass at a time (isa/isa.h), because one compiler run would need more memory than a small device has.

// Any shape, one pixel: the taps inside the row by their definition.
void depthwise_pixel(const Depthwise<T>& d, int x) {
  const int64_t C = d.channels;
  const int64_t weight_row = (C + kLanes - 1) / kLanes * kLanes;
  for (int c = 0; c < C; c += kLanes) {
    const int count = d.channels - c;
    V acc = start(d.epilogue, c);
    for (int r = 0; r < d.row_count; ++r) {
      const T* weights = d.weights + static_cast<int64_t>(d.taps[r]) * d.kernel * weight_row + c;
      for (int j = 0; j < d.kernel; ++j) {
        int column = x * d.stride + j - d.padding;
        if (d.transposed) {
          column = x + d.padding - j;
          if (column % d.stride != 0) continue;
          column /= d.stride;
        }
        if (column < 0 || column >= d.width_in) continue;
        acc += load_up_to(d.rows[r] + column * C + c, count) * load(weights + j * weight_row);
      }
    }
    finish_tile(d.epilogue, &acc, x, 1, c, 1, d.channels);
  }
}

int depthwise(const Depthwise<T>* rows, [[maybe_unused]] int count) {
  const Depthwise<T>& d = *rows;
#if !defined(TT_SCALAR)
  for (; count > 0; --count) {
    bool done = false;
    if (d.kernel == 3) done = d.transposed ? depthwise_grad_input<3>(rows, count) : depthwise_forward<3>(rows, count);
    if (d.kernel == 5) done = d.transposed ? depthwise_grad_input<5>(rows, count) : depthwise_forward<5>(rows, count);
    if (d.kernel == 7) done = d.transposed ? depthwise_grad_input<7>(rows, count) : depthwise_forward<7>(rows, count);
    if (done) return count;
  }
#endif
  for (int x = 0; x < d.width_out; ++x) depthwise_pixel(d, x);
  return 1;
}

void depthwise_grad_weight(const DepthwiseGradWeight<T>& d) {
  const int64_t C = d.selected;
  for (int c = 0; c < d.selected; c += kLanes) {
    bool done = false;
#if !defined(TT_SCALAR)
    if (d.kernel == 3) done = depthwise_grad_weight_vector<3>(d, c);
    if (d.kernel == 5) done = depthwise_grad_weight_vector<5>(d, c);
    if (d.kernel == 7) done = depthwise_grad_weight_vector<7>(d, c);
#endif
    if (done) continue;
    const int count = d.selected - c;
    for (int ky = 0; ky < d.kernel; ++ky) {
      for (int kx = 0; kx < d.kernel; ++kx) {
        V acc{};
        for (int oy = 0; oy < d.height_out; ++oy) {
          const int iy = oy * d.stride + ky - d.padding;
          if (iy < 0 || iy >= d.height_in) continue;
          for (int ox = 0; ox < d.width_out; ++ox) {
            const int ix = ox * d.stride + kx - d.padding;
            if (ix < 0 || ix >= d.width_in) continue;
            acc += load_up_to(d.grad_output + (static_cast<int64_t>(oy) * d.width_out + ox) * C + c, count) *
                   load_up_to(d.input + (static_cast<int64_t>(iy) * d.width_in + ix) * C + c, count);
          }
        }
        T* out = d.grad + static_cast<int64_t>(ky * d.kernel + kx) * C + c;
        store_up_to(out, load_up_to(out, count) + acc, count);
      }
    }
  }
}
