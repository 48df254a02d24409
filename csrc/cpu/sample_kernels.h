// What csrc/cpu/sample.cpp needs from each instruction set. All of them work in 16 lanes and in the same
// order, so their results differ by the fusing of multiply and add at most.
#pragma once
#include <cstdint>

namespace elastic_decode {

constexpr std::int64_t kSampleLanes = 16;
// Elements whose lane-wise maxima (16 of them, each over 16 elements) are kept, to skip the group in later
// passes.
constexpr std::int64_t kSampleGroup = 256;
// Elements whose exponentials are summed as one: fixed ranges, so the bits of lse depend on nothing else.
constexpr std::int64_t kSampleChunk = 4096;
// Of the histogram that finds top-p's threshold where much of the vocabulary is above it.
constexpr std::int32_t kSampleBins = 2048;

struct ChunkScan {
  float max;  // NaN ignored
  float sum;  // of exp((x - max) / T); 0 where max is infinite
  bool nan;
};

struct Best {
  float score;
  std::int32_t id;
};

// One row's logits and the key of its noise; y = (x - max) / T.
struct NoiseRow {
  const float* x;
  const float* lane_max;  // [ceil(vocab / 256), 16]
  std::int64_t vocab;
  float max, inverse_t;
  std::int64_t seed;
  std::int32_t sample_index, position;
  float bound;  // some entry's score: what cannot reach it is skipped
  float least;  // entries below are filtered out
};

struct SampleKernels {
  // x[0..count), count <= kSampleChunk; writes lane_max [ceil(count / 256), 16].
  ChunkScan (*scan)(const float* x, std::int64_t count, float inverse_t, float* lane_max);
  // The entries x >= floor (floor finite), in order; the outputs have room for 16 more than limit. Returns
  // how many, -1 where there are more than `limit`.
  std::int64_t (*collect)(const float* x, std::int64_t vocab, const float* lane_max, float floor,
                          float* values, std::int32_t* ids, std::int64_t limit);
  // mass[bin] += exp((x - max) * inverse_t), bin = floor((max - x) * scale), for x >= floor. kSampleBins + 1
  // entries: the last takes the others, and means nothing.
  void (*histogram)(const float* x, std::int64_t vocab, const float* lane_max, float floor, float max,
                    float inverse_t, float scale, double* mass);
  // As collect, but only the entries of one bin; no limit.
  std::int64_t (*collect_bin)(const float* x, std::int64_t vocab, const float* lane_max, float floor,
                              float max, float scale, std::int32_t bin, float* values, std::int32_t* ids);
  // The sum of exp((x - max) * inverse_t) over x >= floor.
  double (*mass_from)(const float* x, std::int64_t vocab, const float* lane_max, float floor, float max,
                      float inverse_t);
  // weights[i] = exp((values[i] - max) * inverse_t); values readable and weights writable up to the next
  // multiple of 16.
  void (*weigh)(const float* values, std::int64_t count, float max, float inverse_t, float* weights);
  // The entry of greatest y + G among ids begin..end (multiples of 256, or the vocabulary's end); score -inf
  // where all were skipped.
  Best (*draw_range)(const NoiseRow& row, std::int64_t begin, std::int64_t end);
  // The same among listed entries (ids ascending), readable up to the next multiple of 16.
  Best (*draw_list)(const NoiseRow& row, const float* values, const std::int32_t* ids, std::int64_t count);
  // The words of ids 0..count, and the noise that words become: for tests. Multiples of 32 are read and
  // written.
  void (*words)(std::int64_t seed, std::int32_t sample_index, std::int32_t position, std::int64_t count,
                std::uint32_t* words);
  void (*gumbel)(const std::uint32_t* words, std::int64_t count, float* gumbel);
  // Step 1 of the contract: penalties by how often the output holds a token and whether the prompt does.
  void (*penalize)(float* out, const float* x, std::int64_t vocab, const std::int32_t* counts,
                   const std::uint8_t* in_prompt, float repetition, float presence, float frequency);
};

extern const SampleKernels kSampleGeneric;
#if defined(__x86_64__)
extern const SampleKernels kSampleAvx2;
extern const SampleKernels kSampleAvx512;
#endif

}  // namespace elastic_decode
