#include "cpu/linear.h"

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace elastic_decode {
namespace {

// The best variant that has a function for these types.
LinearColumns pick(LinearColumns LinearVariant::* types) {
#if ELASTIC_X86
  const Isa best = isa();
  if (best >= Isa::Avx512Bf16 && kLinearAvx512Bf16.*types != nullptr) return kLinearAvx512Bf16.*types;
  if (best >= Isa::Avx512) return kLinearAvx512.*types;
  if (best >= Isa::Avx2) return kLinearAvx2.*types;
#endif
  return kLinearGeneric.*types;
}

}  // namespace

void linear(void* out, const void* x, const void* weight, const void* bias, std::int64_t tokens,
            std::int64_t outputs, std::int64_t inputs, std::int64_t weight_stride, DType dtype,
            DType out_dtype) {
  if (tokens == 0 || outputs == 0) return;
  const LinearColumns run = pick(dtype != DType::BFloat16       ? &LinearVariant::float32
                                 : out_dtype == DType::BFloat16 ? &LinearVariant::bf16
                                                                : &LinearVariant::bf16_to_float32);
  const LinearArgs args{out, x, weight, bias, tokens, outputs, inputs, weight_stride};
  // Whole groups of 8 outputs a thread: no two threads share a tile. Reading a weight takes as long as
  // multiplying it with some seven tokens; a thread is worth starting from about 3 microseconds of work.
  const std::int64_t groups = (outputs + 7) / 8;
  const int threads = threads_for((tokens + 7) * outputs * inputs, 5 << 17, groups);
  parallel_ranges(groups, threads, [&](std::int64_t begin, std::int64_t end) {
    run(args, begin * 8, std::min(outputs, end * 8));
  });
}

}  // namespace elastic_decode
