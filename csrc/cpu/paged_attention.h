// Paged attention's inner interface: what the scheduler (paged_attention.cpp) hands to a kernel compiled for
// one instruction set.
//
// The order of every sum is fixed by positions: keys fall into splits of kSplit tokens counted from position
// 0; within a split a query's scores are one chain over head_dim and its output one chain over the keys,
// first to last; splits are folded in order. A tile of many queries runs the same chains side by side, so a
// token's bits do not depend on how the work was cut.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/ops.h"

namespace elastic_decode::attention {

constexpr int kSplit = 256;     // keys that share one softmax maximum
constexpr int kTileRows = 128;  // (query, head) pairs a tile aims at in prefill
constexpr int kKeyBlock = 32;   // keys packed at a time: the packed block stays in the first-level cache
constexpr int kLanes = 16;      // floats in a Lanes value, whatever the registers are

using Call = PagedAttentionCall;

// Queries [first_query, first_query + num_queries) of a row, one kv head: num_queries * group "rows" of the
// products.
struct Tile {
  int row, kv_head, first_query, num_queries;
  int first_position;          // of first_query
  std::int64_t first_token;    // of first_query in q and out
  int first_split, end_split;  // splits with a key that some query of the tile sees
};

inline int padded_dim(const Call& call) {
  return (call.head_dim + kLanes - 1) / kLanes * kLanes;
}
// A partial result of a tile's row over one split: padded_dim floats of unnormalised output, then the maximum
// and the sum of weights. The sum is 0 exactly where the row sees no key of the split.
inline int partial_stride(const Call& call) {
  return padded_dim(call) + kLanes;  // a whole number of Lanes, which keeps rows aligned
}

// Working memory of one thread: grows, and is kept from call to call.
class Scratch {
 public:
  // At least this many floats, 64-byte aligned; takes back what the last call returned.
  float* take(std::size_t floats) {
    if (storage_.size() < floats + kLanes) storage_.resize(floats + kLanes);
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(storage_.data());
    return storage_.data() + (64 - address % 64) % 64 / sizeof(float);
  }

 private:
  std::vector<float> storage_;
};

struct Kernel {
  // The tile against one split: writes a partial for each of its rows.
  void (*attend_split)(const Call&, const Tile&, int split, Scratch&, float* partials);
  // The tile against all its splits, to the output.
  void (*attend)(const Call&, const Tile&, Scratch&);
  // Folds the partials of the tile's splits, in order, to the output.
  void (*fold)(const Call&, const Tile&, Scratch&, const float* partials);
};

extern const Kernel kGeneric, kAvx2, kAvx512, kAvx512Bf16;

}  // namespace elastic_decode::attention
