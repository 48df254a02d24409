// The extension and its CPU half; csrc/cuda/bindings.cpp is the other. Arrays cross as integer addresses, so
// that no torch header (and no torch ABI) is needed; the Python wrappers in kernels/<op>/cpu.py check shapes
// and dtypes before they call.
#include <pybind11/pybind11.h>

#include "budget.h"
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
  m.def("linear", [](std::uintptr_t out, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias,
                     std::int64_t tokens, std::int64_t outputs, std::int64_t inputs,
                     std::int64_t weight_stride, int dtype, int out_dtype) {
    const auto call = [&] {
      elastic_decode::linear(as<void>(out), as<void>(x), as<void>(weight), as<void>(bias), tokens, outputs,
                             inputs, weight_stride, static_cast<DType>(dtype), static_cast<DType>(out_dtype));
    };
    if (tokens * outputs * inputs < (1 << 22)) return call();
    py::gil_scoped_release
        release;  // worth its price only where the work takes longer than a few microseconds
    call();
  });
}

static void bind_rms_norm(py::module_& m) {
  m.def("rms_norm", [](std::uintptr_t out, std::uintptr_t residual, std::uintptr_t x, std::uintptr_t weight,
                       std::int64_t rows, std::int64_t width, float eps, int dtype) {
    elastic_decode::rms_norm(as<void>(out), as<void>(residual), as<void>(x), as<void>(weight), rows, width,
                             eps, static_cast<DType>(dtype));
  });
}

static void bind_silu_mul(py::module_& m) {
  m.def("silu_mul",
        [](std::uintptr_t out, std::uintptr_t gate_up, std::int64_t rows, std::int64_t width, int dtype) {
          elastic_decode::silu_mul(as<void>(out), as<void>(gate_up), rows, width, static_cast<DType>(dtype));
        });
}

static void bind_rope(py::module_& m) {
  m.def("rope",
        [](std::uintptr_t q_out, std::uintptr_t qkv, std::uintptr_t cos_sin, std::uintptr_t positions,
           std::uintptr_t slot_mapping, std::uintptr_t k_cache, std::uintptr_t v_cache,
           std::uintptr_t q_weight, std::uintptr_t k_weight, std::int64_t tokens, std::int64_t num_heads,
           std::int64_t num_kv_heads, std::int64_t head_dim, float eps, int dtype, int cache_dtype) {
          const elastic_decode::RopeArgs args{as<void>(q_out),
                                              as<void>(qkv),
                                              as<float>(cos_sin),
                                              as<std::int32_t>(positions),
                                              as<std::int32_t>(slot_mapping),
                                              as<void>(k_cache),
                                              as<void>(v_cache),
                                              as<void>(q_weight),
                                              as<void>(k_weight),
                                              tokens,
                                              num_heads,
                                              num_kv_heads,
                                              head_dim,
                                              eps};
          elastic_decode::rope(args, static_cast<DType>(dtype), static_cast<DType>(cache_dtype));
        });
}

static void bind_paged_attention(py::module_& m) {
  m.def("paged_attention",
        [](std::uintptr_t q, int q_dtype, std::uintptr_t k_cache, std::uintptr_t v_cache, int kv_dtype,
           std::uintptr_t page_table, std::uintptr_t seq_lens, std::uintptr_t query_start, std::uintptr_t out,
           int num_tokens, int num_rows, int table_stride, int num_heads, int num_kv_heads, int head_dim,
           int page_size, float scale, int window) {
          const elastic_decode::PagedAttentionCall call{as<void>(q),
                                                        as<void>(k_cache),
                                                        as<void>(v_cache),
                                                        static_cast<DType>(q_dtype),
                                                        static_cast<DType>(kv_dtype),
                                                        as<std::int32_t>(page_table),
                                                        as<std::int32_t>(seq_lens),
                                                        as<std::int32_t>(query_start),
                                                        as<void>(out),
                                                        num_tokens,
                                                        num_rows,
                                                        table_stride,
                                                        num_heads,
                                                        num_kv_heads,
                                                        head_dim,
                                                        page_size,
                                                        scale,
                                                        window};
          py::gil_scoped_release release;
          elastic_decode::paged_attention(call);
        });
}

