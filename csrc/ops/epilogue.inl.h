// What follows every sum (see Epilogue in kernels.h): bias, shortcut, ReLU with its bit mask, and in the backward pass the mask
// and the Fisher sum. One vector at a time; the branches are the same for a whole tile, so they predict well, and they cost
// nothing beside a tile's reduction.

// What a sum starts from: its bias, which saves adding it behind (a tenth of the work on a sum of eight or nine products). NEON adds
// it behind the sum: there a start from zero is an instruction, too.
#if defined(TT_NEON)
constexpr bool kBiasFirst = false;
#else
constexpr bool kBiasFirst = true;
#endif
TT_INLINE V start(const Epilogue<T>& e, int channel) { return kBiasFirst && e.bias ? load(e.bias + channel) : V{}; }

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
  if (!kBiasFirst && e.bias) v += load(e.bias + channel);
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

// Most results do not leave the registers: a frozen layer's (bias, activation, perhaps a shortcut), a layer's whose ReLU6 bits are
// kept, and a gradient's behind a ReLU; often the depth is only 8 and the epilogue as long as the reduction. Everything else
// goes through finish_tile.
template <int P, int N>
TT_INLINE void finish_sums(const Epilogue<T>& e, V (&sums)[P][N], int64_t pixel, int channel, int channels) {
  const bool bytes = kLanes >= 8 || channel + N * kLanes <= channels;  // ReLU bits of whole vectors
  const bool frozen = e.bias && !e.mask_out && !e.mask_in && !e.fisher;
  const bool saving = bytes && e.bias && e.mask_out && e.activation == Activation::kRelu6 && !e.addend && !e.mask_in && !e.fisher;
  const bool gradient = bytes && !e.bias && !e.addend && e.mask_in && e.activation == Activation::kNone;
  // Read once: for all the compiler knows, stores change them.
  const int64_t stride = e.out_stride, addend_stride = e.addend_stride;
  T* const out = e.out + pixel * stride + channel;
  // Only the last vector can be a part.
  const auto count_of = [&](int vector) { return vector + 1 < N ? kLanes : channels - channel - (N - 1) * kLanes; };
  if (frozen || saving) {
    if constexpr (!kBiasFirst) {
      unroll<N>(TT_EACH {
        const V bias = load(e.bias + channel + i * kLanes);
        unroll<P>(TT_EACH_J { sums[j][i] += bias; });
      });
    }
    if (e.addend) {
      const T* addend = e.addend + pixel * addend_stride + channel;
      unroll<P * N>(
          TT_EACH { sums[i / N][i % N] += load_up_to(addend + (i / N) * addend_stride + (i % N) * kLanes, count_of(i % N)); });
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
    if (e.activation != Activation::kNone) {
      unroll<P * N>(TT_EACH { sums[i / N][i % N] = clamp_below(sums[i / N][i % N], splat(0)); });
      if (e.activation == Activation::kRelu6) {
        unroll<P * N>(TT_EACH { sums[i / N][i % N] = clamp_above(sums[i / N][i % N], splat(6)); });
      }
    }
    unroll<P * N>(TT_EACH { store_up_to(out + (i / N) * stride + (i % N) * kLanes, sums[i / N][i % N], count_of(i % N)); });
  } else if (gradient) {
    const uint8_t* mask = e.mask_in + pixel * mask_bytes(channels);
    unroll<P * N>(TT_EACH {
      sums[i / N][i % N] =
          keep_masked(sums[i / N][i % N], mask + (i / N) * mask_bytes(channels), channel + (i % N) * kLanes, channels);
      store_up_to(out + (i / N) * stride + (i % N) * kLanes, sums[i / N][i % N], count_of(i % N));
    });
    if (e.fisher) {
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

void apply_epilogue(const T* input, int64_t pixels, int channels, const Epilogue<T>& e) {
  for (int channel = 0; channel < channels; channel += kLanes) {
    V fisher{};
    for (int64_t p = 0; p < pixels; ++p) {
      V v = load_up_to(input + p * channels + channel, channels - channel);
      if (kBiasFirst && e.bias) v += load(e.bias + channel);
      finish(e, v, p, channel, channels, fisher);
    }
    add_fisher(e, fisher, channel, channels);
  }
}
