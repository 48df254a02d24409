#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace elastic_decode {
namespace {

template <class T>
static ELASTIC_INLINE float dot(const T* a, const T* b, std::int64_t count) {
  float partial[32] = {};
  std::int64_t at = 0;
  for (; at + 32 <= count; at += 32) {
#pragma omp simd
    for (int lane = 0; lane < 32; ++lane) partial[lane] += to_float(a[at + lane]) * to_float(b[at + lane]);
  }
  for (int lane = 0; at + lane < count; ++lane)
    partial[lane] += to_float(a[at + lane]) * to_float(b[at + lane]);
  for (int width = 16; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) partial[lane] += partial[lane + width];
  }
  return partial[0];
}

template <class T, class Out>
struct LinearColumns {
  static ELASTIC_INLINE void run(Out* out, const T* x, const T* weight, const T* bias, std::int64_t tokens,
                                 std::int64_t outputs, std::int64_t inputs, std::int64_t weight_stride,
                                 std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      for (std::int64_t t = 0; t < tokens; ++t) {
        const float sum = dot(x + t * inputs, weight + n * weight_stride, inputs);
        out[t * outputs + n] = from_float<Out>(bias != nullptr ? sum + to_float(bias[n]) : sum);
      }
    }
  }
};

template <class T, class Out>
void linear_typed(void* out, const void* x, const void* weight, const void* bias, std::int64_t tokens,
                  std::int64_t outputs, std::int64_t inputs, std::int64_t weight_stride) {
  const int threads = threads_for(tokens * outputs * inputs, 65536, outputs);
  parallel_ranges(outputs, threads, [&](std::int64_t begin, std::int64_t end) {
    run_for_isa<LinearColumns<T, Out>>(static_cast<Out*>(out), static_cast<const T*>(x),
                                       static_cast<const T*>(weight), static_cast<const T*>(bias), tokens,
                                       outputs, inputs, weight_stride, begin, end);
  });
}

}  // namespace

void linear(void* out, const void* x, const void* weight, const void* bias, std::int64_t tokens,
            std::int64_t outputs, std::int64_t inputs, std::int64_t weight_stride, DType dtype,
            DType out_dtype) {
  const auto typed = dtype != DType::BFloat16       ? &linear_typed<float, float>
                     : out_dtype == DType::BFloat16 ? &linear_typed<BFloat16, BFloat16>
                                                    : &linear_typed<BFloat16, float>;
  typed(out, x, weight, bias, tokens, outputs, inputs, weight_stride);
}

}  // namespace elastic_decode
