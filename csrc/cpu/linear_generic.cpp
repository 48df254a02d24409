// linear without intrinsics: the compiler's own vectors of four floats, which are SSE2 on x86-64 and NEON on
// arm64.
#define ELASTIC_TILE
#include "cpu/linear_tile.h"

namespace elastic_decode {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef std::uint32_t Bits4 __attribute__((vector_size(16)));

struct Float4Lanes {
  using Sum = Float4;
  static constexpr int kTokens = ELASTIC_X86 ? 2 : 4;  // 16 registers on x86-64, 32 on arm64
  static constexpr int kTokensWide = 0;

  static ELASTIC_INLINE Float4 zero() { return Float4{0.0f, 0.0f, 0.0f, 0.0f}; }
  static ELASTIC_INLINE Float4 reduce(Float4 a, Float4 b, Float4 c, Float4 d) {
    return Float4{(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]), (c[0] + c[2]) + (c[1] + c[3]),
                  (d[0] + d[2]) + (d[1] + d[3])};
  }
  static ELASTIC_INLINE void store(float* out, Float4 values) { std::memcpy(out, &values, sizeof values); }
  static ELASTIC_INLINE void store(BFloat16* out, Float4 values) {
    for (int i = 0; i < 4; ++i) out[i] = from_float<BFloat16>(values[i]);
  }

  template <class Element>
  static ELASTIC_INLINE Float4 add(Float4 values, const Element* bias) {
    return values + Float4{to_float(bias[0]), to_float(bias[1]), to_float(bias[2]), to_float(bias[3])};
  }
};

struct FloatLanes : Float4Lanes {
  using Element = float;
  using Vector = Float4;
  static constexpr int kStep = 4;

  static ELASTIC_INLINE Float4 load(const float* from) {
    Float4 values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
  static ELASTIC_INLINE Float4 load_first(const float* from, int count) {
    float padded[4] = {};
    for (int i = 0; i < count; ++i) padded[i] = from[i];
    return load(padded);
  }
  static ELASTIC_INLINE Float4 multiply_add(Float4 sum, Float4 w, Float4 x) { return sum + w * x; }
};

struct WidenedLanes : Float4Lanes {
  using Element = BFloat16;
  struct Vector {
    Float4 even, odd;
  };
  static constexpr int kStep = 8;

  static ELASTIC_INLINE Vector load(const BFloat16* from) {
    Bits4 pairs;  // little-endian: the first of a pair is in the low half
    std::memcpy(&pairs, from, sizeof pairs);
    const Bits4 even = pairs << 16;
    const Bits4 odd = pairs & 0xffff0000u;
    return {(Float4)even, (Float4)odd};
  }
  static ELASTIC_INLINE Vector load_first(const BFloat16* from, int count) {
    BFloat16 padded[8] = {};
    for (int i = 0; i < count; ++i) padded[i] = from[i];
    return load(padded);
  }
  static ELASTIC_INLINE Float4 multiply_add(Float4 sum, Vector w, Vector x) {
    return sum + w.even * x.even + w.odd * x.odd;
  }
};

}  // namespace

const LinearVariant kLinearGeneric = {&columns<FloatLanes, float>, &columns<WidenedLanes, BFloat16>,
                                      &columns<WidenedLanes, float>};

}  // namespace elastic_decode
