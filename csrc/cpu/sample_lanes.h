// The kernels of sample_kernels.h over 16 lanes of a vector type V. Included only by
// csrc/cpu/sample_<isa>.cpp, each after it has selected its instruction set; everything here is a template on
// V, so no two of them share code.
//
// V has F (16 floats), I (16 uint32), C (8 uint64) and M (16 truth values) with the operations used below. A
// Philox counter or word sits in the low half of a C lane: the 32 x 32 -> 64 multiply reads nothing else, so
// what the exclusive ors leave in the high half is harmless. For the same reason no function template of the
// standard library is used: a linker keeps one copy of each for all.
#pragma once
#include <cmath>
#include <limits>

#include "cpu/sample_kernels.h"
#include "philox.h"

namespace elastic_decode {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

template <class V>
struct SampleLanes {
  using F = typename V::F;
  using I = typename V::I;
  using C = typename V::C;

  // e^y for y <= 0 (NaN gives anything), within 1e-7; what lies below -86 gives e^-86. y = n ln2 + r, e^r by
  // a polynomial of degree 6 (relative error 3e-9).
  static inline F exp(F y) {
    const F to_nearest =
        V::set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    y = V::max(V::set(-86.0f), y);
    const F shifted = V::fma(y, V::set(1.44269504f), to_nearest);
    const F n = V::sub(shifted, to_nearest);
    F r = V::fma(n, V::set(-0.693359375f), y);  // ln2 in two parts, the first exact in 9 bits
    r = V::fma(n, V::set(2.12194440e-4f), r);
    F p = V::fma(r, V::set(0.00138144626f), V::set(0.00836878084f));
    p = V::fma(p, r, V::set(0.0416683927f));
    p = V::fma(p, r, V::set(0.166665196f));
    p = V::fma(p, r, V::set(0.49999994f));
    p = V::add(V::fma(p, V::mul(r, r), r), V::set(1.0f));
    return V::from_bits(V::add_int(V::bits(p), V::template shift_left<23>(V::bits(shifted))));
  }

  // log x for normal x > 0, within 1e-7. x = 2^e (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); log(1 + f) = f - f^2
  // / 2 + f^3 p(f), p of degree 7 (relative error 6e-9), so near x = 1 the error is relative to the
  // logarithm.
  static inline F log(F x) {
    const I bits = V::bits(x);
    const I e =
        V::template shift_right_signed<23>(V::sub_int(bits, V::set_int(0x3f3504f3u)));  // minus sqrt(1/2)
    const F f = V::sub(V::from_bits(V::sub_int(bits, V::template shift_left<23>(e))), V::set(1.0f));
    const F exponent = V::to_float_signed(e);
    F p = V::fma(f, V::set(-0.0763434768f), V::set(0.127615169f));
    p = V::fma(p, f, V::set(-0.131602108f));
    p = V::fma(p, f, V::set(0.142017677f));
    p = V::fma(p, f, V::set(-0.166233554f));
    p = V::fma(p, f, V::set(0.200012267f));
    p = V::fma(p, f, V::set(-0.250008225f));
    p = V::fma(p, f, V::set(0.333333313f));
    const F square = V::mul(f, f);
    F low = V::fma(V::mul(square, f), p, V::mul(exponent, V::set(-2.12194440e-4f)));
    low = V::fma(square, V::set(-0.5f), low);
    return V::fma(exponent, V::set(0.693359375f), V::add(f, low));
  }

  // As gumbel() of philox.h.
  static inline F gumbel(I word) {
    const F u = V::mul(V::add(V::to_float(word), V::set(0.5f)), V::set(0x1p-32f));
    const F series = V::mul(u, V::fma(u, V::fma(u, V::set(1.0f / 3.0f), V::set(0.5f)), V::set(1.0f)));
    const F rest = V::mul(V::add(V::to_float(V::complement(word)), V::set(0.5f)), V::set(0x1p-32f));
    const F e = V::select(V::less_int(word, 1u << 22), series, V::negate(log(rest)));
    return V::negate(log(e));
  }

  struct Key {
    std::uint32_t position, seed_high;
    std::uint32_t round[kPhiloxRounds][2];

