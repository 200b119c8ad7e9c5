// 3 x 3 depthwise rows for the Cortex-A53, one vector of channels at a time: columns stream past, each loaded once from each kernel
// row and added to the three outputs that it reaches, whose sums rotate through registers (a tile reloads two columns of every ten,
// and waits at its end). What follows a sum is known at compile time, so that three columns are one run of code in which loads and
// the work on finished outputs issue beside FMAs: 5 to 6 FLOP a cycle of 8 where tiles reach 3 to 4.
//
// The order of reduction is (column, row) here. Which outputs come here depends on the layer and the row only.

// An output's sum on its way to memory, in three stages for the caller to put between other work.
template <Ending kEnding>
struct RollingEnd {
  T* out;
  const uint8_t* mask;
  int64_t stride;
  int shift, masks;
  V bias;
  Bounds bounds;

  TT_INLINE RollingEnd(const Epilogue<T>& e, int c, int channels)
      : out(e.out + c),
        mask(e.mask_in + c / 8),
        stride(e.out_stride),
        shift(c % 8),
        masks(mask_bytes(channels)),
        bias(start(e, c)),
        bounds(e.activation) {}

  TT_INLINE void stage(V& v, Index<0>) {
    if constexpr (kEnding == Ending::kClamp) {
      v = clamp_below(v, bounds.low);
    } else {
      v = keep_masked(v, mask, shift, 8);
      mask += masks;
    }
  }
  TT_INLINE void stage(V& v, Index<1>) {
    if constexpr (kEnding == Ending::kClamp) v = clamp_above(v, bounds.high);
  }
  TT_INLINE void stage(V& v, Index<2>) {
    store(out, v);
    out += stride;
  }
  TT_INLINE void finish(V& v) {
    unroll<3>(TT_EACH { stage(v, Index<i.value>{}); });
  }
};

// The kernel rows inside the image and their weights, for one vector of channels. w[r][j]: of tap j.
template <int R, int S>
struct RollingRows {
  const T* at[R];
  V w[R][3], v[R][S];  // v: S columns of the input
  int64_t C;

  TT_INLINE RollingRows(const Depthwise<T>& d, int c) : C(d.channels) {
    unroll<R>(TT_EACH {
      at[i] = d.rows[i] + c;
      const T* tap = d.weights + d.taps[i] * 3 * C + c;
      unroll<3>(TT_EACH_J { w[i][j] = load(row_of(tap, j, C)); });
      fetch(i);
    });
  }
  template <int I>
  TT_INLINE void fetch(Index<I>) {
    unroll<S>(TT_EACH { v[I][i] = load_halves(at[I] + i * C); });
    at[I] += S * C;
  }
};

// One vector of channels; R kernel rows inside the image.
template <int R, int S, bool kTransposed, Ending kEnding>
TT_INLINE void rolling_vector(const Depthwise<T>& d, int c) {
  RollingEnd<kEnding> end(d.epilogue, c, d.channels);
  RollingRows<R, S> in(d, c);
  // From a column to the output left of it, here, and right of it.
  constexpr int kLeft = kTransposed ? 0 : 2, kHere = 1, kRight = 2 - kLeft;
  // S columns of the input, S = 1: adds to the outputs left of it, here, and right of it, where it comes first. S = 2: an even column
  // reaches one output, the odd one behind it that output and the next. A value is replaced right after its last use, and what
  // was `done` before is finished meanwhile.
  const auto columns = [&](V* done, V& left, V& here, V& right, auto more) __attribute__((always_inline)) {
    V odd{};  // apart: six products in turn would wait for one another
    right = end.bias;
    unroll<R>(TT_EACH {
      if constexpr (S == 1) left += in.v[i][0] * in.w[i][kLeft];
      here += in.v[i][0] * in.w[i][kHere];
      if constexpr (S == 2) odd += in.v[i][1] * in.w[i][kLeft];
      right += in.v[i][S - 1] * in.w[i][kRight];
      if (done) end.stage(*done, Index<i.value>{});
      if constexpr (more) in.fetch(i);
    });
    if (done && R == 2) end.stage(*done, Index<2>{});
    if constexpr (S == 2) here += odd;
  };
  constexpr Index<1> kMore{};
  constexpr Index<0> kLast{};
  V s0 = end.bias, s1 = end.bias, s2, s3;
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
    end.finish(s2);
    end.finish(s3);
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
    end.finish(s1);
  }
}

