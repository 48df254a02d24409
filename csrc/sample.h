// The tensors of `sample`, one layout for the CPU and for CUDA.
#pragma once
#include <cstdint>

namespace elastic_decode {

// The contract is that of kernels/sample/__init__.py; R rows, S slots, vocabulary V.
struct SampleArgs {
  std::int32_t* token;  // [R]
  float* lse;
  float* sampling_logprob;
  const float* logits;            // [R, V]
  const std::int32_t* slots;      // [R], -1: idle
  const std::int32_t* positions;  // [R]
  std::int64_t rows, vocab;
  const float* temperature;  // [S], as all that follow
  const std::int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const std::int64_t* seed;
  const std::int32_t* sample_index;
  const float* repetition;
  const float* presence;
  const float* frequency;
  const std::int32_t* ban_until;
  const std::int32_t* ban_ids;   // [S, num_bans]
  const std::int32_t* bias_ids;  // [S, num_biases]
  const float* bias_values;      // [S, num_biases]
  std::int64_t num_bans, num_biases;
  const std::int32_t* output_counts;  // [S, V] or null
  const std::uint8_t* prompt_mask;    // [S, V] or null
};

}  // namespace elastic_decode
