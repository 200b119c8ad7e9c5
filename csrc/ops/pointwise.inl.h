// Pointwise and dense convolution as one matrix product per row of pixels, and the weight gradient as an outer product.
//
// gemm: a tile of P pixels x N vectors of outputs lives in registers; for each value of the depth it loads N weight vectors
// and broadcasts P inputs. Panels of weights are the outer loop: a panel stays in L1 while the pixels stream past.
// Bound by the FMA ports (x86: P + N loads for P * N FMAs); on the A53 inputs come as vectors of four and are used by lane.

// Vectors in a full panel, and pixels in a tile of one, two or three vectors: as many sums as the registers hold. Three vectors
// fit most expansions of the three networks without a rest (their widths are multiples of 24 or 48).
#if defined(TT_NEON)
constexpr int kPanelVectors = 2;
constexpr int kTilePixels[] = {0, 8, 8};  // 16 sums + 8 inputs + 2 weights of 32 registers
#elif defined(TT_AVX512)
constexpr int kPanelVectors = 3;
constexpr int kTilePixels[] = {0, 16, 8, 8};
#elif defined(TT_AVX2)
constexpr int kPanelVectors = 3;
constexpr int kTilePixels[] = {0, 8, 6, 4};  // 12 sums + 3 weights + 1 input of 16 registers
#else
constexpr int kPanelVectors = 2;
constexpr int kTilePixels[] = {0, 4, 4};
#endif

template <int P, int N>
TT_INLINE void gemm_reduce_one(const T* input, int64_t stride, const T* weights, V (&acc)[P][N]) {
  V w[N];
  unroll<N>(TT_EACH { w[i] = load(weights + i * kLanes); });
  unroll<P>(TT_EACH {
    const V x = splat(input[i * stride]);
    unroll<N>(TT_EACH_J { acc[i][j] += w[j] * x; });
  });
}

// kPairs: the depth goes by pairs only. On AVX-512 weights are packed so (pack.h), on NEON it is even and not zero.
template <int P, int N, bool kPairs>
TT_INLINE void gemm_reduce(const T* input, int64_t stride, int depth, const T* weights, V (&acc)[P][N]) {
  constexpr int kPanel = N * kLanes;
#if defined(TT_AVX512)
  // A single vector, or half a one in pairs of the depth: bound by its loads, P + 1 for P products, so pixels are many, and reached
  // from every fourth one. The empty asm hides how those relate; else GCC keeps sixteen offsets, most of them in vector registers.
  if constexpr (N == 1) {
    const T* at[(P + 3) / 4];
    unroll<(P + 3) / 4>(TT_EACH {
      at[i] = input + 4 * i * stride;
      asm("" : "+r"(at[i]));
    });
    for (int k = 0; k < depth; k += kPairs ? 2 : 1, weights += kLanes) {
      const V w = load(weights);
      unroll<P>(TT_EACH {
        const T* const x = at[i / 4] + (i % 4) * stride + k;
        acc[i][0] += w * (kPairs ? splat_pair(x) : splat(*x));
      });
    }
    return;
  }
#elif defined(TT_NEON)
  // Two values of the depth at a time. An input is replaced right after its last use, so that its 64-bit load issues beside an FMA;
  // the loop has no loads to wait for but those of the weights. An odd value comes first: the last pair can then issue beside
  // what follows the sums.
  if (!kPairs && depth % 2 != 0) {
    gemm_reduce_one<P, N>(input, stride, weights, acc);
    input += 1;
    weights += kPanel;
  }
  if (!kPairs && depth < 2) return;
  V x[P];
  unroll<P>(TT_EACH { x[i] = load_two(input + i * stride); });
  const auto pair = [&](auto more) __attribute__((always_inline)) {
    V w[2][N];
    unroll<2 * N>(TT_EACH { w[i / N][i % N] = load(weights + i * kLanes); });
    weights += 2 * kPanel;
    input += 2;
    unroll<P * N>(TT_EACH { add_product(acc[i / N][i % N], w[0][i % N], x[i / N], Index<0>{}); });
    unroll<P>(TT_EACH {
      unroll<N>(TT_EACH_J { add_product(acc[i][j], w[1][j], x[i], Index<1>{}); });
      if constexpr (more) x[i] = load_two(input + i * stride);
    });
  };
  for (int k = depth / 2; k > 1; --k) pair(Index<1>{});
  pair(Index<0>{});
  return;
#endif
  for (int k = 0; k < depth; ++k) gemm_reduce_one<P, N>(input + k, stride, weights + static_cast<int64_t>(k) * kPanel, acc);
}

