// Sampling on the CPU. A row is read once for its maximum and logsumexp (scan); greedy rows are then done.
// Noise is drawn only for entries that can still win; filters work on the candidates above a cheap bound of
// their threshold.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/sample_filter.h"
#include "cpu/sample_kernels.h"

namespace elastic_decode {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kSpan = 8 * kSampleChunk;  // what one task takes of a row that several threads share

const SampleKernels& kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::Avx512) return kSampleAvx512;
  if (isa() >= Isa::Avx2) return kSampleAvx2;
#endif
  return kSampleGeneric;
}

enum class Stage { Idle, Scanning, Drawing, Done };

// One row in progress. The stages: start, scan (chunks in any order, by any thread), choose, and draw where
// choose left it to.
struct Row {
  Stage stage = Stage::Idle;
  std::int64_t at = 0, slot = 0;
  const float* x =
      nullptr;  // the raw logits, from choose() on the modified ones where something modifies them
  float temperature = 0.0f, inverse_t = 1.0f;
  float max = 0.0f;
  double mass = 0.0;  // of exp((x - max) / T) over what may be drawn
  bool plain = true;  // nothing modifies or filters
  NoiseRow noise{};
  std::vector<float> lane_max;
  std::vector<ChunkScan> chunks;
  std::vector<Best> drawn;  // by span
  std::vector<float> modified, floats;
  std::vector<std::int32_t> indices;
  Candidates candidates;
};

class Sampler {
 public:
  explicit Sampler(const SampleArgs& args) : args_(args), kernels_(kernels()) {
    chunks_ = (args.vocab + kSampleChunk - 1) / kSampleChunk;
    spans_ = (args.vocab + kSpan - 1) / kSpan;
  }

  std::int64_t spans() const { return spans_; }

  void start(Row& row, std::int64_t at) const {
    row.at = at;
    row.slot = args_.slots[at];
    row.plain = true;
    finish(row, -1, 0.0f);
    args_.lse[at] = 0.0f;
    if (row.slot < 0) return;
    row.stage = Stage::Scanning;
    row.x = args_.logits + at * args_.vocab;
    row.temperature = args_.temperature[row.slot];
    row.inverse_t = row.temperature > 0.0f ? std::min(1.0f / row.temperature, FLT_MAX) : 1.0f;
    row.chunks.resize(static_cast<std::size_t>(chunks_));
    row.lane_max.resize(static_cast<std::size_t>(chunks_ * (kSampleChunk / kSampleGroup) * kSampleLanes));
  }

  void scan(Row& row, std::int64_t span) const {
    const std::int64_t last = std::min(chunks_, (span + 1) * (kSpan / kSampleChunk));
    for (std::int64_t chunk = span * (kSpan / kSampleChunk); chunk < last; ++chunk) {
      const std::int64_t begin = chunk * kSampleChunk;
      row.chunks[static_cast<std::size_t>(chunk)] =
          kernels_.scan(row.x + begin, std::min(kSampleChunk, args_.vocab - begin), row.inverse_t,
                        row.lane_max.data() + begin / kSampleGroup * kSampleLanes);
    }
  }

  // After the scan: lse, modifications, filters, and the draw itself unless the whole vocabulary takes part.
  void choose(Row& row) const {
    args_.lse[row.at] = merge(row);
    if (!std::isfinite(row.max)) return finish(row, -1, 0.0f);
    if (modify(row)) {
      row.plain = false;
      for (std::int64_t span = 0; span < spans_; ++span) scan(row, span);
      merge(row);
      if (!std::isfinite(row.max)) return finish(row, -1, 0.0f);
    }
    const std::int32_t top = argmax(row);
    if (!(row.temperature > 0.0f)) return finish(row, top, 0.0f);
    row.noise = NoiseRow{row.x,
                         row.lane_max.data(),
                         args_.vocab,
                         row.max,
                         row.inverse_t,
                         args_.seed[row.slot],
                         args_.sample_index[row.slot],
                         args_.positions[row.at],
                         -kInfinity,
                         -FLT_MAX};
    // The maximum is always among what may be drawn: its score is the one to beat.
    alignas(64) float value[16] = {row.max};
    alignas(64) std::int32_t id[16] = {top};
    row.noise.bound = kernels_.draw_list(row.noise, value, id, 1).score;
    if (filter(row)) {
      const Candidates& all = row.candidates;
      const Best best = kernels_.draw_list(row.noise, all.values.data(), all.ids.data(), all.count);
      return finish(row, best.id, logprob(row, best.id));
    }
    row.stage = Stage::Drawing;
    row.drawn.resize(static_cast<std::size_t>(spans_));
  }

