// What every CUDA source here begins with: checked calls, checked launches, dynamic shared memory. Tests
// compile the same sources for the CPU, where tests/cuda_on_cpu takes the place of CUDA's headers.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace elastic_decode {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Throws std::runtime_error with the call's name where `code` is an error.
inline void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(code) + ": " +
                           cudaGetErrorString(code));
}

// The block's dynamic shared memory.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef CUDA_ON_CPU
  return static_cast<T*>(cuda_on_cpu::dynamic_shared());
#else
  extern __shared__ __align__(1024) unsigned char elastic_decode_shared[];
  return reinterpret_cast<T*>(elastic_decode_shared);
#endif
}

// How a kernel is launched; `name` is what an error calls it. With `overlap` (sm_90 and newer) it may start
// before the stream's previous kernel ends, and must call cudaGridDependencySynchronize() before it reads
// what that one wrote.
struct Launch {
  const char* name;
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes;  // dynamic; above 48 KiB it is asked for here
  std::uintptr_t stream;
  bool overlap = false;
};

template <typename... Parameters, typename... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (how.shared_bytes > (48 << 10)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(how.shared_bytes)),
          how.name);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(how.stream);
  config.attrs = &attribute;
  config.numAttrs = how.overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), how.name);
  check(cudaGetLastError(), how.name);
}

}  // namespace cuda
}  // namespace elastic_decode