#if defined(TT_NEON)
#define TT_TILE TT_INLINE  // what follows the sums is known: the rest of a tile is as short as a call
#else
#define TT_TILE
#endif

template <int P, int N, bool kPairs, Ending kEnding>
TT_TILE void gemm_tile(const Gemm<T>& g, const T* panel, int64_t pixel, int channel) {
  constexpr bool kHalf = kPairs && kPairsDepth;  // a vector in pairs of the depth
  constexpr int kPanel = kHalf ? kLanes / 2 : N * kLanes;
  V first[N], acc[P][N];
  unroll<N>(TT_EACH { first[i] = start(g.epilogue, channel + i * kLanes); });
  unroll<P * N>(TT_EACH { acc[i / N][i % N] = kHalf ? V{} : first[i % N]; });
  const auto row = [&](int r) __attribute__((always_inline)) {
    gemm_reduce<P, N, kPairs>(g.rows[r] + pixel * g.pixel_stride, g.pixel_stride, g.depth,
                              panel + static_cast<int64_t>(g.taps[r]) * g.depth * kPanel, acc);
  };
  if constexpr (kPairs && !kHalf) {
    row(0);  // pointwise
  } else {
    for (int r = 0; r < g.row_count; ++r) row(r);
  }
#if defined(TT_AVX512)
  if constexpr (kPairs && P == 1) add_lane_pairs(acc[0][0], acc[0][0]);
  if constexpr (kPairs) {
    unroll<P / 2>(TT_EACH { add_lane_pairs(acc[2 * i][0], acc[2 * i + 1][0]); });
    unroll<P>(TT_EACH { acc[i][0] += first[0]; });
  }
#endif
  finish_sums<P, N, kEnding>(g.epilogue, acc, pixel, channel, g.outputs);
}

// Whole tiles of P pixels; returns the first pixel behind them.
template <int P, int N, bool kPairs, Ending kEnding>
TT_INLINE int64_t gemm_tiles(const Gemm<T>& g, const T* panel, int64_t pixel, int channel) {
  for (; pixel + P <= g.pixels; pixel += P) gemm_tile<P, N, kPairs, kEnding>(g, panel, pixel, channel);
  return pixel;
}

// One panel: tiles of P pixels, then ever smaller ones.
template <int P, int N, bool kPairs>
void gemm_panel(const Gemm<T>& g, const T* panel, int64_t pixel, int channel) {
  pixel = gemm_tiles<P, N, kPairs, Ending::kAny>(g, panel, pixel, channel);
  if constexpr (P > 1) {
    if (pixel < g.pixels) gemm_panel<(P > 8 ? 8 : P > 4 ? 4 : P / 2), N, kPairs>(g, panel, pixel, channel);
  }
}

#if defined(TT_NEON)
// A full panel with an ending that is known: its code has neither other endings' branches nor, if pointwise and of even depth, a loop
// over rows. It works on a copy that nothing else points to, which stays in registers over stores.
template <bool kPairs, Ending kEnding>
__attribute__((noinline)) void gemm_known_panel(const Gemm<T>& g, const T* panel, int channel) {
  constexpr int N = kPanelVectors, P = kTilePixels[N];
  Gemm<T> own = g;
  const T* const row = kPairs ? g.rows[0] : nullptr;
  const int tap = 0;
  if constexpr (kPairs) {
    own.rows = &row;
    own.taps = &tap;
  }
  const int64_t rest = gemm_tiles<P, N, kPairs, kEnding>(own, panel, 0, channel);
  if (rest < g.pixels) gemm_panel<P / 2, N, false>(g, panel, rest, channel);
}

template <bool kPairs>
void gemm_full_panel(const Gemm<T>& g, const T* panel, int channel) {
  switch (ending_of(g.epilogue)) {
    case Ending::kAny:
    case Ending::kClamp: return gemm_known_panel<false, Ending::kAny>(g, panel, channel);
    case Ending::kLinear: return gemm_known_panel<kPairs, Ending::kLinear>(g, panel, channel);
    case Ending::kAdd: return gemm_known_panel<kPairs, Ending::kAdd>(g, panel, channel);
    case Ending::kRelu6: return gemm_known_panel<kPairs, Ending::kRelu6>(g, panel, channel);
    case Ending::kSaving: return gemm_known_panel<kPairs, Ending::kSaving>(g, panel, channel);
    case Ending::kGradient: return gemm_known_panel<kPairs, Ending::kGradient>(g, panel, channel);
    case Ending::kFisher: return gemm_known_panel<kPairs, Ending::kFisher>(g, panel, channel);
  }
}
#endif

