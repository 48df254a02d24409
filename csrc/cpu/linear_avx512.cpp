// linear with AVX-512: float32, and bfloat16 widened to it.
#include "cpu/isa.h"

#if ELASTIC_X86
#define ELASTIC_TILE ELASTIC_AVX512
#include "cpu/linear_tile.h"
#include "cpu/linear_x86.h"

namespace elastic_decode {
namespace {

struct FloatLanes : Sums512 {
  using Element = float;
  using Vector = __m512;
  static constexpr int kStep = 16;
  static constexpr int kTokens = 6;      // 24 sums, 6 x, 1 weight: of 32 registers
  static constexpr int kTokensWide = 3;  // 24 sums, 3 x, 1 weight

  static ELASTIC_TILE ELASTIC_INLINE __m512 load(const float* from) { return _mm512_loadu_ps(from); }
  static ELASTIC_TILE ELASTIC_INLINE __m512 load_first(const float* from, int count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from);
  }
  static ELASTIC_TILE ELASTIC_INLINE __m512 multiply_add(__m512 sum, __m512 w, __m512 x) {
    return _mm512_fmadd_ps(w, x, sum);
  }
};

struct WidenedLanes : Sums512 {
  using Element = BFloat16;
  struct Vector {
    __m512 even, odd;
  };
  static constexpr int kStep = 32;
  static constexpr int kTokens = 4;      // 16 sums, 8 x, 2 weights
  static constexpr int kTokensWide = 2;  // 16 sums, 4 x, 2 weights

  static ELASTIC_TILE ELASTIC_INLINE Vector widen(__m512i pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static ELASTIC_TILE ELASTIC_INLINE Vector load(const BFloat16* from) {
    return widen(_mm512_loadu_si512(from));
  }
  static ELASTIC_TILE ELASTIC_INLINE Vector load_first(const BFloat16* from, int count) {
    return widen(_mm512_maskz_loadu_epi16((1u << count) - 1u, from));
  }
  static ELASTIC_TILE ELASTIC_INLINE __m512 multiply_add(__m512 sum, Vector w, Vector x) {
    return _mm512_fmadd_ps(w.odd, x.odd, _mm512_fmadd_ps(w.even, x.even, sum));
  }
};

}  // namespace

const LinearVariant kLinearAvx512 = {&columns<FloatLanes, float>, &columns<WidenedLanes, BFloat16>,
                                     &columns<WidenedLanes, float>};

}  // namespace elastic_decode
#endif
