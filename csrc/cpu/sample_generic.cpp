// sample_lanes.h in plain C++, for processors without AVX2: arrays of 16 that the compiler vectorises as it
// can.
#include <cstring>

#include "cpu/sample_lanes.h"

namespace elastic_decode {
namespace {

struct Generic {
  struct F {
    float v[16];
  };
  struct I {
    std::uint32_t v[16];
  };
  struct C {
    std::uint64_t v[8];
  };
  struct M {
    std::uint32_t v[16];  // 0 or 1
  };

  template <class Result, class Operation>
  static inline Result each(Operation operation) {
    Result r;
    for (int i = 0; i < static_cast<int>(sizeof r.v / sizeof r.v[0]); ++i) r.v[i] = operation(i);
    return r;
  }

  static inline F load(const float* p) {
    return each<F>([&](int i) { return p[i]; });
  }
  static inline void store(float* p, const F& x) { std::memcpy(p, x.v, sizeof x.v); }
  static inline F set(float x) {
    return each<F>([&](int) { return x; });
  }
  static inline F add(const F& x, const F& y) {
    return each<F>([&](int i) { return x.v[i] + y.v[i]; });
  }
  static inline F sub(const F& x, const F& y) {
    return each<F>([&](int i) { return x.v[i] - y.v[i]; });
  }
  static inline F mul(const F& x, const F& y) {
    return each<F>([&](int i) { return x.v[i] * y.v[i]; });
  }
  static inline F fma(const F& x, const F& y, const F& z) {
    return each<F>([&](int i) { return x.v[i] * y.v[i] + z.v[i]; });
  }
  static inline F max(const F& x, const F& y) {  // y where either is NaN, as on x86
    return each<F>([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
  }
  static inline F negate(const F& x) {
    return each<F>([&](int i) { return -x.v[i]; });
  }
  static inline M unordered(const F& x, const F& y) {
    return each<M>([&](int i) { return static_cast<std::uint32_t>(x.v[i] != x.v[i]) | (y.v[i] != y.v[i]); });
  }
  static inline M at_least(const F& x, const F& y) {
    return each<M>([&](int i) { return x.v[i] >= y.v[i]; });
  }
  static inline M less_int(const I& x, std::uint32_t y) {
    return each<M>([&](int i) { return x.v[i] < y; });
  }
  static inline M first(std::int64_t count) {
    return each<M>([&](int i) { return i < count; });
  }
  static inline M either(const M& x, const M& y) {
    return each<M>([&](int i) { return x.v[i] | y.v[i]; });
  }
  static inline M both_of(const M& x, const M& y) {
    return each<M>([&](int i) { return x.v[i] & y.v[i]; });
  }
  static inline M but_not(const M& x, const M& y) {
    return each<M>([&](int i) { return x.v[i] & ~y.v[i]; });
  }
  static inline std::uint32_t mask(const M& m) {
    std::uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= m.v[i] << i;
    return bits;
  }
  static inline F select(const M& m, const F& yes, const F& no) {
    return each<F>([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; });
  }

  static inline I bits(const F& x) {
    I r;
    std::memcpy(&r, &x, sizeof r);
    return r;
  }
  static inline F from_bits(const I& x) {
    F r;
    std::memcpy(&r, &x, sizeof r);
    return r;
  }
  static inline I set_int(std::uint32_t x) {
    return each<I>([&](int) { return x; });
  }
  static inline I add_int(const I& x, const I& y) {
    return each<I>([&](int i) { return x.v[i] + y.v[i]; });
  }
  static inline I sub_int(const I& x, const I& y) {
    return each<I>([&](int i) { return x.v[i] - y.v[i]; });
  }
  static inline I complement(const I& x) {
    return each<I>([&](int i) { return ~x.v[i]; });
  }
  template <int n>
  static inline I shift_left(const I& x) {
    return each<I>([&](int i) { return x.v[i] << n; });
  }
  template <int n>
  static inline I shift_right_signed(const I& x) {
    return each<I>([&](int i) { return static_cast<std::uint32_t>(static_cast<std::int32_t>(x.v[i]) >> n); });
  }
  static inline F to_float(const I& x) {
    return each<F>([&](int i) { return static_cast<float>(x.v[i]); });
  }
  static inline I truncate(const F& x) {
    return each<I>([&](int i) { return static_cast<std::uint32_t>(static_cast<std::int32_t>(x.v[i])); });
  }
  static inline F to_float_signed(const I& x) {
    return each<F>([&](int i) { return static_cast<float>(static_cast<std::int32_t>(x.v[i])); });
  }
  static inline I load_int(const std::uint32_t* p) {
    return each<I>([&](int i) { return p[i]; });
  }
  static inline void store_int(std::uint32_t* p, const I& x) { std::memcpy(p, x.v, sizeof x.v); }
  // As in sample_avx2.cpp: far too low for words below 256.
  static inline F floor_log2(const I& x) {
    const F shifted =
        each<F>([&](int i) { return static_cast<float>(static_cast<std::int32_t>(x.v[i] >> 8)); });
    const I field = bits(shifted);
    return each<F>(
        [&](int i) { return static_cast<float>(static_cast<std::int32_t>(field.v[i] >> 23) - (127 - 8)); });
  }

  static inline C set_wide(std::uint32_t x) {
    return each<C>([&](int) { return x; });
  }
  static inline C multiply(const C& x, std::uint32_t y) {
    return each<C>([&](int i) { return (x.v[i] & 0xffffffffu) * y; });
  }
  static inline C high(const C& x) {
    return each<C>([&](int i) { return x.v[i] >> 32; });
  }
  static inline C exclusive_or(const C& x, const C& y, const C& z) {
    return each<C>([&](int i) { return x.v[i] ^ y.v[i] ^ z.v[i]; });
  }
  template <int n>
  static inline C shift_right_wide(const C& x) {
    return each<C>([&](int i) { return x.v[i] >> n; });
  }
  static inline C load_wide(const std::int32_t* p) {
    return each<C>([&](int i) { return static_cast<std::uint32_t>(p[i]); });
  }
  static inline C counters(std::uint32_t first) {
    return each<C>([&](int i) { return first + static_cast<std::uint32_t>(i); });
  }
  static inline void interleave(const C* w, I* low, I* high) {
    *low = each<I>([&](int i) { return static_cast<std::uint32_t>(w[i & 3].v[i >> 2]); });
    *high = each<I>([&](int i) { return static_cast<std::uint32_t>(w[i & 3].v[4 + (i >> 2)]); });
  }
  static inline C pick(const C& id, const C* w) {
    return each<C>([&](int i) { return w[id.v[i] & 3].v[i]; });
  }
  static inline I narrow(const C& x, const C& y) {
    return each<I>([&](int i) { return static_cast<std::uint32_t>(i < 8 ? x.v[i] : y.v[i - 8]); });
  }
  static inline std::int64_t compress(const M& m, const F& x, std::int32_t first_id, float* values,
                                      std::int32_t* ids) {
    std::int64_t found = 0;
    for (int i = 0; i < 16; ++i) {
      if (!m.v[i]) continue;
      values[found] = x.v[i];
      ids[found++] = first_id + i;
    }
    return found;
  }
};

}  // namespace

const SampleKernels kSampleGeneric = SampleLanes<Generic>::kernels();

}  // namespace elastic_decode
