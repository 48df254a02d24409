// Declarations of the CPU kernels, an op a section: raw pointers, sizes, strides. Implemented in
// csrc/cpu/<op>.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

#include "sample.h"

namespace elastic_decode {

// Element types that cross the boundary as integers; kernels/dtypes.py holds the same numbers.
enum class DType : int { Float32 = 0, BFloat16 = 1, Float16 = 2 };

// ---- linear ----

// out[t, n] = sum_k x[t, k] weight[n, k] + bias[n], summed in float32. `weight_stride` in elements; the rows
// of x and out are contiguous. `dtype` is that of x, weight and bias (bias may be null).
void linear(void* out, const void* x, const void* weight, const void* bias, std::int64_t tokens,
            std::int64_t outputs, std::int64_t inputs, std::int64_t weight_stride, DType dtype,
            DType out_dtype);

// ---- rms_norm ----

// out = x / sqrt(mean(x^2) + eps) * weight by row. With `residual` (else null) it first becomes residual + x,
// in place, and the norm is of that.
void rms_norm(void* out, void* residual, const void* x, const void* weight, std::int64_t rows,
              std::int64_t width, float eps, DType dtype);

// ---- silu_mul ----

// out[r, i] = silu(gate_up[r, i]) * gate_up[r, width + i]
void silu_mul(void* out, const void* gate_up, std::int64_t rows, std::int64_t width, DType dtype);

// ---- rope ----

struct RopeArgs {
  void* q_out;                       // [tokens, num_heads, head_dim]
  const void* qkv;                   // [tokens, (num_heads + 2 num_kv_heads) head_dim]
  const float* cos_sin;              // [positions, head_dim]: cosines, then sines
  const std::int32_t* positions;     // [tokens]
  const std::int32_t* slot_mapping;  // [tokens], -1: write no KV
  void* k_cache;                     // [slots, num_kv_heads, head_dim]
  void* v_cache;
  const void* q_weight;  // [head_dim] or null: no norm
  const void* k_weight;
  std::int64_t tokens, num_heads, num_kv_heads, head_dim;
  float eps;
};

// Norms (optionally) and rotates q and k, writes q to q_out and k, v into the cache.
void rope(const RopeArgs& args, DType dtype, DType cache_dtype);

// ---- paged_attention ----

// Shapes as in kernels/paged_attention/__init__.py.
struct PagedAttentionCall {
  const void* q;
  const void* k_cache;
  const void* v_cache;
  DType q_dtype, kv_dtype;  // Float32 or BFloat16; out has q's
  const std::int32_t* page_table;
  const std::int32_t* seq_lens;
  const std::int32_t* query_start;
  void* out;
  int num_tokens, num_rows, table_stride, num_heads, num_kv_heads, head_dim, page_size;
  float scale;
  int window;  // 0: none

  int group() const { return num_heads / num_kv_heads; }
};
void paged_attention(const PagedAttentionCall& call);

// ---- sample ----

void sample(const SampleArgs& args);

// The random words of ids 0..count at one position, and the Gumbel noise that words become, by the code that
// sample() uses: for tests. `count` is a multiple of 32.
void sample_words(std::uint32_t* words, std::int64_t count, std::int64_t seed, std::int32_t sample_index,
                  std::int32_t position);
void sample_gumbel(float* gumbel, const std::uint32_t* words, std::int64_t count);

// ---- budget ----

namespace budget {
struct Step;
struct DecodeInputs;
}  // namespace budget

// One decode step of the budget machine for rows 0 … rows-1 (csrc/budget.h).
void budget_step(const budget::Step& step, std::int64_t rows);

// The forward pass's inputs of rows 0 … rows-1.
void decode_inputs(const budget::DecodeInputs& inputs, std::int64_t rows);

// The initial state of one row: state [STATE_WORDS], program [PROGRAM_WORDS].
void enter_start(std::int32_t* state_row, const std::int32_t* program_row, const std::int32_t* automata,
                 std::int32_t phase);

// The numbers of the machine's tables by name, to compare with kernels/budget/layout.py.
struct BudgetConstant {
  const char* name;
  int value;
};
struct BudgetLayout {
  const BudgetConstant* constants;
  std::size_t size;
};
BudgetLayout budget_layout();

// ---- draw ----

// Advances the ring, samples the rows that run, steps the machine and counts what it emitted, as in
// kernels/draw/__init__.py. Ignored, because made here: the outputs of `sampling`; slots, draws and what
// comes of them in `machine`, and its ring_index. `output_counts` is that of `sampling`, to write; it may be
// null.
void draw(const SampleArgs& sampling, const budget::Step& machine, std::int32_t* ring_index,
          std::int32_t* output_counts);

}  // namespace elastic_decode
