// Copies from global to shared memory that run while the thread goes on: cp.async (PTX ISA, "Non-bulk copy").
// A copy has arrived for the thread that started it once wait_copies returns, for the others after a barrier.
#pragma once
#include "device.cuh"

namespace elastic_decode {
namespace cuda {

#if !defined(CUDA_ON_CPU)
__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Starts a copy of 16 bytes, past L1; both addresses are multiples of 16. Not `present`: writes zeros and
// reads nothing, though `from` must be an address in global memory all the same.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool present) {
#if defined(CUDA_ON_CPU)
  cuda_on_cpu::copy_async(to, from, 16, present ? 16 : 0);
#else
  asm volatile(
      "{\n"
      "  .reg .pred absent;\n"
      "  setp.eq.s32 absent, %2, 0;\n"
      "  cp.async.cg.shared.global [%0], [%1], 16, absent;\n"
      "}"
      :
      : "r"(shared_address(to)), "l"(from), "r"(static_cast<int>(present))
      : "memory");
#endif
}

// What the thread has started since its last call becomes a group, even if that is nothing.
__device__ __forceinline__ void commit_copies() {
#if defined(CUDA_ON_CPU)
  cuda_on_cpu::commit_async();
#else
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits until at most the `Pending` latest groups of the thread are on their way.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
#if defined(CUDA_ON_CPU)
  cuda_on_cpu::wait_async(Pending);
#else
  asm volatile("cp.async.wait_group %0;" : : "n"(Pending) : "memory");
#endif
}

}  // namespace cuda
}  // namespace elastic_decode
