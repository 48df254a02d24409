// sample_lanes.h in AVX2 and FMA: 16 lanes are two registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/sample_kernels.h"
#include "philox.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "cpu/sample_lanes.h"

namespace elastic_decode {
namespace {

struct Avx2 {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  using C = I;
  using M = F;  // all bits of a lane

  static inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static inline void store(float* p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  static inline F both(__m256 v) { return {v, v}; }
  static inline I both(__m256i v) { return {v, v}; }
  static inline F set(float v) { return both(_mm256_set1_ps(v)); }
  static inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static inline F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static inline F negate(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(x.a, sign), _mm256_xor_ps(x.b, sign)};
  }
  static inline M unordered(F x, F y) {
    return {_mm256_cmp_ps(x.a, y.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, y.b, _CMP_UNORD_Q)};
  }
  static inline M at_least(F x, F y) {
    return {_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)};
  }
  static inline M less_int(I x, std::uint32_t y) {  // unsigned: x <= y - 1 where the smaller of both is x
    const __m256i last = _mm256_set1_epi32(static_cast<int>(y - 1));
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_min_epu32(x.a, last), x.a)),
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_min_epu32(x.b, last), x.b))};
  }
  static inline M first(std::int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i n = _mm256_set1_epi32(static_cast<int>(count));
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(n, lane)),
            _mm256_castsi256_ps(_mm256_cmpgt_epi32(n, _mm256_add_epi32(lane, _mm256_set1_epi32(8))))};
  }
  static inline M either(M x, M y) { return {_mm256_or_ps(x.a, y.a), _mm256_or_ps(x.b, y.b)}; }
  static inline M both_of(M x, M y) { return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }
  static inline M but_not(M x, M y) { return {_mm256_andnot_ps(y.a, x.a), _mm256_andnot_ps(y.b, x.b)}; }
  static inline std::uint32_t mask(M m) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(m.a)) |
           static_cast<std::uint32_t>(_mm256_movemask_ps(m.b)) << 8;
  }
  static inline F select(M m, F yes, F no) {
    return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
  }

  static inline I bits(F v) { return {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)}; }
  static inline F from_bits(I v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
  static inline I set_int(std::uint32_t v) { return both(_mm256_set1_epi32(static_cast<int>(v))); }
  static inline I add_int(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static inline I sub_int(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static inline I complement(I x) {
    const __m256i ones = _mm256_set1_epi32(-1);
    return {_mm256_xor_si256(x.a, ones), _mm256_xor_si256(x.b, ones)};
  }
  template <int n>
  static inline I shift_left(I v) {
    return {_mm256_slli_epi32(v.a, n), _mm256_slli_epi32(v.b, n)};
  }
  template <int n>
  static inline I shift_right_signed(I v) {
    return {_mm256_srai_epi32(v.a, n), _mm256_srai_epi32(v.b, n)};
  }
  // Both halves of an unsigned word are exact; the one addition rounds to nearest.
  static inline __m256 unsigned_to_float(__m256i v) {
    const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(v, 16)), _mm256_set1_ps(65536.0f), low);
  }
  static inline F to_float(I v) { return {unsigned_to_float(v.a), unsigned_to_float(v.b)}; }
  static inline I truncate(F v) { return {_mm256_cvttps_epi32(v.a), _mm256_cvttps_epi32(v.b)}; }
  static inline F to_float_signed(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  static inline I load_int(const std::uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
  }
  static inline void store_int(std::uint32_t* p, I v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), v.b);
  }
  // From the exponent of word >> 8, which converts exactly; far too low (so nothing is skipped wrongly) for
  // words below 256.
  static inline __m256 floor_log2(__m256i v) {
    const __m256i field =
        _mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srli_epi32(v, 8))), 23);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(field, _mm256_set1_epi32(127 - 8)));
  }
  static inline F floor_log2(I v) { return {floor_log2(v.a), floor_log2(v.b)}; }

  static inline C set_wide(std::uint32_t v) { return both(_mm256_set1_epi64x(v)); }
  static inline C multiply(C x, std::uint32_t y) {
    const __m256i m = _mm256_set1_epi64x(y);
    return {_mm256_mul_epu32(x.a, m), _mm256_mul_epu32(x.b, m)};
  }
  static inline C high(C x) { return {_mm256_srli_epi64(x.a, 32), _mm256_srli_epi64(x.b, 32)}; }
  static inline C exclusive_or(C x, C y, C z) {
    return {_mm256_xor_si256(_mm256_xor_si256(x.a, y.a), z.a),
            _mm256_xor_si256(_mm256_xor_si256(x.b, y.b), z.b)};
  }
  template <int n>
  static inline C shift_right_wide(C x) {
    return {_mm256_srli_epi64(x.a, n), _mm256_srli_epi64(x.b, n)};
  }
  static inline C load_wide(const std::int32_t* p) {
    return {_mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 4)))};
  }
  // In the order in which interleave() leaves ids ascending.
  static inline C counters(std::uint32_t first) {
    const __m256i base = _mm256_set1_epi64x(first);
    return {_mm256_add_epi64(base, _mm256_setr_epi64x(0, 2, 1, 3)),
            _mm256_add_epi64(base, _mm256_setr_epi64x(4, 6, 5, 7))};
  }
  static inline __m256i pair(__m256i x, __m256i y) {
    return _mm256_blend_epi32(x, _mm256_slli_epi64(y, 32), 0xAA);
  }
  static inline void interleave(const C* w, I* low, I* high) {
    const __m256i a0 = pair(w[0].a, w[1].a), a1 = pair(w[2].a, w[3].a);
    const __m256i b0 = pair(w[0].b, w[1].b), b1 = pair(w[2].b, w[3].b);
    *low = {_mm256_unpacklo_epi64(a0, a1), _mm256_unpackhi_epi64(a0, a1)};
    *high = {_mm256_unpacklo_epi64(b0, b1), _mm256_unpackhi_epi64(b0, b1)};
  }
  static inline __m256i pick(__m256i id, __m256i w0, __m256i w1, __m256i w2, __m256i w3) {
    const __m256d odd = _mm256_castsi256_pd(_mm256_slli_epi64(id, 63));  // the blend looks at the sign bit
    const __m256d upper = _mm256_castsi256_pd(_mm256_slli_epi64(id, 62));
    const __m256d low = _mm256_blendv_pd(_mm256_castsi256_pd(w0), _mm256_castsi256_pd(w1), odd);
    const __m256d high = _mm256_blendv_pd(_mm256_castsi256_pd(w2), _mm256_castsi256_pd(w3), odd);
    return _mm256_castpd_si256(_mm256_blendv_pd(low, high, upper));
  }
  // Of every lane, the word numbered by the low two bits of its id.
  static inline C pick(C id, const C* w) {
    return {pick(id.a, w[0].a, w[1].a, w[2].a, w[3].a), pick(id.b, w[0].b, w[1].b, w[2].b, w[3].b)};
  }
  static inline __m256i narrow(C x) {  // the low halves of 8 lanes
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    return _mm256_blend_epi32(_mm256_permutevar8x32_epi32(x.a, order),
                              _mm256_permutevar8x32_epi32(x.b, order), 0xF0);
  }
  static inline I narrow(C x, C y) { return {narrow(x), narrow(y)}; }
  static inline std::int64_t compress(M m, F v, std::int32_t first_id, float* values, std::int32_t* ids) {
    float lane[16];
    store(lane, v);
    std::int64_t found = 0;
    for (std::uint32_t left = mask(m); left != 0; left &= left - 1) {
      const int at = __builtin_ctz(left);
      values[found] = lane[at];
      ids[found++] = first_id + at;
    }
    return found;
  }
};

}  // namespace

const SampleKernels kSampleAvx2 = SampleLanes<Avx2>::kernels();

}  // namespace elastic_decode

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
