// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// noise drawn from its words. One source for the C++ and the CUDA compiler.
#pragma once
#include <math.h>
#include <stdint.h>

#ifndef ELASTIC_DECODE_HD
#if defined(__CUDACC__)
#define ELASTIC_DECODE_HD __host__ __device__ __forceinline__
#else
#define ELASTIC_DECODE_HD inline
#endif
#endif

namespace elastic_decode {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // the round's multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // the key schedule's increments
constexpr int kPhiloxRounds = 10;

struct Philox4 {
  uint32_t word[4];
};

ELASTIC_DECODE_HD Philox4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                     uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// The word of one vocabulary id at one position: key (seed's low half, sample index), counter (id / 4,
// position, seed's high half, 0).
ELASTIC_DECODE_HD uint32_t philox_word(int64_t seed, int32_t sample_index, int32_t position, int32_t id) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  const Philox4 block = philox4x32(static_cast<uint32_t>(id) >> 2, static_cast<uint32_t>(position),
                                   static_cast<uint32_t>(bits >> 32), 0u, static_cast<uint32_t>(bits),
                                   static_cast<uint32_t>(sample_index));
  return block.word[id & 3];
}

// E = -log(1 - u), u = (x + 1/2) 2^-32. Below u = 2^-10 by the series of -log1p(-u): x + 1/2 is exact in
// float32 there. Above, 1 - u is formed from the complement of x, so it rounds neither to 0 nor to 1. Always
// in [2^-33, 23).
ELASTIC_DECODE_HD float exponential(uint32_t x) {
  if (x < (1u << 22)) {
    const float u = (static_cast<float>(x) + 0.5f) * 0x1p-32f;
    return u * (1.0f + u * (0.5f + u * (1.0f / 3.0f)));
  }
  return -logf((static_cast<float>(~x) + 0.5f) * 0x1p-32f);
}

// Standard Gumbel noise, between kGumbelMin and kGumbelMax.
ELASTIC_DECODE_HD float gumbel(uint32_t x) {
  return -logf(exponential(x));
}

constexpr float kGumbelMin = -3.131f;  // x = 2^32 - 1: -log(33 log 2) = -3.1300
constexpr float kGumbelMax = 22.875f;  // x = 0: 33 log 2 = 22.8739

}  // namespace elastic_decode
