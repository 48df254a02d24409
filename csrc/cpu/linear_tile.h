// The loops of linear, for every instruction set. Included by each linear_<isa>.cpp after it has defined
// ELASTIC_TILE, the target attribute of its functions, and the types `Lanes` stands for below:
//   Element            of x and weight
//   Vector, kStep      kStep elements in registers, widened if need be
//   Sum                partial sums of one output
//   load(p), load_first(p, count)   the latter: `count` elements, then zeros, without touching memory past
//   them multiply_add(sum, w, x) reduce(a, b, c, d) -> Quad: the totals of four outputs, each with the same
//   order of additions kTokens            tokens of a tile of 4 outputs; kTokensWide of a tile of 8 (0: no
//   such tiles)
//
// A tile is 4 or 8 outputs by a few tokens, and walks along K once with all its sums in registers. Each
// output has its own sums, so the order in which its products are added depends on K alone: not on the tile,
// the tokens or the threads.
#pragma once
#include <algorithm>

#include "cpu/linear.h"

#ifndef ELASTIC_TILE
#error "define ELASTIC_TILE, the target attribute, before including this file"
#endif

namespace elastic_decode {
namespace {

// Bytes of a row taken at a time, so that the weights of a tile stay in the first-level cache for all tokens.
constexpr std::int64_t kChunkBytes = 3072;
// Bytes of x taken at a time, so that they stay in the second-level cache while the weights stream by.
constexpr std::int64_t kPanelBytes = 768 * 1024;
// Most tokens whose unfinished sums are kept between chunks.
constexpr std::int64_t kMostTokens = 64;

// The inputs in equal chunks, each a whole number of steps but the last.
struct Chunks {
  std::int64_t inputs, step, count;
  Chunks(std::int64_t inputs, std::int64_t element_bytes, std::int64_t step)
      : inputs(inputs),
        step(step),
        count(std::max<std::int64_t>(1, (inputs * element_bytes + kChunkBytes - 1) / kChunkBytes)) {}
  std::int64_t end(std::int64_t chunk) const {
    return chunk + 1 < count ? inputs * (chunk + 1) / count / step * step : inputs;
  }
};

// Where a tile stands: outputs n.. (`valid` of them), tokens t.., inputs from..to.
template <class Element>
struct Place {
  std::int64_t n, valid, t, from, to;
  const Element* fetch;     // weights that will be needed soon, to be fetched into the cache on the way
  std::int64_t fetch_step;  // elements from one step to the next
};

// Outputs past the last one repeat it: their sums are computed and dropped. kFetch: rows to fetch at a time.
// Sums that end before the last input go to `unfinished`, and the tile of the inputs after them takes them
// from there.
template <class Lanes, class Out, int kOutputs, int kTokens, int kFetch>
static ELASTIC_TILE ELASTIC_INLINE void tile(const LinearArgs& args, const Place<typename Lanes::Element>& at,
                                             typename Lanes::Sum* unfinished) {
  using Element = typename Lanes::Element;
  using Vector = typename Lanes::Vector;
  const std::int64_t inputs = args.inputs;
  const std::int64_t stride = args.weight_stride;
  const Element* x = static_cast<const Element*>(args.x) + at.t * inputs;
  const Element* fetch = at.fetch;
  const Element* w[kOutputs];
  typename Lanes::Sum sums[kOutputs][kTokens];
#pragma GCC unroll 8
  for (int i = 0; i < kOutputs; ++i) {
    w[i] = static_cast<const Element*>(args.weight) + (at.n + (i < at.valid ? i : at.valid - 1)) * stride;
#pragma GCC unroll 8
    for (int j = 0; j < kTokens; ++j) sums[i][j] = Lanes::zero();
  }
  if (at.from > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kTokens; ++j) sums[i][j] = unfinished[i * kTokens + j];
    }
  }

