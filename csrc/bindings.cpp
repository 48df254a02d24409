// The only pybind11 file. Arrays cross as integer addresses, so that no torch header (and no torch ABI) is
// needed; the Python wrappers in kernels/<op>/cpu.py check shapes and dtypes before they call.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "cpu/ops.h"

namespace py = pybind11;
using elastic_decode::DType;

template <typename T>
static T* as(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

static void bind_isa(py::module_& m) {
  py::enum_<elastic_decode::Isa>(m, "Isa")
      .value("generic", elastic_decode::Isa::Generic)
      .value("avx2", elastic_decode::Isa::Avx2)
      .value("avx512", elastic_decode::Isa::Avx512)
      .value("avx512_bf16", elastic_decode::Isa::Avx512Bf16);
  m.def("isa", &elastic_decode::isa, "The instruction set that the kernels use.");
  m.def("limit_isa", &elastic_decode::limit_isa, py::arg("best"), "Cap the instruction set; for tests.");
}

static void bind_linear(py::module_& m) {
  (void)m;
}

static void bind_rms_norm(py::module_& m) {
  (void)m;
}

static void bind_silu_mul(py::module_& m) {
  (void)m;
}

static void bind_rope(py::module_& m) {
  (void)m;
}

static void bind_paged_attention(py::module_& m) {
  (void)m;
}

static void bind_sample(py::module_& m) {
  (void)m;
}

static void bind_budget(py::module_& m) {
  (void)m;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "elastic_decode's compiled kernels";
  py::module_ cpu = m.def_submodule("cpu", "C++ kernels for the CPU");
  bind_isa(cpu);
  bind_linear(cpu);
  bind_rms_norm(cpu);
  bind_silu_mul(cpu);
  bind_rope(cpu);
  bind_paged_attention(cpu);
  bind_sample(cpu);
  bind_budget(cpu);
}
