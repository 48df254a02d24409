#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace elastic_decode {
namespace cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // no driver, or none that fits: not an error of the next launch
  return 0;
}

}  // namespace cuda
}  // namespace elastic_decode
