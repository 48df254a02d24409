// Which instruction set to use, found at run time: the extension is compiled once, without -march, for every
// machine.
//
// Two ways to use it. Kernels written with intrinsics switch on isa() and mark each variant ELASTIC_AVX2,
// ELASTIC_AVX512, … Kernels that a compiler vectorises well are written once, as an always-inline
// `Body::run(args...)` without intrinsics, and called through run_for_isa<Body>(args...), which compiles that
// body for each instruction set.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ELASTIC_X86 1
#else
#define ELASTIC_X86 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define ELASTIC_INLINE inline __attribute__((always_inline))
#define ELASTIC_NOINLINE __attribute__((noinline))
#else
#define ELASTIC_INLINE inline
#define ELASTIC_NOINLINE
#endif

#if ELASTIC_X86
#define ELASTIC_AVX2 __attribute__((target("avx2,fma")))
#define ELASTIC_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define ELASTIC_AVX512_BF16 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#else
#define ELASTIC_AVX2
#define ELASTIC_AVX512
#define ELASTIC_AVX512_BF16
#endif

namespace elastic_decode {

// Each includes those before it. Generic is plain C++: SSE2 on x86-64, NEON on arm64.
enum class Isa : int { Generic = 0, Avx2 = 1, Avx512 = 2, Avx512Bf16 = 3 };

// The best instruction set of this processor, no better than the limit.
Isa isa();

// Caps isa() from now on (a cap above what the processor has does nothing). For tests and measurements only:
// results of different instruction sets differ in the last bits.
void limit_isa(Isa best);

template <class Body, class... Args>
ELASTIC_AVX512 void run_avx512(Args... args) {
  Body::run(args...);
}

template <class Body, class... Args>
ELASTIC_AVX2 void run_avx2(Args... args) {
  Body::run(args...);
}

template <class Body, class... Args>
inline void run_for_isa(Args... args) {
  const Isa best = isa();
  if (best >= Isa::Avx512) {
    run_avx512<Body, Args...>(args...);
  } else if (best >= Isa::Avx2) {
    run_avx2<Body, Args...>(args...);
  } else {
    Body::run(args...);
  }
}

}  // namespace elastic_decode