static void bind_sample(py::module_& m) {
  m.def("sample",
        [](std::uintptr_t token, std::uintptr_t lse, std::uintptr_t sampling_logprob, std::uintptr_t logits,
           std::uintptr_t slots, std::uintptr_t positions, std::int64_t rows, std::int64_t vocab,
           std::uintptr_t temperature, std::uintptr_t top_k, std::uintptr_t top_p, std::uintptr_t min_p,
           std::uintptr_t seed, std::uintptr_t sample_index, std::uintptr_t repetition,
           std::uintptr_t presence, std::uintptr_t frequency, std::uintptr_t ban_until,
           std::uintptr_t ban_ids, std::uintptr_t bias_ids, std::uintptr_t bias_values, std::int64_t num_bans,
           std::int64_t num_biases, std::uintptr_t output_counts, std::uintptr_t prompt_mask) {
          const elastic_decode::SampleArgs args{as<std::int32_t>(token),
                                                as<float>(lse),
                                                as<float>(sampling_logprob),
                                                as<float>(logits),
                                                as<std::int32_t>(slots),
                                                as<std::int32_t>(positions),
                                                rows,
                                                vocab,
                                                as<float>(temperature),
                                                as<std::int32_t>(top_k),
                                                as<float>(top_p),
                                                as<float>(min_p),
                                                as<std::int64_t>(seed),
                                                as<std::int32_t>(sample_index),
                                                as<float>(repetition),
                                                as<float>(presence),
                                                as<float>(frequency),
                                                as<std::int32_t>(ban_until),
                                                as<std::int32_t>(ban_ids),
                                                as<std::int32_t>(bias_ids),
                                                as<float>(bias_values),
                                                num_bans,
                                                num_biases,
                                                as<std::int32_t>(output_counts),
                                                as<std::uint8_t>(prompt_mask)};
          if (rows * vocab < (1 << 16)) return elastic_decode::sample(args);
          py::gil_scoped_release release;
          elastic_decode::sample(args);
        });
  m.def("sample_words", [](std::uintptr_t words, std::int64_t count, std::int64_t seed,
                           std::int32_t sample_index, std::int32_t position) {
    elastic_decode::sample_words(as<std::uint32_t>(words), count, seed, sample_index, position);
  });
  m.def("sample_gumbel", [](std::uintptr_t gumbel, std::uintptr_t words, std::int64_t count) {
    elastic_decode::sample_gumbel(as<float>(gumbel), as<std::uint32_t>(words), count);
  });
}

static void bind_budget(py::module_& m) {
  using Address = std::uintptr_t;
  m.def("budget_step",
        [](Address state, Address programs, Address automata, Address slots, Address draws, Address logits,
           Address lse, Address draw_logprob, Address temperature, Address ring_tokens, Address ring_flags,
           Address ring_logprobs, Address ring_sampling_logprobs, Address ring_index, std::int64_t rows,
           std::int64_t logits_width, std::int64_t ring_length, std::int64_t ring_width) {
          elastic_decode::budget_step(
              {as<std::int32_t>(state), as<std::int32_t>(programs), as<std::int32_t>(automata),
               as<std::int32_t>(slots), as<std::int32_t>(draws), as<float>(logits), as<float>(lse),
               as<float>(draw_logprob), as<float>(temperature), as<std::int32_t>(ring_tokens),
               as<std::int32_t>(ring_flags), as<float>(ring_logprobs), as<float>(ring_sampling_logprobs),
               as<std::int32_t>(ring_index), logits_width, ring_length, ring_width},
              rows);
        });
  m.def("decode_inputs",
        [](Address state, Address page_table, Address slots, Address token, Address position, Address seq_len,
           Address slot_mapping, std::int64_t rows, std::int64_t max_pages, std::int64_t page_size) {
          elastic_decode::decode_inputs(
              {as<std::int32_t>(state), as<std::int32_t>(page_table), as<std::int32_t>(slots),
               as<std::int32_t>(token), as<std::int32_t>(position), as<std::int32_t>(seq_len),
               as<std::int32_t>(slot_mapping), max_pages, page_size},
              rows);
        });
  m.def("enter_start", [](Address state_row, Address program_row, Address automata, std::int32_t phase) {
    elastic_decode::enter_start(as<std::int32_t>(state_row), as<std::int32_t>(program_row),
                                as<std::int32_t>(automata), phase);
  });
  m.def("budget_layout", [] {
    py::dict layout;
    const elastic_decode::BudgetLayout constants = elastic_decode::budget_layout();
    for (std::size_t i = 0; i < constants.size; ++i) {
      layout[constants.constants[i].name] = constants.constants[i].value;
    }
    return layout;
  });
}

