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

static void bind_paged_attention(py::module_& m) {
  using Address = std::uintptr_t;
  m.attr("SPLIT") = elastic_decode::cuda::kSplit;
  m.def("paged_attention",
        [](Address q, Address k_cache, Address v_cache, Address page_table, Address seq_lens,
           Address query_start, Address out, Address partial_out, Address partial_sums,
           std::int64_t table_stride, std::int32_t num_tokens, std::int32_t num_rows, std::int32_t num_heads,
           std::int32_t num_kv_heads, std::int32_t page_size, std::int32_t num_splits, std::int32_t pass,
           std::int32_t window, float scale, std::int32_t num_processors, bool overlap, int head_dim,
           bool bfloat16, Address stream) {
          elastic_decode::cuda::paged_attention({as<void>(q),
                                                 as<void>(k_cache),
                                                 as<void>(v_cache),
                                                 as<std::int32_t>(page_table),
                                                 as<std::int32_t>(seq_lens),
                                                 as<std::int32_t>(query_start),
                                                 as<void>(out),
                                                 as<float>(partial_out),
                                                 as<float>(partial_sums),
                                                 table_stride,
                                                 num_tokens,
                                                 num_rows,
                                                 num_heads,
                                                 num_kv_heads,
                                                 page_size,
                                                 num_splits,
                                                 pass,
                                                 window,
                                                 scale,
                                                 num_processors,
                                                 overlap},
                                                head_dim, bfloat16, stream);
        });
}

void bind_cuda(py::module_& m) {
  m.doc() = "CUDA kernels; each call enqueues work on a stream";
  m.def("device_count", &elastic_decode::cuda::device_count);
  bind_paged_attention(m);
}
