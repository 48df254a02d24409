#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace elastic_decode {
namespace {

template <class T>
struct SiluMulRows {
  static ELASTIC_INLINE void run(T* out, const T* gate_up, std::int64_t rows, std::int64_t width) {
    for (std::int64_t row = 0; row < rows; ++row) {
      const T* gate = gate_up + 2 * row * width;
      const T* up = gate + width;
      T* result = out + row * width;
#pragma omp simd
      for (std::int64_t i = 0; i < width; ++i) {
        const float g = to_float(gate[i]);
        result[i] = from_float<T>(g / (1.0f + exp_float(-g)) * to_float(up[i]));
      }
    }
  }
};

template <class T>
void silu_mul_typed(void* out, const void* gate_up, std::int64_t rows, std::int64_t width) {
  const int threads = threads_for(rows * width, 16384, rows);
  parallel_ranges(rows, threads, [&](std::int64_t begin, std::int64_t end) {
    run_for_isa<SiluMulRows<T>>(static_cast<T*>(out) + begin * width,
                                static_cast<const T*>(gate_up) + 2 * begin * width, end - begin, width);
  });
}

}  // namespace

void silu_mul(void* out, const void* gate_up, std::int64_t rows, std::int64_t width, DType dtype) {
  if (dtype == DType::BFloat16) {
    silu_mul_typed<BFloat16>(out, gate_up, rows, width);
  } else {
    silu_mul_typed<float>(out, gate_up, rows, width);
  }
}

}  // namespace elastic_decode