// The panel of N vectors if that is how many there are, else of fewer; 0: half a one (kPairsDepth). Returns its width.
template <int N>
int gemm_panel_of(const Gemm<T>& g, const T* panel, int channel, int vectors) {
  if constexpr (N > 1) {
    if (vectors < N) return gemm_panel_of<N - 1>(g, panel, channel, vectors);
  } else if constexpr (kPairsDepth) {
    if (vectors == 0) {
      gemm_panel<kTilePixels[1], 1, true>(g, panel, 0, channel);
      return kLanes / 2;
    }
  }
#if defined(TT_NEON)
  if (N == kPanelVectors && channel + N * kLanes <= g.outputs) {
    g.kernel_rows == 1 && g.depth % 2 == 0 ? gemm_full_panel<true>(g, panel, channel) : gemm_full_panel<false>(g, panel, channel);
    return N * kLanes;
  }
#endif
  gemm_panel<kTilePixels[N], N, false>(g, panel, 0, channel);
  return N * kLanes;
}

void gemm(const Gemm<T>& g) {
  const int64_t panel_rows = static_cast<int64_t>(g.kernel_rows) * g.depth;
  const T* panel = g.weights;
  for (int channel = g.first; channel < g.until;) {
    const int rest = g.until - channel;
    // Half a vector that is left over comes by itself, behind whole ones.
    const bool half = kPairsDepth && g.depth % 2 == 0 && rest % kLanes <= kLanes / 2;
    const int width = gemm_panel_of<kPanelVectors>(g, panel, channel, half ? rest / kLanes : (rest + kLanes - 1) / kLanes);
    panel += panel_rows * width;
    channel += width;
  }
}

void expand_panel(const ExpandPanel<T>& e) {
  const int8_t* bytes = e.bytes;
  T* out = e.out;
  if (e.paired) {
    for (int64_t row = 0; row < e.rows; row += 2, bytes += 2 * e.width, out += 2 * e.width) {
      const float even = e.scaled_rows > 0 ? e.scales[row % e.scaled_rows] : 0;
      const float odd = e.scaled_rows > 0 ? e.scales[(row + 1) % e.scaled_rows] : 0;
      for (int i = 0; i < e.width; ++i) {
        out[2 * i] = static_cast<T>((e.scaled_rows > 0 ? even : e.scales[i]) * static_cast<float>(bytes[2 * i]));
        out[2 * i + 1] = static_cast<T>((e.scaled_rows > 0 ? odd : e.scales[i]) * static_cast<float>(bytes[2 * i + 1]));
      }
    }
    return;
  }
  int output = 0;  // of a scaled row
  for (int64_t row = 0; row < e.rows; ++row) {
    const float row_scale = e.scaled_rows > 0 ? e.scales[output] : 0;
    if (++output == e.scaled_rows) output = 0;
    for (int i = 0; i < e.width; i += kLanes, bytes += kLanes, out += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float scale = e.scaled_rows > 0 ? row_scale : e.scales[i + lane];
        out[lane] = static_cast<T>(scale * static_cast<float>(bytes[lane]));
      }
    }
  }
}

// ---- grad_weight: an outer product summed over pixels ----
//
// A tile of R rows x N vectors: rows are broadcast, vectors loaded. Rows are the selected outputs and vectors the inputs, or, if
// that fills the vectors better (an expansion of 8 channels to 48), the other way round with a transposed store.

#if defined(TT_NEON) || defined(TT_AVX512)
constexpr int kGradRows = 8;
#elif defined(TT_AVX2)
constexpr int kGradRows = 6;
#else
constexpr int kGradRows = 4;
#endif

// rows (pixels, row_count) x vectors (pixels, vector_count) -> grad, whose strides say which of them is its row.
struct OuterProduct {
  const T* rows;
  const T* vectors;
  int64_t row_stride, vector_stride;  // between pixels
  int row_count, vector_count;
  int pixels;
  T* grad;
  int64_t grad_row_stride, grad_vector_stride;  // between values of rows, of vectors
};

