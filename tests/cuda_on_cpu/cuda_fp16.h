// float16 as CUDA spells it, for tests on the CPU: conversions only, round to nearest even.
#pragma once
#include <cuda_runtime.h>

struct alignas(2) __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(2) __half_raw {
  unsigned short x;
};

inline unsigned short __half_as_ushort(__half h) {
  return h.bits;
}
inline __half __ushort_as_half(unsigned short bits) {
  return {bits};
}
inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float magnitude =
      std::ldexp(static_cast<float>(fraction + (exponent ? 1024 : 0)), std::max(exponent, 1) - 25);
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  return h.bits & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float value) {
  const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return {0x7fff};
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00)};
  if (magnitude == 0.0f) return {sign};
  // In units of the last place the nearest even integer; a carry into the exponent is right as it is.
  const int exponent = std::max(std::ilogb(magnitude), -14);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<unsigned short>(sign | (((exponent + 14) << 10) + units))};
}
inline __half __float2half(float value) {
  return __float2half_rn(value);
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 v) {
  return {__half2float(v.x), __half2float(v.y)};
}
