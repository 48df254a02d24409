// linear with AVX2 and FMA: float32, and bfloat16 widened to it.
#include "cpu/isa.h"

#if ELASTIC_X86
#define ELASTIC_TILE ELASTIC_AVX2
#include "cpu/linear_tile.h"
#include "cpu/linear_x86.h"

namespace elastic_decode {
namespace {

struct FloatLanes : Sums256 {
  using Element = float;
  using Vector = __m256;
  static constexpr int kStep = 8;
  static constexpr int kTokens = 3;  // 12 sums, 3 x, 1 weight: of 16 registers
  static constexpr int kTokensWide = 1;

  static ELASTIC_TILE ELASTIC_INLINE __m256 load(const float* from) { return _mm256_loadu_ps(from); }
  static ELASTIC_TILE ELASTIC_INLINE __m256 load_first(const float* from, int count) {
    float padded[8] = {};
    for (int i = 0; i < count; ++i) padded[i] = from[i];
    return _mm256_loadu_ps(padded);
  }
  static ELASTIC_TILE ELASTIC_INLINE __m256 multiply_add(__m256 sum, __m256 w, __m256 x) {
    return _mm256_fmadd_ps(w, x, sum);
  }
};

struct WidenedLanes : Sums256 {
  using Element = BFloat16;
  struct Vector {
    __m256 even, odd;
  };
  static constexpr int kStep = 16;
  static constexpr int kTokens = 2;  // 8 sums, 4 x, 2 weights
  static constexpr int kTokensWide = 1;

  static ELASTIC_TILE ELASTIC_INLINE Vector load(const BFloat16* from) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static ELASTIC_TILE ELASTIC_INLINE Vector load_first(const BFloat16* from, int count) {
    BFloat16 padded[16] = {};
    for (int i = 0; i < count; ++i) padded[i] = from[i];
    return load(padded);
  }
  static ELASTIC_TILE ELASTIC_INLINE __m256 multiply_add(__m256 sum, Vector w, Vector x) {
    return _mm256_fmadd_ps(w.odd, x.odd, _mm256_fmadd_ps(w.even, x.even, sum));
  }
};

}  // namespace

const LinearVariant kLinearAvx2 = {&columns<FloatLanes, float>, &columns<WidenedLanes, BFloat16>,
                                   &columns<WidenedLanes, float>};

}  // namespace elastic_decode
#endif