template <int R, int N, bool kWhole>
__attribute__((noinline)) void outer_tile(const OuterProduct& g, int row, int column) {
  V acc[R][N];
  unroll<R * N>(TT_EACH { acc[i / N][i % N] = V{}; });
  const T* rows = g.rows + row;
  const T* vectors = g.vectors + column;
  const int last = g.vector_count - column - (N - 1) * kLanes;  // values in the last vector
  const auto load_vectors = [&](V(&x)[N], const T* from) __attribute__((always_inline)) {
    unroll<N>(TT_EACH { x[i] = kWhole || i + 1 < N ? load(from + i * kLanes) : load_some(from + i * kLanes, last); });
  };
  int p = 0;
#if defined(TT_NEON)
  // As in gemm_reduce: the next pixel's values are loaded beside this one's FMAs, into registers that those have done with.
  if constexpr (R % 2 == 0) {
    V d[R / 2], x[2][N];
    const auto pixel = [&](auto side, auto more) __attribute__((always_inline)) {
      if constexpr (more) load_vectors(x[1 - side], vectors);
      vectors += g.vector_stride;
      unroll<R / 2>([&](auto pair) __attribute__((always_inline)) {
        unroll<2 * N>(TT_EACH { add_product(acc[2 * pair + i / N][i % N], x[side][i % N], d[pair], Index<i.value / N>{}); });
        if constexpr (more) d[pair] = load_two(rows + 2 * pair);
      });
      rows += g.row_stride;
    };
    load_vectors(x[0], vectors);
    unroll<R / 2>(TT_EACH { d[i] = load_two(rows + 2 * i); });
    vectors += g.vector_stride;
    rows += g.row_stride;
    for (; p + 3 <= g.pixels; p += 2) {
      pixel(Index<0>{}, Index<1>{});
      pixel(Index<1>{}, Index<1>{});
    }
    if (p + 2 == g.pixels) {
      pixel(Index<0>{}, Index<1>{});
      pixel(Index<1>{}, Index<0>{});
    } else {
      pixel(Index<0>{}, Index<0>{});
    }
    p = g.pixels;
  }
#endif
  for (; p < g.pixels; ++p) {
    V x[N];
    load_vectors(x, vectors);
    unroll<R>(TT_EACH {
      const V d = splat(rows[i]);
      unroll<N>(TT_EACH_J { acc[i][j] += x[j] * d; });
    });
    rows += g.row_stride;
    vectors += g.vector_stride;
  }
  T* const out = g.grad + row * g.grad_row_stride + column * g.grad_vector_stride;
  if (g.grad_vector_stride == 1) {
    unroll<R * N>(TT_EACH {
      T* p = out + (i / N) * g.grad_row_stride + (i % N) * kLanes;
      if (kWhole || i % N + 1 < N) {
        store(p, load(p) + acc[i / N][i % N]);
      } else {
        store_some(p, load_some(p, last) + acc[i / N][i % N], last);
      }
    });
  } else {
    T sums[R * N * kLanes];
    unroll<R * N>(TT_EACH { store(sums + i * kLanes, acc[i / N][i % N]); });
    const int count = kWhole ? N * kLanes : (N - 1) * kLanes + last;
    for (int j = 0; j < count; ++j) {
      for (int r = 0; r < R; ++r) out[r * g.grad_row_stride + j * g.grad_vector_stride] += sums[r * N * kLanes + j];
    }
  }
}

// Whole groups of R rows, then ever smaller ones.
template <int R>
void outer_product(const OuterProduct& g, int row) {
  for (; row + R <= g.row_count; row += R) {
    int column = 0;
    for (; column + 2 * kLanes <= g.vector_count; column += 2 * kLanes) outer_tile<R, 2, true>(g, row, column);
    const int rest = g.vector_count - column;
    if (rest > kLanes) {
      outer_tile<R, 2, false>(g, row, column);
    } else if (rest == kLanes) {
      outer_tile<R, 1, true>(g, row, column);
    } else if (rest > 0) {
      outer_tile<R, 1, false>(g, row, column);
    }
  }
  if constexpr (R > 1) {
    if (row < g.row_count) outer_product<(R > 4 ? 4 : R / 2)>(g, row);
  }
}

// FMA slots a pixel takes: pairs of vectors keep the FMA ports busy, single ones wait for the broadcasts.
constexpr int outer_cost(int rows, int vectors) {
  const int pairs = vectors / (2 * kLanes), rest = vectors - pairs * 2 * kLanes;
  const int groups = (rows + kGradRows - 1) / kGradRows;
  return groups * (pairs * 16 + (rest > kLanes ? 16 : rest > 0 ? 9 : 0));
}

void gemm_grad_weight(const GemmGradWeight<T>& g) {
  const OuterProduct direct{g.grad_output, g.input, g.grad_output_stride, g.input_stride, g.selected, g.depth, g.pixels, g.grad,
                            g.grad_stride, 1};
  const OuterProduct turned{g.input, g.grad_output, g.input_stride, g.grad_output_stride, g.depth, g.selected, g.pixels, g.grad,
                            1,       g.grad_stride};
  const bool turn = kLanes > 1 && outer_cost(g.depth, g.selected) < outer_cost(g.selected, g.depth);
  outer_product<kGradRows>(turn ? turned : direct, 0);
}
