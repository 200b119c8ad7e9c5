// 3 x 3 depthwise rows for the Cortex-A53, one vector of channels at a time: columns stream past, each loaded once from each kernel
// row and added to the three outputs that it reaches, whose sums rotate through registers (a tile reloads two columns of every ten,
// and waits at its end). What follows a sum is known at compile time, so that three columns are one run of code in which loads and
// the work on finished outputs issue beside FMAs: 5 to 6 FLOP a cycle of 8 where tiles reach 3 to 4. Two rows of outputs at a time,
// where the caller has two, share weights, what a row's start and end cost, and the input rows that both meet.
//
// The order of reduction is (column, row) here, with one row of outputs and with two. Which outputs come here depends on the layer
// and the row only.

// Rows of outputs at a time, and rows of the input: output row o meets those from o * S on, three of them, as far as they are among
// [kFirst, kUntil), the ones inside the image.
template <int kOutputs_, int S_, int kFirst_, int kUntil_>
struct Window {
  static constexpr int kOutputs = kOutputs_, S = S_, kFirst = kFirst_, kUntil = kUntil_;
};

// Finished sums on their way to memory, one of each row of outputs, in three stages for the caller to put between other work.
template <int Q, Ending kEnding>
struct RollingEnd {
  T* out;
  int64_t below;  // from a row's output to the next row's
  const uint8_t* mask[Q];
  int64_t stride;
  int shift, masks;
  V bias;
  Bounds bounds;

  TT_INLINE RollingEnd(const Depthwise<T>* d, int c)
      : out(d[0].epilogue.out + c),
        below(d[Q - 1].epilogue.out - d[0].epilogue.out),
        stride(d[0].epilogue.out_stride),
        shift(c % 8),
        masks(mask_bytes(d[0].channels)),
        bias(start(d[0].epilogue, c)),
        bounds(d[0].epilogue.activation) {
    unroll<Q>(TT_EACH { mask[i] = d[i].epilogue.mask_in + c / 8; });
  }

  TT_INLINE void stage(V (&v)[Q], Index<0>) {
    unroll<Q>(TT_EACH {
      if constexpr (kEnding == Ending::kClamp) {
        v[i] = clamp_below(v[i], bounds.low);
      } else {
        v[i] = keep_masked(v[i], mask[i], shift, 8);
        mask[i] += masks;
      }
    });
  }
  TT_INLINE void stage(V (&v)[Q], Index<1>) {
    if constexpr (kEnding == Ending::kClamp) unroll<Q>(TT_EACH { v[i] = clamp_above(v[i], bounds.high); });
  }
  TT_INLINE void stage(V (&v)[Q], Index<2>) {
    unroll<Q>(TT_EACH { store(out + i * below, v[i]); });
    out += stride;
  }
  TT_INLINE void finish(V (&v)[Q]) {
    unroll<3>(TT_EACH { stage(v, Index<i.value>{}); });
  }

  // The first product of a sum. A gradient has no bias.
  TT_INLINE V first(V v, V w) const { return kEnding == Ending::kGradient ? v * w : bias + v * w; }
};

// The input rows of one or two rows of outputs and the weights, for one vector of channels. w[r][j]: of tap j of the r-th row that an
// output meets.
template <class W, bool kTransposed>
struct RollingRows {
  static constexpr int S = W::S;
  const T* at[W::kUntil];
  V w[3][3], v[W::kUntil][S];  // v: S columns of the input
  int64_t C;

  TT_INLINE RollingRows(const Depthwise<T>* d, int c) : C(d->channels) {
    unroll<3>(TT_EACH {
      const T* tap = d->weights + (kTransposed ? 2 - i : i) * 3 * C + c;
      unroll<3>(TT_EACH_J { w[i][j] = load(row_of(tap, j, C)); });
    });
    unroll<W::kUntil - W::kFirst>(TT_EACH {
      constexpr int kRow = W::kFirst + i.value;
      // The upper row of outputs meets the first three.
      at[kRow] = (kRow < 3 ? d[0].rows[i] : d[1].rows[d[1].row_count - W::kUntil + kRow]) + c;
      fetch(Index<kRow>{});
    });
  }
  template <int I>
  TT_INLINE void fetch(Index<I>) {
    v[I][0] = load_halves(at[I]);
    // With stride 2 loads take more slots than FMAs leave free. A whole load then costs hardly more cycles than two halves, and two
    // instructions less: as many of them as keep the loop above 4 FLOP a cycle.
    if constexpr (S == 2) v[I][1] = I % 2 == 0 ? load(at[I] + C) : load_halves(at[I] + C);
    at[I] += S * C;
  }
};

