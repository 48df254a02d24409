#include <cmath>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace elastic_decode {
namespace {

// One head of one token: the optional norm, then the rotation of element i with element i + half.
template <class T, class Out>
static ELASTIC_INLINE void rotate_head(Out* out, const T* head, const T* weight, const float* cos_sin,
                                       std::int64_t head_dim, float eps) {
  const std::int64_t half = head_dim / 2;
  const float* cosine = cos_sin;
  const float* sine = cos_sin + half;
  if (weight == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
      const float a = to_float(head[i]);
      const float b = to_float(head[i + half]);
      out[i] = from_float<Out>(a * cosine[i] - b * sine[i]);
      out[i + half] = from_float<Out>(b * cosine[i] + a * sine[i]);
    }
    return;
  }
  const float scale = 1.0f / std::sqrt(sum_of_squares(head, head_dim) / static_cast<float>(head_dim) + eps);
#pragma omp simd
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = to_float(head[i]) * scale * to_float(weight[i]);
    const float b = to_float(head[i + half]) * scale * to_float(weight[i + half]);
    out[i] = from_float<Out>(a * cosine[i] - b * sine[i]);
    out[i + half] = from_float<Out>(b * cosine[i] + a * sine[i]);
  }
}

template <class T, class Cache>
struct RopeTokens {
  static ELASTIC_INLINE void run(const RopeArgs* args, std::int64_t begin, std::int64_t end) {
    const RopeArgs& a = *args;
    const std::int64_t dim = a.head_dim;
    const std::int64_t kv_width = a.num_kv_heads * dim;
    const T* q_weight = static_cast<const T*>(a.q_weight);
    const T* k_weight = static_cast<const T*>(a.k_weight);
    for (std::int64_t token = begin; token < end; ++token) {
      const T* q = static_cast<const T*>(a.qkv) + token * (a.num_heads * dim + 2 * kv_width);
      const T* k = q + a.num_heads * dim;
      const T* v = k + kv_width;
      const float* cos_sin = a.cos_sin + static_cast<std::int64_t>(a.positions[token]) * dim;
      T* q_out = static_cast<T*>(a.q_out) + token * a.num_heads * dim;
      for (std::int64_t head = 0; head < a.num_heads; ++head) {
        rotate_head(q_out + head * dim, q + head * dim, q_weight, cos_sin, dim, a.eps);
      }
      const std::int64_t slot = a.slot_mapping[token];
      if (slot < 0) continue;
      Cache* k_out = static_cast<Cache*>(a.k_cache) + slot * kv_width;
      Cache* v_out = static_cast<Cache*>(a.v_cache) + slot * kv_width;
      for (std::int64_t head = 0; head < a.num_kv_heads; ++head) {
        rotate_head(k_out + head * dim, k + head * dim, k_weight, cos_sin, dim, a.eps);
      }
#pragma omp simd
      for (std::int64_t i = 0; i < kv_width; ++i) v_out[i] = from_float<Cache>(to_float(v[i]));
    }
  }
};

template <class T, class Cache>
void rope_typed(const RopeArgs& args) {
  const std::int64_t width = (args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
  const int threads = threads_for(args.tokens * width, 32768, args.tokens);
  parallel_ranges(args.tokens, threads, [&](std::int64_t begin, std::int64_t end) {
    run_for_isa<RopeTokens<T, Cache>>(&args, begin, end);
  });
}

}  // namespace

void rope(const RopeArgs& args, DType dtype, DType cache_dtype) {
  const bool bf16 = dtype == DType::BFloat16;
  const bool bf16_cache = cache_dtype == DType::BFloat16;
  if (bf16 && bf16_cache) {
    rope_typed<BFloat16, BFloat16>(args);
  } else if (bf16) {
    rope_typed<BFloat16, float>(args);
  } else if (bf16_cache) {
    rope_typed<float, BFloat16>(args);
  } else {
    rope_typed<float, float>(args);
  }
}

}  // namespace elastic_decode
