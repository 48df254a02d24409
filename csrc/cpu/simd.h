// Scalar pieces that compilers vectorise: bfloat16 conversions, exp. Written without branches or intrinsics,
// for the bodies of run_for_isa (isa.h).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

namespace elastic_decode {

// Storage only; arithmetic is float32.
struct BFloat16 {
  std::uint16_t bits;
};

static ELASTIC_INLINE float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static ELASTIC_INLINE std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static ELASTIC_INLINE float to_float(float value) {
  return value;
}
static ELASTIC_INLINE float to_float(BFloat16 value) {
  return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16);
}

template <class T>
struct FromFloat;

template <>
struct FromFloat<float> {
  static ELASTIC_INLINE float round(float value) { return value; }
};

template <>
struct FromFloat<BFloat16> {
  // To nearest, ties to even; NaN stays NaN.
  static ELASTIC_INLINE BFloat16 round(float value) {
    const std::uint32_t bits = float_to_bits(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<std::uint16_t>(nan ? 0x7fc0u : rounded)};
  }
};

template <class T>
static ELASTIC_INLINE T from_float(float value) {
  return FromFloat<T>::round(value);
}

// e^x within 1.1 units in the last place where the result is a normal float; below 2^-126 it rounds to a
// subnormal or 0, above the largest float to infinity; NaN stays NaN. x = n ln2 + r with |r| <= ln2 / 2; e^r
// by a polynomial of degree 6 fitted to the least relative error (3e-9); 2^n in two factors, so that neither
// overflows before the product does. No comparisons: a compiler would copy the caller's code for each
// outcome.
static ELASTIC_INLINE float exp_float(float x) {
  constexpr float kToNearest =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  constexpr std::int32_t kInfinity = 0x7f800000;
  constexpr std::int32_t kLimit = 0x42d00000;  // 104: e^-104 is 0, e^104 infinity
  const std::int32_t bits = static_cast<std::int32_t>(float_to_bits(x));
  const std::int32_t magnitude = bits & 0x7fffffff;
  const std::int32_t limited = std::min(magnitude, kLimit) | (bits & static_cast<std::int32_t>(0x80000000u));
  const float clamped = bits_to_float(static_cast<std::uint32_t>(limited));
  const std::uint32_t nan = static_cast<std::uint32_t>((kInfinity - magnitude) >> 31) & 0x7fc00000u;
  const float shifted = clamped * 1.44269504f + kToNearest;
  const float n = shifted - kToNearest;
  float r =
      clamped - n * 0.693359375f;  // ln2 in two parts, the first exact in 9 bits, so n times it is exact
  r = r + n * 2.12194440e-4f;
  float p = 0.0013814459f;
  p = p * r + 0.00836878122f;
  p = p * r + 0.0416683944f;
  p = p * r + 0.166665201f;
  p = p * r + 0.499999934f;
  p = p * (r * r) + r + 1.0f;
  const std::int32_t power = static_cast<std::int32_t>(float_to_bits(shifted) - float_to_bits(kToNearest));
  const std::int32_t half = power >> 1;
  const float scale = bits_to_float(static_cast<std::uint32_t>(half + 127) << 23);
  const float rest = bits_to_float(static_cast<std::uint32_t>(power - half + 127) << 23);
  return bits_to_float(float_to_bits(p * scale * rest) | nan);
}

// The order of the additions depends on `count` alone: 32 partial sums, then halves folded onto halves.
template <class T>
static ELASTIC_INLINE float sum_of_squares(const T* values, std::int64_t count) {
  float partial[32] = {};
  std::int64_t at = 0;
  for (; at + 32 <= count; at += 32) {
#pragma omp simd
    for (int lane = 0; lane < 32; ++lane) {
      const float value = to_float(values[at + lane]);
      partial[lane] += value * value;
    }
  }
  for (int lane = 0; at + lane < count; ++lane) {
    const float value = to_float(values[at + lane]);
    partial[lane] += value * value;
  }
  for (int width = 16; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) partial[lane] += partial[lane + width];
  }
  return partial[0];
}

}  // namespace elastic_decode
