// Paged attention's two kernels: attend_kernel, a split of a token's keys at a time, and fold_kernel, which
// adds up the splits of a token. The why of it is in paged_attention.cu.
#pragma once
#include "mma.cuh"
#include "ops.h"

namespace elastic_decode {
namespace cuda {

constexpr int kTile = 16;        // keys that a warp multiplies at a time
constexpr int kHeads = 16;       // query heads a block: the rows of an mma
constexpr int kFoldAtOnce = 32;  // splits that the fold reads before it adds them up

// `KV` is the dtype of keys and values: that of q, or Float8.
template <typename KV, int HeadDim>
struct Tiling {
  static constexpr int kWarps = HeadDim > 128 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kTiles = kSplit / (kTile * kWarps);  // of a split, a warp's
  static constexpr int kStages = 2;
  // A row is an odd number of 16-byte pieces: 8 rows lie in different banks.
  static constexpr int kQRow = HeadDim + 8;  // elements
  static constexpr int kRowBytes = sizeof(KV) * HeadDim + 16;
  static constexpr int kTileBytes = kTile * kRowBytes;  // of keys; as many of values lie behind them
  static constexpr int kWarpBytes = kStages * 2 * kTileBytes;
  static constexpr int kQBytes = 2 * kHeads * kQRow;
  static constexpr int kAccRow = HeadDim + 8;  // floats of a head, where a warp leaves its result
  static constexpr std::size_t kSharedBytes = kQBytes + kWarps * kWarpBytes;
  static constexpr int kBlocks = HeadDim > 128 ? 2 : 3;  // a processor, by registers and shared memory
  static_assert(sizeof(KV) * HeadDim % 32 == 0 && kTiles % 2 == 0 && 4 * kHeads * kAccRow <= kWarpBytes);
};

__device__ __forceinline__ float exp2_approximate(float x) {  // 2^-inf is 0; subnormal results are 0
#if defined(CUDA_ON_CPU)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Until what the stream's previous kernel wrote is there, where this one was launched to overlap it.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// Keeps the compiler from taking an address apart, to compute its terms anew for every copy.
__device__ __forceinline__ const char* whole(const char* address) {
#if !defined(CUDA_ON_CPU)
  asm volatile("" : "+l"(address));
#endif
  return address;
}

// A token's row and the number of keys that it may see, its position + 1; 0 where it has none.
struct Query {
  int row, visible;
};

__device__ __forceinline__ Query query_of(const PagedAttentionArgs& call, int token) {
  const auto query = [&](int row, int end, int seq_len) {
    return Query{row, seq_len > 0 ? max(0, seq_len - (end - token) + 1) : 0};
  };
  if (token < call.num_rows) {  // three loads at once: in decode, token t is row t's only one
    const int start = call.query_start[token], end = call.query_start[token + 1];
    const int seq_len = call.seq_lens[token];
    if (start == token && end == token + 1) return query(token, end, seq_len);
  }
  int low = 0, high = call.num_rows + 1;  // the first row that begins after the token
  while (low < high) {
    const int middle = (low + high) / 2;
    if (call.query_start[middle] <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low > call.num_rows) return {0, 0};  // past the last row
  return query(low - 1, call.query_start[low], call.seq_lens[low - 1]);
}

// Splits first .. first + count - 1 hold the keys oldest .. visible - 1. Without keys it is one, of none.
struct Splits {
  int oldest, first, count;
};

__device__ __forceinline__ Splits splits_of(int visible, int window) {
  const int oldest = window > 0 ? max(0, visible - window) : 0;
  const int first = oldest / kSplit;
  return {oldest, first, max(1, (visible + kSplit - 1) / kSplit - first)};
}

// What a block works on: a split of a token's keys.
struct Work {
  int token, row, visible, split;
  bool alone;  // the token's only one
};

// The keys low .. high - 1 of a split in pages of any size, copied by a warp, tile by tile: kLanes lanes a
// key, 16 bytes a lane (if head_dim is no power of 2, some have nothing to do), kCopies keys after another.
template <typename KV, int HeadDim>
struct KeySource {
  using Shape = Tiling<KV, HeadDim>;
  static constexpr int kPieces = sizeof(KV) * HeadDim / 16;
  static constexpr int kLanes = kPieces <= 2    ? 2
                                : kPieces <= 4  ? 4
                                : kPieces <= 8  ? 8
                                : kPieces <= 16 ? 16
                                                : 32;
  static constexpr int kCopies = kTile * kLanes / kWarp;

  const char* k;  // the kv head's part of token slot 0, at this lane's column
  const char* v;
  std::uint32_t slot_bytes;
  const std::int32_t* table;
  int page_size, low, high, begin, warp, lane;

  __device__ __forceinline__ void set_caches(const PagedAttentionArgs& call, int kv_head) {
    const std::int64_t at = std::int64_t{sizeof(KV) * HeadDim} * kv_head + 16 * (lane % kLanes);
    k = whole(static_cast<const char*>(call.k_cache) + at);
    v = whole(static_cast<const char*>(call.v_cache) + at);
    slot_bytes = sizeof(KV) * HeadDim * static_cast<std::uint32_t>(call.num_kv_heads);
  }

  __device__ __forceinline__ int first_key(int tile) const {
    return begin + (tile * Shape::kWarps + warp) * kTile;
  }
  __device__ __forceinline__ bool has_tile(int tile) const {
    return first_key(tile) < high && first_key(tile) + kTile > low;
  }

  // The slot of one key of the tiles 2 pair and 2 pair + 1; -1: no key of this split. A lane holds what its
  // kLanes copy, so that a shuffle among those, from a constant lane, hands it out.
  __device__ __forceinline__ int slot(int pair) const {
    const int in_group = lane % kLanes;
    const int key = first_key(2 * pair + in_group / kCopies) + lane / kLanes * kCopies + in_group % kCopies;
    if (key < low || key >= high) return -1;
    return table[key / page_size] * page_size + key % page_size;
  }

  // Starts the copies of a tile, keys and values, to `to`. `slots`: slot() of its pair.
  __device__ __forceinline__ void start_tile(int tile, int slots, unsigned char* to) const {
    if (has_tile(tile)) {
      unsigned char* row = to + lane / kLanes * kCopies * Shape::kRowBytes + lane % kLanes * 16;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int from = __shfl_sync(kAllLanes, slots, tile % 2 * kCopies + i, kLanes);
        const std::uint64_t at = std::uint64_t{static_cast<std::uint32_t>(max(from, 0))} * slot_bytes;
        if (kPieces == kLanes || lane % kLanes < kPieces) {
          copy_async(row + i * Shape::kRowBytes, k + at, from >= 0);
          copy_async(row + i * Shape::kRowBytes + Shape::kTileBytes, v + at, from >= 0);
        }
      }
    }
    commit_copies();
  }
};

// A warp's online softmax over its tiles, for 16 heads. Index 0: head lane / 4, 1: head lane / 4 + 8.
template <typename T, typename KV, int HeadDim>
struct Softmax {
  using Shape = Tiling<KV, HeadDim>;

  float top[2];               // maximum of the scaled scores, base 2; -inf: no key yet
  float sums[2];              // of the weights 2^(score - top), of this lane's keys
  float acc[HeadDim / 8][4];  // products' fragments, columns in the order of add_values

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = -INFINITY;
      sums[i] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < HeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
    }
  }

