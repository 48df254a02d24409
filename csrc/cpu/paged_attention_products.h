// The two products of attention and the packing of their operands, on Lanes. Included like
// paged_attention_lanes.h. ELASTIC_PAIRS is 1 where dot products of bfloat16 pairs exist.
//
// A product runs over "units": one float, or with pairs (bfloat16 q and cache) one 32-bit word of two
// bfloat16. Operands are packed so that a unit of sixteen keys (scores) or of sixteen output elements
// (values) is one Lanes, and a unit of a row is broadcast.

// acc + a * b a lane, or acc + a.low * b.low + a.high * b.high where the words are pairs.
template <bool kPairs>
ELASTIC_INLINE Lanes accumulate(Lanes acc, Lanes a, Lanes b) {
#if ELASTIC_PAIRS
  if constexpr (kPairs) return dot_pairs(acc, a, b);
#endif
  return mul_add(a, b, acc);
}

// Sixteen rows of one head in the cache, or copies of them, `stride` bytes apart.
struct Rows {
  const char* base;
  std::ptrdiff_t stride;
};

// Into the second-level cache: what is asked for is too much for the first one beside what is being worked
// on.
ELASTIC_INLINE void prefetch(const char* address) {
  __builtin_prefetch(address, 0, 2);
}

template <int kCount>
ELASTIC_INLINE void prefetch_rows(const char* row, std::ptrdiff_t stride, int row_bytes) {
  for (int i = 0; i < kCount; ++i) {
    for (int at = 0; at < row_bytes; at += 64) prefetch(row + i * stride + at);
  }
}

// f(std::integral_constant<int, n>) for 1 <= n <= kRowsAtOnce.
template <int kRows = kRowsAtOnce, class F>
ELASTIC_INLINE void with_rows(int rows, F f) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return with_rows<kRows - 1>(rows, f);
  }
  f(std::integral_constant<int, kRows>());
}

// scores[r, key] = scale * q[r] . k[key] for kRows rows and kBlocks blocks of sixteen keys; k is [kBlocks,
// units, 16]. A chain of rounding errors grows with its length: chains of kChain units are summed.
template <bool kPairs, int kRows, int kBlocks>
void score_rows(const float* q, int q_stride, const float* k, int units, float scale, float* scores) {
  constexpr int kChain = 64;
  for (int begin = 0; begin < units; begin += kChain) {
    const int end = begin + kChain < units ? begin + kChain : units;
    Lanes acc[kRows][kBlocks];
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocks; ++b) acc[r][b] = splat(0.0f);
    }
    for (int u = begin; u < end; ++u) {
      Lanes block[kBlocks];
      for (int b = 0; b < kBlocks; ++b) block[b] = load(k + (b * units + u) * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Lanes x = splat(q[r * q_stride + u]);
        for (int b = 0; b < kBlocks; ++b) acc[r][b] = accumulate<kPairs>(acc[r][b], x, block[b]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocks; ++b) {
        float* to = scores + r * kSplit + b * kLanes;
        if (begin > 0) acc[r][b] = add(load(to), acc[r][b]);
        store(to, end == units ? mul(acc[r][b], splat(scale)) : acc[r][b]);
      }
    }
  }
}

// Sixteen elements of a unit of values, straight from the cache: with pairs, of two rows.
template <class KV, bool kPairs>
ELASTIC_INLINE Lanes load_value(const char* row, std::ptrdiff_t stride, int element) {
  const KV* from = reinterpret_cast<const KV*>(row) + element;
  if constexpr (kPairs) {
#if ELASTIC_PAIRS
    const char* second = reinterpret_cast<const char*>(from) + stride;
    return join_pairs(reinterpret_cast<const std::uint16_t*>(from),
                      reinterpret_cast<const std::uint16_t*>(second));
#endif
  } else if constexpr (sizeof(KV) == 2) {
    return widen(reinterpret_cast<const std::uint16_t*>(from));
  } else {
    return load(from);
  }
}

// Units of values as packed by pack_values, [units, dim] …
struct PackedValues {
  const float* values;
  int dim;
  ELASTIC_INLINE void ahead(int, int, int) const {}
  ELASTIC_INLINE Lanes operator()(int unit, int element) const { return load(values + unit * dim + element); }
};

// … or where they lie in the cache: two blocks of sixteen rows, of which the second is given less sixteen
// rows, so that both take the row's number; and the two that come next.
template <class KV, bool kPairs>
struct CachedValues {
  const char *low, *high, *next_low, *next_high;
  std::ptrdiff_t low_stride, high_stride, next_stride;  // copies of rows lie closer than rows
  ELASTIC_INLINE Lanes operator()(int unit, int element) const {
    const int row = unit * (kPairs ? 2 : 1);
    const std::ptrdiff_t stride = row < kLanes ? low_stride : high_stride;
    return load_value<KV, kPairs>((row < kLanes ? low : high) + row * stride, stride, element);
  }
  // Asks for the same elements of the rows that come next.
  ELASTIC_INLINE void ahead(int unit, int element, int elements) const {
    const int row = unit * (kPairs ? 2 : 1), size = sizeof(KV);
    const char* next = row < kLanes ? next_low : next_high;
    if (next == nullptr) return;
    prefetch_rows<kPairs ? 2 : 1>(next + row * next_stride + element * size, next_stride, elements * size);
  }
};