// grad_input with stride 2: a gradient reaches the outputs at twice its column (by the middle tap) and on both sides of that. A row
// of outputs meets the middle kernel row alone or the two others.
template <int R, Ending kEnding>
TT_INLINE void rolling_spread(const Depthwise<T>& d, int c) {
  RollingEnd<kEnding> end(d.epilogue, c, d.channels);
  RollingRows<R, 1> in(d, c);
  // The outputs at a column and right of it, while the two before are finished.
  const auto column = [&](V* done, V& even, V& odd, auto more) __attribute__((always_inline)) {
    V far = V{};  // apart, as above
    even = odd = end.bias;
    unroll<R>(TT_EACH {
      even += in.v[i][0] * in.w[i][1];
      odd += in.v[i][0] * in.w[i][2];
      if (done) end.stage(done[0], Index<i.value>{});
      if constexpr (more) {
        in.fetch(i);
        far += in.v[i][0] * in.w[i][0];
      }
    });
    if (done) {
      unroll<3 - R>(TT_EACH { end.stage(done[0], Index<R + i.value>{}); });
      end.finish(done[1]);
    }
    if constexpr (more) odd += far;
  };
  constexpr Index<1> kMore{};
  constexpr Index<0> kLast{};
  V a[2], b[2];
  column(nullptr, a[0], a[1], kMore);
  int rest = d.width_in - 1;
  for (; rest > 2; rest -= 2) {
    column(a, b[0], b[1], kMore);
    column(b, a[0], a[1], kMore);
  }
  if (rest == 2) {
    column(a, b[0], b[1], kMore);
    a[0] = b[0];
    a[1] = b[1];
  }
  column(a, b[0], b[1], kLast);
  unroll<2>(TT_EACH { end.finish(b[i]); });
}

// All vectors of channels in one function, which saves what a call costs each on maps of 4 x 4 and 8 x 8.
template <int R, int S, bool kTransposed, Ending kEnding>
__attribute__((noinline)) bool rolling_row(const Depthwise<T>& d) {
  for (int c = 0; c < d.channels; c += kLanes) rolling_vector<R, S, kTransposed, kEnding>(d, c);
  return true;
}
template <int R, Ending kEnding>
__attribute__((noinline)) bool rolling_spread_row(const Depthwise<T>& d) {
  for (int c = 0; c < d.channels; c += kLanes) rolling_spread<R, kEnding>(d, c);
  return true;
}

// False: not of these, nothing was done.
template <bool kTransposed, Ending kEnding>
bool depthwise_rolling(const Depthwise<T>& d) {
  if (d.padding != 1 || d.channels % kLanes != 0) return false;
  if (d.stride == 1 && d.width_in == d.width_out && d.width_out > 2) {
    if (d.row_count == 3) return rolling_row<3, 1, kTransposed, kEnding>(d);
    if (d.row_count == 2) return rolling_row<2, 1, kTransposed, kEnding>(d);
  }
  if constexpr (kTransposed) {
    if (d.stride == 2 && d.width_out == 2 * d.width_in && d.width_in > 1) {
      if (d.row_count == 2) return rolling_spread_row<2, kEnding>(d);
      if (d.row_count == 1) return rolling_spread_row<1, kEnding>(d);
    }
  } else {
    if (d.stride == 2 && d.width_in == 2 * d.width_out && d.width_out > 1) {
      if (d.row_count == 3) return rolling_row<3, 2, kTransposed, kEnding>(d);
      if (d.row_count == 2) return rolling_row<2, 2, kTransposed, kEnding>(d);
    }
  }
  return false;
}

// One row of outputs in any form: clamps and a gradient's mask beside the sums, everything else in another pass over the row. The
// order of a layer's sums thus never depends on what is saved. False: not of these, nothing was done.
template <int K, bool kTransposed>
bool depthwise_passes(Depthwise<T> d) {
  const Epilogue<T> e = d.epilogue;
  if (e.addend == e.out) return false;  // the first pass would overwrite it
  const Ending ending = ending_of(e);
  const bool gradient = kTransposed && (ending == Ending::kGradient || ending == Ending::kFisher);
  const bool clamp = ending == Ending::kRelu6 || ending == Ending::kClamp || ending == Ending::kSaving;
  d.epilogue = Epilogue<T>{};
  d.epilogue.out = e.out;
  d.epilogue.out_stride = e.out_stride;
  d.epilogue.bias = e.bias;
  if (clamp) d.epilogue.activation = e.activation;
  if (gradient) d.epilogue.mask_in = e.mask_in;
  const auto sums = [&](auto known) {
    constexpr Ending kEnding = known ? Ending::kGradient : Ending::kClamp;
    if constexpr (K == 3) {
      return depthwise_rolling<kTransposed, kEnding>(d);
    } else {
      return depthwise_rows<K, kTransposed, kEnding>(d);
    }
  };
  bool done;
  if constexpr (kTransposed) {
    done = gradient ? sums(Index<1>{}) : sums(Index<0>{});
  } else {
    done = sums(Index<0>{});
  }
  if (!done) return false;
  if (ending == Ending::kSaving) {
    save_relu6_bits<8>(e, d.channels, 0, d.width_out);
  } else if (ending == Ending::kFisher) {
    for (int c = 0; c < d.channels; c += kLanes) {
      V fisher{};
      for (int64_t at = c; at < d.width_out * e.out_stride; at += e.out_stride) fisher += load(e.out + at) * load(e.values + at);
      add_fisher(e, fisher, c, d.channels);
    }
  } else if (!gradient && !clamp && ending != Ending::kLinear) {
    Epilogue<T> rest = e;
    rest.bias = nullptr;
    apply_epilogue(e.out, d.width_out, d.channels, rest);
  }
  return true;
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