  // q [16, HeadDim] times keys [16, HeadDim] transposed, both in shared memory.
  __device__ __forceinline__ void score(float (&scores)[2][4], const std::uint16_t* q,
                                        const unsigned char* keys, int lane) {
    const unsigned char* at = keys + (lane / 16 * 8 + lane % 8) * Shape::kRowBytes + lane / 8 % 2 * 16;
    if constexpr (sizeof(KV) == 2) {
      const std::uint16_t* q_at = q + (lane / 8 % 2 * 8 + lane % 8) * Shape::kQRow + lane / 16 * 8;
#pragma unroll
      for (int k = 0; k < HeadDim / 16; ++k) {
        std::uint32_t a[4], b[4];
        load_matrices(a, q_at + 16 * k);
        load_matrices(b, at + 32 * k);
        multiply_add<T>(scores[0], a, b[0], b[1]);
        multiply_add<T>(scores[1], a, b[2], b[3]);
      }
    } else {
      // A lane gets four bytes of a key, columns 4c .. 4c + 3 of 16: taken as rows 2c, 2c+1, 2c+8, 2c+9 of B,
      // with q's columns in the same order.
      const std::uint16_t* q_at = q + lane / 4 * Shape::kQRow + lane % 4 * 4;
      std::uint32_t b[4];
#pragma unroll
      for (int k = 0; k < HeadDim / 16; ++k) {
        if (k % 2 == 0) load_matrices(b, at + 16 * k);
        const uint2 upper = *reinterpret_cast<const uint2*>(q_at + 16 * k);
        const uint2 lower = *reinterpret_cast<const uint2*>(q_at + 8 * Shape::kQRow + 16 * k);
        const std::uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
        multiply_add<T>(scores[0], a, widen<T, 0, 1>(b[k % 2]), widen<T, 2, 3>(b[k % 2]));
        multiply_add<T>(scores[1], a, widen<T, 0, 1>(b[2 + k % 2]), widen<T, 2, 3>(b[2 + k % 2]));
      }
    }
  }