  void draw(Row& row, std::int64_t span) const {
    row.drawn[static_cast<std::size_t>(span)] =
        kernels_.draw_range(row.noise, span * kSpan, std::min(args_.vocab, (span + 1) * kSpan));
  }

  void conclude(Row& row) const {
    Best best{-kInfinity, -1};
    for (const Best& one : row.drawn) {
      if (one.score > best.score) best = one;  // spans ascend: ties stay with the lowest id
    }
    finish(row, best.id, logprob(row, best.id));
  }

 private:
  void finish(Row& row, std::int32_t token, float logprob) const {
    args_.token[row.at] = token;
    args_.sampling_logprob[row.at] = logprob;
    row.stage = Stage::Done;
  }

  float logprob(const Row& row, std::int32_t token) const {
    // Without options the draw's and the model's log-probability are one number: computed alike, they agree
    // to the last bit.
    if (row.plain) return row.x[token] / row.temperature - args_.lse[row.at];
    const float y = (row.x[token] - row.max) * row.inverse_t;
    return static_cast<float>(static_cast<double>(y) - std::log(row.mass));
  }

  // Chunks in order, whoever scanned them: maximum, mass, and the logsumexp, which is returned. A NaN
  // anywhere becomes the maximum.
  static float merge(Row& row) {
    row.max = -kInfinity;
    row.mass = 0.0;
    bool nan = false;
    for (const ChunkScan& chunk : row.chunks) {
      nan = nan || chunk.nan;
      row.max = std::max(row.max, chunk.max);
    }
    if (nan) row.max = std::nanf("");
    if (!std::isfinite(row.max)) return row.max;
    for (const ChunkScan& chunk : row.chunks) {
      if (chunk.max == -kInfinity) continue;
      row.mass += chunk.sum * std::exp((static_cast<double>(chunk.max) - row.max) * row.inverse_t);
    }
    const double scale = row.temperature > 0.0f ? static_cast<double>(row.temperature) : 1.0;
    return static_cast<float>(row.max / scale + std::log(row.mass));
  }

  std::int32_t argmax(const Row& row) const {
    std::size_t chunk = 0;
    while (row.chunks[chunk].max != row.max) ++chunk;
    std::int64_t lane = static_cast<std::int64_t>(chunk) * (kSampleChunk / kSampleGroup) * kSampleLanes;
    while (row.lane_max[static_cast<std::size_t>(lane)] != row.max) ++lane;
    std::int64_t id = lane / kSampleLanes * kSampleGroup;
    while (row.x[id] != row.max) ++id;
    return static_cast<std::int32_t>(id);
  }

  bool listed(const std::int32_t* ids, std::int64_t count) const {
    return std::any_of(ids, ids + count, [&](std::int32_t id) { return id >= 0 && id < args_.vocab; });
  }

