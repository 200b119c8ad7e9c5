// Depthwise convolution, its input gradient and its weight gradient, over unpadded rows.
//
// A tile is P output pixels of one vector of channels. Which taps fall outside the row is known at compile time: a row is cut
// into tiles that touch the left border, the right border, both or none, so borders need neither padded copies nor
// branches, and a 7 x 7 kernel on a 4 x 4 map costs its 16 useful taps instead of 49. Each input value is loaded once a
// kernel row and used for every output it reaches. Odd shapes go through depthwise_general.inl.h.

// AVX-512: a tile's row of inputs fits the registers, and taps are the outer loop: P products apart, no two in a row wait for one sum,
// where column by column each waits for the third before it (a core looks some hundred instructions ahead, about a tile).
constexpr bool kWholeRows = kLanes == 16;

// Output pixel of a tile that input column `column` (both relative to the tile's first) reaches through tap `tap`; -1 if none.
template <int K, int S, bool kTransposed>
constexpr int tap_output(int column, int tap) {
  constexpr int kPadding = (K - 1) / 2;
  if (kTransposed) return column * S + tap - kPadding;
  const int shifted = column + kPadding - tap;
  return shifted % S == 0 ? shifted / S : -1;
}

// Whether whole vectors have code of their own where parts are loaded by masks: up to 15 % of a 3 x 3 layer. Larger kernels do more
// with what they load, and one copy of them is all that a compiler run of 300 MB has room for.
template <int K>
constexpr bool kSplitsParts = kLoadsParts && K == 3;

// The input column that output pixel `out` reads through a tap; kNowhere if none.
constexpr int kNowhere = -1000;
template <int K, int S, bool kTransposed>
constexpr int tap_column(int out, int tap) {
  constexpr int kPadding = (K - 1) / 2;
  if (!kTransposed) return out * S + tap - kPadding;
  return (out + kPadding - tap) % S == 0 ? (out + kPadding - tap) / S : kNowhere;
}

// What P output pixels gather from one input row; `input` at the tile's first column.
template <int K, int S, bool kTransposed, int P, bool kLeft, bool kRight, class Lanes>
TT_INLINE void depthwise_gather(const T* input, int64_t C, Lanes lanes, const V (&w)[K], V (&acc)[P][1]) {
  constexpr int kPadding = (K - 1) / 2;
  constexpr int kInside = kTransposed ? P / S : P * S;  // input columns that belong to the tile
  constexpr int kFirst = kLeft ? 0 : (kTransposed ? -(kPadding / S) : -kPadding);
  constexpr int kLast = kRight ? kInside : kInside + (kTransposed ? kPadding : K - 1 - kPadding);
  if constexpr (kWholeRows) {
    V v[kLast - kFirst];
    unroll<kLast - kFirst>(TT_EACH { v[i] = load_lanes(input + (kFirst + i) * C, lanes); });
    unroll<K>([&](auto step) __attribute__((always_inline)) {
      constexpr int kTap = kTransposed ? K - 1 - step.value : step.value;  // columns in ascending order
      unroll<P>(TT_EACH {
        constexpr int kColumn = tap_column<K, S, kTransposed>(i.value, kTap);
        if constexpr (kColumn >= kFirst && kColumn < kLast) acc[i][0] += v[kColumn - kFirst] * w[kTap];
      });
    });
  } else {
    unroll<kLast - kFirst>([&](auto at) __attribute__((always_inline)) {
      constexpr int kColumn = kFirst + at.value;
      const V v = load_lanes(input + kColumn * C, lanes);
      unroll<K>(TT_EACH {
        constexpr int kOut = tap_output<K, S, kTransposed>(kColumn, i.value);
        if constexpr (kOut >= 0 && kOut < P) acc[kOut][0] += v * w[i];
      });
    });
  }
}

// A tile of one vector of channels; w: the R x K weights if the rows are all K of them (inside the image), else null.
template <int K, int S, bool kTransposed, Ending kEnding, int P, bool kLeft, bool kRight, class Lanes>
TT_INLINE void depthwise_tile(const Depthwise<T>& d, int x, int c, Lanes lanes, const V (*w)[K], int64_t weight_row) {
  const int64_t C = d.channels;
  const int64_t first = (kTransposed ? x / S : x * S) * C + c;
  V acc[P][1];
  const V bias = start(d.epilogue, c);
  unroll<P>(TT_EACH { acc[i][0] = bias; });
  if (w) {
    unroll<K>(TT_EACH { depthwise_gather<K, S, kTransposed, P, kLeft, kRight>(d.rows[i] + first, C, lanes, w[i], acc); });
  } else {
    for (int r = 0; r < d.row_count; ++r) {
      const T* weights = d.weights + static_cast<int64_t>(d.taps[r]) * K * weight_row + c;
      V row[K];
      unroll<K>(TT_EACH { row[i] = load(weights + i * weight_row); });
      depthwise_gather<K, S, kTransposed, P, kLeft, kRight>(d.rows[r] + first, C, lanes, row, acc);
    }
  }
  finish_sums<P, 1, kEnding>(d.epilogue, acc, x, c, d.channels);
}