  // acc += weights [16, 16], as A's fragments, times values [16, HeadDim] in shared memory.
  __device__ __forceinline__ void add_values(const std::uint32_t (&weights)[4], const unsigned char* values,
                                             int lane) {
    const unsigned char* at = values + (lane / 8 % 2 * 8 + lane % 8) * Shape::kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int n = 0; n < static_cast<int>(sizeof(KV)) * HeadDim / 32; ++n) {
      std::uint32_t b[4];
      load_matrices_transposed(b, at + 32 * n);
      if constexpr (sizeof(KV) == 2) {
        multiply_add<T>(acc[2 * n], weights, b[0], b[1]);
        multiply_add<T>(acc[2 * n + 1], weights, b[2], b[3]);
      } else {
        // Two columns of two keys a register: of 16 columns the even ones are one product, the odd another.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const std::uint32_t first = b[2 * half], second = b[2 * half + 1];
          multiply_add<T>(acc[4 * n + 2 * half], weights, widen<T, 0, 2>(first), widen<T, 0, 2>(second));
          multiply_add<T>(acc[4 * n + 2 * half + 1], weights, widen<T, 1, 3>(first), widen<T, 1, 3>(second));
        }
      }
    }
  }

  // Adds the tile at `tile`, whose first key is `first`.
  __device__ __forceinline__ void add_tile(const std::uint16_t* q, const unsigned char* tile, int first,
                                           int low, int high, float scale_log2e, int lane) {
    float scores[2][4] = {};
    score(scores, q, tile, lane);
    float highest[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + 8 * n + lane % 4 * 2 + i % 2;
        scores[n][i] = key >= low && key < high ? __fmul_rn(scores[n][i], scale_log2e) : -INFINITY;
        highest[i / 2] = fmaxf(highest[i / 2], scores[n][i]);
      }
    }
    float decay[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      highest[i] = fmaxf(highest[i], __shfl_xor_sync(kAllLanes, highest[i], 1));
      highest[i] = fmaxf(highest[i], __shfl_xor_sync(kAllLanes, highest[i], 2));
      const float safe = highest[i] == -INFINITY ? 0.0f : highest[i];
      decay[i] = exp2_approximate(top[i] - safe);
      top[i] = highest[i];
      highest[i] = safe;
    }
    std::uint32_t weights[4];  // the scores' fragments become A's
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float left = exp2_approximate(scores[n][2 * i] - highest[i]);
        const float right = exp2_approximate(scores[n][2 * i + 1] - highest[i]);
        sums[i] = __fmaf_rn(sums[i], n == 0 ? decay[i] : 1.0f, __fadd_rn(left, right));
        weights[2 * n + i] = pack<T>(left, right);
      }
    }
