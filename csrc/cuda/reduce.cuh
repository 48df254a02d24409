// Reductions over a warp and over a block, in a fixed order, and floats as integers of the same order.
#pragma once
#include "cuda/device.cuh"

namespace elastic_decode {
namespace cuda {

__device__ __forceinline__ float warp_max(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Every thread of a block of kWarps full warps takes part and gets the result. `space` is shared memory,
// which may be that of the block's last reduction.
template <int kWarps, typename T, typename Operation>
__device__ __forceinline__ T block_reduce(T value, T (&space)[kWarps], Operation operation) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = operation(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) space[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = space[0];
  for (int warp = 1; warp < kWarps; ++warp) value = operation(value, space[warp]);
  return value;
}

template <int kWarps, typename T>
__device__ __forceinline__ T block_sum(T value, T (&space)[kWarps]) {
  return block_reduce(value, space, [](T a, T b) { return a + b; });
}

template <int kWarps, typename T>
__device__ __forceinline__ T block_max(T value, T (&space)[kWarps]) {
  return block_reduce(value, space, [](T a, T b) { return a > b ? a : b; });
}

// The sum over the threads before this one; `total` is that over all.
template <int kWarps>
__device__ __forceinline__ unsigned long long block_sum_before(unsigned long long value,
                                                               unsigned long long (&space)[kWarps],
                                                               unsigned long long* total) {
  const int lane = threadIdx.x % kWarp, own_warp = threadIdx.x / kWarp;
  unsigned long long sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned long long other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == kWarp - 1) space[own_warp] = sum;
  __syncthreads();
  *total = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp < own_warp) sum += space[warp];
    *total += space[warp];
  }
  return sum - value;
}

// Rises with the float's value; -0 lies just below 0.
__device__ __forceinline__ int key_of(float value) {
  const int bits = __float_as_int(value);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

__device__ __forceinline__ float value_of(int key) {
  return __int_as_float(key < 0 ? key ^ 0x7fffffff : key);
}

// Orders pairs by score, equal scores by falling id: the largest is the best, the lowest id on ties.
__device__ __forceinline__ unsigned long long score_key(float score, int id) {
  const unsigned high = static_cast<unsigned>(key_of(score + 0.0f)) ^ 0x80000000u;
  return static_cast<unsigned long long>(high) << 32 | (0xffffffffu - static_cast<unsigned>(id));
}

__device__ __forceinline__ int id_of(unsigned long long key) {
  return static_cast<int>(0xffffffffu - static_cast<unsigned>(key));
}

}  // namespace cuda
}  // namespace elastic_decode