  // Steps 1 and 2. Returns whether row.x is now a modified copy.
  bool modify(Row& row) const {
    const std::int64_t s = row.slot, vocab = args_.vocab;
    const float repetition = args_.repetition[s], presence = args_.presence[s],
                frequency = args_.frequency[s];
    const std::int32_t* bias = args_.bias_ids + s * args_.num_biases;
    const std::int32_t* bans = args_.ban_ids + s * args_.num_bans;
    const bool penalized =
        args_.output_counts && (repetition != 1.0f || presence != 0.0f || frequency != 0.0f);
    const bool biased = listed(bias, args_.num_biases);
    const bool banned = args_.positions[row.at] < args_.ban_until[s] && listed(bans, args_.num_bans);
    if (!penalized && !biased && !banned) return false;
    row.modified.resize(static_cast<std::size_t>(vocab));
    float* out = row.modified.data();
    if (penalized) {
      kernels_.penalize(out, row.x, vocab, args_.output_counts + s * vocab, args_.prompt_mask + s * vocab,
                        repetition, presence, frequency);
    } else {
      std::copy(row.x, row.x + vocab, out);
    }
    for (std::int64_t i = 0; i < args_.num_biases; ++i) {
      if (bias[i] >= 0 && bias[i] < vocab) out[bias[i]] += args_.bias_values[s * args_.num_biases + i];
    }
    for (std::int64_t i = 0; banned && i < args_.num_bans; ++i) {
      if (bans[i] >= 0 && bans[i] < vocab) out[bans[i]] = -kInfinity;
    }
    row.x = out;
    return true;
  }

  // Steps 4 to 6. Returns true where what may be drawn is listed in row.candidates, false where it is all
  // that reaches row.noise.least.
  bool filter(Row& row) const {
    const std::int64_t vocab = args_.vocab, k = args_.top_k[row.slot];
    const double p = std::max(0.0, static_cast<double>(args_.top_p[row.slot]));
    const float min_p = std::min(args_.min_p[row.slot], 1.0f);
    const bool by_count = k > 0 && k < vocab, by_mass = p < 1.0, by_ratio = min_p > 0.0f;
    if (!by_count && !by_mass && !by_ratio) return false;
    row.plain = false;
    // Everything below `floor` is out for certain, and nothing below it is needed to find the thresholds:
    // under top-k, the mass that top-p looks at is that of the k largest. All mass below y = log((1 - p) mass
    // / V) together is less than the 1 - p that top-p leaves out.
    const float least_y = by_ratio ? static_cast<float>(std::log(static_cast<double>(min_p))) : -kInfinity;
    const float ratio = by_ratio ? ratio_threshold(row.max, row.inverse_t, least_y) : -FLT_MAX;
    float floor = -FLT_MAX;
    if (by_count) {
      const std::int64_t groups = (vocab + kSampleGroup - 1) / kSampleGroup;
      floor = kth_largest_bound(row.lane_max.data(), groups, k, row.floats);
    } else if (by_mass) {
      const double y = std::log((1.0 - p) * row.mass / static_cast<double>(vocab)) - 1e-3;
      const double x = std::max(-static_cast<double>(FLT_MAX), row.max + y * row.temperature);
      floor = std::min(row.max, std::nextafter(static_cast<float>(x), -FLT_MAX));
    }
    if (!(by_count && by_mass)) floor = std::max(floor, ratio);

    Candidates& all = row.candidates;
    all.values.get(vocab + 16), all.ids.get(vocab + 16), all.weights.get(vocab + 16);
    all.count = kernels_.collect(row.x, vocab, row.lane_max.data(), floor, all.values.data(), all.ids.data(),
                                 by_count ? vocab : vocab / 8);
    if (all.count < 0) {
      const float least = by_mass ? wide_mass_threshold(row, floor, p * row.mass) : -FLT_MAX;
      row.noise.least = std::max(least, ratio);
      row.mass =
          kernels_.mass_from(row.x, vocab, row.lane_max.data(), row.noise.least, row.max, row.inverse_t);
      return false;
    }
    weigh(row);
    float least = -FLT_MAX;
    if (by_count && all.count > k) least = kth_largest(all.values.data(), all.count, k, row.floats);
    if (by_mass) {
      const double mass = by_count ? keep_from(all, least) : row.mass;
      least = mass_threshold(all, p * mass, row.indices);
    }
    row.mass = keep_from(all, std::max(least, ratio));
    return true;
  }

  void weigh(Row& row) const {
    Candidates& all = row.candidates;
    kernels_.weigh(all.values.data(), all.count, row.max, row.inverse_t, all.weights.data());
  }