  std::int64_t k = at.from;
  for (; k + Lanes::kStep <= at.to; k += Lanes::kStep) {
    Vector xs[kTokens];
#pragma GCC unroll 8
    for (int j = 0; j < kTokens; ++j) xs[j] = Lanes::load(x + j * inputs + k);
#pragma GCC unroll 8
    for (int i = 0; i < kFetch; ++i) __builtin_prefetch(fetch + i * stride);
    if (kFetch > 0) fetch += at.fetch_step;
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
      const Vector wi = Lanes::load(w[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < kTokens; ++j) sums[i][j] = Lanes::multiply_add(sums[i][j], wi, xs[j]);
    }
  }
  if (at.to < inputs) {
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kTokens; ++j) unfinished[i * kTokens + j] = sums[i][j];
    }
    return;
  }
  if (k < inputs) {
    const int rest = static_cast<int>(inputs - k);
    Vector xs[kTokens];
#pragma GCC unroll 8
    for (int j = 0; j < kTokens; ++j) xs[j] = Lanes::load_first(x + j * inputs + k, rest);
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
      const Vector wi = Lanes::load_first(w[i] + k, rest);
#pragma GCC unroll 8
      for (int j = 0; j < kTokens; ++j) sums[i][j] = Lanes::multiply_add(sums[i][j], wi, xs[j]);
    }
  }

  const Element* bias = static_cast<const Element*>(args.bias);
#pragma GCC unroll 8
  for (int j = 0; j < kTokens; ++j) {
    Out* out = static_cast<Out*>(args.out) + (at.t + j) * args.outputs + at.n;
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; i += 4) {
      const auto totals = Lanes::reduce(sums[i][j], sums[i + 1][j], sums[i + 2][j], sums[i + 3][j]);
      if (at.valid >= i + 4) {
        Lanes::store(out + i, bias != nullptr ? Lanes::add(totals, bias + at.n + i) : totals);
      } else {
        const std::int64_t last = at.valid - i;
        Element biases[4] = {};
        if (bias != nullptr) std::copy_n(bias + at.n + i, last, biases);
        Out each[4];
        Lanes::store(each, bias != nullptr ? Lanes::add(totals, biases) : totals);
        std::copy_n(each, last, out + i);
      }
    }
  }
}

// A tile of `tokens` <= kTokens tokens.
template <class Lanes, class Out, int kOutputs, int kTokens, int kFetch>
static ELASTIC_TILE ELASTIC_INLINE void tile_of(std::int64_t tokens, const LinearArgs& args,
                                                const Place<typename Lanes::Element>& at,
                                                typename Lanes::Sum* unfinished) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) {
      return tile_of<Lanes, Out, kOutputs, kTokens - 1, kFetch>(tokens, args, at, unfinished);
    }
  }
  tile<Lanes, Out, kOutputs, kTokens, kFetch>(args, at, unfinished);
}

// Tokens first..last, few enough for one tile, of outputs n..end; returns the first output left over, for
// which a tile of kOutputs is too large.
template <class Lanes, class Out, int kOutputs, int kTokens>
static ELASTIC_TILE ELASTIC_NOINLINE std::int64_t columns_of_few(const LinearArgs& args, std::int64_t n,
                                                                 std::int64_t end, std::int64_t first,
                                                                 std::int64_t last,
                                                                 typename Lanes::Sum* unfinished) {
  using Element = typename Lanes::Element;
  const Chunks chunks(args.inputs, sizeof(Element), Lanes::kStep);
  for (; n < end; n += kOutputs) {
    if (kOutputs > 4 && n + kOutputs > end) return n;
    const std::int64_t valid = std::min<std::int64_t>(kOutputs, end - n);
    const Element* weight = static_cast<const Element*>(args.weight) + n * args.weight_stride;
    std::int64_t from = 0;
    for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const std::int64_t to = chunks.end(chunk);
      const Element* next = to < args.inputs ? weight + to : weight + kOutputs * args.weight_stride;
      tile_of<Lanes, Out, kOutputs, kTokens, kOutputs>(
          last - first, args, {n, valid, first, from, to, next, Lanes::kStep}, unfinished);
      from = to;
    }
  }
  return end;
}

