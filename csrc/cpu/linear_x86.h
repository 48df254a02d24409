// What the x86 variants of linear share: vectors of sums and their totals, four at a time.
#pragma once

// GCC's AVX-512 intrinsics read a deliberately undefined vector, and its warning blames our calls.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "cpu/linear.h"

namespace elastic_decode {
namespace {

struct Quads {
  static ELASTIC_AVX2 ELASTIC_INLINE void store(float* out, __m128 values) { _mm_storeu_ps(out, values); }

  static ELASTIC_AVX2 ELASTIC_INLINE __m128 add(__m128 values, const float* bias) {
    return _mm_add_ps(values, _mm_loadu_ps(bias));
  }

  static ELASTIC_AVX2 ELASTIC_INLINE __m128 add(__m128 values, const BFloat16* bias) {
    const __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bias)));
    return _mm_add_ps(values, _mm_castsi128_ps(_mm_slli_epi32(wide, 16)));
  }

  static ELASTIC_AVX2 ELASTIC_INLINE void store(BFloat16* out, __m128 values) {
    const __m128i bits = _mm_castps_si128(values);
    const __m128i even = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    const __m128i rounded =
        _mm_srli_epi32(_mm_add_epi32(bits, _mm_add_epi32(even, _mm_set1_epi32(0x7fff))), 16);
    const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(values, values));
    const __m128i result = _mm_blendv_epi8(rounded, _mm_set1_epi32(0x7fc0), nan);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi32(result, result));
  }
};

struct Sums512 : Quads {
  using Sum = __m512;
  static ELASTIC_AVX512 ELASTIC_INLINE __m512 zero() { return _mm512_setzero_ps(); }

  static ELASTIC_AVX512 ELASTIC_INLINE __m128 reduce(__m512 a, __m512 b, __m512 c, __m512 d) {
    // In each 128-bit lane: a0+a2 b0+b2 a1+a3 b1+b3, then (a0+a2)+(a1+a3) and so on for b, c, d; then the
    // lanes.
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
};

struct Sums256 : Quads {
  using Sum = __m256;
  static ELASTIC_AVX2 ELASTIC_INLINE __m256 zero() { return _mm256_setzero_ps(); }

  static ELASTIC_AVX2 ELASTIC_INLINE __m128 reduce(__m256 a, __m256 b, __m256 c, __m256 d) {
    // In each 128-bit lane: a0+a2 b0+b2 a1+a3 b1+b3, then (a0+a2)+(a1+a3) and so on for b, c, d; then the
    // lanes.
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }
};

}  // namespace
}  // namespace elastic_decode
