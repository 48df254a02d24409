// Stands in for NVIDIA's header where g++ compiles csrc/cuda for the CPU: the part of CUDA that the kernels
// use, on the emulator. What is missing here does not compile; add it with CUDA's own meaning.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define CUDA_ON_CPU 1

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// All thread-local variables of the library are the running block's static shared memory (emulator.cpp).
#define __shared__ static thread_local

// ---- vectors and indices ----

#define CUDA_ON_CPU_VECTOR(type, element, alignment)                          \
  struct alignas(2 * sizeof(element)) type##2 {                               \
    element x, y;                                                             \
  };                                                                          \
  struct type##3 {                                                            \
    element x, y, z;                                                          \
  };                                                                          \
  struct alignas(alignment) type##4 {                                         \
    element x, y, z, w;                                                       \
  };                                                                          \
  inline type##2 make_##type##2(element x, element y) {                       \
    return {x, y};                                                            \
  }                                                                           \
  inline type##3 make_##type##3(element x, element y, element z) {            \
    return {x, y, z};                                                         \
  }                                                                           \
  inline type##4 make_##type##4(element x, element y, element z, element w) { \
    return {x, y, z, w};                                                      \
  }

CUDA_ON_CPU_VECTOR(char, signed char, 4)
CUDA_ON_CPU_VECTOR(uchar, unsigned char, 4)
CUDA_ON_CPU_VECTOR(short, short, 8)
CUDA_ON_CPU_VECTOR(ushort, unsigned short, 8)
CUDA_ON_CPU_VECTOR(int, int, 16)
CUDA_ON_CPU_VECTOR(uint, unsigned int, 16)
CUDA_ON_CPU_VECTOR(longlong, long long, 16)
CUDA_ON_CPU_VECTOR(ulonglong, unsigned long long, 16)
CUDA_ON_CPU_VECTOR(float, float, 16)
CUDA_ON_CPU_VECTOR(double, double, 16)
#undef CUDA_ON_CPU_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- barriers and warps ----

using cuda_on_cpu::Where;