// One vector of channels; d: a Depthwise for each row of outputs.
template <class W, bool kTransposed, Ending kEnding>
TT_INLINE void rolling_vector(const Depthwise<T>* d, int c) {
  constexpr int Q = W::kOutputs, S = W::S, R = W::kUntil - W::kFirst;
  RollingEnd<Q, kEnding> end(d, c);
  RollingRows<W, kTransposed> in(d, c);
  // From a column to the output left of it, here, and right of it.
  constexpr int kLeft = kTransposed ? 0 : 2, kHere = 1, kRight = 2 - kLeft;
  // S columns of the input, S = 1: adds to the outputs left of it, here, and right of it, where it comes first. S = 2: an even column
  // reaches one output, the odd one behind it that output and the next. A value is replaced right after its last use, and what
  // was `done` before is finished meanwhile.
  const auto columns = [&](V(*done)[Q], V(&left)[Q], V(&here)[Q], V(&right)[Q], auto more) __attribute__((always_inline)) {
    unroll<R>(TT_EACH {
      constexpr int kRow = W::kFirst + i.value;
      unroll<Q>(TT_EACH_J {
        constexpr int kWeights = kRow - S * j.value;
        if constexpr (kWeights >= 0 && kWeights < 3) {
          constexpr bool kBegins = kWeights == 0 || kRow == W::kFirst;
          const V(&w)[3] = in.w[kWeights];
          if constexpr (S == 1) left[j] += in.v[kRow][0] * w[kLeft];
          here[j] += in.v[kRow][0] * w[kHere];
          if constexpr (S == 2) here[j] += in.v[kRow][1] * w[kLeft];
          const V product = in.v[kRow][S - 1];
          right[j] = kBegins ? end.first(product, w[kRight]) : right[j] + product * w[kRight];
        }
      });
      if constexpr (i.value < 3) {
        if (done) end.stage(*done, Index<i.value>{});
      }
      if constexpr (more) in.fetch(Index<kRow>{});
    });
    if (done && R == 2) end.stage(*done, Index<2>{});
  };
  constexpr Index<1> kMore{};
  constexpr Index<0> kLast{};
  const auto copy = [](V(&to)[Q], const V(&from)[Q]) __attribute__((always_inline)) { unroll<Q>(TT_EACH { to[i] = from[i]; }); };
  V s0[Q], s1[Q], s2[Q], s3[Q];
  unroll<Q>(TT_EACH { s0[i] = s1[i] = end.bias; });
  int rest = d->width_out;
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
      copy(s1, s2);
      copy(s2, s3);
      copy(s3, s0);
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
      copy(s0, s1);
      copy(s1, s2);
    }
    columns(&s0, s3, s1, s2, kLast);
    end.finish(s1);
  }
}

