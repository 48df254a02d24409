// A warp's products on tensor cores, D = A B + D with A [16, 16] and B [16, 8] in 16 bits and D [16, 8] in
// float32: mma.sync.m16n8k16 and the ldmatrix that feeds it (sm_80 and newer), and what they mean, for the
// CPU.
//
// Fragments (PTX ISA, "Matrix fragments for mma.m16n8k16"), g = lane / 4, c = lane % 4; a register holds two
// 16-bit elements, the one of lower index in its lower half:
//   a[0] row g, columns 2c, 2c+1   a[1] row g+8   a[2] row g, columns 2c+8, 2c+9   a[3] row g+8, those
//   columns b0 rows 2c, 2c+1 of column g   b1 rows 2c+8, 2c+9 d[0], d[1] row g, columns 2c, 2c+1   d[2], d[3]
//   row g+8
#pragma once
#include <type_traits>

#include "async_copy.cuh"

namespace elastic_decode {
namespace cuda {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
struct Float8 {  // e4m3: no infinity, the largest is 448, 0x7f and 0xff are NaN
  std::uint8_t bits;
};

#if defined(CUDA_ON_CPU)

inline float to_float(BFloat16 x) {
  return __uint_as_float(std::uint32_t{x.bits} << 16);
}
inline float to_float(Float16 x) {
  return static_cast<float>(cuda_on_cpu_bits<_Float16>(x.bits));
}

template <typename T>
T round_to(float x);
template <>
inline BFloat16 round_to<BFloat16>(float x) {
  const std::uint32_t word = __float_as_uint(x);
  const std::uint32_t rounded = x != x ? word | 1u << 22 : word + 0x7fffu + (word >> 16 & 1u);
  return {static_cast<std::uint16_t>(rounded >> 16)};
}
template <>
inline Float16 round_to<Float16>(float x) {
  return {cuda_on_cpu_bits<std::uint16_t>(static_cast<_Float16>(x))};
}

template <typename T>
inline float half_of(std::uint32_t pair, int which) {
  return to_float(T{static_cast<std::uint16_t>(pair >> 16 * which)});
}

// `low` and `high` rounded to nearest even, as two halves of a register.
template <typename T>
inline std::uint32_t pack(float low, float high) {
  return round_to<T>(low).bits | static_cast<std::uint32_t>(round_to<T>(high).bits) << 16;
}

// Bytes First and Second of four Float8, as two halves of a register; exact.
template <typename T, int First, int Second>
inline std::uint32_t widen(std::uint32_t bytes) {
  const auto value = [=](int i) {
    const std::uint32_t x = bytes >> 8 * i & 0xffu, exponent = x >> 3 & 15u, mantissa = x & 7u;
    if ((x & 0x7fu) == 0x7fu) return NAN;
    const float size = exponent ? std::ldexp(8.0f + mantissa, static_cast<int>(exponent) - 10)
                                : std::ldexp(static_cast<float>(mantissa), -9);
    return x & 0x80u ? -size : size;
  };
  return pack<T>(value(First), value(Second));
}

template <typename T>
inline void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                         Where where = Where::here()) {
  struct Mine {
    std::uint32_t a[4], b[2];
  };
  const auto all =
      cuda_on_cpu::warp_exchange(kAllLanes, Mine{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "mma", where);
  const int lane = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const std::uint32_t left = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const std::uint32_t right = all[column * 4 + k % 8 / 2].b[k / 8];
      d[i] = std::fma(half_of<T>(left, k % 2), half_of<T>(right, k % 2), d[i]);
    }
  }
}

template <bool Transposed>
inline void load_matrices_on_cpu(std::uint32_t (&r)[4], const void* row, const char* kind, Where where) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16) cuda_on_cpu::fail("loads a row that is not aligned", where);
  const auto all = cuda_on_cpu::warp_exchange(kAllLanes, static_cast<const std::uint16_t*>(row), kind, where);
  const int lane = cuda_on_cpu::lane(), g = lane / 4, c = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int y, int x) { return static_cast<std::uint32_t>(all[8 * i + y][x]); };
    r[i] = Transposed ? at(2 * c, g) | at(2 * c + 1, g) << 16 : at(g, 2 * c) | at(g, 2 * c + 1) << 16;
  }
  // ldmatrix has read when it returns; here a lane may still have to while another goes on to overwrite.
  cuda_on_cpu::warp_exchange(kAllLanes, 0, kind, where);
}

// Four 8 x 8 matrices of 16-bit elements in shared memory; lane i gives the address of row i % 8 of matrix i
// / 8. r[i]: elements 2c, 2c+1 of row g of matrix i; transposed: of column g.
inline void load_matrices(std::uint32_t (&r)[4], const void* row, Where where = Where::here()) {
  load_matrices_on_cpu<false>(r, row, "ldmatrix", where);
}
inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row, Where where = Where::here()) {
  load_matrices_on_cpu<true>(r, row, "ldmatrix.trans", where);
}

#else

template <typename T>
__device__ __forceinline__ std::uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack<BFloat16>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ std::uint32_t pack<Float16>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <typename T, int First, int Second>
__device__ __forceinline__ std::uint32_t widen(std::uint32_t bytes) {
  constexpr bool kBFloat16 = std::is_same<T, BFloat16>::value;
  std::uint32_t pair;
#if __CUDA_ARCH__ >= 890
  const auto two = static_cast<std::uint16_t>(__byte_perm(bytes, 0, First | Second << 4));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(two));
  if constexpr (kBFloat16) {
    float low, high;
    asm("{\n"
        "  .reg .b16 low, high;\n"
        "  mov.b32 {low, high}, %2;\n"
        "  cvt.f32.f16 %0, low;\n"
        "  cvt.f32.f16 %1, high;\n"
        "}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
    pair = pack<BFloat16>(low, high);
  }
#else
  // Exponent and mantissa in their places are a number too small by a power of 2, that of the biases'
  // difference.
  const std::uint32_t spread = __byte_perm(bytes, 0, 4 | First << 4 | 4 << 8 | Second << 12);
  const std::uint32_t size = spread & 0x7f007f00u, sign = spread & 0x80008000u;
  if constexpr (kBFloat16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(pair)
        : "r"(sign | size >> 4), "r"(0x7b807b80u), "r"(0x80008000u));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;"
        : "=r"(pair)
        : "r"(sign | size >> 1), "r"(0x5c005c00u), "r"(0x80008000u));
  }
  pair |= (((size + 0x01000100u) & 0x80008000u) >> 15) * 0x7fffu;  // NaN
#endif
  return pair;
}

#define ELASTIC_DECODE_MMA(type)                                                      \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float (&d)[4], const std::uint32_t (&a)[4],
                                                       std::uint32_t b0, std::uint32_t b1) {
  ELASTIC_DECODE_MMA("bf16");
}
template <>
__device__ __forceinline__ void multiply_add<Float16>(float (&d)[4], const std::uint32_t (&a)[4],
                                                      std::uint32_t b0, std::uint32_t b1) {
  ELASTIC_DECODE_MMA("f16");
}
#undef ELASTIC_DECODE_MMA

__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

#endif

}  // namespace cuda
}  // namespace elastic_decode
