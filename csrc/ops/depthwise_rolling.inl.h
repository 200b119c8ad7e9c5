// 3 x 3 depthwise rows for the Cortex-A53, one vector of channels at a time: columns stream past, each loaded once from each kernel
// row and added to the three outputs that it reaches, whose sums rotate through registers (a tile reloads two columns of every ten,
// and waits at its end). What follows a sum is known at compile time, so that three columns are one run of code in which loads and
// the work on finished outputs issue beside FMAs: 5 to 6 FLOP a cycle of 8 where tiles reach 3 to 4.
//
// The order of reduction is (column, row) here. Which outputs come here depends on the layer and the row only.

enum class Ending { kFrozen, kSaving, kGradient, kFisher };

template <Ending kEnding>
struct RollingEnd {
  T* out;
  uint8_t* mask_out;
  const uint8_t* mask_in;
  const T* values;
  int64_t stride;
  int shift, masks;
  V bias, low, high, fisher;

  TT_INLINE RollingEnd(const Epilogue<T>& e, int c, int channels)
      : out(e.out + c),
        mask_out(e.mask_out + c / 8),
        mask_in(e.mask_in + c / 8),
        values(e.values + c),
        stride(e.out_stride),
        shift(c % 8),
        masks(mask_bytes(channels)),
        bias{},
        fisher{} {
    constexpr float kInfinity = __builtin_inff();
    if (e.bias) bias = load(e.bias + c);
    low = splat(e.activation == Activation::kNone ? -kInfinity : 0);
    high = splat(e.activation == Activation::kRelu6 ? 6 : kInfinity);
  }

  // An output's sum on its way to memory, in three stages for the caller to put between other work.
  TT_INLINE void stage(V& v, Index<0>) {
    if constexpr (kEnding == Ending::kFrozen || kEnding == Ending::kSaving) {
      v += bias;
    } else {
      v = keep_masked(v, mask_in, shift, 8);
      mask_in += masks;
    }
  }
  TT_INLINE void stage(V& v, Index<1>) {
    if constexpr (kEnding == Ending::kFisher) {
      fisher += v * load(values);
      values += stride;
    }
    if constexpr (kEnding == Ending::kSaving) {
      const unsigned before = shift == 0 ? 0 : *mask_out;
      *mask_out = static_cast<uint8_t>(before | relu6_bits(v) << shift);
      mask_out += masks;
    }
    if constexpr (kEnding == Ending::kFrozen || kEnding == Ending::kSaving) v = clamp_below(v, low);
  }
  TT_INLINE void stage(V& v, Index<2>) {
    if constexpr (kEnding == Ending::kFrozen || kEnding == Ending::kSaving) v = clamp_above(v, high);
    store(out, v);
    out += stride;
  }
};