#pragma unroll
    for (int n = 0; n < HeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] = __fmul_rn(acc[n][i], decay[i / 2]);
    }
    add_values(weights, tile + Shape::kTileBytes, lane);
  }

  // To shared memory: acc [kHeads, kAccRow], tops and sums [kHeads]. Only `heads` of them.
  __device__ __forceinline__ void store(float* to, float* tops, float* all_sums, int heads, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(kAllLanes, sums[i], 1));
      sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(kAllLanes, sums[i], 2));
      const int head = lane / 4 + 8 * i;
      if (head >= heads) continue;
      if (lane % 4 == 0) {
        tops[head] = top[i];
        all_sums[head] = sums[i];
      }
      float* row = to + head * Shape::kAccRow;
      if constexpr (sizeof(KV) == 2) {
#pragma unroll
        for (int n = 0; n < HeadDim / 8; ++n) {
          *reinterpret_cast<float2*>(row + 8 * n + lane % 4 * 2) =
              make_float2(acc[n][2 * i], acc[n][2 * i + 1]);
        }
      } else {
#pragma unroll
        for (int n = 0; n < HeadDim / 16; ++n) {
          *reinterpret_cast<float4*>(row + 16 * n + lane % 4 * 4) = make_float4(
              acc[2 * n][2 * i], acc[2 * n + 1][2 * i], acc[2 * n][2 * i + 1], acc[2 * n + 1][2 * i + 1]);
        }
      }
    }
  }
};

// Shares the splits of `count` tokens from `first_token` on out to blocks, one after the other, from the
// lengths as they are on the device. Each thread of a block answers for some adjacent tokens.
template <int Threads>
struct Schedule {
  int begin, end, before, mine, total;
  Query first;

  __device__ __forceinline__ void plan(const PagedAttentionArgs& call, int first_token, int count) {
    __shared__ int warp_totals[Threads / kWarp];
    const int thread = threadIdx.x, lane = thread % kWarp, each = (count + Threads - 1) / Threads;
    begin = first_token + min(count, thread * each);
    end = first_token + min(count, (thread + 1) * each);
    mine = 0;
    for (int token = begin; token < end; ++token) {
      const Query query = query_of(call, token);
      if (token == begin) first = query;
      mine += splits_of(query.visible, call.window).count;
    }
    int scan = mine;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int left = __shfl_up_sync(kAllLanes, scan, step);
      if (lane >= step) scan += left;
    }
    if (lane == kWarp - 1) warp_totals[thread / kWarp] = scan;
    __syncthreads();
    before = scan - mine;
    total = 0;
#pragma unroll
    for (int w = 0; w < Threads / kWarp; ++w) {
      if (w < thread / kWarp) before += warp_totals[w];
      total += warp_totals[w];
    }
  }

  // The thread that answers for split number `index` writes it to *work, in shared memory.
  __device__ __forceinline__ void find(const PagedAttentionArgs& call, int index, Work* work) const {
    if (index < before || index >= before + mine) return;
    int at = before;
    for (int token = begin; token < end; ++token) {
      const Query query = token == begin ? first : query_of(call, token);
      const Splits splits = splits_of(query.visible, call.window);
      if (index < at + splits.count) {
        *work = {token, query.row, query.visible, splits.first + index - at, splits.count == 1};
        return;
      }
      at += splits.count;
    }
  }
};

// Four results of a head as the output's dtype.
template <typename T>
__device__ __forceinline__ void store_rounded(void* to, std::int64_t at, float4 x) {
  reinterpret_cast<uint2*>(to)[at / 4] = make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
}