// Tokens first..last of outputs n..end, in tiles of nearly equal size. Those of the same outputs share the
// fetching of the weights that come next, as evenly as goes: memory and arithmetic then work at the same
// time.
template <class Lanes, class Out>
static ELASTIC_TILE ELASTIC_NOINLINE void columns_of_many(const LinearArgs& args, std::int64_t n,
                                                          std::int64_t end, std::int64_t first,
                                                          std::int64_t last,
                                                          typename Lanes::Sum* unfinished) {
  using Element = typename Lanes::Element;
  constexpr int kTokens = Lanes::kTokens;
  const std::int64_t stride = args.weight_stride;
  const std::int64_t count = (last - first + kTokens - 1) / kTokens;
  const std::int64_t tokens = (last - first) / count;
  const std::int64_t larger = (last - first) % count;    // tiles with a token more
  const int shift = count < 8 ? 0 : count < 16 ? 1 : 2;  // 2^shift tiles fetch a row
  const Chunks chunks(args.inputs, sizeof(Element), Lanes::kStep);
  for (; n < end; n += 4) {
    const std::int64_t valid = std::min<std::int64_t>(4, end - n);
    const Element* weight = static_cast<const Element*>(args.weight) + n * stride;
    std::int64_t from = 0;
    for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const std::int64_t to = chunks.end(chunk);
      const Element* next = to < args.inputs ? weight + to : weight + 4 * stride;
      Place<Element> at{n, valid, first, from, to, next, Lanes::kStep >> shift};
      from = to;
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t here = tokens + (i < larger ? 1 : 0);
        typename Lanes::Sum* mine = unfinished + (at.t - first) * 4;
        if (count < 4 && i < 2) {
          at.fetch = next + 2 * i * stride;
          tile_of<Lanes, Out, 4, kTokens, 2>(here, args, at, mine);
        } else if (count >= 4 && i < (4 << shift)) {
          at.fetch = next + (i >> shift) * stride + (i & ((1 << shift) - 1)) * ((at.to - at.from) >> shift);
          tile_of<Lanes, Out, 4, kTokens, 1>(here, args, at, mine);
        } else {
          tile_of<Lanes, Out, 4, kTokens, 0>(here, args, at, mine);
        }
        at.t += here;
      }
    }
  }
}

template <class Lanes, class Out>
static ELASTIC_TILE void columns(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t row_bytes = std::max<std::int64_t>(1, args.inputs * sizeof(typename Lanes::Element));
  const std::int64_t fitting = kPanelBytes / row_bytes;
  const std::int64_t most = row_bytes > kChunkBytes ? std::min(fitting, kMostTokens) : fitting;
  const std::int64_t panels = (args.tokens - 1) / std::max<std::int64_t>(most, 4 * Lanes::kTokens) + 1;
  typename Lanes::Sum unfinished[4 * kMostTokens];  // 4 outputs of all tokens, or 8 of the few of a wide tile
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t first = args.tokens * panel / panels;
    const std::int64_t last = args.tokens * (panel + 1) / panels;
    std::int64_t n = begin;
    if constexpr (Lanes::kTokensWide > 0) {
      if (last - first <= Lanes::kTokensWide) {
        n = columns_of_few<Lanes, Out, 8, Lanes::kTokensWide>(args, n, end, first, last, unfinished);
      }
    }
    if (last - first <= Lanes::kTokens) {
      columns_of_few<Lanes, Out, 4, Lanes::kTokens>(args, n, end, first, last, unfinished);
    } else {
      columns_of_many<Lanes, Out>(args, n, end, first, last, unfinished);
    }
  }
}

}  // namespace
}  // namespace elastic_decode