// One vector of channels; R kernel rows inside the image.
template <int R, int S, bool kTransposed, Ending kEnding>
__attribute__((noinline)) void rolling_vector(const Depthwise<T>& d, int c) {
  const int64_t C = d.channels;
  RollingEnd<kEnding> end(d.epilogue, c, d.channels);
  // w[r][j]: from a column to the output j places right of its left neighbour's.
  V w[R][3];
  const T* at[R];
  unroll<R>(TT_EACH {
    at[i] = d.rows[i] + c;
    unroll<3>(TT_EACH_J {
      constexpr int kTap = kTransposed ? j.value : 2 - j.value;
      w[i][j] = load(d.weights + (d.taps[i] * 3 + kTap) * C + c);
    });
  });
  // S columns of the input, S = 1: adds to the outputs left of it, here, and right of it, where it comes first. S = 2: an even column
  // reaches one output, the odd one behind it that output and the next. A value is replaced right after its last use, and what
  // was `done` before is finished meanwhile.
  V v[R][S];
  const auto fetch = [&](auto row) __attribute__((always_inline)) {
    unroll<S>(TT_EACH { v[row][i] = load_halves(at[row] + i * C); });
    at[row] += S * C;
  };
  const auto columns = [&](V* done, V& left, V& here, V& right, auto more) __attribute__((always_inline)) {
    V odd{};  // apart: six products in turn would wait for one another
    unroll<R>(TT_EACH {
      if constexpr (S == 1) left += v[i][0] * w[i][0];
      here += v[i][0] * w[i][1];
      if constexpr (S == 2) odd += v[i][1] * w[i][0];
      if constexpr (i.value == 0) {
        right = v[i][S - 1] * w[i][2];
      } else {
        right += v[i][S - 1] * w[i][2];
      }
      if (done) end.stage(*done, Index<i.value>{});
      if constexpr (more) fetch(i);
    });
    if (done && R == 2) end.stage(*done, Index<2>{});
    if constexpr (S == 2) here += odd;
  };
  const auto finish = [&](V& v) __attribute__((always_inline)) { unroll<3>(TT_EACH { end.stage(v, Index<i.value>{}); }); };
  constexpr Index<1> kMore{};
  constexpr Index<0> kLast{};
  unroll<R>(TT_EACH { fetch(i); });
  V s0{}, s1{}, s2{}, s3{};
  int rest = d.width_out;
  if constexpr (S == 1) {
    columns(nullptr, s0, s1, s2, kMore);
    columns(nullptr, s1, s2, s3, kMore);
    // s1 is done.
    for (rest -= 2; rest > 4; rest -= 4) {
      columns(&s1, s2, s3, s0, kMore);
      columns(&s2, s3, s0, s1, kMore);
      columns(&s3, s0, s1, s2, kMore);
      columns(&s0, s1, s2, s3, kMore);
    }
    for (; rest > 1; --rest) {
      columns(&s1, s2, s3, s0, kMore);
      s1 = s2;
      s2 = s3;
      s3 = s0;
    }
    columns(&s1, s2, s3, s0, kLast);
    finish(s2);
    finish(s3);
  } else {
    columns(nullptr, s3, s0, s1, kMore);
    for (rest -= 1; rest > 3; rest -= 3) {
      columns(&s0, s3, s1, s2, kMore);
      columns(&s1, s3, s2, s0, kMore);
      columns(&s2, s3, s0, s1, kMore);
    }
    for (; rest > 1; --rest) {
      columns(&s0, s3, s1, s2, kMore);
      s0 = s1;
      s1 = s2;
    }
    columns(&s0, s3, s1, s2, kLast);
    finish(s1);
  }
  if constexpr (kEnding == Ending::kFisher) add_fisher(d.epilogue, end.fisher, c, d.channels);
}

template <int R, int S, bool kTransposed>
bool rolling_rows(const Depthwise<T>& d) {
  const Epilogue<T>& e = d.epilogue;
  const auto all = [&](auto kernel) {
    for (int c = 0; c < d.channels; c += kLanes) kernel(d, c);
    return true;
  };
  if constexpr (kTransposed) {
    if (e.bias || e.addend || !e.mask_in || e.activation != Activation::kNone) return false;
    if (e.fisher) return all(rolling_vector<R, S, kTransposed, Ending::kFisher>);
    return all(rolling_vector<R, S, kTransposed, Ending::kGradient>);
  } else {
    // ReLU6 only, whether its bits are kept or not: the order of a layer's sums must not depend on what is saved.
    if (!e.bias || e.addend || e.mask_in || e.fisher || e.activation != Activation::kRelu6) return false;
    if (!e.mask_out) return all(rolling_vector<R, S, kTransposed, Ending::kFrozen>);
    return all(rolling_vector<R, S, kTransposed, Ending::kSaving>);
  }
}

// False: not of these, nothing was done.
template <bool kTransposed>
bool depthwise_rolling(const Depthwise<T>& d) {
  if (d.padding != 1 || d.channels % kLanes != 0) return false;
  if (d.stride == 1 && d.width_in == d.width_out && d.width_out > 2) {
    if (d.row_count == 3) return rolling_rows<3, 1, kTransposed>(d);
    if (d.row_count == 2) return rolling_rows<2, 1, kTransposed>(d);
  }
  if constexpr (!kTransposed) {
    if (d.stride == 2 && d.width_in == 2 * d.width_out && d.width_out > 1) {
      if (d.row_count == 3) return rolling_rows<3, 2, false>(d);
      if (d.row_count == 2) return rolling_rows<2, 2, false>(d);
    }
  }
  return false;
}

// ---- grad_weight: the nine sums stay in registers, inputs and the outputs' gradients stream past ----