template <int K, int S, bool kTransposed, Ending kEnding, int P, class Lanes>
TT_INLINE void depthwise_tiles(const Depthwise<T>& d, int c, Lanes lanes, const V (*w)[K], int64_t weight_row) {
  if (d.width_out == P) {
    depthwise_tile<K, S, kTransposed, kEnding, P, true, true>(d, 0, c, lanes, w, weight_row);
    return;
  }
  depthwise_tile<K, S, kTransposed, kEnding, P, true, false>(d, 0, c, lanes, w, weight_row);
  int x = P;
  for (; x + P < d.width_out; x += P) depthwise_tile<K, S, kTransposed, kEnding, P, false, false>(d, x, c, lanes, w, weight_row);
  depthwise_tile<K, S, kTransposed, kEnding, P, false, true>(d, x, c, lanes, w, weight_row);
}

// Rows in the image's middle meet all K kernel rows, in order (turned round if transposed): the weights are loaded once for the
// whole row of pixels.
template <int K, int S, bool kTransposed, Ending kEnding, int P, class Lanes>
void depthwise_vector(const Depthwise<T>& d, int c, Lanes lanes) {
  const int64_t weight_row = (d.channels + kLanes - 1) / kLanes * kLanes;
  if (K == 3 && d.row_count == K) {
    V w[K][K];
    unroll<K * K>(TT_EACH { w[i / K][i % K] = load(d.weights + (d.taps[i / K] * K + i % K) * weight_row + c); });
    depthwise_tiles<K, S, kTransposed, kEnding, P>(d, c, lanes, w, weight_row);
  } else {
    depthwise_tiles<K, S, kTransposed, kEnding, P>(d, c, lanes, nullptr, weight_row);
  }
}

template <int K, int S, bool kTransposed, Ending kEnding, int P>
void depthwise_vectors(const Depthwise<T>& d) {
  for (int c = 0; c < d.channels; c += kLanes) {
    if (kSplitsParts<K> && c + kLanes <= d.channels) {
      depthwise_vector<K, S, kTransposed, kEnding, P>(d, c, Whole{});
    } else {
      depthwise_vector<K, S, kTransposed, kEnding, P>(d, c, part_of(d.channels - c));
    }
  }
}

template <int K, int S, bool kTransposed, Ending kEnding>
bool depthwise_row(const Depthwise<T>& d) {
  const bool regular = kTransposed ? d.width_out == d.width_in * S : d.width_in == d.width_out * S;
  if (!regular || d.padding != (K - 1) / 2 || (!kLoadsParts && d.channels % kLanes != 0)) return false;
  if (d.width_out % 8 == 0) {
    depthwise_vectors<K, S, kTransposed, kEnding, 8>(d);
  } else if (d.width_out % 4 == 0) {
    depthwise_vectors<K, S, kTransposed, kEnding, 4>(d);
  } else {
    return false;
  }
  return true;
}

template <int K, bool kTransposed, Ending kEnding = Ending::kAny>
bool depthwise_rows(const Depthwise<T>& d) {
  if (d.stride == 1) return depthwise_row<K, 1, kTransposed, kEnding>(d);
  if (d.stride == 2) return depthwise_row<K, 2, kTransposed, kEnding>(d);
  return false;
}

// ---- grad_weight: the sums of R kernel rows x K taps live in registers while the whole image streams past ----

template <int K, int S, int R, bool kLeft, bool kRight, class Lanes>
TT_INLINE void depthwise_grad_tile(const T* grad_output, const T* const* inputs, int64_t stride, Lanes lanes, V (&acc)[R][K]) {
  constexpr int P = 4, kPadding = (K - 1) / 2;
  constexpr int kFirst = kLeft ? 0 : -kPadding;
  constexpr int kLast = kRight ? P * S : P * S + K - 1 - kPadding;
  V g[P];
  unroll<P>(TT_EACH { g[i] = load_lanes(grad_output + i * stride, lanes); });
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<kLast - kFirst>([&](auto at) __attribute__((always_inline)) {
      constexpr int kColumn = kFirst + at.value;
      const V v = load_lanes(inputs[r] + kColumn * stride, lanes);
      unroll<K>(TT_EACH {
        constexpr int kOut = tap_output<K, S, false>(kColumn, i.value);
        if constexpr (kOut >= 0 && kOut < P) acc[r][i] += v * g[kOut];
      });
    });
  });
}

