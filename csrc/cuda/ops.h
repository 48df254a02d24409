// Declarations of the CUDA kernels' host functions, an op a section: as csrc/cpu/ops.h, on device pointers,
// with the stream as an integer. All return once the work is enqueued, and throw std::runtime_error, with the
// kernel's name, where CUDA refuses it.
#pragma once
#include <cstdint>

namespace elastic_decode {
namespace cuda {

// How many CUDA devices there are; 0 also where there is no driver.
int device_count();

}  // namespace cuda
}  // namespace elastic_decode