  // mass_threshold() where the candidates are too many to list: by bins of equal width, then exactly within
  // the one bin.
  float wide_mass_threshold(Row& row, float floor, double target) const {
    const float scale = std::min((kSampleBins - 1) / (row.max - floor), FLT_MAX);
    double mass[kSampleBins + 1] = {};
    kernels_.histogram(row.x, args_.vocab, row.lane_max.data(), floor, row.max, row.inverse_t, scale, mass);
    double above = 0.0;
    std::int32_t bin = 0;
    for (std::int32_t next = 1; next < kSampleBins && above + mass[bin] < target; ++next) {
      if (mass[next] == 0.0) continue;
      above += mass[bin];
      bin = next;
    }
    Candidates& all = row.candidates;
    all.count = kernels_.collect_bin(row.x, args_.vocab, row.lane_max.data(), floor, row.max, scale, bin,
                                     all.values.data(), all.ids.data());
    weigh(row);
    return mass_threshold(all, target - above, row.indices);
  }

  const SampleArgs& args_;
  const SampleKernels& kernels_;
  std::int64_t chunks_, spans_;
};

}  // namespace

void sample(const SampleArgs& args) {
  if (args.rows == 0) return;
  const Sampler sampler(args);
  const std::int64_t spans = sampler.spans();
  const int threads = threads_for(args.rows * args.vocab, kSpan, args.rows * spans);
  if (threads == 1 || args.rows >= 2 * threads) {
    // A row a task: its second and third pass find it in the core's cache.
    parallel_ranges(args.rows, threads, [&](std::int64_t begin, std::int64_t end) {
      static thread_local Row row;
      for (std::int64_t at = begin; at < end; ++at) {
        sampler.start(row, at);
        for (std::int64_t span = 0; span < spans && row.stage == Stage::Scanning; ++span)
          sampler.scan(row, span);
        if (row.stage == Stage::Scanning) sampler.choose(row);
        for (std::int64_t span = 0; span < spans && row.stage == Stage::Drawing; ++span)
          sampler.draw(row, span);
        if (row.stage == Stage::Drawing) sampler.conclude(row);
      }
    });
    return;
  }
  // Fewer rows than keep the threads busy: they share each row's scan and its draw by spans.
  static thread_local std::vector<Row> shared;
  std::vector<Row>& rows = shared;
  if (rows.size() < static_cast<std::size_t>(args.rows)) rows.resize(static_cast<std::size_t>(args.rows));
  const auto in_stage = [&](Stage stage, const auto& body) {
    parallel_ranges(args.rows * spans, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        Row& row = rows[static_cast<std::size_t>(task / spans)];
        if (row.stage == stage) body(row, task % spans);
      }
    });
  };
  for (std::int64_t at = 0; at < args.rows; ++at) sampler.start(rows[static_cast<std::size_t>(at)], at);
  in_stage(Stage::Scanning, [&](Row& row, std::int64_t span) { sampler.scan(row, span); });
  parallel_ranges(args.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t at = begin; at < end; ++at) {
      Row& row = rows[static_cast<std::size_t>(at)];
      if (row.stage == Stage::Scanning) sampler.choose(row);
    }
  });
  bool drawing = false;
  for (std::int64_t at = 0; at < args.rows; ++at)
    drawing |= rows[static_cast<std::size_t>(at)].stage == Stage::Drawing;
  if (!drawing) return;
  in_stage(Stage::Drawing, [&](Row& row, std::int64_t span) { sampler.draw(row, span); });
  for (std::int64_t at = 0; at < args.rows; ++at) {
    Row& row = rows[static_cast<std::size_t>(at)];
    if (row.stage == Stage::Drawing) sampler.conclude(row);
  }
}

void sample_words(std::uint32_t* words, std::int64_t count, std::int64_t seed, std::int32_t sample_index,
                  std::int32_t position) {
  kernels().words(seed, sample_index, position, count, words);
}

void sample_gumbel(float* gumbel, const std::uint32_t* words, std::int64_t count) {
  kernels().gumbel(words, count, gumbel);
}

}  // namespace elastic_decode
