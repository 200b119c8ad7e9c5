// Pointwise and dense convolution as one matrix product per row of pixels, and the weight gradient as an outer product.
//
// gemm: a tile of P pixels x N vectors of outputs lives in registers; for each value of the depth it loads N weight vectors
// and broadcasts P inputs. Panels of weights are the outer loop: a panel stays in L1 while the pixels stream past.
// Bound by the FMA ports (x86: P + N loads for P * N FMAs); on the A53 inputs come as vectors of four and are used by lane.

#if defined(TT_NEON)
constexpr int kTilePixels = 8, kNarrowTilePixels = 8;   // 16 accumulators + 8 inputs + 2 weights of 32 registers
#elif defined(TT_AVX512)
constexpr int kTilePixels = 8, kNarrowTilePixels = 16;
#elif defined(TT_AVX2)
constexpr int kTilePixels = 6, kNarrowTilePixels = 8;   // 12 accumulators + 2 weights + 1 input of 16 registers
#else
constexpr int kTilePixels = 4, kNarrowTilePixels = 4;
#endif
constexpr int kPanelVectors = 2;

template <int P, int N>
TT_INLINE void gemm_reduce(const T* input, int64_t stride, int depth, const T* weights, V (&acc)[P][N]) {
  constexpr int kPanel = N * kLanes;
  int k = 0;
#if defined(TT_NEON)
  for (; k + 4 <= depth; k += 4) {
    V x[P];
    unroll<P>(TT_EACH { x[i] = load(input + i * stride + k); });
    unroll<4>(TT_EACH_J {
      V w[N];
      unroll<N>(TT_EACH { w[i] = load(weights + (k + j) * kPanel + i * kLanes); });
      unroll<P * N>(TT_EACH { acc[i / N][i % N] += w[i % N] * x[i / N][j]; });
    });
  }
#endif
  for (; k < depth; ++k) {
    V w[N];
    unroll<N>(TT_EACH { w[i] = load(weights + static_cast<int64_t>(k) * kPanel + i * kLanes); });
    unroll<P>(TT_EACH {
      const V x = splat(input[i * stride + k]);
      unroll<N>(TT_EACH_J { acc[i][j] += w[j] * x; });
    });
  }
}

template <int P, int N>
void gemm_tile(const Gemm<T>& g, const T* panel, int64_t pixel, int channel) {
  constexpr int kPanel = N * kLanes;
  V acc[P][N];
  unroll<P * N>(TT_EACH { acc[i / N][i % N] = V{}; });
  for (int r = 0; r < g.row_count; ++r) {
    gemm_reduce<P, N>(g.rows[r] + pixel * g.pixel_stride, g.pixel_stride, g.depth,
                      panel + static_cast<int64_t>(g.taps[r]) * g.depth * kPanel, acc);
  }
  finish_sums<P, N>(g.epilogue, acc, pixel, channel, g.outputs);
}

// One panel: whole tiles of P pixels, then ever smaller ones.
template <int P, int N>
void gemm_panel(const Gemm<T>& g, const T* panel, int64_t pixel, int channel) {
  for (; pixel + P <= g.pixels; pixel += P) gemm_tile<P, N>(g, panel, pixel, channel);
  if constexpr (P > 1) {
    if (pixel < g.pixels) gemm_panel<(P > 4 ? 4 : P / 2), N>(g, panel, pixel, channel);
  }
}

void gemm(const Gemm<T>& g) {
  const int64_t panel_rows = static_cast<int64_t>(g.kernel_rows) * g.depth;
  constexpr int kPanel = kPanelVectors * kLanes;
  const T* panel = g.weights;
  for (int channel = 0; channel < g.outputs; channel += kPanel) {
    if (g.outputs - channel > kPanel - kLanes) {
      gemm_panel<kTilePixels, kPanelVectors>(g, panel, 0, channel);
    } else {
      gemm_panel<kNarrowTilePixels, 1>(g, panel, 0, channel);
    }
    panel += panel_rows * kPanel;
  }
}

// ---- grad_weight: a tile of R selected outputs x N vectors of inputs; pixels are the depth ----

#if defined(TT_NEON) || defined(TT_AVX512)
constexpr int kGradRows = 8;
#elif defined(TT_AVX2)
constexpr int kGradRows = 6;
#else
constexpr int kGradRows = 4;
#endif

template <int R, int N, bool kWhole>
TT_INLINE void grad_weight_tile(const GemmGradWeight<T>& g, int row, int column) {
  V acc[R][N];
  unroll<R * N>(TT_EACH { acc[i / N][i % N] = V{}; });
  const T* grad_output = g.grad_output + row;
  const T* input = g.input + column;
  const int last = g.depth - column - (N - 1) * kLanes;   // values in the last vector
  for (int p = 0; p < g.pixels; ++p) {
    V x[N];
    unroll<N>(TT_EACH {
      x[i] = kWhole || i + 1 < N ? load(input + i * kLanes) : load_some(input + i * kLanes, last);
    });
#if defined(TT_NEON)
    if constexpr (R == 8) {
      const V low = load(grad_output), high = load(grad_output + 4);
      unroll<8 * N>(TT_EACH {
        constexpr int kRow = i.value / N;
        acc[kRow][i % N] += x[i % N] * (kRow < 4 ? low : high)[kRow % 4];
      });
    } else
#endif
      unroll<R>(TT_EACH {
        const V d = splat(grad_output[i]);
        unroll<N>(TT_EACH_J { acc[i][j] += x[j] * d; });
      });
    grad_output += g.grad_output_stride;
    input += g.input_stride;
  }
  unroll<R>(TT_EACH {
    T* out = g.grad + static_cast<int64_t>(row + i) * g.grad_stride + column;
    unroll<N>(TT_EACH_J {
      T* p = out + j * kLanes;
      if (kWhole || j + 1 < N) {
        store(p, load(p) + acc[i][j]);
      } else {
        store_some(p, load_some(p, last) + acc[i][j], last);
      }
    });
  });
}

template <int R>
TT_INLINE void grad_weight_rows(const GemmGradWeight<T>& g, int row) {
  int column = 0;
  for (; column + 2 * kLanes <= g.depth; column += 2 * kLanes) grad_weight_tile<R, 2, true>(g, row, column);
  for (; column + kLanes <= g.depth; column += kLanes) grad_weight_tile<R, 1, true>(g, row, column);
  if (column < g.depth) grad_weight_tile<R, 1, false>(g, row, column);
}

// Whole groups of R selected outputs, then ever smaller ones.
template <int R>
void grad_weight_groups(const GemmGradWeight<T>& g, int row) {
  for (; row + R <= g.selected; row += R) grad_weight_rows<R>(g, row);
  if constexpr (R > 1) {
    if (row < g.selected) grad_weight_groups<(R > 4 ? 4 : R / 2)>(g, row);
  }
}

void gemm_grad_weight(const GemmGradWeight<T>& g) { grad_weight_groups<kGradRows>(g, 0); }
