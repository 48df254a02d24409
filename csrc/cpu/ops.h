// Declarations of the CPU kernels, an op a section: raw pointers, sizes, strides. Implemented in
// csrc/cpu/<op>.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

namespace elastic_decode {

// Element types that cross the boundary as integers; kernels/dtypes.py holds the same numbers.
enum class DType : int { Float32 = 0, BFloat16 = 1, Float16 = 2 };

// ---- linear ----

// ---- rms_norm ----

// ---- silu_mul ----

// ---- rope ----

// ---- paged_attention ----

// ---- sample ----

// ---- budget ----

}  // namespace elastic_decode
