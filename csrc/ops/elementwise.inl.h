// Everything that is bound by memory rather than arithmetic: sums over pixels, pooling, gathering, reading the image, optimisers.
// Plain loops: the compiler vectorises them for each ISA.

void fisher_sum(const T* __restrict a, const T* __restrict g, int64_t pixels, int channels, T* __restrict fisher) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int c = 0; c < channels; ++c) fisher[c] += a[p * channels + c] * g[p * channels + c];
  }
}

void grad_bias(const T* __restrict g, int64_t pixels, int channels, T* __restrict grad) {
  for (int c = 0; c < channels; c += kLanes) {
    const int count = channels - c;
    V sum{};
    for (int64_t p = 0; p < pixels; ++p) sum += load_up_to(g + p * channels + c, count);
    store_up_to(grad + c, load_up_to(grad + c, count) + sum, count);
  }
}

void gather_columns(const T* __restrict in, int64_t pixels, int64_t stride, const int32_t* __restrict columns, int count,
                    T* __restrict out) {
  // Four pixels for every index that is read.
  for (; pixels >= 4; pixels -= 4) {
    const T *in1 = in + stride, *in2 = in1 + stride, *in3 = in2 + stride;
    T *out1 = out + count, *out2 = out1 + count, *out3 = out2 + count;
    for (int s = 0; s < count; ++s) {
      const int32_t c = columns[s];
      const T a = in[c], b = in1[c], d = in2[c], e = in3[c];
      out[s] = a;
      out1[s] = b;
      out2[s] = d;
      out3[s] = e;
    }
    in = in3 + stride;
    out = out3 + count;
  }
  for (; pixels > 0; --pixels) {
    for (int s = 0; s < count; ++s) out[s] = in[columns[s]];
    in += stride;
    out += count;
  }
}

void pool(const Pool<T>& p) {
  for (int oy = 0; oy < p.height_out; ++oy) {
    for (int ox = 0; ox < p.width_out; ++ox) {
      T* out = p.out + (static_cast<int64_t>(oy) * p.width_out + ox) * p.channels;
      int inside = 0;
      for (int ky = 0; ky < p.kernel; ++ky) {
        for (int kx = 0; kx < p.kernel; ++kx) {
          const int iy = oy * p.stride + ky - p.padding, ix = ox * p.stride + kx - p.padding;
          if (iy < 0 || iy >= p.height_in || ix < 0 || ix >= p.width_in) continue;
          const T* in = p.input + (static_cast<int64_t>(iy) * p.width_in + ix) * p.channels;
          if (inside++ == 0) {
            for (int c = 0; c < p.channels; ++c) out[c] = in[c];
          } else if (p.kind == PoolKind::kMax) {
            for (int c = 0; c < p.channels; ++c) out[c] = in[c] > out[c] ? in[c] : out[c];
          } else {
            for (int c = 0; c < p.channels; ++c) out[c] += in[c];
          }
        }
      }
      if (p.kind == PoolKind::kAverage && inside > 1) {
        for (int c = 0; c < p.channels; ++c) out[c] /= T(inside);
      }
    }
  }
}

void pool_backward(const Pool<T>& p) {
  const int64_t count = static_cast<int64_t>(p.height_in) * p.width_in * p.channels;
  for (int64_t i = 0; i < count; ++i) p.grad_input[i] = 0;
  for (int oy = 0; oy < p.height_out; ++oy) {
    for (int ox = 0; ox < p.width_out; ++ox) {
      const T* grad = p.grad_output + (static_cast<int64_t>(oy) * p.width_out + ox) * p.channels;
      const int top = oy * p.stride - p.padding, left = ox * p.stride - p.padding;
      const int y0 = top < 0 ? 0 : top, x0 = left < 0 ? 0 : left;
      const int y1 = top + p.kernel < p.height_in ? top + p.kernel : p.height_in;
      const int x1 = left + p.kernel < p.width_in ? left + p.kernel : p.width_in;
      const T share = T(1) / T((y1 - y0) * (x1 - x0));
      for (int c = 0; c < p.channels; ++c) {
        int64_t winner = (static_cast<int64_t>(y0) * p.width_in + x0) * p.channels + c;
        for (int y = y0; y < y1; ++y) {
          for (int x = x0; x < x1; ++x) {
            const int64_t at = (static_cast<int64_t>(y) * p.width_in + x) * p.channels + c;
            if (p.kind == PoolKind::kAverage) {
              p.grad_input[at] += grad[c] * share;
            } else if (p.input[at] > p.input[winner]) {
              winner = at;
            }
          }
        }
        if (p.kind == PoolKind::kMax) p.grad_input[winner] += grad[c];
      }
    }
  }
}

void global_average(const T* __restrict in, int64_t pixels, int channels, T* __restrict out) {
  const T share = T(1) / T(pixels);
  for (int c = 0; c < channels; ++c) out[c] = 0;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int c = 0; c < channels; ++c) out[c] += in[p * channels + c];
  }
  for (int c = 0; c < channels; ++c) out[c] *= share;
}

void image_sum(const uint8_t* bytes, const float* values, int64_t pixels, double* sums) {
  for (int c = 0; c < 3; ++c) sums[c] = 0;
  if (bytes) {
    // Blocks short enough for 32-bit sums; six lanes of one colour pattern vectorise better than three.
    for (int64_t start = 0; start < pixels; start += 1 << 20) {
      const int64_t end = start + (1 << 20) < pixels ? start + (1 << 20) : pixels;
      uint32_t r = 0, g = 0, b = 0;
      for (int64_t p = start; p < end; ++p) {
        r += bytes[3 * p];
        g += bytes[3 * p + 1];
        b += bytes[3 * p + 2];
      }
      sums[0] += r;
      sums[1] += g;
      sums[2] += b;
    }
  } else {
    for (int64_t i = 0; i < 3 * pixels; ++i) sums[i % 3] += static_cast<double>(values[i]);
  }
}

