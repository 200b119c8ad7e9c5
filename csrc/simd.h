// Vectors of 1 / 4 / 8 / 16 lanes. Included inside the anonymous namespace of one ISA file, after `T` (the scalar type) and
// `kLanes` are defined. Arithmetic comes from compiler vector extensions; only what those lack is an intrinsic.
//
// No include guard: scalar.cpp includes it once for float and once for double.

#define TT_INLINE inline __attribute__((always_inline))

// Compile-time loops. GCC keeps an array of vectors in registers only if every index is a constant before its scalar
// replacement pass runs; ordinary loops are unrolled too late for that (seen with GCC 12).
template <int I>
struct Index {
  static constexpr int value = I;
  constexpr TT_INLINE operator int() const { return I; }
};
template <int... I>
struct Sequence {};
template <int N, int... I>
struct MakeSequence : MakeSequence<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSequence<0, I...> {
  using Type = Sequence<I...>;
};
template <int... I, class F>
TT_INLINE void unroll_over(Sequence<I...>, F&& body) {
  (body(Index<I>{}), ...);
}
template <int N, class F>
TT_INLINE void unroll(F&& body) {
  unroll_over(typename MakeSequence<N>::Type{}, body);
}
#define TT_EACH [&](auto i) __attribute__((always_inline))
#define TT_EACH_J [&](auto j) __attribute__((always_inline))

#if !defined(TT_NEON)
template <class P>
TT_INLINE P* row_of(P* first, int i, int64_t by) {
  return first + i * by;
}
#endif

#if defined(TT_SCALAR)

using V = T;
TT_INLINE V load(const T* p) { return *p; }
TT_INLINE void store(T* p, V v) { *p = v; }
TT_INLINE V splat(T x) { return x; }
// A NaN in `v` comes out as NaN: a fault must reach the checks, not vanish in a ReLU.
TT_INLINE V clamp_below(V v, V low) { return v < low ? low : v; }
TT_INLINE V clamp_above(V v, V high) { return v > high ? high : v; }
TT_INLINE unsigned positive(V v) { return v > T(0); }
TT_INLINE unsigned below(V v, V high) { return v < high; }
TT_INLINE V keep(V v, unsigned bits) { return (bits & 1) ? v : T(0); }

#else

typedef T V __attribute__((vector_size(sizeof(T) * kLanes)));
typedef T UnalignedV __attribute__((vector_size(sizeof(T) * kLanes), aligned(sizeof(T)), may_alias));
TT_INLINE V load(const T* p) { return *reinterpret_cast<const UnalignedV*>(p); }
TT_INLINE void store(T* p, V v) { *reinterpret_cast<UnalignedV*>(p) = v; }
TT_INLINE V splat(T x) { return x - V{}; }

#if defined(TT_NEON)
TT_INLINE V clamp_below(V v, V low) { return (V)vmaxq_f32((float32x4_t)v, (float32x4_t)low); }
TT_INLINE V clamp_above(V v, V high) { return (V)vminq_f32((float32x4_t)v, (float32x4_t)high); }
TT_INLINE unsigned gather_bits(uint32x4_t lanes) {
  const uint32x4_t bits = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(lanes, bits));
}
TT_INLINE unsigned positive(V v) { return gather_bits(vcgtq_f32((float32x4_t)v, vdupq_n_f32(0))); }
TT_INLINE unsigned below(V v, V high) { return gather_bits(vcltq_f32((float32x4_t)v, (float32x4_t)high)); }
TT_INLINE V keep(V v, unsigned bits) {
  const uint32x4_t lane = {1, 2, 4, 8};
  return (V)vandq_u32((uint32x4_t)v, vtstq_u32(vdupq_n_u32(bits), lane));
}
// Two values in the lower half of a vector: the A53 issues a 64-bit load beside an FMA, a 128-bit one alone and for two cycles. By
// this builtin because GCC takes vld1_f32 apart into single values again.
TT_INLINE V load_two(const T* p) { return (V)vcombine_f32(vld1_f32(p), vdup_n_f32(0)); }
// A whole vector by two 64-bit loads.
TT_INLINE V load_halves(const T* p) {
  return (V)vld1q_lane_f64(reinterpret_cast<const double*>(p + 2), (float64x2_t)load_two(p), 1);
}
// Row i of rows `by` apart, where they are asked for in order. GCC would compute the addresses of all rows of a tile ahead, more than
// there are registers.
template <class P>
TT_INLINE P* row_of(P*& row, int i, int64_t by) {
  if (i > 0) {
    row += by;
    asm("" : "+r"(row));
  }
  return row;
}
// sum += v * x[lane], one instruction.
template <int kLane>
TT_INLINE void add_product(V& sum, V v, V x, Index<kLane>) {
  sum = (V)vfmaq_laneq_f32((float32x4_t)sum, (float32x4_t)v, (float32x4_t)x, kLane);
}
#elif defined(TT_AVX2)
// x86 max / min return the second operand where one is NaN.
TT_INLINE V clamp_below(V v, V low) { return (V)_mm256_max_ps((__m256)low, (__m256)v); }
TT_INLINE V clamp_above(V v, V high) { return (V)_mm256_min_ps((__m256)high, (__m256)v); }
TT_INLINE unsigned positive(V v) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_GT_OQ)); }
TT_INLINE unsigned below(V v, V high) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)high, _CMP_LT_OQ)); }
TT_INLINE V keep(V v, unsigned bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane), lane);
  return (V)_mm256_and_ps((__m256)v, _mm256_castsi256_ps(set));
}
#elif defined(TT_AVX512)
TT_INLINE V clamp_below(V v, V low) { return (V)_mm512_max_ps((__m512)low, (__m512)v); }
TT_INLINE V clamp_above(V v, V high) { return (V)_mm512_min_ps((__m512)high, (__m512)v); }
TT_INLINE unsigned positive(V v) { return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ); }
TT_INLINE unsigned below(V v, V high) { return _mm512_cmp_ps_mask((__m512)v, (__m512)high, _CMP_LT_OQ); }
TT_INLINE V keep(V v, unsigned bits) { return (V)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v); }
#endif
#endif  // TT_SCALAR