// grad_input with stride 2: a gradient reaches the outputs at twice its column (by the middle tap) and on both sides of that. In the
// same way an even row of outputs meets one row of gradients by the middle kernel row, an odd one that by the last and, inside
// the image, the next by the first. Outputs [kFirst, kUntil) of an even row and the odd one below it; R rows of gradients.
template <int kFirst, int kUntil, int R, Ending kEnding>
TT_INLINE void rolling_spread(const Depthwise<T>* d, int c) {
  constexpr int Q = kUntil - kFirst;
  RollingEnd<Q, kEnding> end(d, c);
  RollingRows<Window<1, 1, 0, R>, true> in(d + Q - 1, c);
  // The outputs at a column and right of it, while the two before are finished.
  const auto column = [&](V(*done)[Q], V(&even)[Q], V(&odd)[Q], auto more) __attribute__((always_inline)) {
    unroll<R>(TT_EACH {
      const auto each = [&](auto body) __attribute__((always_inline)) {
        unroll<Q>(TT_EACH_J {
          constexpr bool kOddRow = kFirst + j.value == 1;
          if constexpr (kOddRow || i.value == 0) body(j, in.w[kOddRow ? 2 * i.value : 1]);
        });
      };
      const V v = in.v[i][0];
      each([&](auto j, const V(&w)[3]) __attribute__((always_inline)) {
        even[j] = i.value == 0 ? end.first(v, w[1]) : even[j] + v * w[1];
        odd[j] = i.value == 0 ? end.first(v, w[2]) : odd[j] + v * w[2];
      });
      if constexpr (more) {
        in.fetch(i);
        each([&](auto j, const V(&w)[3]) __attribute__((always_inline)) { odd[j] += in.v[i][0] * w[0]; });
      }
    });
    if (done) unroll<3>([&](auto stage) __attribute__((always_inline)) { unroll<2>(TT_EACH { end.stage(done[i], stage); }); });
  };
  constexpr Index<1> kMore{};
  constexpr Index<0> kLast{};
  V a[2][Q], b[2][Q];
  column(nullptr, a[0], a[1], kMore);
  int rest = d->width_in - 1;
  for (; rest > 2; rest -= 2) {
    column(a, b[0], b[1], kMore);
    column(b, a[0], a[1], kMore);
  }
  if (rest == 2) {
    column(a, b[0], b[1], kMore);
    unroll<2 * Q>(TT_EACH { a[i / Q][i % Q] = b[i / Q][i % Q]; });
  }
  column(a, b[0], b[1], kLast);
  unroll<2>(TT_EACH { end.finish(b[i]); });
}

// All vectors of channels in one function, which saves what a call costs each on maps of 4 x 4 and 8 x 8.
template <class W, bool kTransposed, Ending kEnding>
__attribute__((noinline)) bool rolling_rows(const Depthwise<T>* d) {
  for (int c = 0; c < d->channels; c += kLanes) rolling_vector<W, kTransposed, kEnding>(d, c);
  return true;
}
template <int kFirst, int kUntil, int R, Ending kEnding>
__attribute__((noinline)) bool rolling_spread_rows(const Depthwise<T>* d) {
  for (int c = 0; c < d->channels; c += kLanes) rolling_spread<kFirst, kUntil, R, kEnding>(d, c);
  return true;
}

// One row of outputs, or two. False: not of these, nothing was done.
template <bool kTransposed, Ending kEnding>
bool depthwise_rolling(const Depthwise<T>* d, int count) {
  if (d->padding != 1 || d->channels % kLanes != 0) return false;
  const int upper = d[0].row_count, lower = d[count - 1].row_count;
  const bool top = upper == 2 && d->taps[0] == 1;  // the first kernel row is outside the image
  const bool same = d->stride == 1 && d->width_in == d->width_out && d->width_out > 2;
  if (same && count == 2) {
    if (upper == 3 && lower == 3) return rolling_rows<Window<2, 1, 0, 4>, kTransposed, kEnding>(d);
    if (upper == 2 && lower == 3) return rolling_rows<Window<2, 1, 1, 4>, kTransposed, kEnding>(d);
    if (upper == 3 && lower == 2) return rolling_rows<Window<2, 1, 0, 3>, kTransposed, kEnding>(d);
  } else if (same) {
    if (upper == 3) return rolling_rows<Window<1, 1, 0, 3>, kTransposed, kEnding>(d);
    if (upper == 2 && top) return rolling_rows<Window<1, 1, 1, 3>, kTransposed, kEnding>(d);
    if (upper == 2) return rolling_rows<Window<1, 1, 0, 2>, kTransposed, kEnding>(d);
  }
  if constexpr (kTransposed) {
    if (d->stride != 2 || d->width_out != 2 * d->width_in || d->width_in < 2) return false;
    const bool even = upper == 1 && d->taps[0] == 1;
    if (count == 2) {
      if (even && lower == 2) return rolling_spread_rows<0, 2, 2, kEnding>(d);
      if (even && lower == 1) return rolling_spread_rows<0, 2, 1, kEnding>(d);
    } else {
      if (even) return rolling_spread_rows<0, 1, 1, kEnding>(d);
      if (upper == 2) return rolling_spread_rows<1, 2, 2, kEnding>(d);
      if (upper == 1) return rolling_spread_rows<1, 2, 1, kEnding>(d);
    }
  } else {
    if (d->stride != 2 || d->width_in != 2 * d->width_out || d->width_out < 2) return false;
    if (count == 2) {
      if (upper == 3 && lower == 3) return rolling_rows<Window<2, 2, 0, 5>, kTransposed, kEnding>(d);
      if (upper == 2 && lower == 3) return rolling_rows<Window<2, 2, 1, 5>, kTransposed, kEnding>(d);
    } else {
      if (upper == 3) return rolling_rows<Window<1, 2, 0, 3>, kTransposed, kEnding>(d);
      if (upper == 2 && top) return rolling_rows<Window<1, 2, 1, 3>, kTransposed, kEnding>(d);
      if (upper == 2) return rolling_rows<Window<1, 2, 0, 2>, kTransposed, kEnding>(d);
    }
  }
  return false;
}