    Key(std::int64_t seed, std::int32_t sample_index, std::int32_t place) {
      const std::uint64_t bits = static_cast<std::uint64_t>(seed);
      position = static_cast<std::uint32_t>(place);
      seed_high = static_cast<std::uint32_t>(bits >> 32);
      for (std::uint32_t i = 0; i < kPhiloxRounds; ++i) {
        round[i][0] = static_cast<std::uint32_t>(bits) + i * kPhiloxW0;
        round[i][1] = static_cast<std::uint32_t>(sample_index) + i * kPhiloxW1;
      }
    }
  };

  struct Words {
    C word[4];
  };

  static inline Words philox(C c0, const Key& key) {
    C c1 = V::set_wide(key.position), c2 = V::set_wide(key.seed_high), c3 = V::set_wide(0);
    for (int i = 0; i < kPhiloxRounds; ++i) {
      const C p0 = V::multiply(c0, kPhiloxM0);
      const C p1 = V::multiply(c2, kPhiloxM1);
      c0 = V::exclusive_or(V::high(p1), c1, V::set_wide(key.round[i][0]));
      c1 = p1;
      c2 = V::exclusive_or(V::high(p0), c3, V::set_wide(key.round[i][1]));
      c3 = p0;
    }
    return Words{{c0, c1, c2, c3}};
  }

  // The words of ids 4 * group .. 4 * group + 31.
  static inline void words32(std::uint32_t group, const Key& key, I* low, I* high) {
    const Words w = philox(V::counters(group), key);
    V::interleave(w.word, low, high);
  }

  // The words of 16 ids.
  static inline I words_of(const std::int32_t* ids, const Key& key) {
    C half[2];
    for (int i = 0; i < 2; ++i) {
      const C id = V::load_wide(ids + 8 * i);
      const Words w = philox(V::template shift_right_wide<2>(id), key);
      half[i] = V::pick(id, w.word);
    }
    return V::narrow(half[0], half[1]);
  }

  static float reduce_max(F v) {
    float lane[16];
    V::store(lane, v);
    float most = lane[0];
    for (int i = 1; i < 16; ++i) most = lane[i] > most ? lane[i] : most;
    return most;
  }

