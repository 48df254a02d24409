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
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/isa.h"
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

void paged_attention(const PagedAttentionCall& call) {
  using namespace attention;
  clear_idle(call);
  const std::vector<Tile> tiles = cut_tiles(call);
  if (tiles.empty()) return;
  const Kernel& run = kernel();
  const int num_tiles = static_cast<int>(tiles.size());

#if defined(_OPENMP)
  // Multiply-adds of the whole call, to within what masks leave out. Waking threads costs some microseconds.
  constexpr double kWorthThreads = 4e5;
  double work = 0;
  int splits = 0;
  for (const Tile& tile : tiles) {
    work +=
        2.0 * kSplit * (tile.end_split - tile.first_split) * tile.num_queries * call.group() * call.head_dim;
    splits += tile.end_split - tile.first_split;
  }
  const int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  if (threads > 1 && work >= kWorthThreads) {
    if (num_tiles >= 4 * threads || splits == num_tiles) {
#pragma omp parallel for schedule(dynamic, 1)
      for (int i = num_tiles - 1; i >= 0; --i)
        run.attend(call, tiles[i], thread_scratch());  // the longest first
      return;
    }
    // Few tiles: a thread takes one split of one, and the partial results are folded afterwards, in the same
    // order as above.
    struct Piece {
      int tile, split;
      std::size_t offset;
    };
    std::vector<Piece> pieces;
    std::vector<std::size_t> offsets;
    std::size_t total = 0;
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
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < num_pieces; ++i) {
        run.attend_split(call, tiles[pieces[i].tile], pieces[i].split, thread_scratch(),
                         partials + pieces[i].offset);
      }
#pragma omp for schedule(static)
      for (int i = 0; i < num_tiles; ++i) run.fold(call, tiles[i], thread_scratch(), partials + offsets[i]);
    }
    return;
  }
#endif
  for (const Tile& tile : tiles) run.attend(call, tile, thread_scratch());
}

}  // namespace elastic_decode
