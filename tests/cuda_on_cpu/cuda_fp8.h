// float8 e4m3 as CUDA spells it, for tests on the CPU: saturating conversions, round to nearest even.
#pragma once
#include <cuda_fp16.h>

using __nv_fp8_storage_t = unsigned char;
enum __nv_saturation_t { __NV_SATFINITE = 1 };
enum __nv_fp8_interpretation_t { __NV_E4M3 = 0 };

inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float value, __nv_saturation_t, __nv_fp8_interpretation_t) {
  const unsigned char sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return 0x7f;
  const float magnitude = std::min(std::fabs(value), 448.0f);
  if (magnitude == 0.0f) return sign;
  const int exponent = std::max(std::ilogb(magnitude), -6);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  return static_cast<unsigned char>(sign | std::min(((exponent + 6) << 3) + units, 0x7e));
}
inline float cuda_on_cpu_fp8_to_float(__nv_fp8_storage_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  float magnitude = std::ldexp(static_cast<float>(fraction + (exponent ? 8 : 0)), std::max(exponent, 1) - 10);
  if ((bits & 0x7f) == 0x7f) magnitude = NAN;
  return bits & 0x80 ? -magnitude : magnitude;
}
inline __half_raw __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t bits, __nv_fp8_interpretation_t) {
  return {__float2half_rn(cuda_on_cpu_fp8_to_float(bits)).bits};
}
struct alignas(1) __nv_fp8_e4m3 {
  __nv_fp8_storage_t __x;
  __nv_fp8_e4m3() = default;
  explicit __nv_fp8_e4m3(float value) : __x(__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)) {}
  explicit operator float() const { return cuda_on_cpu_fp8_to_float(__x); }
};
