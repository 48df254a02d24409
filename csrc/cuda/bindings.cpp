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

using Address = std::uintptr_t;

// The table of `sample`, in the order in which kernels/sample/cuda.py and kernels/draw/cuda.py pass it.
static elastic_decode::SampleArgs sample_args(Address logits, Address slots, Address positions,
                                              std::int64_t rows, std::int64_t vocab, Address temperature,
                                              Address top_k, Address top_p, Address min_p, Address seed,
                                              Address sample_index, Address repetition, Address presence,
                                              Address frequency, Address ban_until, Address ban_ids,
                                              Address bias_ids, Address bias_values, std::int64_t num_bans,
                                              std::int64_t num_biases, Address output_counts,
                                              Address prompt_mask) {
  elastic_decode::SampleArgs s{};
  s.logits = as<float>(logits);
  s.slots = as<std::int32_t>(slots);
  s.positions = as<std::int32_t>(positions);
  s.rows = rows;
  s.vocab = vocab;
  s.temperature = as<float>(temperature);
  s.top_k = as<std::int32_t>(top_k);
  s.top_p = as<float>(top_p);
  s.min_p = as<float>(min_p);
  s.seed = as<std::int64_t>(seed);
  s.sample_index = as<std::int32_t>(sample_index);
  s.repetition = as<float>(repetition);
  s.presence = as<float>(presence);
  s.frequency = as<float>(frequency);
  s.ban_until = as<std::int32_t>(ban_until);
  s.ban_ids = as<std::int32_t>(ban_ids);
  s.bias_ids = as<std::int32_t>(bias_ids);
  s.bias_values = as<float>(bias_values);
  s.num_bans = num_bans;
  s.num_biases = num_biases;
  s.output_counts = as<std::int32_t>(output_counts);
  s.prompt_mask = as<std::uint8_t>(prompt_mask);
  return s;
}

static void bind_draw(py::module_& m) {
  m.def("draw_work_bytes", &elastic_decode::cuda::draw_work_bytes, py::arg("rows"), py::arg("vocab"),
        py::arg("modifies"));
  m.def("sample",
        [](Address token, Address lse, Address sampling_logprob, Address logits, Address slots,
           Address positions, std::int64_t rows, std::int64_t vocab, Address temperature, Address top_k,
           Address top_p, Address min_p, Address seed, Address sample_index, Address repetition,
           Address presence, Address frequency, Address ban_until, Address ban_ids, Address bias_ids,
           Address bias_values, std::int64_t num_bans, std::int64_t num_biases, Address output_counts,
           Address prompt_mask, Address work, Address stream) {
          elastic_decode::SampleArgs s =
              sample_args(logits, slots, positions, rows, vocab, temperature, top_k, top_p, min_p, seed,
                          sample_index, repetition, presence, frequency, ban_until, ban_ids, bias_ids,
                          bias_values, num_bans, num_biases, output_counts, prompt_mask);
          s.token = as<std::int32_t>(token);
          s.lse = as<float>(lse);
          s.sampling_logprob = as<float>(sampling_logprob);
          elastic_decode::cuda::sample(s, as<void>(work), stream);
        });
  m.def("draw", [](Address logits, Address slots, Address positions, std::int64_t rows, std::int64_t vocab,
                   Address temperature, Address top_k, Address top_p, Address min_p, Address seed,
                   Address sample_index, Address repetition, Address presence, Address frequency,
                   Address ban_until, Address ban_ids, Address bias_ids, Address bias_values,
                   std::int64_t num_bans, std::int64_t num_biases, Address output_counts, Address prompt_mask,
                   Address state, Address programs, Address automata, Address ring_tokens, Address ring_flags,
                   Address ring_logprobs, Address ring_sampling_logprobs, Address ring_index,
                   std::int64_t ring_length, std::int64_t ring_width, Address work, Address stream) {
    const elastic_decode::SampleArgs s =
        sample_args(logits, slots, positions, rows, vocab, temperature, top_k, top_p, min_p, seed,
                    sample_index, repetition, presence, frequency, ban_until, ban_ids, bias_ids, bias_values,
                    num_bans, num_biases, output_counts, prompt_mask);
    elastic_decode::budget::Step machine{};
    machine.state = as<std::int32_t>(state);
    machine.programs = as<std::int32_t>(programs);
    machine.automata = as<std::int32_t>(automata);
    machine.ring_tokens = as<std::int32_t>(ring_tokens);
    machine.ring_flags = as<std::int32_t>(ring_flags);
    machine.ring_logprobs = as<float>(ring_logprobs);
    machine.ring_sampling_logprobs = as<float>(ring_sampling_logprobs);
    machine.ring_length = ring_length;
    machine.ring_width = ring_width;
    elastic_decode::cuda::draw(s, machine, as<std::int32_t>(ring_index), as<std::int32_t>(output_counts),
                               as<void>(work), stream);
  });
}

static void bind_budget(py::module_& m) {
  m.def("budget_step",
        [](Address state, Address programs, Address automata, Address slots, Address draws, Address logits,
           Address lse, Address draw_logprob, Address temperature, Address ring_tokens, Address ring_flags,
           Address ring_logprobs, Address ring_sampling_logprobs, Address ring_index, std::int64_t rows,
           std::int64_t logits_width, std::int64_t ring_length, std::int64_t ring_width, Address stream) {
          elastic_decode::cuda::budget_step(
              {as<std::int32_t>(state), as<std::int32_t>(programs), as<std::int32_t>(automata),
               as<std::int32_t>(slots), as<std::int32_t>(draws), as<float>(logits), as<float>(lse),
               as<float>(draw_logprob), as<float>(temperature), as<std::int32_t>(ring_tokens),
               as<std::int32_t>(ring_flags), as<float>(ring_logprobs), as<float>(ring_sampling_logprobs),
               as<std::int32_t>(ring_index), logits_width, ring_length, ring_width},
              rows, stream);
        });
  m.def("decode_inputs", [](Address state, Address page_table, Address slots, Address token, Address position,
                            Address seq_len, Address slot_mapping, std::int64_t rows, std::int64_t max_pages,
                            std::int64_t page_size, Address stream) {
    elastic_decode::cuda::decode_inputs(
        {as<std::int32_t>(state), as<std::int32_t>(page_table), as<std::int32_t>(slots),
         as<std::int32_t>(token), as<std::int32_t>(position), as<std::int32_t>(seq_len),
         as<std::int32_t>(slot_mapping), max_pages, page_size},
        rows, stream);
  });
}

static void bind_paged_attention(py::module_& m) {
  m.attr("SPLIT") = elastic_decode::cuda::kSplit;
  m.def("paged_attention",
        [](Address q, Address k_cache, Address v_cache, Address page_table, Address seq_lens,
           Address query_start, Address out, Address partial_out, Address partial_sums,
           std::int64_t table_stride, std::int32_t num_tokens, std::int32_t num_rows, std::int32_t num_heads,
           std::int32_t num_kv_heads, std::int32_t page_size, std::int32_t num_splits, std::int32_t pass,
           std::int32_t window, float scale, std::int32_t num_processors, std::int32_t processor_shared,
           bool overlap, int head_dim, bool bfloat16, bool float8, Address stream) {
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
                                                 processor_shared,
                                                 overlap},
                                                head_dim, bfloat16, float8, stream);
        });
}

void bind_cuda(py::module_& m) {
  m.doc() = "CUDA kernels; each call enqueues work on a stream";
  m.def("device_count", &elastic_decode::cuda::device_count);
  bind_draw(m);
  bind_budget(m);
  bind_paged_attention(m);
}
