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

// Rows past the last one stand in for it: their products are computed and dropped.
template <class Lanes, class Out, int kOutputs, int kTokens, bool kPrefetch>
static ELASTIC_TILE ELASTIC_INLINE void tile(const LinearArgs& args, std::int64_t n, std::int64_t valid,
                                             std::int64_t t) {
  using Element = typename Lanes::Element;
  using Sum = typename Lanes::Sum;
  using Vector = typename Lanes::Vector;
  const std::int64_t inputs = args.inputs;
  const std::int64_t stride = args.weight_stride;
  const Element* w[kOutputs];
#pragma GCC unroll 8
  for (int i = 0; i < kOutputs; ++i) {
    w[i] = static_cast<const Element*>(args.weight) + (n + (i < valid ? i : valid - 1)) * stride;
  }
  const Element* x = static_cast<const Element*>(args.x) + t * inputs;

  Sum sums[kOutputs][kTokens];
#pragma GCC unroll 8
  for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kTokens; ++j) sums[i][j] = Lanes::zero();
  }
  std::int64_t k = 0;
  for (; k + Lanes::kStep <= inputs; k += Lanes::kStep) {
    Vector xs[kTokens];
#pragma GCC unroll 8
    for (int j = 0; j < kTokens; ++j) xs[j] = Lanes::load(x + j * inputs + k);
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
      const Vector wi = Lanes::load(w[i] + k);
      if (kPrefetch) __builtin_prefetch(w[i] + k + kOutputs * stride, 0, 3);
#pragma GCC unroll 8
      for (int j = 0; j < kTokens; ++j) sums[i][j] = Lanes::multiply_add(sums[i][j], wi, xs[j]);
    }
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
    Out* out = static_cast<Out*>(args.out) + (t + j) * args.outputs + n;
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; i += 4) {
      const auto totals = Lanes::reduce(sums[i][j], sums[i + 1][j], sums[i + 2][j], sums[i + 3][j]);
      if (valid >= i + 4) {
        Lanes::store(out + i, bias != nullptr ? Lanes::add(totals, bias + n + i) : totals);
      } else {
        float each[4];
        Lanes::store(each, totals);
        for (int l = i; l < valid; ++l) {
          out[l] = from_float<Out>(bias != nullptr ? each[l - i] + to_float(bias[n + l]) : each[l - i]);
        }
      }
    }
  }
}

// A tile of `tokens` <= kTokens tokens.
template <class Lanes, class Out, int kOutputs, int kTokens, bool kPrefetch>
static ELASTIC_TILE ELASTIC_INLINE void tile_of(int tokens, const LinearArgs& args, std::int64_t n,
                                                std::int64_t valid, std::int64_t t) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) {
      return tile_of<Lanes, Out, kOutputs, kTokens - 1, kPrefetch>(tokens, args, n, valid, t);
    }
  }
  tile<Lanes, Out, kOutputs, kTokens, kPrefetch>(args, n, valid, t);
}

// All tokens of kOutputs outputs, in tiles of nearly equal size; the first one fetches the next outputs'
// weights.
template <class Lanes, class Out, int kOutputs, int kTokens>
static ELASTIC_TILE void tiles(const LinearArgs& args, std::int64_t n, std::int64_t valid, std::int64_t first,
                               std::int64_t last) {
  std::int64_t left = (last - first + kTokens - 1) / kTokens;
  for (std::int64_t t = first; left > 0; --left) {
    const int tokens = static_cast<int>((last - t + left - 1) / left);
    if (t == first) {
      tile_of<Lanes, Out, kOutputs, kTokens, true>(tokens, args, n, valid, t);
    } else {
      tile_of<Lanes, Out, kOutputs, kTokens, false>(tokens, args, n, valid, t);
    }
    t += tokens;
  }
}

template <class Lanes, class Out>
static ELASTIC_TILE void columns(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  // Tokens in panels whose x stays in the second-level cache while the weights stream by.
  constexpr std::int64_t kPanelBytes = 512 * 1024;
  const std::int64_t row_bytes = std::max<std::int64_t>(1, args.inputs * sizeof(typename Lanes::Element));
  const std::int64_t most = std::max<std::int64_t>(kPanelBytes / row_bytes, 4 * Lanes::kTokens);
  const std::int64_t panels = (args.tokens + most - 1) / most;
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t first = args.tokens * panel / panels;
    const std::int64_t last = args.tokens * (panel + 1) / panels;
    std::int64_t n = begin;
    if constexpr (Lanes::kTokensWide > 0) {
      if (last - first <= Lanes::kTokensWide) {
        for (; n + 8 <= end; n += 8) tiles<Lanes, Out, 8, Lanes::kTokensWide>(args, n, 8, first, last);
      }
    }
    for (; n < end; n += 4) {
      tiles<Lanes, Out, 4, Lanes::kTokens>(args, n, std::min<std::int64_t>(4, end - n), first, last);
    }
  }
}

}  // namespace
}  // namespace elastic_decode
