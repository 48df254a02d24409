// The attention kernel compiled for x86-64's instruction sets; paged_attention.cpp picks one at run time.
#include "cpu/isa.h"

#if ELASTIC_X86
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own intrinsics headers, when inlined
#endif
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/paged_attention.h"
#include "cpu/simd.h"

namespace elastic_decode::attention {

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define ELASTIC_LANES 256
#define ELASTIC_PAIRS 0
#include "cpu/paged_attention_lanes.h"
// in this order, which this line keeps
#include "cpu/paged_attention_products.h"
// likewise
#include "cpu/paged_attention_kernel.h"
#undef ELASTIC_LANES
#undef ELASTIC_PAIRS
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace avx512 {
#define ELASTIC_LANES 512
#define ELASTIC_PAIRS 0
#include "cpu/paged_attention_lanes.h"
// in this order, which this line keeps
#include "cpu/paged_attention_products.h"
// likewise
#include "cpu/paged_attention_kernel.h"
#undef ELASTIC_PAIRS
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
namespace avx512_bf16 {
#define ELASTIC_PAIRS 1
#include "cpu/paged_attention_lanes.h"
// in this order, which this line keeps
#include "cpu/paged_attention_products.h"
// likewise
#include "cpu/paged_attention_kernel.h"
#undef ELASTIC_LANES
#undef ELASTIC_PAIRS
}  // namespace avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernel kAvx2 = {avx2::attend_split, avx2::attend, avx2::fold};
const Kernel kAvx512 = {avx512::attend_split, avx512::attend, avx512::fold};
const Kernel kAvx512Bf16 = {avx512_bf16::attend_split, avx512_bf16::attend, avx512_bf16::fold};

}  // namespace elastic_decode::attention
#endif