inline void __syncthreads(Where where = Where::here()) {
  cuda_on_cpu::barrier(0, 0, where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap(Where where = Where::here()) {
  cuda_on_cpu::fail("__trap()", where);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, Where where = Where::here()) {
  cuda_on_cpu::warp_exchange(mask, 0, "__syncwarp", where);
}

namespace cuda_on_cpu {
// Shuffles stay within segments of `width` lanes; a lane outside of them reads its own value.
template <typename T, typename Source>
T shuffle(unsigned mask, T value, int width, const char* kind, Where where, Source source) {
  if (width < 1 || width > kLanes || (width & (width - 1)))
    fail("shuffles with a width of no power of 2", where);
  const int first = lane() & ~(width - 1), from = source(lane() - first);
  const auto all = warp_exchange(mask, value, kind, where);
  return all[from < 0 || from >= width ? lane() : first + from];
}

template <typename T, typename Operation>
T reduce(unsigned mask, T value, const char* kind, Where where, Operation operation) {
  const auto all = warp_exchange(mask, value, kind, where);
  T result = value;
  for (int i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1u) && i != lane()) result = operation(result, all[i]);
  }
  return result;
}
}  // namespace cuda_on_cpu

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, Where where = Where::here()) {
  return cuda_on_cpu::shuffle(mask, value, width, "__shfl_sync", where,
                              [=](int) { return from & (width - 1); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, Where where = Where::here()) {
  return cuda_on_cpu::shuffle(mask, value, width, "__shfl_up_sync", where,
                              [=](int lane) { return lane - static_cast<int>(delta); });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, Where where = Where::here()) {
  return cuda_on_cpu::shuffle(mask, value, width, "__shfl_down_sync", where,
                              [=](int lane) { return lane + static_cast<int>(delta); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, Where where = Where::here()) {
  return cuda_on_cpu::shuffle(mask, value, width, "__shfl_xor_sync", where,
                              [=](int lane) { return lane ^ bits; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Where where = Where::here()) {
  const unsigned bit = predicate ? 1u << cuda_on_cpu::lane() : 0u;
  return cuda_on_cpu::reduce(mask, bit, "__ballot_sync", where, [](unsigned a, unsigned b) {
    return b == 0x7fffffffu ? a : a | b;  // poison: an exited lane
  });
}
inline int __any_sync(unsigned mask, int predicate, Where where = Where::here()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, Where where = Where::here()) {
  return __ballot_sync(mask, !predicate, where) == 0;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, Where where = Where::here()) {
  const auto all = cuda_on_cpu::warp_exchange(mask, value, "__match_any_sync", where);
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= (mask >> i & 1u) && all[i] == value ? 1u << i : 0u;
  return same;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value, Where where = Where::here()) {
  return cuda_on_cpu::reduce(mask, value, "__reduce_add_sync", where, [](T a, T b) { return a + b; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, Where where = Where::here()) {
  return cuda_on_cpu::reduce(mask, value, "__reduce_max_sync", where, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, Where where = Where::here()) {
  return cuda_on_cpu::reduce(mask, value, "__reduce_min_sync", where, [](T a, T b) { return a < b ? a : b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, Where where = Where::here()) {
  return cuda_on_cpu::reduce(mask, value, "__reduce_or_sync", where,
                             [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, Where where = Where::here()) {
  return cuda_on_cpu::reduce(mask, value, "__reduce_and_sync", where,
                             [](unsigned a, unsigned b) { return a & b; });
}
inline int __syncthreads_or(int predicate, Where where = Where::here()) {
  __shared__ int any;
  cuda_on_cpu::barrier(0, 0, where);
  any = 0;
  cuda_on_cpu::barrier(0, 0, where);
  if (predicate) any = 1;
  cuda_on_cpu::barrier(0, 0, where);
  return any;
}
inline int __syncthreads_and(int predicate, Where where = Where::here()) {
  return !__syncthreads_or(!predicate, where);
}
inline int __syncthreads_count(int predicate, Where where = Where::here()) {
  __shared__ int count;
  cuda_on_cpu::barrier(0, 0, where);
  count = 0;
  cuda_on_cpu::barrier(0, 0, where);
  count += predicate != 0;
  cuda_on_cpu::barrier(0, 0, where);
  return count;
}

// ---- atomics: one fiber runs at a time ----

template <typename T, typename Operation>
T cuda_on_cpu_atomic(T* address, Operation operation) {
  const T old = *address;
  *address = operation(old);
  return old;
}
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu_atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicSub(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu_atomic(address, [=](T old) { return static_cast<T>(old - value); });
}
template <typename T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu_atomic(address, [=](T old) { return old > value ? old : value; });
}
template <typename T>
T atomicMin(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu_atomic(address, [=](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicOr(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu_atomic(address, [=](T old) { return old | value; });
}
template <typename T>
T atomicAnd(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu_atomic(address, [=](T old) { return old & value; });
}
template <typename T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu_atomic(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return cuda_on_cpu_atomic(address, [=](T old) { return old == expected ? value : old; });
}

// ---- loads and stores with a hint, and dot's own spelling of plain arithmetic ----

#define CUDA_ON_CPU_LOAD(name) \
  template <typename T>        \
  T name(const T* address) {   \
    return *address;           \
  }
#define CUDA_ON_CPU_STORE(name)                        \
  template <typename T>                                \
  void name(T* address, std::common_type_t<T> value) { \
    *address = value;                                  \
  }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldlu)
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
CUDA_ON_CPU_STORE(__stwt)
#undef CUDA_ON_CPU_LOAD
#undef CUDA_ON_CPU_STORE

template <typename To, typename From>
To cuda_on_cpu_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __int_as_float(int x) {
  return cuda_on_cpu_bits<float>(x);
}
inline float __uint_as_float(unsigned x) {
  return cuda_on_cpu_bits<float>(x);
}
inline int __float_as_int(float x) {
  return cuda_on_cpu_bits<int>(x);
}
inline unsigned __float_as_uint(float x) {
  return cuda_on_cpu_bits<unsigned>(x);
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) >> (shift & 31));
}

// The approximate ones are computed exactly here.
inline float __expf(float x) {
  return std::exp(x);
}
inline float __exp10f(float x) {
  return std::pow(10.0f, x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __log2f(float x) {
  return std::log2(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float x) {
  return 1.0f / x;
}
inline float __frsqrt_rn(float x) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}
inline float rsqrtf(float x) {
  return __frsqrt_rn(x);
}
inline float __saturatef(float x) {
  return std::isnan(x) ? 0.0f : std::min(std::max(x, 0.0f), 1.0f);
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline int __float2int_rn(float x) {
  return static_cast<int>(std::nearbyint(x));
}
inline int __float2int_rz(float x) {
  return static_cast<int>(x);
}
inline int __float2int_rd(float x) {
  return static_cast<int>(std::floor(x));
}
inline unsigned __float2uint_rz(float x) {
  return static_cast<unsigned>(x);
}
inline unsigned long long __float2ull_rz(float x) {
  return static_cast<unsigned long long>(x);
}
inline unsigned long long __float2ull_rn(float x) {
  return static_cast<unsigned long long>(std::nearbyint(x));
}
inline float __int2float_rn(int x) {
  return static_cast<float>(x);
}
inline float __uint2float_rn(unsigned x) {
  return static_cast<float>(x);
}

// CUDA has these outside of any namespace.
#define CUDA_ON_CPU_MIN_MAX(type)   \
  inline type min(type a, type b) { \
    return b < a ? b : a;           \
  }                                 \
  inline type max(type a, type b) { \
    return a < b ? b : a;           \
  }
CUDA_ON_CPU_MIN_MAX(int)
CUDA_ON_CPU_MIN_MAX(unsigned)
CUDA_ON_CPU_MIN_MAX(long)
CUDA_ON_CPU_MIN_MAX(unsigned long)
CUDA_ON_CPU_MIN_MAX(long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long)
#undef CUDA_ON_CPU_MIN_MAX
inline float min(float a, float b) {
  return std::fmin(a, b);
}
inline float max(float a, float b) {
  return std::fmax(a, b);
}
inline double min(double a, double b) {
  return std::fmin(a, b);
}
inline double max(double a, double b) {
  return std::fmax(a, b);
}
using std::isfinite;
using std::isinf;
using std::isnan;

// ---- the runtime ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorName(cudaError_t code) {
  return code == cudaSuccess ? "cudaSuccess" : "an error";
}
inline const char* cudaGetErrorString(cudaError_t code) {
  return cudaGetErrorName(code);
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    cuda_on_cpu::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<std::size_t>(value));
  }
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  static_assert(sizeof call.arguments <= 4096, "a kernel takes at most 4 KiB of arguments");
  const auto shape = [](dim3 d) { return cuda_on_cpu::Shape{d.x, d.y, d.z}; };
  const auto body = [](void* each) {
    const Call& call = *static_cast<const Call*>(each);
    std::apply(call.kernel, call.arguments);
  };
  cuda_on_cpu::run(reinterpret_cast<const void*>(kernel), shape(config->gridDim), shape(config->blockDim),
                   config->dynamicSmemBytes, body, &call);
  return cudaSuccess;
}
