// `sample` and `draw` in two launches: draw_scan (draw_scan.cuh), then draw_finish, a block a row, which
// folds the tiles, filters, draws where that is left to it, and, for `draw`, steps the budget machine, writes
// the ring's entry and counts the token. Nothing is sorted; only candidates above a cheap bound are looked at
// again.
#include <climits>

#include "cuda/draw_scan.cuh"
#include "cuda/draw_select.cuh"

namespace elastic_decode {
namespace cuda {
namespace {

constexpr float kLeast = -3.402823466e+38f;

struct Drawn {
  std::int32_t token;
  float logprob;
};

// One row in its block.
template <bool kAligned>
struct Row {
  const DrawCall& call;
  std::int64_t row, slot;
  const Tile* tiles;
  float temperature, inverse;
  float top = 0.0f, mass = 0.0f, lowest_top = 0.0f;  // of the values after steps 1 and 2

  __device__ Row(const DrawCall& call, std::int64_t row, std::int64_t slot)
      : call(call),
        row(row),
        slot(slot),
        tiles(call.work.tiles + row * call.work.splits),
        temperature(call.sampling.temperature[slot]),
        inverse(inverse_of(temperature)) {}

  __device__ float scaled(float x) const { return (x - top) * inverse; }

  // The value of `id` after steps 1 and 2.
  __device__ float value(int id) const {
    const float* source = tiles[id / kTile].modified ? call.work.modified : call.sampling.logits;
    return source[row * call.sampling.vocab + id];
  }

