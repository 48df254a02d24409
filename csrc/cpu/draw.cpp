#include <vector>

#include "budget.h"
#include "cpu/ops.h"

namespace elastic_decode {

void draw(const SampleArgs& sampling, const budget::Step& machine, std::int32_t* ring_index,
          std::int32_t* output_counts) {
  *ring_index = static_cast<std::int32_t>((*ring_index + std::int64_t{1}) % machine.ring_length);

  // Rows that have finished are not sampled; the machine itself passes them over.
  static thread_local std::vector<std::int32_t> slots, tokens;
  static thread_local std::vector<float> lse, logprobs;
  const std::size_t rows = static_cast<std::size_t>(sampling.rows);
  slots.resize(rows), tokens.resize(rows), lse.resize(rows), logprobs.resize(rows);
  for (std::size_t row = 0; row < rows; ++row) {
    const std::int64_t slot = sampling.slots[row];
    const bool runs = slot >= 0 && machine.state[slot * budget::STATE_WORDS + budget::State::FINISH] ==
                                       budget::Finish::RUNNING;
    slots[row] = runs ? sampling.slots[row] : -1;
  }
  SampleArgs args = sampling;
  args.slots = slots.data();
  args.token = tokens.data();
  args.lse = lse.data();
  args.sampling_logprob = logprobs.data();
  sample(args);

  budget::Step step = machine;
  step.slots = slots.data();
  step.draws = tokens.data();
  step.lse = lse.data();
  step.draw_logprob = logprobs.data();
  step.ring_index = ring_index;
  budget_step(step, sampling.rows);

  if (output_counts == nullptr) return;
  for (std::size_t row = 0; row < rows; ++row) {
    const std::int64_t entry = *ring_index * machine.ring_width + static_cast<std::int64_t>(row);
    if (!(machine.ring_flags[entry] & budget::Flag::VALID)) continue;
    const std::int32_t token = machine.ring_tokens[entry];
    if (token >= 0 && token < sampling.vocab) output_counts[slots[row] * sampling.vocab + token] += 1;
  }
}

}  // namespace elastic_decode
