// What follows every sum (see Epilogue in kernels.h): shortcut, ReLU with its bit mask, and in the backward pass the mask and the
// Fisher sum. The bias comes before: sums start at it. One vector at a time; the branches are the same for a whole tile, so they
// predict well, and they cost little beside a tile's reduction where a core issues out of order.

// On the A53 they are hoisted out of the loops over tiles for what the networks do most. The end of a reduction and what follows it
// are then one run of code, whose clamps and stores issue beside the last FMAs.
enum class Ending {
  kAny,
  kLinear,    // nothing
  kAdd,       // a shortcut
  kRelu6,     // ReLU6 without a mask
  kClamp,     // any other activation without one
  kSaving,    // ReLU6 with its mask
  kGradient,  // masked
  kFisher,    // masked and multiplied by values
};

TT_INLINE Ending ending_of(const Epilogue<T>& e) {
  if (e.mask_in) {
    if (e.addend || e.activation != Activation::kNone) return Ending::kAny;
    return e.fisher ? Ending::kFisher : Ending::kGradient;
  }
  if (e.fisher) return Ending::kAny;
  if (e.activation == Activation::kNone) return e.addend ? Ending::kAdd : Ending::kLinear;
  if (e.addend) return Ending::kAny;
  if (e.activation != Activation::kRelu6) return e.mask_out ? Ending::kAny : Ending::kClamp;
  return e.mask_out ? Ending::kSaving : Ending::kRelu6;
}

// Between what an activation holds its values.
struct Bounds {
  V low, high;
  TT_INLINE explicit Bounds(Activation activation)
      : low(splat(activation == Activation::kNone ? -T(__builtin_inf()) : T(0))),
        high(splat(activation == Activation::kRelu6 ? T(6) : T(__builtin_inf()))) {}
};

// What a sum starts from: its bias, which saves adding it behind (a tenth of the work on a sum of eight or nine products).
TT_INLINE V start(const Epilogue<T>& e, int channel) { return e.bias ? load(e.bias + channel) : V{}; }

TT_INLINE V activate(V v, Activation activation) {
  if (activation != Activation::kNone) {
    v = clamp_below(v, splat(0));
    if (activation == Activation::kRelu6) v = clamp_above(v, splat(6));
  }
  return v;
}

// One vector of a tile's results, in the general form. `count` lanes exist. `fisher` collects values * v over a tile.
TT_INLINE void finish(const Epilogue<T>& e, V v, int64_t pixel, int channel, int channels, V& fisher) {
  const int count = channels - channel;
  if (e.addend) v += load_up_to(e.addend + pixel * e.addend_stride + channel, count);
  if (e.activation != Activation::kNone) {
    if (e.mask_out) {
      unsigned bits = positive(v);
      if (e.activation == Activation::kRelu6) bits &= below(v, splat(6));
      store_bits(e.mask_out + pixel * mask_bytes(channels), channel, channels, bits);
    }
    v = activate(v, e.activation);
  }
  if (e.mask_in) v = keep_masked(v, e.mask_in + pixel * mask_bytes(channels), channel, channels);
  if (e.fisher) fisher += v * load_up_to(e.values + pixel * e.out_stride + channel, count);
  store_up_to(e.out + pixel * e.out_stride + channel, v, count);
}

TT_INLINE void add_fisher(const Epilogue<T>& e, V fisher, int channel, int channels) {
  if (!e.fisher) return;
  const int count = channels - channel;
  store_up_to(e.fisher + channel, load_up_to(e.fisher + channel, count) + fisher, count);
}

// A tile of `pixels` x `vectors` sums, through memory: one copy of this code serves every tile shape.
__attribute__((noinline)) void finish_tile(const Epilogue<T>& e, const V* sums, int64_t pixel, int pixels, int channel, int vectors,
                                           int channels) {
  for (int j = 0; j < vectors && channel + j * kLanes < channels; ++j) {
    V fisher{};
    for (int i = 0; i < pixels; ++i) {
      finish(e, sums[i * vectors + j], pixel + i, channel + j * kLanes, channels, fisher);
    }
    add_fisher(e, fisher, channel + j * kLanes, channels);
  }
}