  // Calls body(value, id) for this thread's share of the values from `floor` up; other groups are not read.
  template <typename Body>
  __device__ void each_from(float floor, const Body& body) const {
    const int lane = threadIdx.x % kWarp, vocab = static_cast<int>(call.sampling.vocab);
    const float* group_max = call.work.group_max + row * call.work.splits * kWarp;
    for (int at = threadIdx.x / kWarp; at < call.work.splits; at += kFinishWarps) {
      if (!(tiles[at].top >= floor) || !(group_max[at * kWarp + lane] >= floor)) continue;
      const float* source =
          (tiles[at].modified ? call.work.modified : call.sampling.logits) + row * call.sampling.vocab;
      if (kAligned) {
#pragma unroll 1
        for (int quad = 0; quad < kQuads; ++quad) {
          float four[4];
          const int id = quad_id(at * kTile, quad, lane);
          load_quad<true, float4>(source, id, vocab, -INFINITY, four);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (four[i] >= floor) body(four[i], id + i);
          }
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < kPerLane; ++i) {
          const int id = quad_id(at * kTile, i / 4, lane) + i % 4;
          if (id < vocab && source[id] >= floor) body(source[id], id);
        }
      }
    }
  }
};

struct Folded {
  float lse, raw_top;
  bool modified;
};

// Maxima and masses of all tiles. The order of every sum is fixed by the vocabulary.
template <bool kAligned>
__device__ Folded fold(Row<kAligned>& row, Scratch& scratch) {
  auto& space = reinterpret_cast<float (&)[kFinishWarps]>(scratch.space);
  const auto max_or_nan = [](float a, float b) { return a != a ? a : b != b ? b : fmaxf(a, b); };
  const int splits = row.call.work.splits;
  float raw_top = -INFINITY, top = -INFINITY, lowest = INFINITY;
  int modified = penalizes(row.call.sampling, row.slot);
  for (int at = threadIdx.x; at < splits; at += kFinishThreads) {
    raw_top = max_or_nan(raw_top, row.tiles[at].raw_top);
    top = max_or_nan(top, row.tiles[at].top);
    if (row.tiles[at].top > -INFINITY) lowest = fminf(lowest, row.tiles[at].top);
    modified |= row.tiles[at].modified;
  }
  raw_top = block_reduce(raw_top, space, max_or_nan);
  row.top = block_reduce(top, space, max_or_nan);
  row.lowest_top = block_reduce(lowest, space, [](float a, float b) { return fminf(a, b); });
  Folded folded{raw_top, raw_top, __syncthreads_or(modified) != 0};
  if (!(fabsf(raw_top) < INFINITY)) return folded;
  const float safe = finite_or_0(row.top);
  float raw_mass = 0.0f, mass = 0.0f;
  for (int at = threadIdx.x; at < splits; at += kFinishThreads) {
    const Tile tile = row.tiles[at];
    raw_mass += tile.raw_mass * expf((tile.raw_top - raw_top) * row.inverse);
    mass += tile.mass * expf((tile.top - safe) * row.inverse);
  }
  raw_mass = block_sum(raw_mass, space);
  row.mass = block_sum(mass, space);
  const double scale = row.temperature > 0.0f ? row.temperature : 1.0;
  folded.lse = static_cast<float>(raw_top / scale + static_cast<double>(logf(raw_mass)));
  return folded;
}

// What the scan drew: the best of the tiles' bests.
template <bool kAligned>
__device__ Drawn best_of_tiles(const Row<kAligned>& row, const Folded& folded, Scratch& scratch) {
  Weight best = 0;
  for (int at = threadIdx.x; at < row.call.work.splits; at += kFinishThreads) {
    const Tile tile = row.tiles[at];
    const Weight key = score_key(row.scaled(tile.top) + tile.best, tile.best_id);
    best = key > best ? key : best;
  }
  const int token = id_of(block_max(best, scratch.space));
  if (!(row.temperature > 0.0f)) return {token, 0.0f};
  if (folded.modified) return {token, row.scaled(row.value(token)) - logf(row.mass)};
  // To the last bit what the machine computes as the model's log-probability.
  return {token, __fsub_rn(__fdiv_rn(row.value(token), row.temperature), folded.lse)};
}

// Steps 4 to 7 for a row with filters.
template <bool kAligned>
__device__ Drawn draw_filtered(const Row<kAligned>& row, Scratch& scratch) {
  const SampleArgs& s = row.call.sampling;
  const int k = s.top_k[row.slot];
  const float p = fmaxf(s.top_p[row.slot], 0.0f), min_p = fminf(s.min_p[row.slot], 1.0f), top = row.top;
  const bool by_count = k > 0 && k < s.vocab, by_mass = p < 1.0f, by_ratio = min_p > 0.0f;
  const float least_y = by_ratio ? logf(min_p) : -INFINITY;

  // A floor below which nothing matters: with top-k, one that k groups reach. All mass below
  // y = log((1 - p) mass / V) together is less than the 1 - p that top-p leaves out; 1e-3 is for rounding.
  // Under top-k, the mass that top-p looks at is that of the k largest: min-p may not cut it.
  float floor_y = -INFINITY;
  if (by_ratio && !(by_count && by_mass)) floor_y = least_y - 1e-3f;
  if (by_mass && !by_count) {
    const float left_out = fmaxf((1.0f - p) * row.mass / static_cast<float>(s.vocab), 1e-37f);
    floor_y = fmaxf(floor_y, logf(left_out) - 1e-3f);
  }
  float floor = kLeast;
  if (floor_y > -INFINITY) floor = top + floor_y * row.temperature - fabsf(top) * 3e-7f;
  // Below the tiles' lowest maximum by as much as that is below the top lies all that top-k may ask for.
  const float low = fmaxf(top - 2.0f * (top - row.lowest_top), kLeast);
  if (by_count) {
    const int groups = row.call.work.splits * kWarp;
    const float* group_max = row.call.work.group_max + row.row * groups;
    const Binning binning(top, low);
    const int bin = crossing_bin(scratch, binning, static_cast<Weight>(k), [&](const auto& body) {
      for (int at = threadIdx.x; at < groups; at += kFinishThreads) {
        if (group_max[at] > -INFINITY) body(group_max[at], 1);
      }
    });
    if (bin >= 0) floor = fmaxf(floor, binning.floor_of(bin));
  }
  floor = fminf(fmaxf(floor, kLeast), top);

  // Candidates are listed in whatever order: everything below is exact or a maximum.
  if (threadIdx.x == 0) scratch.size = 0;
  __syncthreads();
  row.each_from(floor, [&](float x, int id) {
    const int at = atomicAdd(&scratch.size, 1);
    if (at < kCapacity) scratch.values[at] = x, scratch.ids[at] = id;
  });
  __syncthreads();
  const int size = scratch.size;
  const auto each = [&](const auto& body) {
    if (size > kCapacity) return row.each_from(floor, body);
    for (int at = threadIdx.x; at < size; at += kFinishThreads) body(scratch.values[at], scratch.ids[at]);
  };
  const float range_low = floor > kLeast ? floor : low;

  // Top-k, then top-p, by one loop: the code is large, and an instruction cache is not.
  float least = floor;
#pragma unroll 1
  for (int round = 0; round < 2; ++round) {
    const bool masses = round == 1;
    if (masses ? !by_mass : !by_count || size <= k) continue;
    const float from = least;
    Weight target = static_cast<Weight>(k);
    if (masses) {
      double total = static_cast<double>(row.mass) * 0x1p40;
      if (by_count) {
        Weight sum = 0;
        each([&](float x, int) {
          if (x >= from) sum += mass_of(row.scaled(x));
        });
        total = static_cast<double>(block_sum(sum, scratch.space));
      }
      target = static_cast<Weight>(fmax(ceil(static_cast<double>(p) * total), 1.0));
    }
    const float last = smallest_kept(scratch, top, range_low, target, [&](const auto& body) {
      each([&](float x, int) {
        if (x >= from) body(x, masses ? mass_of(row.scaled(x)) : 1);
      });
    });
    least = fmaxf(least, last);
  }

  // The draw. An entry whose noise cannot lift it above the thread's best so far is spared the logarithms.
  const std::int64_t seed = s.seed[row.slot];
  const std::int32_t position = s.positions[row.row], sample_index = s.sample_index[row.slot];
  Weight sum = 0, best = 0;
  float best_score = -INFINITY;
  each([&](float x, int id) {
    const float y = row.scaled(x);
    if (!(x >= least) || !(y >= least_y)) return;
    sum += mass_of(y);
    const std::uint32_t word = philox_word(seed, sample_index, position, id);
    if (y + log2_bound(word) + kAbove < best_score) return;
    const float score = y + gumbel(word);
    best_score = fmaxf(best_score, score);
    const Weight key = score_key(score, id);
    best = key > best ? key : best;
  });
  sum = block_sum(sum, scratch.space);
  const int token = id_of(block_max(best, scratch.space));
  return {token, row.scaled(row.value(token)) - logf(static_cast<float>(sum) * 0x1p-40f)};
}

// By the whole block; `count` is at most its threads.
__device__ __forceinline__ void copy_words(std::int32_t* to, const std::int32_t* from, int count) {
  if (static_cast<int>(threadIdx.x) < count) to[threadIdx.x] = from[threadIdx.x];
}
static_assert(budget::PROGRAM_WORDS <= kFinishThreads && budget::STATE_WORDS <= kFinishThreads, "");

// What the machine reads and writes of a slot, brought near while the row is drawn: its loads depend on each
// other, one after the other.
struct Slot {
  std::int32_t state[budget::STATE_WORDS], program[budget::PROGRAM_WORDS];
};

// By one thread: steps the machine with the draw, writes the ring's entry and counts the token.
__device__ void step(const DrawCall& call, std::int64_t row, std::int64_t slot, Slot& near) {
  const budget::Emitted emitted = budget::step_slot(call.machine, row, slot, near.state, near.program);
  const bool counted = call.output_counts != nullptr && (emitted.flags & budget::Flag::VALID) &&
                       emitted.token >= 0 && emitted.token < call.sampling.vocab;
  if (counted) call.output_counts[slot * call.sampling.vocab + emitted.token] += 1;
}

template <bool kAligned>
__global__ void __launch_bounds__(kFinishThreads, 2) draw_finish(const __grid_constant__ DrawCall call) {
  __shared__ Scratch scratch;
  __shared__ Slot near;
  const SampleArgs& s = call.sampling;
  const budget::Step& machine = call.machine;
  const std::int64_t at = blockIdx.x, slot = running_slot(call, at);
  if (slot < 0) {
    if (threadIdx.x != 0) return;
    s.token[at] = -1, s.lse[at] = 0.0f, s.sampling_logprob[at] = 0.0f;
    if (machine.state != nullptr) machine.ring_flags[budget::ring_entry(machine, at)] = 0;
    return;
  }
  if (machine.state != nullptr) {  // complete at the fold's first barrier
    copy_words(near.state, machine.state + slot * budget::STATE_WORDS, budget::STATE_WORDS);
    copy_words(near.program, machine.programs + slot * budget::PROGRAM_WORDS, budget::PROGRAM_WORDS);
  }
  Row<kAligned> row(call, at, slot);
  const Folded folded = fold(row, scratch);
  Drawn drawn{-1, 0.0f};
  if (fabsf(folded.raw_top) < INFINITY && fabsf(row.top) < INFINITY) {
    if (row.temperature > 0.0f && filters(s, slot)) {
      drawn = draw_filtered(row, scratch);
    } else {
      drawn = best_of_tiles(row, folded, scratch);
    }
  }
  if (threadIdx.x == 0) {
    s.token[at] = drawn.token, s.lse[at] = folded.lse, s.sampling_logprob[at] = drawn.logprob;
    if (machine.state != nullptr) step(call, at, slot, near);
  }
  if (machine.state == nullptr) return;
  __syncthreads();
  copy_words(machine.state + slot * budget::STATE_WORDS, near.state, budget::STATE_WORDS);
}

bool modifies(const SampleArgs& s) {
  return s.output_counts != nullptr || s.num_bans > 0 || s.num_biases > 0;
}

constexpr std::int64_t rounded_up(std::int64_t bytes) {
  return (bytes + 15) / 16 * 16;
}

// Parts of the working memory, one behind the other.
struct Layout {
  std::int64_t splits, group_max, modified, outputs, bytes;
  explicit Layout(std::int64_t rows, std::int64_t vocab, bool modifies) {
    splits = (vocab + kTile - 1) / kTile;
    group_max = rows * splits * static_cast<std::int64_t>(sizeof(Tile));
    modified = group_max + rows * splits * kWarp * 4;
    outputs = modified + (modifies ? rounded_up(rows * vocab * 4) : 0);
    bytes = outputs + 3 * rounded_up(rows * 4);
  }
};

void launch_both(DrawCall call, void* work, std::uintptr_t stream) {
  const SampleArgs& s = call.sampling;
  const Layout layout(s.rows, s.vocab, modifies(s));
  unsigned char* bytes = static_cast<unsigned char*>(work);
  call.work.tiles = reinterpret_cast<Tile*>(bytes);
  call.work.group_max = reinterpret_cast<float*>(bytes + layout.group_max);
  call.work.modified = modifies(s) ? reinterpret_cast<float*>(bytes + layout.modified) : nullptr;
  call.work.splits = static_cast<int>(layout.splits);
  if (call.machine.state != nullptr) {
    const std::int64_t each = rounded_up(s.rows * 4);
    call.sampling.token = reinterpret_cast<std::int32_t*>(bytes + layout.outputs);
    call.sampling.lse = reinterpret_cast<float*>(bytes + layout.outputs + each);
    call.sampling.sampling_logprob = reinterpret_cast<float*>(bytes + layout.outputs + 2 * each);
    call.machine.draws = call.sampling.token;
    call.machine.lse = call.sampling.lse;
    call.machine.draw_logprob = call.sampling.sampling_logprob;
  }
  const std::int64_t blocks = (s.rows * layout.splits + kScanWarps - 1) / kScanWarps;
  if (s.vocab > INT_MAX - kTile || blocks > INT_MAX / kScanWarps) {
    throw std::runtime_error("draw: more logits than one launch takes");
  }
  // Rows begin at multiples of 16 bytes where the vocabulary is a multiple of 4, as all tensors do.
  const bool aligned = s.vocab % 4 == 0 && reinterpret_cast<std::uintptr_t>(s.logits) % 16 == 0 &&
                       reinterpret_cast<std::uintptr_t>(s.output_counts) % 16 == 0 &&
                       reinterpret_cast<std::uintptr_t>(s.prompt_mask) % 4 == 0;
  // Without rows the scan still advances the ring.
  const dim3 grid(static_cast<unsigned>(blocks > 0 ? blocks : 1));
  launch({"draw_scan", grid, dim3(kScanWarps * kWarp), 0, stream},
         aligned ? &draw_scan<true> : &draw_scan<false>, call);
  if (s.rows == 0) return;
  launch({"draw_finish", dim3(static_cast<unsigned>(s.rows)), dim3(kFinishThreads), 0, stream},
         aligned ? &draw_finish<true> : &draw_finish<false>, call);
}

}  // namespace

std::int64_t draw_work_bytes(std::int64_t rows, std::int64_t vocab, bool modifies) {
  return Layout(rows, vocab, modifies).bytes;
}

void sample(const SampleArgs& args, void* work, std::uintptr_t stream) {
  if (args.rows == 0) return;
  DrawCall call{};
  call.sampling = args;
  launch_both(call, work, stream);
}

void draw(const SampleArgs& sampling, const budget::Step& machine, std::int32_t* ring_index,
          std::int32_t* output_counts, void* work, std::uintptr_t stream) {
  DrawCall call{sampling, machine, ring_index, output_counts, {}};
  call.machine.slots = sampling.slots;
  call.machine.logits = sampling.logits;
  call.machine.logits_width = sampling.vocab;
  call.machine.temperature = sampling.temperature;
  call.machine.ring_index = ring_index;
  launch_both(call, work, stream);
}

}  // namespace cuda
}  // namespace elastic_decode
