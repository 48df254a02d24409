// Paged attention: cuts the batch into tiles, spreads them over threads, and holds the kernel for machines
// without a special one.
#include "cpu/paged_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace elastic_decode {
namespace attention {

namespace generic {
#define ELASTIC_LANES 128
#define ELASTIC_PAIRS 0
#include "cpu/paged_attention_lanes.h"
// in this order, which this line keeps
#include "cpu/paged_attention_products.h"
// likewise
#include "cpu/paged_attention_kernel.h"
}  // namespace generic

const Kernel kGeneric = {generic::attend_split, generic::attend, generic::fold};

static const Kernel& kernel() {
#if ELASTIC_X86
  const Isa best = isa();
  if (best >= Isa::Avx512Bf16) return kAvx512Bf16;
  if (best >= Isa::Avx512) return kAvx512;
  if (best >= Isa::Avx2) return kAvx2;
#endif
  return kGeneric;
}

// Multiply-adds that take some 5 microseconds, in which a second thread wakes.
constexpr std::int64_t kWorkPerThread = 400000;

static Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

static std::vector<Tile> cut_tiles(const Call& call) {
  std::vector<Tile> tiles;
  const int tile_queries = std::max(1, kTileRows / call.group());
  for (int row = 0; row < call.num_rows; ++row) {
    const int start = call.query_start[row], count = call.query_start[row + 1] - start;
    const int seq_len = call.seq_lens[row];
    if (seq_len <= 0) continue;
    for (int first = 0; first < count; first += tile_queries) {
      Tile tile;
      tile.row = row;
      tile.first_query = first;
      tile.num_queries = std::min(tile_queries, count - first);
      tile.first_position = seq_len - count + first;
      tile.first_token = start + first;
      const int last = tile.first_position + tile.num_queries - 1;
      if (last < 0) continue;
      const int oldest = call.window > 0 ? std::max(0, tile.first_position - call.window + 1) : 0;
      tile.first_split = oldest / kSplit;
      tile.end_split = last / kSplit + 1;
      for (tile.kv_head = 0; tile.kv_head < call.num_kv_heads; ++tile.kv_head) tiles.push_back(tile);
    }
  }
  return tiles;
}

// Zeros for the tokens that no tile writes.
static void clear_idle(const Call& call) {
  const std::size_t bytes =
      static_cast<std::size_t>(call.num_heads) * call.head_dim * (call.q_dtype == DType::Float32 ? 4 : 2);
  const auto clear = [&](std::int64_t begin, std::int64_t end) {
    if (begin < end) std::memset(static_cast<char*>(call.out) + begin * bytes, 0, (end - begin) * bytes);
  };
  for (int row = 0; row < call.num_rows; ++row) {
    const std::int64_t start = call.query_start[row], end = call.query_start[row + 1];
    const std::int64_t without_position =
        std::max<std::int64_t>(0, end - start - std::max(0, call.seq_lens[row]));
    clear(start, start + without_position);
  }
  clear(call.query_start[call.num_rows], call.num_tokens);
}

}  // namespace attention

namespace attention {

// Few tiles: a thread takes one split of one, and the partial results are folded afterwards, in the order in
// which one thread would have folded them.
static void attend_by_splits(const Kernel& run, const Call& call, const std::vector<Tile>& tiles,
                             int threads) {
  struct Piece {
    int tile, split;
    std::size_t offset;
  };
  std::vector<Piece> pieces;
  std::vector<std::size_t> offsets;
  std::size_t total = 0;
  const int num_tiles = static_cast<int>(tiles.size());
  for (int i = 0; i < num_tiles; ++i) {
    offsets.push_back(total);
    for (int split = tiles[i].first_split; split < tiles[i].end_split; ++split) {
      pieces.push_back({i, split, total});
      total += static_cast<std::size_t>(tiles[i].num_queries) * call.group() * partial_stride(call);
    }
  }
  thread_local Scratch shared;
  float* partials = shared.take(total);
  const int num_pieces = static_cast<int>(pieces.size());
  const auto attend = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      run.attend_split(call, tiles[piece.tile], piece.split, thread_scratch(), partials + piece.offset);
    }
  };
  const auto fold = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      run.fold(call, tiles[i], thread_scratch(), partials + offsets[i]);
  };
  parallel_ranges(num_pieces, threads, attend, 1);
  parallel_ranges(num_tiles, threads, fold);
}

}  // namespace attention

void paged_attention(const PagedAttentionCall& call) {
  using namespace attention;
  clear_idle(call);
  const std::vector<Tile> tiles = cut_tiles(call);
  const Kernel& run = kernel();
  std::int64_t work = 0;  // multiply-adds, to within what causal masks leave out
  int splits = 0;
  for (const Tile& tile : tiles) {
    const std::int64_t keys = tile.first_position + tile.num_queries - tile.first_split * kSplit;
    work += 2 * keys * tile.num_queries * call.group() * call.head_dim;
    splits += tile.end_split - tile.first_split;
  }
  const int num_tiles = static_cast<int>(tiles.size());
  const int threads = threads_for(work, kWorkPerThread, splits);
  if (threads == 1) {
    for (const Tile& tile : tiles) run.attend(call, tile, thread_scratch());
  } else if (num_tiles < 4 * threads && splits > num_tiles) {
    attend_by_splits(run, call, tiles, threads);
  } else {
    const auto attend = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        run.attend(call, tiles[num_tiles - 1 - i], thread_scratch());  // a row's last tiles are its longest
    };
    parallel_ranges(num_tiles, threads, attend, 1);
  }
}

}  // namespace elastic_decode
