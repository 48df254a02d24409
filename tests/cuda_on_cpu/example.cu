// Kernels that show what the emulator catches: each is right with `fault` 0 and wrong otherwise.
#include "device.cuh"

using namespace elastic_decode::cuda;

namespace {

// Sums 256 numbers, twice. Fault 1: no barrier before the partial sums are read; 2: a barrier that a part of
// a warp does not reach; 3: two barriers where others have one; 4: a lane shuffles under a mask without
// itself; 5: a warp's lanes meet in two different operations; 6: past the end of the shared memory; 7: no
// barrier before the partial sums are written again.
__global__ void sum(const float* x, float* out, int fault) {
  float* partial = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  float value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(fault == 4 ? ~1u : kAllLanes, value, step);
  }
  if (fault == 2 && warp == 3 && lane > 7) __syncwarp();
  if (fault == 3 && thread < 40) __syncthreads();
  if (fault == 5) lane > 3 ? __syncwarp() : static_cast<void>(__ballot_sync(kAllLanes, 1));
  for (int time = 0; time < 2; ++time) {
    if (lane == 0) partial[fault == 6 ? warp + 8 : warp] = time == 0 ? value + 1.0f : value;
    if (fault != 1) __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < 8; ++i) total += partial[i];
    if (thread == 255) out[blockIdx.x] = time == 0 ? total : out[blockIdx.x] + total - 8.0f;
    if (fault != 7) __syncthreads();
  }
}

// Reverses blocks of 64 in static shared memory, copied there asynchronously. Fault 1: nobody waits for the
// copies; 2: it reads one word that nobody wrote.
__global__ void reverse(const float* x, float* out, int fault) {
  __shared__ __align__(16) float kept[65];
  const int thread = static_cast<int>(threadIdx.x), base = static_cast<int>(blockIdx.x) * 64;
#ifdef CUDA_ON_CPU
  cuda_on_cpu::copy_async(kept + 4 * thread, x + base + 4 * thread, 16, 16);
  cuda_on_cpu::commit_async();
  cuda_on_cpu::wait_async(fault == 1 ? 1 : 0);
#endif
  __syncwarp(0xffffu);
  for (int i = thread; i < 64; i += 16) out[base + i] = kept[(fault == 2 ? 64 : 63) - i];
}

std::string error;

template <typename Body>
const char* report(const Body& body) {
  error.clear();
  try {
    body();
  } catch (const std::exception& thrown) {
    error = thrown.what();
  }
  return error.c_str();
}

}  // namespace

extern "C" void set_schedule(std::uint64_t seed) {
  cuda_on_cpu::set_schedule(seed);
}

extern "C" const char* run_sum(const float* x, float* out, int blocks, int fault) {
  return report([=] {
    launch({"sum", dim3(static_cast<unsigned>(blocks)), dim3(256), 8 * sizeof(float), 0}, sum, x, out, fault);
  });
}

extern "C" const char* run_reverse(const float* x, float* out, int blocks, int fault) {
  return report([=] {
    launch({"reverse", dim3(static_cast<unsigned>(blocks)), dim3(16), 0, 0}, reverse, x, out, fault);
  });
}