template <int K, int S, int R, class Lanes>
TT_INLINE void depthwise_grad_rows(const DepthwiseGradWeight<T>& d, const T* grad_output, const T* const* inputs, Lanes lanes,
                                   V (&acc)[R][K]) {
  constexpr int P = 4;
  const int64_t C = d.selected;
  if (d.width_out == P) {
    depthwise_grad_tile<K, S, R, true, true>(grad_output, inputs, C, lanes, acc);
    return;
  }
  const T* at[R];
  unroll<R>(TT_EACH { at[i] = inputs[i]; });
  depthwise_grad_tile<K, S, R, true, false>(grad_output, at, C, lanes, acc);
  int x = P;
  for (; x + P < d.width_out; x += P) {
    unroll<R>(TT_EACH { at[i] += P * S * C; });
    depthwise_grad_tile<K, S, R, false, false>(grad_output + x * C, at, C, lanes, acc);
  }
  unroll<R>(TT_EACH { at[i] += P * S * C; });
  depthwise_grad_tile<K, S, R, false, true>(grad_output + x * C, at, C, lanes, acc);
}

// Kernel rows [ky, ky + R) of one vector of channels. An output row whose R input rows are not all inside the image adds to
// the kernel rows that are.
template <int K, int S, int R, class Lanes>
void depthwise_grad_group(const DepthwiseGradWeight<T>& d, int ky, int c, Lanes lanes) {
  const int64_t C = d.selected;
  V acc[R][K];
  unroll<R * K>(TT_EACH { acc[i / K][i % K] = V{}; });
  for (int oy = 0; oy < d.height_out; ++oy) {
    const T* grad_output = d.grad_output + static_cast<int64_t>(oy) * d.width_out * C + c;
    const int iy = oy * S + ky - d.padding;
    if (iy >= 0 && iy + R <= d.height_in) {
      const T* inputs[R];
      unroll<R>(TT_EACH { inputs[i] = d.input + static_cast<int64_t>(iy + i) * d.width_in * C + c; });
      depthwise_grad_rows<K, S, R>(d, grad_output, inputs, lanes, acc);
    } else {
      unroll<R>(TT_EACH {
        const int y = iy + i;
        if (y >= 0 && y < d.height_in) {
          const T* inputs[1] = {d.input + static_cast<int64_t>(y) * d.width_in * C + c};
          V one[1][K];
          unroll<K>(TT_EACH_J { one[0][j] = acc[i][j]; });
          depthwise_grad_rows<K, S, 1>(d, grad_output, inputs, lanes, one);
          unroll<K>(TT_EACH_J { acc[i][j] = one[0][j]; });
        }
      });
    }
  }
  unroll<R * K>(TT_EACH {
    T* out = d.grad + static_cast<int64_t>((ky + i / K) * K + i % K) * C + c;
    const int count = d.selected - c;
    store_up_to(out, load_up_to(out, count) + acc[i / K][i % K], count);
  });
}

// Kernel rows at a time: as many sums as the registers hold, and enough independent ones to hide the FMA's latency.
template <int K>
constexpr int grad_group_rows() {
  if (K == 3) return 3;
  return kLanes == 8 && K == 7 ? 1 : 2;
}

template <int K, int S, class Lanes>
void depthwise_grad_groups(const DepthwiseGradWeight<T>& d, int c, Lanes lanes) {
  constexpr int R = grad_group_rows<K>();
  int ky = 0;
  for (; ky + R <= K; ky += R) depthwise_grad_group<K, S, R>(d, ky, c, lanes);
  for (; ky < K; ++ky) depthwise_grad_group<K, S, 1>(d, ky, c, lanes);
}

template <int K, int S>
bool depthwise_grad_kernel(const DepthwiseGradWeight<T>& d, int c) {
  if (kSplitsParts<K> && c + kLanes <= d.selected) {
    depthwise_grad_groups<K, S>(d, c, Whole{});
  } else {
    depthwise_grad_groups<K, S>(d, c, part_of(d.selected - c));
  }
  return true;
}

template <int K>
bool depthwise_grad_vector(const DepthwiseGradWeight<T>& d, int c) {
  const bool regular = d.width_in == d.width_out * d.stride && d.width_out % 4 == 0 && d.padding == (d.kernel - 1) / 2 &&
                       (kLoadsParts || c + kLanes <= d.selected);
  if (!regular) return false;
  if (d.stride == 1) return depthwise_grad_kernel<K, 1>(d, c);
  if (d.stride == 2) return depthwise_grad_kernel<K, 2>(d, c);
  return false;
}
