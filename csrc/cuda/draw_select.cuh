// Thresholds without a sort: the smallest value of a row that a filter keeps, found by a block. Weights are
// whole numbers (1 each, or masses in units of 2^-40), so no sum depends on the order in which threads add.
#pragma once
#include "cuda/reduce.cuh"

namespace elastic_decode {
namespace cuda {

constexpr int kFinishThreads = 512, kFinishWarps = kFinishThreads / kWarp;
constexpr int kCapacity = 4096;        // candidates of a row that are listed
constexpr int kBins = 1024;            // of equal width, from the row's maximum down
constexpr int kMost = kFinishThreads;  // values in one bin that are ranked against each other
constexpr int kBinsPerThread = kBins / kFinishThreads;

using Weight = unsigned long long;

// A block's static shared memory; below 48 KiB.
struct Scratch {
  float values[kCapacity];
  std::int32_t ids[kCapacity];
  int size;    // candidates found, whether they fit or not
  int ranked;  // values in the bin
  int bin;
  Weight above;
  Weight space[kFinishWarps];
  union {
    struct {
      unsigned low[kBins], high[kBins];
    } bins;
    struct {
      float values[kMost];
      Weight weights[kMost];
    } rank;
  };
};

// exp(y) for y <= 0 as a whole number of 2^-40; 2^23 of them fit.
__device__ __forceinline__ Weight mass_of(float y) {
  return __float2ull_rn(expf(y) * 0x1p40f);
}

// Bins of equal width from `top` down to `low`; below that the last one. Rises as x falls.
struct Binning {
  float top, factor;
  __device__ Binning(float top, float low)
      : top(top), factor(fminf(static_cast<float>(kBins - 1) / (top - low), 3.402823466e+38f)) {}
  __device__ int operator()(float x) const {
    return static_cast<int>(fminf((top - x) * factor, static_cast<float>(kBins - 1)));
  }
  // What everything in the bins up to `bin` reaches, with some room for rounding.
  __device__ float floor_of(int bin) const {
    if (bin >= kBins - 1) return -3.402823466e+38f;
    const float width = static_cast<float>(bin + 1) / factor;
    return fmaxf(top - width - (fabsf(top) + width) * 1e-6f, -3.402823466e+38f);
  }
};

// Adds to a 64-bit sum kept in two halves, each with an atomic of its own.
__device__ __forceinline__ void add(unsigned* low, unsigned* high, Weight weight) {
  const unsigned part = static_cast<unsigned>(weight);
  const unsigned before = atomicAdd(low, part);
  const unsigned rest = static_cast<unsigned>(weight >> 32) + (before + part < before ? 1u : 0u);
  if (rest != 0) atomicAdd(high, rest);
}

// The bin in which the weight, summed from the top, reaches `target` (> 0), and the weight above that bin in
// scratch.above; -1 where all of it stays below. `each(body)` calls body(x, weight) for this thread's share.
template <typename Each>
__device__ int crossing_bin(Scratch& scratch, const Binning& binning, Weight target, const Each& each) {
  for (int bin = threadIdx.x; bin < kBins; bin += kFinishThreads) {
    scratch.bins.low[bin] = 0, scratch.bins.high[bin] = 0;
  }
  __syncthreads();
  each([&](float x, Weight weight) {
    const int bin = binning(x);
    add(&scratch.bins.low[bin], &scratch.bins.high[bin], weight);
  });
  __syncthreads();
  Weight own[kBinsPerThread], sum = 0, total;
  for (int i = 0; i < kBinsPerThread; ++i) {
    const int bin = static_cast<int>(threadIdx.x) * kBinsPerThread + i;
    own[i] = static_cast<Weight>(scratch.bins.high[bin]) << 32 | scratch.bins.low[bin];
    sum += own[i];
  }
  Weight above = block_sum_before<kFinishWarps>(sum, scratch.space, &total);
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (above < target && above + own[i] >= target) {  // true of one bin at most
      scratch.bin = static_cast<int>(threadIdx.x) * kBinsPerThread + i;
      scratch.above = above;
    }
    above += own[i];
  }
  __syncthreads();
  return total < target ? -1 : scratch.bin;
}

// The smallest value of which the weight strictly above is below `target` (> 0); -FLT_MAX where that is true
// of all. To be called by the whole block; `low` is where bins end, no bound.
template <typename Each>
__device__ float smallest_kept(Scratch& scratch, float top, float low, Weight target, const Each& each) {
  const Binning binning(top, low);
  const int bin = crossing_bin(scratch, binning, target, each);
  if (bin < 0) return -3.402823466e+38f;
  const Weight above = scratch.above;
  if (threadIdx.x == 0) scratch.ranked = 0;
  __syncthreads();
  each([&](float x, Weight weight) {
    if (binning(x) != bin) return;
    const int at = atomicAdd(&scratch.ranked, 1);
    if (at < kMost) scratch.rank.values[at] = x, scratch.rank.weights[at] = weight;
  });
  __syncthreads();
  if (scratch.ranked <= kMost) {
    const int own = threadIdx.x;
    int kept = INT32_MAX;
    if (own < scratch.ranked) {
      const float x = scratch.rank.values[own];
      Weight before = above;
      for (int i = 0; i < scratch.ranked; ++i) {
        if (scratch.rank.values[i] > x) before += scratch.rank.weights[i];
      }
      if (before < target) kept = key_of(x);
    }
    auto& space = reinterpret_cast<int (&)[kFinishWarps]>(scratch.space);
    return value_of(block_reduce(kept, space, [](int a, int b) { return min(a, b); }));
  }
  // Many values crowd in one bin: by bisection over all floats.
  std::int64_t least = key_of(-3.402823466e+38f), most = key_of(top);
  while (least < most) {
    const std::int64_t middle = least + (most - least) / 2;
    const float value = value_of(static_cast<int>(middle));
    Weight before = 0;
    each([&](float x, Weight weight) {
      if (x > value) before += weight;
    });
    if (block_sum(before, scratch.space) < target) {
      most = middle;
    } else {
      least = middle + 1;
    }
  }
  return value_of(static_cast<int>(least));
}

}  // namespace cuda
}  // namespace elastic_decode
