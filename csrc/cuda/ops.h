// Declarations of the CUDA kernels' host functions, an op a section: as csrc/cpu/ops.h, on device pointers,
// with the stream as an integer. All return once the work is enqueued, and throw std::runtime_error, with the
// kernel's name, where CUDA refuses it.
#pragma once
#include <cstdint>

namespace elastic_decode {
namespace cuda {

// How many CUDA devices there are; 0 also where there is no driver.
int device_count();

// ---- paged_attention ----

// Keys whose order of summation is independent of all others, counted from position 0.
constexpr int kSplit = 256;

struct PagedAttentionArgs {
  const void* q;                    // [num_tokens, num_heads, head_dim]
  const void* k_cache;              // [pages, page_size, num_kv_heads, head_dim], of q's dtype
  const void* v_cache;              // the same
  const std::int32_t* page_table;   // [num_rows, table_stride]
  const std::int32_t* seq_lens;     // [num_rows]
  const std::int32_t* query_start;  // [num_rows + 1]
  void* out;                        // [num_tokens, num_heads, head_dim]
  // What `pass` tokens' splits come to: float32 [pass, num_heads, num_splits, head_dim], and the maximum of
  // the scores and the sum of the weights, [pass, num_heads, num_splits, 2]. Null where num_splits is 1.
  float* partial_out;
  float* partial_sums;
  std::int64_t table_stride;
  std::int32_t num_tokens, num_rows, num_heads, num_kv_heads, page_size;
  std::int32_t num_splits;  // as many as a row of the page table holds
  std::int32_t pass;        // tokens at a time, at least 1
  std::int32_t window;      // 0: none
  float scale;
  std::int32_t num_processors;  // of the device
  bool overlap;                 // sm_90 and newer: the second kernel may start while the first one ends
};

// float16 unless `bfloat16`. Throws std::invalid_argument for a head_dim other than 16, 32, 64, 80, 96, 128,
// 256.
void paged_attention(const PagedAttentionArgs& args, int head_dim, bool bfloat16, std::uintptr_t stream);

}  // namespace cuda
}  // namespace elastic_decode
