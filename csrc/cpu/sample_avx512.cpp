// sample_lanes.h in AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // GCC 12 and older, of their own _mm512_undefined_ps()
#endif
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/sample_kernels.h"
#include "philox.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "cpu/sample_lanes.h"

namespace elastic_decode {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using C = __m512i;
  using M = __mmask16;

  static inline F load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static inline F set(float v) { return _mm512_set1_ps(v); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
  static inline F negate(F a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
  static inline M unordered(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  static inline M at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static inline M less_int(I a, std::uint32_t b) {
    return _mm512_cmplt_epu32_mask(a, _mm512_set1_epi32(static_cast<int>(b)));
  }
  static inline M first(std::int64_t count) { return static_cast<M>((1u << count) - 1); }
  static inline M either(M a, M b) { return static_cast<M>(a | b); }
  static inline M both_of(M a, M b) { return static_cast<M>(a & b); }
  static inline M but_not(M a, M b) { return static_cast<M>(a & ~b); }
  static inline std::uint32_t mask(M m) { return m; }
  static inline F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }

  static inline I bits(F v) { return _mm512_castps_si512(v); }
  static inline F from_bits(I v) { return _mm512_castsi512_ps(v); }
  static inline I set_int(std::uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
  static inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static inline I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
  static inline I complement(I a) { return _mm512_xor_si512(a, _mm512_set1_epi32(-1)); }
  template <int n>
  static inline I shift_left(I v) {
    return _mm512_slli_epi32(v, n);
  }
  template <int n>
  static inline I shift_right_signed(I v) {
    return _mm512_srai_epi32(v, n);
  }
  static inline F to_float(I v) { return _mm512_cvtepu32_ps(v); }
  static inline I truncate(F v) { return _mm512_cvttps_epi32(v); }
  static inline F to_float_signed(I v) { return _mm512_cvtepi32_ps(v); }
  static inline I load_int(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
  static inline void store_int(std::uint32_t* p, I v) { _mm512_storeu_si512(p, v); }
  // -inf for 0. The conversion truncates, so a word just below a power of two does not round up to it.
  static inline F floor_log2(I v) {
    return _mm512_getexp_ps(_mm512_cvt_roundepu32_ps(v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
  }

  static inline C set_wide(std::uint32_t v) { return _mm512_set1_epi64(v); }
  static inline C multiply(C a, std::uint32_t b) { return _mm512_mul_epu32(a, _mm512_set1_epi64(b)); }
  static inline C high(C a) { return _mm512_srli_epi64(a, 32); }
  static inline C exclusive_or(C a, C b, C c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  template <int n>
  static inline C shift_right_wide(C a) {
    return _mm512_srli_epi64(a, n);
  }
  static inline C load_wide(const std::int32_t* p) {
    return _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // In the order in which interleave() leaves ids ascending.
  static inline C counters(std::uint32_t first) {
    return _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static inline void interleave(const C* w, I* low, I* high) {
    const C first = _mm512_mask_shuffle_epi32(w[0], 0xAAAA, w[1], _MM_PERM_CCAA);   // w0 | w1 << 32
    const C second = _mm512_mask_shuffle_epi32(w[2], 0xAAAA, w[3], _MM_PERM_CCAA);  // w2 | w3 << 32
    *low = _mm512_unpacklo_epi64(first, second);
    *high = _mm512_unpackhi_epi64(first, second);
  }
  // Of every lane, the word numbered by the low two bits of its id.
  static inline C pick(C id, const C* w) {
    const __mmask8 odd = _mm512_test_epi64_mask(id, _mm512_set1_epi64(1));
    const __mmask8 upper = _mm512_test_epi64_mask(id, _mm512_set1_epi64(2));
    return _mm512_mask_blend_epi64(upper, _mm512_mask_blend_epi64(odd, w[0], w[1]),
                                   _mm512_mask_blend_epi64(odd, w[2], w[3]));
  }
  static inline I narrow(C a, C b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(a)), _mm512_cvtepi64_epi32(b), 1);
  }
  static inline std::int64_t compress(M m, F v, std::int32_t first_id, float* values, std::int32_t* ids) {
    const I id = _mm512_add_epi32(_mm512_set1_epi32(first_id),
                                  _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    // Whole-register stores: compressing stores are slow on some processors.
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(m, v));
    _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(m, id));
    return __builtin_popcount(m);
  }
};

}  // namespace

const SampleKernels kSampleAvx512 = SampleLanes<Avx512>::kernels();

}  // namespace elastic_decode

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
