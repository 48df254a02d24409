// The first launch of `sample` and `draw`: a warp takes kTile ids of a row and leaves a Tile. It reads the
// logits once, 16 bytes a lane and load where the vocabulary is a multiple of 4. Greedy rows and rows without
// filters are drawn here. Tiles depend on the vocabulary alone: a row's bits do not depend on the batch.
#pragma once
#include "budget.h"
#include "cuda/ops.h"
#include "cuda/reduce.cuh"
#include "philox.h"

namespace elastic_decode {
namespace cuda {

constexpr int kTile = 512, kQuads = kTile / (4 * kWarp), kPerLane = 4 * kQuads;
constexpr int kScanWarps = 4;

// What the scan found in one tile. A NaN among the values makes the maximum NaN.
struct alignas(16) Tile {
  float raw_top, raw_mass;  // of the logits: maximum, and the sum of exp((x - maximum) / T)
  float top, mass;          // of the logits after steps 1 and 2
  float best;               // the best score, above that of `top` without noise
  std::int32_t best_id;
  std::int32_t modified;  // steps 1 and 2 did something here: the values are in Work::modified
  std::int32_t unused;
};

// Between the launches. A group is what one lane had of a tile; its maximum is only there for filtered rows.
struct Work {
  Tile* tiles;       // [rows, splits]
  float* group_max;  // [rows, splits, kWarp]
  float* modified;   // [rows, vocab], or null where no slot can modify anything
  int splits;
};

// Arguments of both launches. `draw` has the machine and a ring; for `sample` machine.state is null.
struct DrawCall {
  SampleArgs sampling;
  budget::Step machine;
  std::int32_t* ring_index;
  std::int32_t* output_counts;  // to count what is emitted, or null
  Work work;
};

// The row's slot, or -1 where there is nothing to draw.
__device__ __forceinline__ std::int64_t running_slot(const DrawCall& call, std::int64_t row) {
  const std::int64_t slot = call.sampling.slots[row];
  const bool finished =
      slot >= 0 && call.machine.state != nullptr &&
      call.machine.state[slot * budget::STATE_WORDS + budget::State::FINISH] != budget::Finish::RUNNING;
  return finished ? -1 : slot;
}

// 1 / T, 1 for a greedy row; finite, so that 0 times it is 0.
__device__ __forceinline__ float inverse_of(float temperature) {
  return temperature > 0.0f ? fminf(__fdiv_rn(1.0f, temperature), 3.402823466e+38f) : 1.0f;
}

__device__ __forceinline__ bool filters(const SampleArgs& s, std::int64_t slot) {
  const std::int32_t k = s.top_k[slot];
  return (k > 0 && k < s.vocab) || s.top_p[slot] < 1.0f || s.min_p[slot] > 0.0f;
}

__device__ __forceinline__ bool penalizes(const SampleArgs& s, std::int64_t slot) {
  return s.output_counts != nullptr &&
         (s.repetition[slot] != 1.0f || s.presence[slot] != 0.0f || s.frequency[slot] != 0.0f);
}

// Noise lies between log2_bound(word) - kBelow and log2_bound(word) + kAbove, where the word's first bit is
// not set: with z leading zeros, u lies between 2^-(z+1) and 2^-z, and E between u and 2 log 2 u while u <=
// 1/2. The upper bound holds for every word. 1e-4 is for rounding.
constexpr float kLog2 = 0.693147181f, kAbove = kLog2 + 1e-4f, kBelow = 0.3267f + 1e-4f;
__device__ __forceinline__ float log2_bound(std::uint32_t word) {
  return static_cast<float>(__clz(static_cast<int>(word))) * kLog2;
}

// Entries id .. id + 3 of a row; `fill` where the vocabulary has ended.
template <bool kAligned, typename Quad, typename T>
__device__ __forceinline__ void load_quad(const T* row, int id, int vocab, T fill, T* out) {
  if (kAligned) {
    Quad quad{fill, fill, fill, fill};
    if (id < vocab) quad = *reinterpret_cast<const Quad*>(row + id);
    out[0] = quad.x, out[1] = quad.y, out[2] = quad.z, out[3] = quad.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = id + i < vocab ? row[id + i] : fill;
  }
}

// The first id of quad `quad` of a lane in the tile that starts at `base`.
__device__ __forceinline__ int quad_id(int base, int quad, int lane) {
  return base + 4 * (quad * kWarp + lane);
}

struct Stats {
  float top, mass, lane_top;
};

__device__ __forceinline__ float finite_or_0(float top) {
  return fabsf(top) < INFINITY ? top : 0.0f;
}

__device__ __forceinline__ Stats stats_of(const float (&x)[kPerLane], float inverse) {
  float lane_top = -INFINITY, sum = 0.0f;
  bool nan = false;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    lane_top = fmaxf(lane_top, x[i]);
    nan = nan || x[i] != x[i];
  }
  const float top = warp_max(lane_top), safe = finite_or_0(top);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += expf((x[i] - safe) * inverse);
  return {__any_sync(kAllLanes, nan) ? NAN : top, warp_sum(sum), lane_top};
}

// Adds `value` to the tile's value of `id`, or bans it.
__device__ __forceinline__ void change(float (&x)[kPerLane], int at, int lane, float value, bool ban) {
  const int own = at / 4 % kWarp == lane ? at / (4 * kWarp) * 4 + at % 4 : -1;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i == own) x[i] = ban ? -INFINITY : x[i] + value;
  }
}