template <typename T, typename KV, int HeadDim>
__global__ void __launch_bounds__(Tiling<KV, HeadDim>::kThreads, Tiling<KV, HeadDim>::kBlocks)
    attend_kernel(PagedAttentionArgs call, int first_token, int count) {
  using Shape = Tiling<KV, HeadDim>;
  __shared__ Work work;
  __shared__ float tops[Shape::kWarps][kHeads], sums[Shape::kWarps][kHeads];
  auto* q_shared = dynamic_shared<std::uint16_t>();
  auto* shared = reinterpret_cast<unsigned char*>(q_shared) + Shape::kQBytes;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  unsigned char* tiles = shared + warp * Shape::kWarpBytes;
  const int group = call.num_heads / call.num_kv_heads, head_tiles = (group + kHeads - 1) / kHeads;
  const int parts = call.num_kv_heads * head_tiles;  // of the heads; neighbours read neighbouring memory
  const float scale_log2e = call.scale * 1.4426950408889634f;

  Schedule<Shape::kThreads> schedule{};
  schedule.plan(call, first_token, count);
  let_next_kernel_start();
  for (int item = blockIdx.x; item < schedule.total * parts; item += gridDim.x) {
    schedule.find(call, item / parts, &work);  // all have read the last one, two barriers ago
    __syncthreads();                           // and its results
    const Work w = work;
    const int part = item % parts, kv_head = part / head_tiles, tile_head = part % head_tiles * kHeads;
    const int heads = min(kHeads, group - tile_head), first_head = kv_head * group + tile_head;

    KeySource<KV, HeadDim> source;
    source.lane = lane;
    source.warp = warp;
    source.set_caches(call, kv_head);
    source.table = call.page_table + w.row * call.table_stride;
    source.page_size = call.page_size;
    source.begin = w.split * kSplit;
    source.low = max(source.begin, splits_of(w.visible, call.window).oldest);
    source.high = min(source.begin + kSplit, w.visible);

    int slots = source.slot(0);
    int next_slots = source.slot(1);
    const auto* q = static_cast<const std::uint16_t*>(call.q) +
                    (static_cast<std::int64_t>(w.token) * call.num_heads + first_head) * HeadDim;
    for (int piece = thread; piece < kHeads * HeadDim / 8; piece += Shape::kThreads) {
      const int head = piece / (HeadDim / 8), column = piece % (HeadDim / 8) * 8;
      const bool present = head < heads;
      copy_async(q_shared + head * Shape::kQRow + column, present ? q + head * HeadDim + column : q, present);
    }
    commit_copies();
    source.start_tile(0, slots, tiles);
    source.start_tile(1, slots, tiles + 2 * Shape::kTileBytes);

    Softmax<T, KV, HeadDim> softmax;
    softmax.clear();
    wait_copies<2>();
    __syncthreads();  // every warp multiplies all of q

#pragma unroll 1
    for (int pair = 0; pair < Shape::kTiles / 2; ++pair) {
      slots = next_slots;
      next_slots = pair + 2 < Shape::kTiles / 2 ? source.slot(pair + 2) : -1;
#pragma unroll
      for (int stage = 0; stage < 2; ++stage) {
        const int tile = 2 * pair + stage;
        unsigned char* buffer = tiles + stage * 2 * Shape::kTileBytes;
        wait_copies<1>();
        __syncwarp();  // every lane's copies of this tile have arrived
        if (source.has_tile(tile)) {
          softmax.add_tile(q_shared, buffer, source.first_key(tile), source.low, source.high, scale_log2e,
                           lane);
        }
        __syncwarp();  // every lane has read the buffer
        if (tile + 2 < Shape::kTiles) {
          source.start_tile(tile + 2, slots, buffer);
        } else {
          commit_copies();
        }
      }
    }

    // The warps' results, in place of their tiles, are added up in the warps' order.
    softmax.store(reinterpret_cast<float*>(tiles), tops[warp], sums[warp], heads, lane);
    __syncthreads();
    const auto* warp_acc = reinterpret_cast<const float*>(shared);
    for (int i = thread; i < heads * (HeadDim / 4); i += Shape::kThreads) {
      const int head = i / (HeadDim / 4), column = i % (HeadDim / 4) * 4;
      float top = tops[0][head];
#pragma unroll
      for (int other = 1; other < Shape::kWarps; ++other) top = fmaxf(top, tops[other][head]);
      const float safe = top == -INFINITY ? 0.0f : top;
      float sum = 0.0f;
      float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int other = 0; other < Shape::kWarps; ++other) {
        const float weight = exp2_approximate(tops[other][head] - safe);
        const float4 part_acc = *reinterpret_cast<const float4*>(warp_acc + other * (Shape::kWarpBytes / 4) +
                                                                 head * Shape::kAccRow + column);
        sum = __fmaf_rn(sums[other][head], weight, sum);
        acc.x = __fmaf_rn(part_acc.x, weight, acc.x);
        acc.y = __fmaf_rn(part_acc.y, weight, acc.y);
        acc.z = __fmaf_rn(part_acc.z, weight, acc.z);
        acc.w = __fmaf_rn(part_acc.w, weight, acc.w);
      }
      if (w.alone) {
        const float total = sum == 0.0f ? 1.0f : sum;
        const std::int64_t to = static_cast<std::int64_t>(w.token) * call.num_heads + first_head + head;
        store_rounded<T>(call.out, to * HeadDim + column,
                         make_float4(acc.x / total, acc.y / total, acc.z / total, acc.w / total));
      } else {
        const std::int64_t to =
            (static_cast<std::int64_t>(w.token - first_token) * call.num_heads + first_head + head) *
                call.num_splits +
            w.split;
        *reinterpret_cast<float4*>(call.partial_out + to * HeadDim + column) = acc;
        if (column == 0) *reinterpret_cast<float2*>(call.partial_sums + to * 2) = make_float2(top, sum);
      }
    }
  }
}