// out[r, :] += sum over units [from, to) of weights[r, unit] * values(unit, element + :) for kRows rows and
// kBlocks blocks of sixteen elements.
template <bool kPairs, int kRows, int kBlocks, class Values>
void weigh_rows(const float* weights, Values values, int element, int from, int to, float* out,
                int out_stride) {
  Lanes acc[kRows][kBlocks];
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) acc[r][b] = load(out + r * out_stride + element + b * kLanes);
  }
  for (int u = from; u < to; ++u) {
    Lanes block[kBlocks];
    for (int b = 0; b < kBlocks; ++b) block[b] = values(u, element + b * kLanes);
    values.ahead(u, element, kBlocks * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Lanes x = splat(weights[r * kSplit + u]);
      for (int b = 0; b < kBlocks; ++b) acc[r][b] = accumulate<kPairs>(acc[r][b], x, block[b]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) store(out + r * out_stride + element + b * kLanes, acc[r][b]);
  }
}

// The same for all `dim` elements.
template <bool kPairs, int kRows, class Values>
ELASTIC_INLINE void weigh(const float* weights, Values values, int dim, int from, int to, float* out,
                          int out_stride) {
  int e = 0;
  for (; e + kBlocksAtOnce * kLanes <= dim; e += kBlocksAtOnce * kLanes) {
    weigh_rows<kPairs, kRows, kBlocksAtOnce>(weights, values, e, from, to, out, out_stride);
  }
  if constexpr (kBlocksAtOnce > 1) {
    for (; e < dim; e += kLanes) weigh_rows<kPairs, kRows, 1>(weights, values, e, from, to, out, out_stride);
  }
}

// Sixteen keys to [units, 16], and a request for the rows that come next.
template <class KV, bool kPairs>
void pack_keys(Rows keys, Rows next, int head_dim, float* out) {
  constexpr int kWord = sizeof(KV) == 2 ? 2 : 1;  // elements in a 32-bit word
  const int words = (head_dim + kWord - 1) / kWord;
  for (int w = 0; w < words; w += 4) {
    Rows from = {keys.base + w * 4, keys.stride};
    if (w % 16 == 0 && next.base != nullptr) {
      for (int i = 0; i < kLanes; ++i) prefetch(next.base + i * next.stride + w * 4);
    }
    char tail[kLanes][16];
    const std::size_t bytes = (head_dim - w * kWord) * sizeof(KV);
    if (bytes < 16) {
      std::memset(tail, 0, sizeof tail);
      for (int i = 0; i < kLanes; ++i) std::memcpy(tail[i], from.base + i * from.stride, bytes);
      from = {tail[0], 16};
    }
    alignas(64) float quarter[4 * kLanes];
    const int count = words - w < 4 ? words - w : 4;
    if (kWord == 1 || kPairs) {
      if (count == 4) {
        transpose_quarter(from.base, from.stride, out + w * kLanes);
      } else {
        transpose_quarter(from.base, from.stride, quarter);
        std::memcpy(out + w * kLanes, quarter, count * kLanes * sizeof(float));
      }
    } else {
      transpose_quarter(from.base, from.stride, quarter);
      for (int i = 0; i < count; ++i) {
        Lanes low, high;
        split_pairs(load(quarter + i * kLanes), &low, &high);
        const int element = 2 * (w + i);
        store(out + element * kLanes, low);
        if (element + 1 < head_dim) store(out + (element + 1) * kLanes, high);
      }
    }
  }
}

// Sixteen rows of values to [units, dim], zeros past head_dim, and a request for the rows that come next.
template <class KV, bool kPairs>
void pack_values(Rows rows, Rows next, int head_dim, int dim, float* out) {
  constexpr int kUnitKeys = kPairs ? 2 : 1;
  for (int j = 0; j < kLanes; j += kUnitKeys, out += dim) {
    const char* row = rows.base + j * rows.stride;
    if (next.base != nullptr) {
      prefetch_rows<kUnitKeys>(next.base + j * next.stride, next.stride,
                               head_dim * static_cast<int>(sizeof(KV)));
    }
    int e = 0;
    for (; e + kLanes <= head_dim; e += kLanes) store(out + e, load_value<KV, kPairs>(row, rows.stride, e));
    if (e == dim) continue;
    KV tail[2][kLanes] = {};
    for (int i = 0; i < kUnitKeys; ++i) {
      std::memcpy(tail[i], row + i * rows.stride + e * sizeof(KV), (head_dim - e) * sizeof(KV));
    }
    store(out + e, load_value<KV, kPairs>(reinterpret_cast<const char*>(tail[0]), sizeof tail[0], 0));
  }
}