// Adds the biases of a list, in its order, or bans its ids. Whether any lies in the tile. Bans have no
// values.
__device__ __forceinline__ bool change_listed(float (&x)[kPerLane], const std::int32_t* ids,
                                              const float* values, std::int64_t count, int base, int vocab,
                                              int lane) {
  bool any = false;
  for (std::int64_t from = 0; from < count; from += kWarp) {
    const int id = from + lane < count ? ids[from + lane] : -1;
    const bool inside = id >= base && id < min(base + kTile, vocab);
    const float value = inside && values != nullptr ? values[from + lane] : 0.0f;
    unsigned hits = __ballot_sync(kAllLanes, inside);
    any = any || hits != 0;
    for (; hits != 0; hits &= hits - 1) {
      const int source = __ffs(static_cast<int>(hits)) - 1;
      const int at = __shfl_sync(kAllLanes, id, source) - base;
      change(x, at, lane, __shfl_sync(kAllLanes, value, source), values == nullptr);
    }
  }
  return any;
}

// Steps 1 and 2 on one tile. Whether they may have changed anything.
template <bool kAligned>
__device__ __forceinline__ bool modify(const SampleArgs& s, std::int64_t row, std::int64_t slot, int base,
                                       int lane, float (&x)[kPerLane]) {
  const int vocab = static_cast<int>(s.vocab);
  const bool penalized = penalizes(s, slot);
  if (penalized) {
    const float repetition = s.repetition[slot], presence = s.presence[slot], frequency = s.frequency[slot];
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      std::int32_t counts[4];
      std::uint8_t in_prompt[4];
      const int id = quad_id(base, quad, lane);
      load_quad<kAligned, int4>(s.output_counts + slot * s.vocab, id, vocab, 0, counts);
      load_quad<kAligned, uchar4>(s.prompt_mask + slot * s.vocab, id, vocab, std::uint8_t{0}, in_prompt);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = x[4 * quad + i];
        if (counts[i] > 0 || in_prompt[i] != 0) {
          value = value > 0.0f ? __fdiv_rn(value, repetition) : value * repetition;
        }
        if (counts[i] > 0) {
          // Not contracted: the same bits as on the CPU.
          const float reduced = __fsub_rn(value, __fmul_rn(frequency, static_cast<float>(counts[i])));
          value = __fsub_rn(reduced, presence);
        }
      }
    }
  }
  const bool biased = change_listed(x, s.bias_ids + slot * s.num_biases, s.bias_values + slot * s.num_biases,
                                    s.num_biases, base, vocab, lane);
  bool banned = false;
  if (s.num_bans > 0 && s.positions[row] < s.ban_until[slot]) {
    banned = change_listed(x, s.ban_ids + slot * s.num_bans, nullptr, s.num_bans, base, vocab, lane);
  }
  return penalized || biased || banned;
}

struct Best {
  float score;
  int id;
};