template <bool kGrey, class In>
TT_INLINE void image_pixels(const ImageRow<T>& r, const In* __restrict in, int count, T* __restrict out) {
  const T s0 = r.scale[0], s1 = r.scale[1], s2 = r.scale[2], o0 = r.offset[0], o1 = r.offset[1], o2 = r.offset[2];
  const T g0 = r.grey_scale[0], g1 = r.grey_scale[1], g2 = r.grey_scale[2];
  for (int x = 0; x < count; ++x) {
    const T red = static_cast<T>(in[3 * x]), green = static_cast<T>(in[3 * x + 1]), blue = static_cast<T>(in[3 * x + 2]);
    const T grey = kGrey ? g0 * red + g1 * green + g2 * blue : T(0);
    out[3 * x] = s0 * red + o0 + grey;
    out[3 * x + 1] = s1 * green + o1 + grey;
    out[3 * x + 2] = s2 * blue + o2 + grey;
  }
}

template <class In>
void image_pixels(const ImageRow<T>& r, const In* row, int from, int count, T* out) {
  const In* const in = row + 3 * (r.mirror ? r.width - from - count : from);
  r.grey ? image_pixels<true>(r, in, count, out) : image_pixels<false>(r, in, count, out);
  if (!r.mirror) return;
  // Turned round afterwards: compilers vectorise the loop above forwards only, and that is worth more than this costs.
  for (T *left = out, *right = out + 3 * (count - 1); left < right; left += 3, right -= 3) {
    for (int c = 0; c < 3; ++c) {
      const T value = left[c];
      left[c] = right[c];
      right[c] = value;
    }
  }
}

void image_row(const ImageRow<T>& r) {
  const int from = r.shift < 0 ? -r.shift : 0;  // first source pixel that stays inside
  const int at = r.shift > 0 ? r.shift : 0;     // where it lands
  const int count = r.width - from - at > 0 ? r.width - from - at : 0;
  for (int i = 0; i < 3 * at && i < 3 * r.width; ++i) r.out[i] = 0;
  if (count > 0) {
    if (r.bytes) {
      image_pixels(r, r.bytes, from, count, r.out + 3 * at);
    } else {
      image_pixels(r, r.values, from, count, r.out + 3 * at);
    }
  }
  for (int i = 3 * (at + count); i < 3 * r.width; ++i) r.out[i] = 0;
}

void adam(const Adam<T>& a) {
  const T* __restrict grad = a.grad;
  T* __restrict weight = a.weight;
  T* __restrict first = a.first_moment;
  T* __restrict second = a.second_moment;
  const T beta1 = a.beta1, beta2 = a.beta2, epsilon = a.epsilon, correction2 = a.correction2;
  const T rate = a.learning_rate * a.correction1;
  for (int64_t i = 0; i < a.count; ++i) {
    const T m = beta1 * first[i] + (1 - beta1) * grad[i];
    const T v = beta2 * second[i] + (1 - beta2) * grad[i] * grad[i];
    first[i] = m;
    second[i] = v;
    weight[i] -= rate * m / (square_root(v * correction2) + epsilon);
  }
}

void sgd(const Sgd<T>& s) {
  const T* __restrict grad = s.grad;
  T* __restrict weight = s.weight;
  T* __restrict velocity = s.velocity;
  const T rate = s.learning_rate, momentum = s.momentum;
  if (velocity) {
    for (int64_t i = 0; i < s.count; ++i) {
      velocity[i] = momentum * velocity[i] + grad[i];
      weight[i] -= rate * velocity[i];
    }
  } else {
    for (int64_t i = 0; i < s.count; ++i) weight[i] -= rate * grad[i];
  }
}

T magnitude(const T* x, int64_t count) {
  V largest{}, fault{};  // x - x is 0 where x is finite, NaN elsewhere
  for (int64_t i = 0; i < count; i += kLanes) {
    const V v = count - i < kLanes ? load_some(x + i, static_cast<int>(count - i)) : load(x + i);
    largest = clamp_below(largest, clamp_below(v, -v));
    fault += v - v;
  }
  T sizes[kLanes], faults[kLanes], most = 0, faulty = 0;
  store(sizes, largest);
  store(faults, fault);
  for (int lane = 0; lane < kLanes; ++lane) {
    most = sizes[lane] > most ? sizes[lane] : most;
    faulty += faults[lane];
  }
  return faulty == 0 ? most : T(__builtin_inf());
}

void accumulate(const T* __restrict x, int64_t count, T* __restrict y) {
  for (int64_t i = 0; i < count; ++i) y[i] += x[i];
}

int64_t fma_peak(int64_t rounds, T* result) {
  constexpr int kChains = 12;
  V sum[kChains];
  unroll<kChains>(TT_EACH { sum[i] = splat(T(i.value)); });
  const V factor = splat(*result);
  for (int64_t r = 0; r < rounds; ++r) {
    unroll<kChains>(TT_EACH { sum[i] = sum[i] * factor + factor; });
  }
  V total{};
  unroll<kChains>(TT_EACH { total += sum[i]; });
  T lanes[kLanes];
  store(lanes, total);
  *result = lanes[0];
  return rounds * kChains * kLanes;
}