  static float reduce_sum(F v) {
    float lane[16];
    V::store(lane, v);
    for (int width = 8; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    return lane[0];
  }

  // Group `at` of x, or a copy of it filled up with -inf where the vocabulary ends inside it.
  static inline const float* group(const float* x, std::int64_t count, std::int64_t at, float* space) {
    if (at + kSampleGroup <= count) return x + at;
    for (std::int64_t i = 0; i < kSampleGroup; ++i) space[i] = at + i < count ? x[at + i] : kMinusInfinity;
    return space;
  }

  static ChunkScan scan(const float* x, std::int64_t count, float inverse_t, float* lane_max) {
    float space[kSampleGroup];
    F most = V::set(kMinusInfinity);
    auto nan = V::unordered(most, most);
    for (std::int64_t at = 0; at < count; at += kSampleGroup) {
      const float* values = group(x, count, at, space);
      F even = V::set(kMinusInfinity), odd = even;
      for (int i = 0; i < kSampleGroup; i += 32) {
        const F a = V::load(values + i), b = V::load(values + i + 16);
        nan = V::either(nan, V::unordered(a, b));
        even = V::max(a, even);
        odd = V::max(b, odd);
      }
      even = V::max(even, odd);
      V::store(lane_max + at / kSampleGroup * kSampleLanes, even);
      most = V::max(most, even);
    }
    ChunkScan result{reduce_max(most), 0.0f, V::mask(nan) != 0};
    if (result.nan || std::isinf(result.max)) return result;
    const F max = V::set(result.max), scale = V::set(inverse_t);
    F even = V::set(0.0f), odd = even;
    for (std::int64_t at = 0; at < count; at += kSampleGroup) {
      const float* values = group(x, count, at, space);
      for (int i = 0; i < kSampleGroup; i += 32) {
        even = V::add(even, exp(V::mul(V::sub(V::load(values + i), max), scale)));
        odd = V::add(odd, exp(V::mul(V::sub(V::load(values + i + 16), max), scale)));
      }
    }
    result.sum = reduce_sum(V::add(even, odd));
    return result;
  }

  // Calls body(first id, 16 values, which of them reach the floor), unless none does. Stops when body says
  // so.
  template <class Body>
  static inline void each_from(const float* x, std::int64_t vocab, const float* lane_max, float floor,
                               const Body& body) {
    float space[kSampleGroup];
    const F least = V::set(floor);
    for (std::int64_t at = 0; at < vocab; at += kSampleGroup) {
      if (!V::mask(V::at_least(V::load(lane_max + at / kSampleGroup * kSampleLanes), least))) continue;
      const float* source = group(x, vocab, at, space);
      for (int i = 0; i < kSampleGroup; i += 16) {
        const F v = V::load(source + i);
        const auto hit = V::at_least(v, least);
        if (V::mask(hit) && !body(static_cast<std::int32_t>(at + i), v, hit)) return;
      }
    }
  }

  static std::int64_t collect(const float* x, std::int64_t vocab, const float* lane_max, float floor,
                              float* values, std::int32_t* ids, std::int64_t limit) {
    std::int64_t found = 0;
    each_from(x, vocab, lane_max, floor, [&](std::int32_t id, F v, auto hit) {
      found += V::compress(hit, v, id, values + found, ids + found);
      return found <= limit;
    });
    return found <= limit ? found : -1;
  }

  static void histogram(const float* x, std::int64_t vocab, const float* lane_max, float floor, float max,
                        float inverse_t, float scale, double* mass) {
    const F top = V::set(max), inverse = V::set(inverse_t), factor = V::set(scale);
    const F other = V::set(static_cast<float>(kSampleBins));
    each_from(x, vocab, lane_max, floor, [&](std::int32_t, F v, auto hit) {
      float weight[16];
      std::uint32_t bin[16];
      V::store(weight, exp(V::mul(V::sub(v, top), inverse)));
      V::store_int(bin, V::truncate(V::select(hit, V::mul(V::sub(top, v), factor), other)));
      for (int i = 0; i < 16; ++i) mass[bin[i]] += static_cast<double>(weight[i]);
      return true;
    });
  }

  static std::int64_t collect_bin(const float* x, std::int64_t vocab, const float* lane_max, float floor,
                                  float max, float scale, std::int32_t bin, float* values,
                                  std::int32_t* ids) {
    const F top = V::set(max), factor = V::set(scale);
    const F from = V::set(static_cast<float>(bin)), to = V::set(static_cast<float>(bin + 1));
    std::int64_t found = 0;
    each_from(x, vocab, lane_max, floor, [&](std::int32_t id, F v, auto hit) {
      const F place = V::mul(V::sub(top, v), factor);
      const auto inside = V::both_of(hit, V::but_not(V::at_least(place, from), V::at_least(place, to)));
      if (V::mask(inside)) found += V::compress(inside, v, id, values + found, ids + found);
      return true;
    });
    return found;
  }

  static double mass_from(const float* x, std::int64_t vocab, const float* lane_max, float floor, float max,
                          float inverse_t) {
    const F top = V::set(max), inverse = V::set(inverse_t), zero = V::set(0.0f);
    double total = 0.0;
    F sum = zero;
    std::int32_t chunk = 0;  // partial sums in float32 over a chunk each
    each_from(x, vocab, lane_max, floor, [&](std::int32_t id, F v, auto hit) {
      if (id >= chunk + static_cast<std::int32_t>(kSampleChunk)) {
        total += static_cast<double>(reduce_sum(sum));
        sum = zero;
        chunk = id;
      }
      sum = V::add(sum, V::select(hit, exp(V::mul(V::sub(v, top), inverse)), zero));
      return true;
    });
    return total + static_cast<double>(reduce_sum(sum));
  }

  static void weigh(const float* values, std::int64_t count, float max, float inverse_t, float* weights) {
    for (std::int64_t i = 0; i < count; i += 16) {
      V::store(weights + i, exp(V::mul(V::sub(V::load(values + i), V::set(max)), V::set(inverse_t))));
    }
  }

  // Updates `best` by 16 scores; ids rise from call to call, so the first to reach a score keeps it.
  static inline void take(F score, const std::int32_t* ids, std::int32_t first_id, float* bound, Best* best) {
    if (!V::mask(V::at_least(score, V::set(*bound)))) return;
    const float top = reduce_max(score);
    *bound = top > *bound ? top : *bound;
    if (!(top > best->score)) return;
    float lane[16];
    V::store(lane, score);
    int at = 0;
    while (lane[at] != top) ++at;
    *best = Best{top, ids ? ids[at] : first_id + at};
  }

  // Noise never exceeds (32 - e) ln2, where 2^e <= word: a cheap bound, which spares most entries both
  // logarithms.
  static inline void contest(F y, I word, std::int32_t first_id, float* bound, Best* best) {
    constexpr float kLog2 = 0.693147181f, kSlack = 1e-4f;
    const F most = V::fma(V::floor_log2(word), V::set(-kLog2), V::add(y, V::set(32 * kLog2 + kSlack)));
    if (!V::mask(V::at_least(most, V::set(*bound)))) return;
    take(V::add(y, gumbel(word)), nullptr, first_id, bound, best);
  }

  static Best draw_range(const NoiseRow& row, std::int64_t begin, std::int64_t end) {
    float space[kSampleGroup];
    const Key key(row.seed, row.sample_index, row.position);
    const F max = V::set(row.max), scale = V::set(row.inverse_t), least = V::set(row.least);
    float bound = row.bound;
    Best best{kMinusInfinity, -1};
    const auto scaled = [&](const float* from) {
      const F x = V::load(from);
      return V::select(V::at_least(x, least), V::mul(V::sub(x, max), scale), V::set(kMinusInfinity));
    };
    for (std::int64_t at = begin; at < end; at += kSampleGroup) {
      const F most = scaled(row.lane_max + at / kSampleGroup * kSampleLanes);
      if (!V::mask(V::at_least(most, V::set(bound - kGumbelMax)))) continue;
      const float* values = group(row.x, row.vocab, at, space);
      for (int i = 0; i < kSampleGroup; i += 32) {
        const F a = scaled(values + i), b = scaled(values + i + 16);
        if (!V::mask(V::at_least(V::max(a, b), V::set(bound - kGumbelMax)))) continue;
        const std::int32_t id = static_cast<std::int32_t>(at + i);
        I low, high;
        words32(static_cast<std::uint32_t>(id) / 4, key, &low, &high);
        contest(a, low, id, &bound, &best);
        contest(b, high, id + 16, &bound, &best);
      }
    }
    return best;
  }

  static Best draw_list(const NoiseRow& row, const float* values, const std::int32_t* ids,
                        std::int64_t count) {
    const Key key(row.seed, row.sample_index, row.position);
    const F max = V::set(row.max), scale = V::set(row.inverse_t);
    float bound = row.bound;
    Best best{kMinusInfinity, -1};
    for (std::int64_t i = 0; i < count; i += 16) {
      F y = V::mul(V::sub(V::load(values + i), max), scale);
      if (count - i < 16) y = V::select(V::first(count - i), y, V::set(kMinusInfinity));
      if (!V::mask(V::at_least(y, V::set(bound - kGumbelMax)))) continue;
      take(V::add(y, gumbel(words_of(ids + i, key))), ids + i, 0, &bound, &best);
    }
    return best;
  }

  static void words(std::int64_t seed, std::int32_t sample_index, std::int32_t position, std::int64_t count,
                    std::uint32_t* words) {
    const Key key(seed, sample_index, position);
    for (std::int64_t at = 0; at < count; at += 32) {
      I low, high;
      words32(static_cast<std::uint32_t>(at) / 4, key, &low, &high);
      V::store_int(words + at, low);
      V::store_int(words + at + 16, high);
    }
  }

  static void gumbels(const std::uint32_t* words, std::int64_t count, float* out) {
    for (std::int64_t at = 0; at < count; at += 16) V::store(out + at, gumbel(V::load_int(words + at)));
  }

  static void penalize(float* out, const float* x, std::int64_t vocab, const std::int32_t* counts,
                       const std::uint8_t* in_prompt, float repetition, float presence, float frequency) {
#pragma omp simd
    for (std::int64_t i = 0; i < vocab; ++i) {
      const std::int32_t count = counts[i];
      const float value = x[i];
      const float repeated = value > 0.0f ? value / repetition : value * repetition;
      const float penalized = (count > 0 || in_prompt[i] != 0) ? repeated : value;
      const float reduced = penalized - frequency * static_cast<float>(count) - presence;
      out[i] = count > 0 ? reduced : penalized;
    }
  }

  static constexpr SampleKernels kernels() {
    return SampleKernels{&scan,       &collect,   &histogram, &collect_bin, &mass_from, &weigh,
                         &draw_range, &draw_list, &words,     &gumbels,     &penalize};
  }
};

}  // namespace elastic_decode
