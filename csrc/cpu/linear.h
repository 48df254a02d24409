// What the variants of linear (linear_<isa>.cpp) share with their caller (linear.cpp).
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/simd.h"

namespace elastic_decode {

// x [tokens, inputs], weight [outputs, inputs] with rows `weight_stride` apart, bias [outputs] or null: of
// one type.
struct LinearArgs {
  void* out;
  const void* x;
  const void* weight;
  const void* bias;
  std::int64_t tokens, outputs, inputs, weight_stride;
};

// Computes the columns begin <= n < end of out for all tokens, in one thread.
using LinearColumns = void (*)(const LinearArgs& args, std::int64_t begin, std::int64_t end);

// The types of (inputs, out), each in a variant's three functions.
struct LinearVariant {
  LinearColumns float32, bf16, bf16_to_float32;
};

extern const LinearVariant kLinearGeneric;
#if ELASTIC_X86
extern const LinearVariant kLinearAvx2;
extern const LinearVariant kLinearAvx512;
extern const LinearVariant kLinearAvx512Bf16;
#endif

}  // namespace elastic_decode