// A block a token and head, a thread a column: log-sum-exp in the splits' order.
template <typename T>
__global__ void __launch_bounds__(256) fold_kernel(PagedAttentionArgs call, int first_token) {
  const int token = first_token + blockIdx.x, head = blockIdx.y, column = threadIdx.x, head_dim = blockDim.x;
  const Splits splits = splits_of(query_of(call, token).visible, call.window);
  wait_for_previous_kernel();  // even where there is nothing to do: whoever waits for this one waits for both
  if (splits.count == 1) return;
  const std::int64_t from =
      (static_cast<std::int64_t>(blockIdx.x) * call.num_heads + head) * call.num_splits + splits.first;
  const float* acc_from = call.partial_out + from * head_dim;
  const float2* sums_from = reinterpret_cast<const float2*>(call.partial_sums) + from;
  // Copied first, all at once: registers would not hold as many loads on their way.
  auto* part_acc = dynamic_shared<float>();  // [kFoldAtOnce, head_dim]
  auto* part_sums = reinterpret_cast<float2*>(part_acc + kFoldAtOnce * head_dim);
  float top = -INFINITY, sum = 0.0f, acc = 0.0f;
  for (int begin = 0; begin < splits.count; begin += kFoldAtOnce) {
    const int count = min(kFoldAtOnce, splits.count - begin);
    for (int i = 4 * column; i < count * head_dim; i += 4 * head_dim) {
      copy_async(part_acc + i, acc_from + static_cast<std::int64_t>(begin) * head_dim + i, true);
    }
    commit_copies();
    for (int i = column; i < count; i += head_dim) part_sums[i] = sums_from[begin + i];
    wait_copies<0>();
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float2 part = part_sums[i];
      const float highest = fmaxf(top, part.x);
      const float safe = highest == -INFINITY ? 0.0f : highest;
      const float decay = exp2_approximate(top - safe), weight = exp2_approximate(part.x - safe);
      sum = __fmaf_rn(part.y, weight, __fmul_rn(sum, decay));
      acc = __fmaf_rn(part_acc[i * head_dim + column], weight, __fmul_rn(acc, decay));
      top = highest;
    }
    __syncthreads();  // all have read these
  }
  const float result = acc / (sum == 0.0f ? 1.0f : sum);
  const std::int64_t to = (static_cast<std::int64_t>(token) * call.num_heads + head) * head_dim + column;
  reinterpret_cast<std::uint16_t*>(call.out)[to] =
      static_cast<std::uint16_t>(pack<T>(result, 0.0f) & 0xffffu);
}

}  // namespace cuda
}  // namespace elastic_decode