TT_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
TT_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// The first `count` lanes only, the rest zero: for channel counts that are no multiple of the lanes.
#if defined(TT_AVX512)
TT_INLINE V load_some(const T* p, int count) { return (V)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p); }
TT_INLINE void store_some(T* p, V v, int count) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v); }
#elif defined(TT_AVX2)
TT_INLINE __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TT_INLINE V load_some(const T* p, int count) { return (V)_mm256_maskload_ps(p, first_lanes(count)); }
TT_INLINE void store_some(T* p, V v, int count) { _mm256_maskstore_ps(p, first_lanes(count), (__m256)v); }
#else
TT_INLINE V load_some(const T* p, int count) {
  T lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
TT_INLINE void store_some(T* p, V v, int count) {
  T lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}
#endif
// Which lanes of a vector exist, as a type: all of them, or, where the ISA loads parts at good speed, those of a mask. (A masked load
// takes a port that FMAs want, too; a kernel of whole vectors is better off without.)
struct Whole {};
#if defined(TT_NEON)
TT_INLINE V load_lanes(const T* p, Whole) { return load_halves(p); }
#else
TT_INLINE V load_lanes(const T* p, Whole) { return load(p); }
#endif
#if defined(TT_AVX512)
constexpr bool kLoadsParts = true;
using Part = __mmask16;
TT_INLINE Part part_of(int count) { return static_cast<Part>(count >= kLanes ? 0xFFFF : (1 << count) - 1); }
TT_INLINE V load_lanes(const T* p, Part part) { return (V)_mm512_maskz_loadu_ps(part, p); }
#else
constexpr bool kLoadsParts = false;
TT_INLINE Whole part_of(int) { return {}; }
#endif

// Where half a vector of outputs would be left over, a vector can hold two values of the depth for each of them instead: lane 2 o is
// output o's share of the even positions, lane 2 o + 1 that of the odd ones.
#if defined(TT_AVX512)
constexpr bool kPairsDepth = true;
// x[0] x[1] x[0] x[1] ..., by one load.
TT_INLINE V splat_pair(const T* x) {
  double both;
  __builtin_memcpy(&both, x, sizeof both);
  return (V)_mm512_set1_pd(both);
}
// Each lane pair's sum: of `a` in a's first half, of `b` in b's; what lies behind means nothing.
TT_INLINE void add_lane_pairs(V& a, V& b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  a = (V)_mm512_permutex2var_ps((__m512)a, even, (__m512)b) + (V)_mm512_permutex2var_ps((__m512)a, odd, (__m512)b);
  b = (V)_mm512_maskz_shuffle_f32x4(0xFFFF, (__m512)a, (__m512)a, 0xEE);  // (unmasked, GCC 12 warns of its own header)
}
#else
constexpr bool kPairsDepth = false;
#endif

#if defined(TT_AVX512)
// With a mask either way: it costs nothing, branches in a row of stores do.
TT_INLINE V load_up_to(const T* p, int count) { return load_lanes(p, part_of(count)); }
TT_INLINE void store_up_to(T* p, V v, int count) { _mm512_mask_storeu_ps(p, part_of(count), (__m512)v); }
#else
TT_INLINE V load_up_to(const T* p, int count) { return count >= kLanes ? load(p) : load_some(p, count); }
TT_INLINE void store_up_to(T* p, V v, int count) {
  if (count >= kLanes) {
    store(p, v);
  } else {
    store_some(p, v, count);
  }
}
#endif

// Mask bits of lanes [channel, channel + kLanes), channel a multiple of kLanes. Narrow vectors share a byte: they are written
// in ascending order of channel, the first one clearing it.
TT_INLINE void store_bits(uint8_t* mask, int channel, int channels, unsigned bits) {
  uint8_t* byte = mask + channel / 8;
  if constexpr (kLanes >= 8) {
    byte[0] = static_cast<uint8_t>(bits);
    if constexpr (kLanes == 16) {
      if (channels - channel > 8) byte[1] = static_cast<uint8_t>(bits >> 8);
    }
  } else {
    const int shift = channel % 8;
    byte[0] = static_cast<uint8_t>(shift == 0 ? bits : byte[0] | bits << shift);
  }
}
TT_INLINE unsigned load_bits(const uint8_t* mask, int channel, int channels) {
  const uint8_t* byte = mask + channel / 8;
  if constexpr (kLanes == 16) {
    return byte[0] | (channels - channel > 8 ? static_cast<unsigned>(byte[1]) << 8 : 0u);
  } else if constexpr (kLanes == 8) {
    return byte[0];
  } else {
    return static_cast<unsigned>(byte[0]) >> (channel % 8);
  }
}

// ReLU6's derivative, one bit a lane.
TT_INLINE unsigned relu6_bits(V v) { return positive(v) & below(v, splat(6)); }

// v where the mask's bits of lanes [channel, channel + kLanes) are set, else 0.
#if defined(TT_NEON)
TT_INLINE V keep_masked(V v, const uint8_t* mask, int channel, int) {
  // The byte goes to all lanes in one load; through a general register it would take four instructions.
  const uint32x4_t lane = uint32x4_t{1, 2, 4, 8} << static_cast<uint32_t>(channel % 8);
  return (V)vandq_u32((uint32x4_t)v, vtstq_u32(vreinterpretq_u32_u8(vld1q_dup_u8(mask + channel / 8)), lane));
}

// P pixels of eight channels where the bits of their bytes, `stride` apart, are set: half of the loads it takes vector by vector.
template <int P>
TT_INLINE void keep_masked_bytes(V (&v)[P][2], const uint8_t* mask, int64_t stride) {
  const uint32x4_t lanes[2] = {{1, 2, 4, 8}, {16, 32, 64, 128}};
  uint32x4_t bytes[P];
  unroll<P>(TT_EACH { bytes[i] = vreinterpretq_u32_u8(vld1q_dup_u8(row_of(mask, i, stride))); });
  unroll<2 * P>(TT_EACH { v[i / 2][i % 2] = (V)vandq_u32((uint32x4_t)v[i / 2][i % 2], vtstq_u32(bytes[i / 2], lanes[i % 2])); });
}

// The mask bytes of ReLU6 for P pixels of eight channels, `stride` bytes apart: as many instructions as outputs, half of what it
// takes pixel by pixel.
template <int P>
TT_INLINE void store_relu6_bytes(const V (&v)[P][2], uint8_t* mask, int64_t stride) {
  // 0 < v < 6 by one comparison: as integers positive floats are in order, and 0 - 1 and negative floats behind all others.
  const uint32x4_t one = vdupq_n_u32(1), six = vdupq_n_u32(0x40C00000 - 1);
  uint16x8_t wide[P];
  unroll<P>(TT_EACH {
    uint32x4_t inside[2];
    unroll<2>(TT_EACH_J { inside[j] = vcltq_u32(vsubq_u32((uint32x4_t)v[i][j], one), six); });
    wide[i] = vuzp1q_u16(vreinterpretq_u16_u32(inside[0]), vreinterpretq_u16_u32(inside[1]));
  });
  const uint8x16_t bits = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  uint8x16_t sums[4] = {};  // two pixels each; then their lanes in pairs, three times
  unroll<(P + 1) / 2>(TT_EACH {
    constexpr int kSecond = 2 * i.value + 1 < P ? 2 * i.value + 1 : P - 1;
    sums[i] = vandq_u8(vuzp1q_u8(vreinterpretq_u8_u16(wide[2 * i]), vreinterpretq_u8_u16(wide[kSecond])), bits);
  });
  sums[0] = vpaddq_u8(sums[0], sums[1]);
  sums[1] = vpaddq_u8(sums[2], sums[3]);
  sums[0] = vpaddq_u8(sums[0], sums[1]);
  sums[0] = vpaddq_u8(sums[0], sums[0]);
  unroll<P>(TT_EACH { vst1q_lane_u8(row_of(mask, i, stride), sums[0], i.value); });
}
#else
TT_INLINE V keep_masked(V v, const uint8_t* mask, int channel, int channels) { return keep(v, load_bits(mask, channel, channels)); }
#endif
