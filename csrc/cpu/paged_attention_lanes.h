// Lanes: sixteen floats, in the registers of the instruction set that this file is compiled for. Included
// inside a namespace and a target region, once for each; ELASTIC_LANES says which. No include guard for that
// reason.
//
// Every operation is one rounding a lane, the same in every function that uses it: no result depends on how a
// compiler contracts or reorders.

constexpr float kLeastExponent =
    -87.0f;  // e^x is taken as 0 below: subnormal numbers are slow on some processors

#if ELASTIC_LANES >= 256
ELASTIC_INLINE float sum_eight(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
ELASTIC_INLINE float max_eight(__m256 x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
#endif

#if ELASTIC_LANES == 512

struct Lanes {
  __m512 v;
};
constexpr int kRowsAtOnce = 8;
constexpr int kBlocksAtOnce = 2;

ELASTIC_INLINE Lanes load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
ELASTIC_INLINE void store(float* p, Lanes a) {
  _mm512_storeu_ps(p, a.v);
}
ELASTIC_INLINE Lanes splat(float x) {
  return {_mm512_set1_ps(x)};
}
ELASTIC_INLINE Lanes add(Lanes a, Lanes b) {
  return {_mm512_add_ps(a.v, b.v)};
}
ELASTIC_INLINE Lanes sub(Lanes a, Lanes b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
ELASTIC_INLINE Lanes mul(Lanes a, Lanes b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
ELASTIC_INLINE Lanes mul_add(Lanes a, Lanes b, Lanes c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
// The second where either is NaN.
ELASTIC_INLINE Lanes max(Lanes a, Lanes b) {
  return {_mm512_max_ps(a.v, b.v)};
}
// value * 2^n where x >= kLeastExponent or x is NaN, else 0. n is given as it is and plus 1.5 * 2^23, with
// its low bits in place.
ELASTIC_INLINE Lanes scale_exp(Lanes x, Lanes value, Lanes n, Lanes) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(kLeastExponent), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(keep, value.v, n.v)};
}
// Lanes first <= i < end of x; the others get fill.
ELASTIC_INLINE Lanes keep_range(Lanes x, int first, int end, float fill) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __mmask16 keep = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(first)) &
                         _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(end));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), keep, x.v)};
}
ELASTIC_INLINE Lanes widen(const std::uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
// Words 0..3 of sixteen rows, transposed: out[w * 16 + row].
ELASTIC_INLINE void transpose_quarter(const char* rows, std::ptrdiff_t stride, float* out) {
  __m512i t[4];
  for (int i = 0; i < 4; ++i) {
    const auto piece = [&](int row) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + row * stride));
    };
    __m512i x = _mm512_castsi128_si512(piece(i));
    x = _mm512_inserti32x4(x, piece(i + 4), 1);
    x = _mm512_inserti32x4(x, piece(i + 8), 2);
    t[i] = _mm512_inserti32x4(x, piece(i + 12), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(t[0], t[1]), b = _mm512_unpacklo_epi32(t[2], t[3]);
  const __m512i c = _mm512_unpackhi_epi32(t[0], t[1]), d = _mm512_unpackhi_epi32(t[2], t[3]);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, b));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(a, b));
  _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(c, d));
  _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(c, d));
}
// Sixteen words of two bfloat16 each: the low and the high ones as floats.
ELASTIC_INLINE void split_pairs(Lanes words, Lanes* low, Lanes* high) {
  const __m512i w = _mm512_castps_si512(words.v);
  low->v = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  high->v = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
// Words of (low[i], high[i]).
ELASTIC_INLINE Lanes join_pairs(const std::uint16_t* low, const std::uint16_t* high) {
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
  return {_mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)))};
}
// The sum and the maximum of the lanes, as a fixed tree: halves onto each other. NaN may or may not stay in a
// maximum.
ELASTIC_INLINE __m256 upper_half(__m512 x) {
  return _mm512_extractf32x8_ps(x, 1);
}
ELASTIC_INLINE float sum_lanes(Lanes a) {
  return sum_eight(_mm256_add_ps(_mm512_castps512_ps256(a.v), upper_half(a.v)));
}
ELASTIC_INLINE float max_lanes(Lanes a) {
  return max_eight(_mm256_max_ps(_mm512_castps512_ps256(a.v), upper_half(a.v)));
}
#if ELASTIC_PAIRS
// acc + a.low * b.low + a.high * b.high for words of bfloat16 pairs
ELASTIC_INLINE Lanes dot_pairs(Lanes acc, Lanes a, Lanes b) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}
ELASTIC_INLINE void store_bfloat16(std::uint16_t* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
#endif

#elif ELASTIC_LANES == 256

struct Lanes {
  __m256 v[2];
};
constexpr int kRowsAtOnce = 4;
constexpr int kBlocksAtOnce = 1;

template <class F>
ELASTIC_INLINE Lanes each(F f) {
  return {{f(0), f(1)}};
}
ELASTIC_INLINE Lanes load(const float* p) {
  return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}};
}
ELASTIC_INLINE void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.v[0]);
  _mm256_storeu_ps(p + 8, a.v[1]);
}
ELASTIC_INLINE Lanes splat(float x) {
  return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}};
}
ELASTIC_INLINE Lanes add(Lanes a, Lanes b) {
  return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
}
ELASTIC_INLINE Lanes sub(Lanes a, Lanes b) {
  return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}};
}
ELASTIC_INLINE Lanes mul(Lanes a, Lanes b) {
  return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
}
ELASTIC_INLINE Lanes mul_add(Lanes a, Lanes b, Lanes c) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
ELASTIC_INLINE Lanes max(Lanes a, Lanes b) {
  return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}};
}
ELASTIC_INLINE __m256 scale_half(__m256 x, __m256 value, __m256 shifted) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), exponent));
  return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_set1_ps(kLeastExponent), _CMP_NLT_UQ), scaled);
}
ELASTIC_INLINE Lanes scale_exp(Lanes x, Lanes value, Lanes, Lanes shifted) {
  return {{scale_half(x.v[0], value.v[0], shifted.v[0]), scale_half(x.v[1], value.v[1], shifted.v[1])}};
}
ELASTIC_INLINE __m256 keep_half(__m256 x, int lane0, int first, int end, float fill) {
  const __m256i lane = _mm256_add_epi32(_mm256_set1_epi32(lane0), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i keep = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane),
                                           _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
  return _mm256_blendv_ps(_mm256_set1_ps(fill), x, _mm256_castsi256_ps(keep));
}
ELASTIC_INLINE Lanes keep_range(Lanes x, int first, int end, float fill) {
  return {{keep_half(x.v[0], 0, first, end, fill), keep_half(x.v[1], 8, first, end, fill)}};
}
ELASTIC_INLINE __m256 widen_half(const std::uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
ELASTIC_INLINE Lanes widen(const std::uint16_t* p) {
  return {{widen_half(p), widen_half(p + 8)}};
}
ELASTIC_INLINE __m256i load_two(const char* low, const char* high) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
}
ELASTIC_INLINE void transpose_quarter(const char* rows, std::ptrdiff_t stride, float* out) {
  for (int half = 0; half < 2; ++half, rows += 8 * stride, out += 8) {
    __m256i t[4];
    for (int i = 0; i < 4; ++i) t[i] = load_two(rows + i * stride, rows + (i + 4) * stride);
    const __m256i a = _mm256_unpacklo_epi32(t[0], t[1]), b = _mm256_unpacklo_epi32(t[2], t[3]);
    const __m256i c = _mm256_unpackhi_epi32(t[0], t[1]), d = _mm256_unpackhi_epi32(t[2], t[3]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(a, b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_unpackhi_epi64(a, b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), _mm256_unpacklo_epi64(c, d));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 48), _mm256_unpackhi_epi64(c, d));
  }
}
ELASTIC_INLINE float sum_lanes(Lanes a) {
  return sum_eight(_mm256_add_ps(a.v[0], a.v[1]));
}
ELASTIC_INLINE float max_lanes(Lanes a) {
  return max_eight(_mm256_max_ps(a.v[0], a.v[1]));
}
ELASTIC_INLINE void split_pairs(Lanes words, Lanes* low, Lanes* high) {
  for (int half = 0; half < 2; ++half) {
    const __m256i w = _mm256_castps_si256(words.v[half]);
    low->v[half] = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
    high->v[half] =
        _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
}

#else  // any machine, through the compiler's four-float vectors: SSE2 on x86-64, NEON on arm64

typedef float Quad __attribute__((vector_size(16)));
typedef std::int32_t QuadInt __attribute__((vector_size(16)));

struct Lanes {
  Quad v[4];
};
#if defined(__aarch64__)
constexpr int kRowsAtOnce = 4;
#else
constexpr int kRowsAtOnce = 2;
#endif
constexpr int kBlocksAtOnce = 1;

ELASTIC_INLINE Quad load_quad(const void* p) {
  Quad x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
ELASTIC_INLINE Quad splat_quad(float x) {
  return Quad{x, x, x, x};
}
ELASTIC_INLINE Quad mul_add_quad(Quad a, Quad b, Quad c) {
#if defined(__aarch64__)
  return (Quad)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;  // no fused instruction in the baseline: two roundings, always
#endif
}

#define ELASTIC_EACH_QUAD(expression)                \
  Lanes r;                                           \
  for (int i = 0; i < 4; ++i) r.v[i] = (expression); \
  return r
ELASTIC_INLINE Lanes load(const float* p) {
  ELASTIC_EACH_QUAD(load_quad(p + 4 * i));
}
ELASTIC_INLINE void store(float* p, Lanes a) {
  std::memcpy(p, a.v, sizeof a.v);
}
ELASTIC_INLINE Lanes splat(float x) {
  ELASTIC_EACH_QUAD(splat_quad(x));
}
ELASTIC_INLINE Lanes add(Lanes a, Lanes b) {
  ELASTIC_EACH_QUAD(a.v[i] + b.v[i]);
}
ELASTIC_INLINE Lanes sub(Lanes a, Lanes b) {
  ELASTIC_EACH_QUAD(a.v[i] - b.v[i]);
}
ELASTIC_INLINE Lanes mul(Lanes a, Lanes b) {
  ELASTIC_EACH_QUAD(a.v[i] * b.v[i]);
}
ELASTIC_INLINE Lanes mul_add(Lanes a, Lanes b, Lanes c) {
  ELASTIC_EACH_QUAD(mul_add_quad(a.v[i], b.v[i], c.v[i]));
}
ELASTIC_INLINE Quad select_quad(QuadInt mask, Quad yes, Quad no) {
  return (Quad)((mask & (QuadInt)yes) | (~mask & (QuadInt)no));
}
ELASTIC_INLINE Lanes max(Lanes a, Lanes b) {
  ELASTIC_EACH_QUAD(select_quad((QuadInt)(a.v[i] > b.v[i]), a.v[i], b.v[i]));
}
ELASTIC_INLINE Lanes scale_exp(Lanes x, Lanes value, Lanes, Lanes shifted) {
  Lanes r;
  for (int i = 0; i < 4; ++i) {
    const QuadInt scaled = (QuadInt)value.v[i] + ((QuadInt)shifted.v[i] << 23);
    r.v[i] = (Quad)(~(QuadInt)(x.v[i] < splat_quad(kLeastExponent)) & scaled);
  }
  return r;
}
ELASTIC_INLINE Lanes keep_range(Lanes x, int first, int end, float fill) {
  Lanes r;
  for (int i = 0; i < 4; ++i) {
    const QuadInt lane = QuadInt{0, 1, 2, 3} + 4 * i;
    r.v[i] = select_quad((QuadInt)(lane >= first) & (QuadInt)(lane < end), x.v[i], splat_quad(fill));
  }
  return r;
}
ELASTIC_INLINE Lanes widen(const std::uint16_t* p) {
  float x[16];
  for (int i = 0; i < 16; ++i) x[i] = to_float(BFloat16{p[i]});
  return load(x);
}
ELASTIC_INLINE void transpose_quarter(const char* rows, std::ptrdiff_t stride, float* out) {
  for (int four = 0; four < 4; ++four, rows += 4 * stride, out += 4) {
    Quad t[4];
    for (int i = 0; i < 4; ++i) t[i] = load_quad(rows + i * stride);
    for (int w = 0; w < 4; ++w) {
      const Quad column{t[0][w], t[1][w], t[2][w], t[3][w]};
      std::memcpy(out + 16 * w, &column, sizeof column);
    }
  }
}
ELASTIC_INLINE void split_pairs(Lanes words, Lanes* low, Lanes* high) {
  for (int i = 0; i < 4; ++i) {
    low->v[i] = (Quad)((QuadInt)words.v[i] << 16);
    high->v[i] = (Quad)((QuadInt)words.v[i] & static_cast<std::int32_t>(0xffff0000u));
  }
}
ELASTIC_INLINE float sum_lanes(Lanes a) {
  float x[16];
  store(x, a);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] = x[i] + x[i + width];
  }
  return x[0];
}
ELASTIC_INLINE float max_lanes(Lanes a) {
  float x[16];
  store(x, a);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
  }
  return x[0];
}
#undef ELASTIC_EACH_QUAD

#endif

// e^x for x <= 0 within 2 units in the last place; 0 below kLeastExponent (where the steps are nonsense); NaN
// stays NaN. exp_float's polynomial (simd.h).
ELASTIC_INLINE Lanes exp_nonpositive(Lanes x) {
  const Lanes shift = splat(12582912.0f);
  const Lanes shifted = mul_add(x, splat(1.44269504f), shift);
  const Lanes n = sub(shifted, shift);
  Lanes r = mul_add(n, splat(-0.693359375f), x);
  r = mul_add(n, splat(2.12194440e-4f), r);
  Lanes p = splat(0.0013814459f);
  p = mul_add(p, r, splat(0.00836878122f));
  p = mul_add(p, r, splat(0.0416683944f));
  p = mul_add(p, r, splat(0.166665201f));
  p = mul_add(p, r, splat(0.499999934f));
  p = mul_add(p, r, splat(1.0f));
  p = mul_add(p, r, splat(1.0f));
  return scale_exp(x, p, n, shifted);
}
