// The CUDA half of the extension, `_C.cuda`: pointers and the stream cross as integers. Apart from
// csrc/bindings.cpp because tests build it without the CPU half, on an emulated device.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cuda/ops.h"

namespace py = pybind11;

template <typename T>
static T* as(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_cuda(py::module_& m) {
  m.doc() = "CUDA kernels; each call enqueues work on a stream";
  m.def("device_count", &elastic_decode::cuda::device_count);
}