// Most results do not leave the registers: a frozen layer's (activation, perhaps a shortcut), a layer's whose ReLU6 bits are kept,
// and a gradient's behind a ReLU; often the depth is only 8 and the epilogue as long as the reduction. Everything else goes
// through finish_tile. kEnding other than kAny: it is that one, and all vectors are whole.
template <int P, int N, Ending kEnding = Ending::kAny>
TT_INLINE void finish_sums(const Epilogue<T>& e, V (&sums)[P][N], int64_t pixel, int channel, int channels) {
  constexpr bool kKnown = kEnding != Ending::kAny;
  const bool bytes = kKnown || kLanes >= 8 || channel + N * kLanes <= channels;  // ReLU bits of whole vectors
  const bool add = kKnown ? kEnding == Ending::kAdd : e.addend != nullptr;
  const bool relu = kKnown ? kEnding == Ending::kSaving || kEnding == Ending::kRelu6 || kEnding == Ending::kClamp
                           : e.activation != Activation::kNone;
  const bool relu6 = kKnown ? relu : e.activation == Activation::kRelu6;
  const bool fisher = kKnown ? kEnding == Ending::kFisher : e.fisher != nullptr;
  const bool gradient = kKnown ? kEnding == Ending::kGradient || fisher : bytes && e.mask_in && !add && !relu;
  const bool saving = kKnown ? kEnding == Ending::kSaving : bytes && e.mask_out && relu6 && !add && !e.mask_in && !fisher;
  const bool frozen = kKnown ? !gradient && !saving : !(e.mask_out && relu) && !e.mask_in && !fisher;
  // Only the last vector can be a part.
  const auto count_of = [&](int vector) { return kKnown || vector + 1 < N ? kLanes : channels - channel - (N - 1) * kLanes; };
  // Read once: for all the compiler knows, stores change them.
  const int64_t stride = e.out_stride, addend_stride = e.addend_stride;
  T* out = e.out + pixel * stride + channel;
  const auto store_sums = [&](auto first, auto count) __attribute__((always_inline)) {
    unroll<count>(TT_EACH {
      T* const to = row_of(out, first + i, stride);
      unroll<N>(TT_EACH_J { store_up_to(to + j * kLanes, sums[first + i][j], count_of(j)); });
    });
  };
  constexpr Index<0> kFirst{};
  constexpr Index<P> kPixels{};
  if (frozen || saving) {
    if (add) {
      // Where nothing else follows, four pixels are loaded, added and stored at a time: GCC would load them all, into memory.
      constexpr int kGroup = kEnding == Ending::kAdd ? 4 : P;
      const T* addend = e.addend + pixel * addend_stride + channel;
      unroll<P / kGroup>([&](auto group) __attribute__((always_inline)) {
        constexpr Index<group.value * kGroup> kGroupFirst{};
        unroll<kGroup>(TT_EACH {
          const T* const from = row_of(addend, kGroupFirst + i, addend_stride);
          unroll<N>(TT_EACH_J {
            sums[kGroupFirst + i][j] +=
                kKnown ? load_lanes(from + j * kLanes, Whole{}) : load_up_to(from + j * kLanes, count_of(j));
          });
        });
        if constexpr (kEnding == Ending::kAdd) store_sums(kGroupFirst, Index<kGroup>{});
      });
    }
    if (saving) {
      uint8_t* mask = e.mask_out + pixel * mask_bytes(channels);
#if defined(TT_NEON)
      if constexpr (N == 2) {
        store_relu6_bytes<P>(sums, mask + channel / 8, mask_bytes(channels));
      } else
#endif
        unroll<P * N>(TT_EACH {
          store_bits(mask + (i / N) * mask_bytes(channels), channel + (i % N) * kLanes, channels, relu6_bits(sums[i / N][i % N]));
        });
    }
    const Bounds bounds(kEnding == Ending::kClamp ? e.activation : Activation::kRelu6);
    if (relu) unroll<P * N>(TT_EACH { sums[i / N][i % N] = clamp_below(sums[i / N][i % N], bounds.low); });
    if (relu6) unroll<P * N>(TT_EACH { sums[i / N][i % N] = clamp_above(sums[i / N][i % N], bounds.high); });
    if constexpr (kEnding != Ending::kAdd) store_sums(kFirst, kPixels);
  } else if (gradient) {
    const uint8_t* mask = e.mask_in + pixel * mask_bytes(channels);
#if defined(TT_NEON)
    if constexpr (N == 2) {
      keep_masked_bytes<P>(sums, mask + channel / 8, mask_bytes(channels));
    } else
#endif
      unroll<P * N>(TT_EACH {
        sums[i / N][i % N] =
            keep_masked(sums[i / N][i % N], mask + (i / N) * mask_bytes(channels), channel + (i % N) * kLanes, channels);
      });
    store_sums(kFirst, kPixels);
    if (fisher) {
      const T* values = e.values + pixel * stride + channel;
      unroll<N>(TT_EACH {
        V fisher{};
        unroll<P>(TT_EACH_J { fisher += sums[j][i] * load_up_to(values + j * stride + i * kLanes, count_of(i)); });
        T* at = e.fisher + channel + i * kLanes;
        store_up_to(at, load_up_to(at, count_of(i)) + fisher, count_of(i));
      });
    }
  } else {
    V spilled[P * N];
    unroll<P * N>(TT_EACH { spilled[i] = sums[i / N][i % N]; });
    finish_tile(e, spilled, pixel, P, channel, N, channels);
  }
}

#if defined(TT_NEON)
// ReLU6's bits of a finished row, whose values say as much as its sums did: eight channels and up to eight pixels at a time. A
// depthwise kernel, one vector of channels at a time, would write every byte in two halves.
template <int P>
TT_INLINE void save_relu6_bits(const Epilogue<T>& e, int channels, int pixel, int pixels) {
  const auto eight = [&](int c, auto whole) __attribute__((always_inline)) {
    const T* from = e.out + pixel * e.out_stride + c;
    V v[P][2];
    unroll<P>(TT_EACH {
      const T* at = row_of(from, i, e.out_stride);
      v[i][0] = load(at);
      v[i][1] = whole ? load(at + kLanes) : V{};
    });
    store_relu6_bytes<P>(v, e.mask_out + static_cast<int64_t>(pixel) * mask_bytes(channels) + c / 8, mask_bytes(channels));
  };
  for (; pixel + P <= pixels; pixel += P) {
    int c = 0;
    for (; c + 8 <= channels; c += 8) eight(c, Index<1>{});
    if (c < channels) eight(c, Index<0>{});
  }
  if constexpr (P > 1) save_relu6_bits<(P > 4 ? 4 : 1)>(e, channels, pixel, pixels);
}
#endif

void apply_epilogue(const T* input, int64_t pixels, int channels, const Epilogue<T>& e) {
  for (int channel = 0; channel < channels; channel += kLanes) {
    V fisher{};
    for (int64_t p = 0; p < pixels; ++p) {
      V v = load_up_to(input + p * channels + channel, channels - channel);
      if (e.bias) v += load(e.bias + channel);
      finish(e, v, p, channel, channels, fisher);
    }
    add_fisher(e, fisher, channel, channels);
  }
}
