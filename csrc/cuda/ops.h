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

}  // namespace cuda
}  // namespace elastic_decode