// What one output row adds: R input rows, the first of them under kernel row kFirst.
template <int kFirst, int R, int S>
TT_INLINE void rolling_grad_row(const T* gradient, const T* input, int64_t input_row, int64_t C, int width_out, V (&sums)[3][3]) {
  constexpr Index<1> kYes{};
  constexpr Index<0> kNo{};
  const T* at[R];
  V v[R][S];
  const auto fetch = [&](auto row) __attribute__((always_inline)) {
    unroll<S>(TT_EACH { v[row][i] = load_halves(at[row] + i * C); });
    at[row] += S * C;
  };
  const auto next_gradient = [&] { return gradient += C, load_halves(gradient); };
  unroll<R>(TT_EACH {
    at[i] = input + i * input_row;
    fetch(i);
  });
  V g0{}, g1 = load_halves(gradient), g2 = next_gradient();
  int rest = width_out;
  if constexpr (S == 1) {
    // A column meets the gradients left of it, here and right of it.
    const auto column = [&](V& left, V& here, V& right, auto has_left, auto has_right, auto has_more)
                            __attribute__((always_inline)) {
                              if constexpr (has_left) unroll<R>(TT_EACH { sums[kFirst + i][2] += v[i][0] * left; });
                              if constexpr (has_more) left = next_gradient();
                              unroll<R>(TT_EACH {
                                sums[kFirst + i][1] += v[i][0] * here;
                                if constexpr (has_right) sums[kFirst + i][0] += v[i][0] * right;
                                if constexpr (has_right) fetch(i);
                              });
                            };
    column(g0, g1, g2, kNo, kYes, kYes);
    for (rest -= 1; rest > 4; rest -= 3) {
      column(g1, g2, g0, kYes, kYes, kYes);
      column(g2, g0, g1, kYes, kYes, kYes);
      column(g0, g1, g2, kYes, kYes, kYes);
    }
    for (; rest > 2; --rest) {
      column(g1, g2, g0, kYes, kYes, kYes);
      const V read = g1;  // the gradient after next
      g1 = g2;
      g2 = g0;
      g0 = read;
    }
    column(g1, g2, g0, kYes, kYes, kNo);
    column(g2, g0, g1, kYes, kNo, kNo);
  } else {
    // An even column meets one gradient, the odd one behind it that one and the next.
    const auto columns = [&](V& here, V& right, auto has_right, auto has_more) __attribute__((always_inline)) {
      unroll<R>(TT_EACH {
        sums[kFirst + i][1] += v[i][0] * here;
        sums[kFirst + i][2] += v[i][1] * here;
      });
      if constexpr (has_more) here = next_gradient();
      unroll<R>(TT_EACH {
        if constexpr (has_right) sums[kFirst + i][0] += v[i][1] * right;
        if constexpr (has_right) fetch(i);
      });
    };
    for (; rest > 3; rest -= 2) {
      columns(g1, g2, kYes, kYes);
      columns(g2, g1, kYes, kYes);
    }
    if (rest == 3) {
      columns(g1, g2, kYes, kYes);
      const V here = g2;
      g2 = g1;
      g1 = here;
    }
    columns(g1, g2, kYes, kNo);
    columns(g2, g1, kNo, kNo);
  }
}

template <int S>
void rolling_grad_vector(const DepthwiseGradWeight<T>& d, int c) {
  const int64_t C = d.selected, input_row = d.width_in * C, output_row = d.width_out * C;
  V sums[3][3];
  unroll<9>(TT_EACH { sums[i / 3][i % 3] = V{}; });
  const T* gradient = d.grad_output + c;
  for (int y = 0; y < d.height_out; ++y, gradient += output_row) {
    const int top = y * S - 1;
    const T* input = d.input + c + top * input_row;
    if (top < 0) {
      rolling_grad_row<1, 2, S>(gradient, input + input_row, input_row, C, d.width_out, sums);
    } else if (top + 3 <= d.height_in) {
      rolling_grad_row<0, 3, S>(gradient, input, input_row, C, d.width_out, sums);
    } else {
      rolling_grad_row<0, 2, S>(gradient, input, input_row, C, d.width_out, sums);
    }
  }
  unroll<9>(TT_EACH {
    T* out = d.grad + i * C + c;
    store(out, load(out) + sums[i / 3][i % 3]);
  });
}

// False: not of these, nothing was done.
bool depthwise_rolling_grad(const DepthwiseGradWeight<T>& d, int c) {
  if (d.padding != 1 || c + kLanes > d.selected || d.width_out < 3 || d.height_out < 2) return false;
  if (d.width_in != d.stride * d.width_out || d.height_in != d.stride * d.height_out) return false;
  if (d.stride == 1) {
    rolling_grad_vector<1>(d, c);
  } else if (d.stride == 2) {
    rolling_grad_vector<2>(d, c);
  } else {
    return false;
  }
  return true;
}