// The warp's best score of y + noise, by all lanes. Only the few that may win have their noise computed.
__device__ __forceinline__ Best draw_tile(const SampleArgs& s, std::int64_t row, std::int64_t slot, int base,
                                          int lane, const float (&y)[kPerLane]) {
  const std::uint64_t seed = static_cast<std::uint64_t>(s.seed[slot]);
  const std::uint32_t position = static_cast<std::uint32_t>(s.positions[row]);
  const std::uint32_t sample_index = static_cast<std::uint32_t>(s.sample_index[slot]);
  std::uint32_t words[kPerLane];
  float bound = -INFINITY;
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    const Philox4 four = philox4x32(static_cast<std::uint32_t>(quad_id(base, quad, lane)) / 4, position,
                                    static_cast<std::uint32_t>(seed >> 32), 0u,
                                    static_cast<std::uint32_t>(seed), sample_index);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float about = y[4 * quad + i] + log2_bound(four.word[i]);
      words[4 * quad + i] = four.word[i];
      if (static_cast<std::int32_t>(four.word[i]) >= 0) bound = fmaxf(bound, about);
    }
  }
  bound = warp_max(bound) - kBelow;
  unsigned pending = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (y[i] + log2_bound(words[i]) + kAbove >= bound) pending |= 1u << i;
  }
  Best best{-INFINITY, base};
  while (__any_sync(kAllLanes, pending != 0)) {
    const int at = __ffs(static_cast<int>(pending)) - 1;  // -1: this lane has none left
    float value = -INFINITY;
    std::uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i == at) value = y[i], word = words[i];
    }
    const float score = value + gumbel(word);
    if (score > best.score) best = {score, quad_id(base, at / 4, lane) + at % 4};
    pending &= pending - 1;
  }
  const float top = warp_max(best.score);
  return {top, __reduce_min_sync(kAllLanes, best.score == top ? best.id : INT32_MAX)};
}

template <bool kAligned>
__global__ void __launch_bounds__(kScanWarps* kWarp, 6) draw_scan(const __grid_constant__ DrawCall call) {
  const SampleArgs& s = call.sampling;
  const Work& work = call.work;
  if (call.ring_index != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    *call.ring_index =
        static_cast<std::int32_t>((*call.ring_index + std::int64_t{1}) % call.machine.ring_length);
  }
  const int lane = threadIdx.x % kWarp, vocab = static_cast<int>(s.vocab);
  const unsigned at = blockIdx.x * kScanWarps + threadIdx.x / kWarp;
  const std::int64_t row = at / static_cast<unsigned>(work.splits);
  const int base = static_cast<int>(at % static_cast<unsigned>(work.splits)) * kTile;
  if (row >= s.rows) return;
  const std::int64_t slot = running_slot(call, row);
  if (slot < 0) return;

  float x[kPerLane];
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    load_quad<kAligned, float4>(s.logits + row * s.vocab, quad_id(base, quad, lane), vocab, -INFINITY,
                                x + 4 * quad);
  }
  const float temperature = s.temperature[slot], inverse = inverse_of(temperature);
  Stats stats = stats_of(x, inverse);
  Tile tile;
  tile.raw_top = stats.top, tile.raw_mass = stats.mass;
  const bool modified = work.modified != nullptr && modify<kAligned>(s, row, slot, base, lane, x);
  if (modified) {
    float* out = work.modified + row * s.vocab;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const int id = quad_id(base, quad, lane);
      const float* four = x + 4 * quad;
      if (kAligned) {
        if (id < vocab)
          *reinterpret_cast<float4*>(out + id) = make_float4(four[0], four[1], four[2], four[3]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (id + i < vocab) out[id + i] = four[i];
        }
      }
    }
    stats = stats_of(x, inverse);
  }
  tile.top = stats.top, tile.mass = stats.mass;
  tile.modified = modified, tile.unused = 0;

  const float safe = finite_or_0(stats.top);
  Best best{-INFINITY, base};
  if (!(temperature > 0.0f)) {
    int first = INT32_MAX;
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i) {
      if (x[i] == stats.top) first = quad_id(base, i / 4, lane) + i % 4;
    }
    best = {0.0f, __reduce_min_sync(kAllLanes, first)};
  } else if (filters(s, slot)) {
    work.group_max[static_cast<std::int64_t>(at) * kWarp + lane] = stats.lane_top;
  } else if (stats.top > -INFINITY) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = (x[i] - safe) * inverse;
    best = draw_tile(s, row, slot, base, lane, x);
  }
  tile.best = best.score, tile.best_id = best.id;
  if (lane == 0) work.tiles[at] = tile;
}

}  // namespace cuda
}  // namespace elastic_decode