static void bind_draw(py::module_& m) {
  using Address = std::uintptr_t;
  m.def("draw", [](Address logits, Address slots, Address positions, std::int64_t rows, std::int64_t vocab,
                   Address temperature, Address top_k, Address top_p, Address min_p, Address seed,
                   Address sample_index, Address repetition, Address presence, Address frequency,
                   Address ban_until, Address ban_ids, Address bias_ids, Address bias_values,
                   std::int64_t num_bans, std::int64_t num_biases, Address output_counts, Address prompt_mask,
                   Address state, Address programs, Address automata, Address ring_tokens, Address ring_flags,
                   Address ring_logprobs, Address ring_sampling_logprobs, Address ring_index,
                   std::int64_t ring_length, std::int64_t ring_width) {
    elastic_decode::SampleArgs sampling{};
    sampling.logits = as<float>(logits);
    sampling.slots = as<std::int32_t>(slots);
    sampling.positions = as<std::int32_t>(positions);
    sampling.rows = rows;
    sampling.vocab = vocab;
    sampling.temperature = as<float>(temperature);
    sampling.top_k = as<std::int32_t>(top_k);
    sampling.top_p = as<float>(top_p);
    sampling.min_p = as<float>(min_p);
    sampling.seed = as<std::int64_t>(seed);
    sampling.sample_index = as<std::int32_t>(sample_index);
    sampling.repetition = as<float>(repetition);
    sampling.presence = as<float>(presence);
    sampling.frequency = as<float>(frequency);
    sampling.ban_until = as<std::int32_t>(ban_until);
    sampling.ban_ids = as<std::int32_t>(ban_ids);
    sampling.bias_ids = as<std::int32_t>(bias_ids);
    sampling.bias_values = as<float>(bias_values);
    sampling.num_bans = num_bans;
    sampling.num_biases = num_biases;
    sampling.output_counts = as<std::int32_t>(output_counts);
    sampling.prompt_mask = as<std::uint8_t>(prompt_mask);
    elastic_decode::budget::Step machine{};
    machine.state = as<std::int32_t>(state);
    machine.programs = as<std::int32_t>(programs);
    machine.automata = as<std::int32_t>(automata);
    machine.logits = sampling.logits;
    machine.temperature = sampling.temperature;
    machine.ring_tokens = as<std::int32_t>(ring_tokens);
    machine.ring_flags = as<std::int32_t>(ring_flags);
    machine.ring_logprobs = as<float>(ring_logprobs);
    machine.ring_sampling_logprobs = as<float>(ring_sampling_logprobs);
    machine.logits_width = vocab;
    machine.ring_length = ring_length;
    machine.ring_width = ring_width;
    const auto call = [&] {
      elastic_decode::draw(sampling, machine, as<std::int32_t>(ring_index), as<std::int32_t>(output_counts));
    };
    if (rows * vocab < (1 << 16)) return call();
    py::gil_scoped_release release;
    call();
  });
}

#ifdef ELASTIC_DECODE_CUDA
void bind_cuda(py::module_& m);  // csrc/cuda/bindings.cpp
#endif

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
  bind_draw(cpu);
#ifdef ELASTIC_DECODE_CUDA
  py::module_ cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
#endif
}
