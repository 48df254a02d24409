// linear with AVX512_BF16: two products and their sum in each lane of an instruction.
#include "cpu/isa.h"

#if ELASTIC_X86
#define ELASTIC_TILE ELASTIC_AVX512_BF16
#include "cpu/linear_tile.h"
#include "cpu/linear_x86.h"

namespace elastic_decode {
namespace {

struct PairLanes : Sums512 {
  using Element = BFloat16;
  using Vector = __m512bh;
  static constexpr int kStep = 32;
  static constexpr int kTokens = 6;      // 24 sums, 6 x, 1 weight: of 32 registers
  static constexpr int kTokensWide = 3;  // 24 sums, 3 x, 1 weight

  static ELASTIC_TILE ELASTIC_INLINE __m512bh load(const BFloat16* from) {
    return (__m512bh)_mm512_loadu_si512(from);
  }
  static ELASTIC_TILE ELASTIC_INLINE __m512bh load_first(const BFloat16* from, int count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1u, from);
  }
  static ELASTIC_TILE ELASTIC_INLINE __m512 multiply_add(__m512 sum, __m512bh w, __m512bh x) {
    return _mm512_dpbf16_ps(sum, w, x);
  }
  using Sums512::store;
  static ELASTIC_TILE ELASTIC_INLINE void store(BFloat16* out, __m128 values) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), (__m128i)_mm_cvtneps_pbh(values));
  }
};

}  // namespace

// float32 needs nothing of AVX512_BF16.
const LinearVariant kLinearAvx512Bf16 = {nullptr, &columns<PairLanes, BFloat16>, &columns<PairLanes, float>};

}  // namespace elastic_decode
#endif
