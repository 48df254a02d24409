// The budget machine without the draw, and the next step's inputs: a thread a row.
#include "budget.h"
#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace elastic_decode {
namespace cuda {
namespace {

constexpr unsigned kRows = 64;  // a block's

__global__ void __launch_bounds__(kRows)
    step_rows(const __grid_constant__ budget::Step step, std::int64_t rows) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRows + threadIdx.x;
  if (row < rows) budget::step_row(step, row);
}

__global__ void __launch_bounds__(kRows)
    input_rows(const __grid_constant__ budget::DecodeInputs inputs, std::int64_t rows) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRows + threadIdx.x;
  if (row < rows) budget::decode_inputs_row(inputs, row);
}

dim3 blocks(std::int64_t rows) {
  return dim3(static_cast<unsigned>((rows + kRows - 1) / kRows));
}

}  // namespace

void budget_step(const budget::Step& step, std::int64_t rows, std::uintptr_t stream) {
  if (rows > 0) launch({"budget_step", blocks(rows), dim3(kRows), 0, stream}, &step_rows, step, rows);
}

void decode_inputs(const budget::DecodeInputs& inputs, std::int64_t rows, std::uintptr_t stream) {
  if (rows > 0) launch({"decode_inputs", blocks(rows), dim3(kRows), 0, stream}, &input_rows, inputs, rows);
}

}  // namespace cuda
}  // namespace elastic_decode