// One row of outputs in any form, or two: clamps and a gradient's mask beside the sums, everything else in another pass over each row.
// The order of a layer's sums thus never depends on what is saved. False: not of these, nothing was done.
template <int K, bool kTransposed>
bool depthwise_passes(const Depthwise<T>* rows, int count) {
  constexpr int kMost = K == 3 ? 2 : 1;
  if (count > kMost) return false;
  const Ending ending = ending_of(rows->epilogue);
  const bool gradient = kTransposed && (ending == Ending::kGradient || ending == Ending::kFisher) && !rows->epilogue.bias;
  const bool clamp = ending == Ending::kRelu6 || ending == Ending::kClamp || ending == Ending::kSaving;
  Depthwise<T> d[kMost];
  for (int i = 0; i < count; ++i) {
    d[i] = rows[i];
    const Epilogue<T>& e = rows[i].epilogue;
    if (e.addend == e.out) return false;  // the first pass would overwrite it
    d[i].epilogue = Epilogue<T>{};
    d[i].epilogue.out = e.out;
    d[i].epilogue.out_stride = e.out_stride;
    d[i].epilogue.bias = e.bias;
    if (clamp) d[i].epilogue.activation = e.activation;
    if (gradient) d[i].epilogue.mask_in = e.mask_in;
  }
  const auto sums = [&](auto known) {
    constexpr Ending kEnding = known ? Ending::kGradient : Ending::kClamp;
    if constexpr (K == 3) {
      return depthwise_rolling<kTransposed, kEnding>(d, count);
    } else {
      return depthwise_rows<K, kTransposed, kEnding>(d[0]);
    }
  };
  bool done;
  if constexpr (kTransposed) {
    done = gradient ? sums(Index<1>{}) : sums(Index<0>{});
  } else {
    done = sums(Index<0>{});
  }
  if (!done) return false;
  for (int i = 0; i < count; ++i) {
    const Epilogue<T>& e = rows[i].epilogue;
    if (ending == Ending::kSaving) {
      save_relu6_bits<8>(e, d->channels, 0, d->width_out);
    } else if (ending == Ending::kFisher && gradient) {
      for (int c = 0; c < d->channels; c += kLanes) {
        V fisher{};
        for (int64_t at = c; at < d->width_out * e.out_stride; at += e.out_stride) fisher += load(e.out + at) * load(e.values + at);
        add_fisher(e, fisher, c, d->channels);
      }
    } else if (!gradient && !clamp && ending != Ending::kLinear) {
      Epilogue<T> rest = e;
      rest.bias = nullptr;
      apply_epilogue(e.out, d->width_out, d->channels, rest);
    }
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
