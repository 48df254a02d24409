// Paged attention for decode on sm_80 and newer: one query a token against keys and values in pages.
//
// A token's keys fall into splits of kSplit, counted from position 0. attend_kernel gives a split, for up to
// 16 query heads of one kv head (the rows of an mma), to a block: its warps take the split's tiles of 16 keys
// in turn, each by itself, with online softmax; then the warps' results are added up in the warps' order.
// fold_kernel adds up a token's splits in their order; a token with one split needs none. So every bit of a
// token depends on its query, its keys and its position alone, whatever the page size, the other tokens, the
// number of blocks and who computes what. Nothing is added atomically.
//
// Blocks stay and take every gridDim-th split of a list of all tokens' splits, which each block makes for
// itself from the lengths on the device: rows of unlike lengths share the GPU evenly, and the host knows
// nothing of them.
//
// Why copies of 16 bytes (cp.async) and not Hopper's bulk copies. Decode is bound by memory: 256 keys of
// head_dim 128 are 128 KiB read and, for 6 heads, 0.8 MFLOP: 6 FLOP a byte, where an H100 has 295. What has
// to be on its way at any time is bandwidth times latency (Little): 3.35 TB/s x 0.8 us / 132 processors =
// 20 KB a processor on an H100, 2.0 TB/s x 0.6 us / 108 = 11 KB on an A100, 8 TB/s x 0.8 us / 148 = 43 KB
// on a B200. A warp here has one to two tiles of 8 KB on their way (head_dim 128), a block of four warps 32
// to 64 KB, a processor with three blocks 96 to 192 KB (two on sm_80); half of that in float8.
// Instructions: nvcc 13.0 makes about 340 of a tile for sm_90, so that the 25 KB that an H100's processor
// gets in a microsecond take 1050 of the 7000 it can issue. Bulk copies would save some of these, which are
// not what bounds it, and copy a head's rows of a page only through a tensor map that the driver makes on
// the host for every layer's cache. In float8 a tile of 4 KB takes 660 (conversions), so 4100 a microsecond
// on an H100 and, on a B200, more than there are: there it would be bound by them.
//
// Shared memory: rows are padded by 16 bytes, an odd number of 16-byte pieces, so that the eight rows that
// ldmatrix reads at a time and the lanes that cp.async writes fall in different banks.
#include <algorithm>

#include "paged_attention.cuh"

namespace elastic_decode {
namespace cuda {
namespace {

template <typename T, typename KV, int HeadDim>
void run(const PagedAttentionArgs& call, std::uintptr_t stream) {
  using Shape = Tiling<KV, HeadDim>;
  const int group = call.num_heads / call.num_kv_heads;
  const std::int64_t parts = static_cast<std::int64_t>(call.num_kv_heads) * ((group + kHeads - 1) / kHeads);
  // As many as run at once: those past that would come when the first are done. A block also takes 1 KiB for
  // the system, and up to 1 KiB of static shared memory.
  const int fit = call.processor_shared / static_cast<int>(Shape::kSharedBytes + (2 << 10));
  const int resident = std::max(1, std::min(Shape::kBlocks, fit));
  for (int first = 0; first < call.num_tokens; first += call.pass) {
    const int count = std::min(call.pass, call.num_tokens - first);
    const std::int64_t most = parts * call.num_splits * count;
    const unsigned blocks =
        static_cast<unsigned>(std::min<std::int64_t>(most, std::int64_t{resident} * call.num_processors));
    launch({"attend_kernel", dim3(blocks), dim3(Shape::kThreads), Shape::kSharedBytes, stream},
           attend_kernel<T, KV, HeadDim>, call, first, count);
    if (call.num_splits == 1) continue;
    constexpr std::size_t kFoldBytes = sizeof(float) * kFoldAtOnce * (HeadDim + 2);
    launch({"fold_kernel", dim3(static_cast<unsigned>(count), static_cast<unsigned>(call.num_heads)),
            dim3(HeadDim), kFoldBytes, stream, call.overlap},
           fold_kernel<T>, call, first);
  }
}

[[noreturn]] void refuse(int head_dim) {
  throw std::invalid_argument("paged_attention: no kernel for head_dim " + std::to_string(head_dim));
}

template <typename T>
void run(const PagedAttentionArgs& call, int head_dim, bool float8, std::uintptr_t stream) {
  if (float8) {
    switch (head_dim) {
      case 32:
        return run<T, Float8, 32>(call, stream);
      case 64:
        return run<T, Float8, 64>(call, stream);
      case 96:
        return run<T, Float8, 96>(call, stream);
      case 128:
        return run<T, Float8, 128>(call, stream);
      case 256:
        return run<T, Float8, 256>(call, stream);
      default:
        refuse(head_dim);
    }
  }
  switch (head_dim) {
    case 16:
      return run<T, T, 16>(call, stream);
    case 32:
      return run<T, T, 32>(call, stream);
    case 64:
      return run<T, T, 64>(call, stream);
    case 80:
      return run<T, T, 80>(call, stream);
    case 96:
      return run<T, T, 96>(call, stream);
    case 128:
      return run<T, T, 128>(call, stream);
    case 256:
      return run<T, T, 256>(call, stream);
    default:
      refuse(head_dim);
  }
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, int head_dim, bool bfloat16, bool float8,
                     std::uintptr_t stream) {
  return bfloat16 ? run<BFloat16>(args, head_dim, float8, stream)
                  : run<Float16>(args, head_dim, float8, stream);
}

}  // namespace cuda
}  // namespace elastic_decode
