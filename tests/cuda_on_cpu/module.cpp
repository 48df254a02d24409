// The extension's `cuda` submodule on the emulator, with the emulator's own switches beside it.
#include <pybind11/pybind11.h>

#include "emulator.h"

void bind_cuda(pybind11::module_& m);

PYBIND11_MODULE(cuda_on_cpu, m) {
  bind_cuda(m);
  m.def("set_schedule", &cuda_on_cpu::set_schedule, pybind11::arg("seed"));
  m.def("launches", &cuda_on_cpu::launches);
}
