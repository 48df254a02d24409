#include "cpu/isa.h"

#include <algorithm>
#include <atomic>

namespace elastic_decode {
namespace {

Isa detect() {
#if ELASTIC_X86
  __builtin_cpu_init();
  // These also ask the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::Avx512Bf16;
  if (avx512) return Isa::Avx512;
  if (avx2) return Isa::Avx2;
#endif
  return Isa::Generic;
}

std::atomic<int> current{-1};

}  // namespace

Isa isa() {
  int best = current.load(std::memory_order_relaxed);
  if (best < 0) {
    best = static_cast<int>(detect());
    current.store(best, std::memory_order_relaxed);
  }
  return static_cast<Isa>(best);
}

void limit_isa(Isa best) {
  current.store(std::min(static_cast<int>(best), static_cast<int>(detect())), std::memory_order_relaxed);
}

}  // namespace elastic_decode
