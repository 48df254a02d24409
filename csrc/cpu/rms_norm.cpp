#include <cmath>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace elastic_decode {
namespace {

template <class T>
struct RmsNormRows {
  static ELASTIC_INLINE void run(T* out, T* residual, const T* x, const T* weight, std::int64_t rows,
                                 std::int64_t width, float eps) {
    for (std::int64_t row = 0; row < rows; ++row) {
      const T* input = x + row * width;
      if (residual != nullptr) {
        T* sum = residual + row * width;
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i)
          sum[i] = from_float<T>(to_float(sum[i]) + to_float(input[i]));
        input = sum;
      }
      const float scale = 1.0f / std::sqrt(sum_of_squares(input, width) / static_cast<float>(width) + eps);
      T* result = out + row * width;
#pragma omp simd
      for (std::int64_t i = 0; i < width; ++i) {
        const T normed = from_float<T>(to_float(input[i]) * scale);
        result[i] = from_float<T>(to_float(normed) * to_float(weight[i]));
      }
    }
  }
};

template <class T>
void rms_norm_typed(void* out, void* residual, const void* x, const void* weight, std::int64_t rows,
                    std::int64_t width, float eps) {
  const int threads = threads_for(rows * width, 32768, rows);
  parallel_ranges(rows, threads, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t at = begin * width;
    run_for_isa<RmsNormRows<T>>(
        static_cast<T*>(out) + at, residual != nullptr ? static_cast<T*>(residual) + at : nullptr,
        static_cast<const T*>(x) + at, static_cast<const T*>(weight), end - begin, width, eps);
  });
}

}  // namespace

void rms_norm(void* out, void* residual, const void* x, const void* weight, std::int64_t rows,
              std::int64_t width, float eps, DType dtype) {
  if (dtype == DType::BFloat16) {
    rms_norm_typed<BFloat16>(out, residual, x, weight, rows, width, eps);
  } else {
    rms_norm_typed<float>(out, residual, x, weight, rows, width, eps);
  }
}

}  // namespace elastic_decode
