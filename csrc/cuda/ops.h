// Declarations of the CUDA kernels' host functions, an op a section: as csrc/cpu/ops.h, on device pointers,
// with the stream as an integer. All return once the work is enqueued, and throw std::runtime_error, with the
// kernel's name, where CUDA refuses it.
#pragma once
#include <cstdint>

#include "budget.h"
#include "sample.h"

namespace elastic_decode {
namespace cuda {

// How many CUDA devices there are; 0 also where there is no driver.
int device_count();

// ---- sample and draw ----

// The working memory that both need, in bytes. `modifies`: there are counts, or lists of bans or biases.
std::int64_t draw_work_bytes(std::int64_t rows, std::int64_t vocab, bool modifies);

// The contract is that of kernels/sample/__init__.py; two launches. `work` begins at a multiple of 16 bytes.
void sample(const SampleArgs& args, void* work, std::uintptr_t stream);

// The contract is that of kernels/draw/__init__.py; two launches. The outputs of `sampling` are ignored, and
// of `machine` all that the sampling has already or leaves.
void draw(const SampleArgs& sampling, const budget::Step& machine, std::int32_t* ring_index,
          std::int32_t* output_counts, void* work, std::uintptr_t stream);

// ---- budget ----

// One decode step of the budget machine for rows 0 … rows-1 (csrc/budget.h).
void budget_step(const budget::Step& step, std::int64_t rows, std::uintptr_t stream);

// The forward pass's inputs of rows 0 … rows-1.
void decode_inputs(const budget::DecodeInputs& inputs, std::int64_t rows, std::uintptr_t stream);

// ---- paged_attention ----

// Keys whose order of summation is independent of all others, counted from position 0.
constexpr int kSplit = 256;

struct PagedAttentionArgs {
  const void* q;                    // [num_tokens, num_heads, head_dim]
  const void* k_cache;              // [pages, page_size, num_kv_heads, head_dim]
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
  std::int32_t num_processors, processor_shared;  // of the device; a processor's shared memory in bytes
  bool overlap;  // sm_90 and newer: the second kernel may start while the first one ends
};

// q and out are bfloat16, or else float16; keys and values the same, or float8 (e4m3). Throws
// std::invalid_argument for a head_dim other than 16, 32, 64, 80, 96, 128, 256; with float8, 16 and 80.
void paged_attention(const PagedAttentionArgs& args, int head_dim, bool bfloat16, bool float8,
                     std::uintptr_t stream);

}  // namespace cuda
}  // namespace elastic_decode
