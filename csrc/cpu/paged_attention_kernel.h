// The attention kernel, written on Lanes. Included inside a namespace and a target region, once for each
// instruction set, after paged_attention_lanes.h; hence no include guard. ELASTIC_PAIRS is 1 where bfloat16
// dot products of pairs exist.
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

// out[r, :] += sum over units of weights[r, u] * v[u, :] for kRows rows and kBlocks blocks of sixteen
// elements; v is [units, v_stride].
template <bool kPairs, int kRows, int kBlocks>
void weigh_rows(const float* weights, const float* v, int v_stride, int units, float* out, int out_stride) {
  Lanes acc[kRows][kBlocks];
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) acc[r][b] = load(out + r * out_stride + b * kLanes);
  }
  for (int u = 0; u < units; ++u) {
    Lanes block[kBlocks];
    for (int b = 0; b < kBlocks; ++b) block[b] = load(v + u * v_stride + b * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Lanes x = splat(weights[r * kSplit + u]);
      for (int b = 0; b < kBlocks; ++b) acc[r][b] = accumulate<kPairs>(acc[r][b], x, block[b]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) store(out + r * out_stride + b * kLanes, acc[r][b]);
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

// Where the rows of a tile lie, and its scratch.
struct Work {
  int rows, units, dim;            // rows of the products; units of a query; padded head_dim
  float* q;                        // [rows, units]
  float* scores;                   // [rows, kSplit]; the weights of a row take its scores' place
  float* keys;                     // [kKeyBlock / 16, units, 16]
  float* values;                   // [kKeyBlock or half as many pairs, dim]
  float* partial;                  // [rows, partial_stride]
  float* state;                    // [rows, partial_stride]
  float* zeros;                    // head_dim elements, for keys that are not there
  int first[kSplit], end[kSplit];  // keys of the split that a query of the tile sees, relative to its start
};

template <class KV, bool kPairs>
struct Attention {
  static constexpr int kUnitKeys = kPairs ? 2 : 1;       // keys in a unit of the values' product
  static constexpr int kWord = sizeof(KV) == 2 ? 2 : 1;  // elements in a 32-bit word

  static int query_units(const Call& call) { return kPairs ? (call.head_dim + 1) / 2 : call.head_dim; }

  static Work prepare(const Call& call, const Tile& tile, Scratch& scratch) {
    Work w;
    w.rows = tile.num_queries * call.group();
    w.units = query_units(call);
    w.dim = padded_dim(call);
    const std::size_t stride = partial_stride(call), rows = w.rows;
    const std::size_t q = round_up(rows * w.units), scores = rows * kSplit;
    const std::size_t keys = static_cast<std::size_t>(kKeyBlock) * round_up(w.units),
                      values = kKeyBlock * w.dim;
    const std::size_t sums = round_up(rows * stride);
    float* p = scratch.take(q + scores + keys + values + 2 * sums + w.dim);
    w.q = p, p += q;
    w.scores = p, p += scores;
    w.keys = p, p += keys;
    w.values = p, p += values;
    w.partial = p, p += sums;
    w.state = p, p += sums;
    w.zeros = p;
    std::memset(w.zeros, 0, w.dim * sizeof(float));
    load_queries(call, tile, w);
    return w;
  }

  static std::size_t round_up(std::size_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

  static void load_queries(const Call& call, const Tile& tile, Work& w) {
    const int group = call.group(), dim = call.head_dim;
    for (int i = 0; i < tile.num_queries; ++i) {
      const std::int64_t head =
          (tile.first_token + i) * call.num_heads + static_cast<std::int64_t>(tile.kv_head) * group;
      float* to = w.q + static_cast<std::int64_t>(i) * group * w.units;
      if (call.q_dtype == DType::Float32) {
        std::memcpy(to, static_cast<const float*>(call.q) + head * dim, sizeof(float) * group * dim);
        continue;
      }
      const std::uint16_t* from = static_cast<const std::uint16_t*>(call.q) + head * dim;
      if (!kPairs) {
        for (int e = 0; e < group * dim; ++e) to[e] = to_float(BFloat16{from[e]});
      } else {
        for (int g = 0; g < group; ++g) {
          if (dim % 2) to[g * w.units + w.units - 1] = 0.0f;
          std::memcpy(to + g * w.units, from + g * dim, sizeof(std::uint16_t) * dim);
        }
      }
    }
  }

  // Addresses of the rows of keys [begin, end) of the split at `base`; those outside [first, last) are zeros.
  static void find_rows(const Call& call, const Tile& tile, const void* cache, const float* zeros, int base,
                        int begin, int end, int first, int last, const char** rows) {
    const std::int32_t* pages = call.page_table + static_cast<std::int64_t>(tile.row) * call.max_pages;
    const int from = begin > first ? begin : first, to = end < last ? end : last;
    const std::int64_t row_bytes = static_cast<std::int64_t>(call.num_kv_heads) * call.head_dim * sizeof(KV);
    const char* head = static_cast<const char*>(cache) +
                       static_cast<std::int64_t>(tile.kv_head) * call.head_dim * sizeof(KV);
    int page = (base + from) / call.page_size, offset = (base + from) % call.page_size;
    for (int j = begin; j < from && j < end; ++j) rows[j - begin] = reinterpret_cast<const char*>(zeros);
    for (int j = from; j < to; ++page, offset = 0) {
      const char* row = head + (static_cast<std::int64_t>(pages[page]) * call.page_size + offset) * row_bytes;
      for (; offset < call.page_size && j < to; ++offset, ++j, row += row_bytes) rows[j - begin] = row;
    }
    for (int j = to > begin ? to : begin; j < end; ++j)
      rows[j - begin] = reinterpret_cast<const char*>(zeros);
  }

  // Sixteen keys to [units, 16].
  static void pack_keys(const char* const* rows, int head_dim, float* out) {
    const int words = (head_dim + kWord - 1) / kWord;
    const char* tails[kLanes];
    char tail[kLanes][16];
    for (int w = 0; w < words; w += 4) {
      const char* const* from = rows;
      std::size_t offset = w * sizeof(float);
      const int count = words - w < 4 ? words - w : 4;
      const std::size_t bytes = (head_dim - w * kWord) * sizeof(KV);
      if (bytes < 16) {
        for (int i = 0; i < kLanes; ++i) {
          std::memset(tail[i], 0, 16);
          std::memcpy(tail[i], rows[i] + offset, bytes);
          tails[i] = tail[i];
        }
        from = tails;
        offset = 0;
      }
      alignas(64) float quarter[4 * kLanes];
      if (kWord == 1 || kPairs) {
        if (count == 4) {
          transpose_quarter(from, offset, out + w * kLanes);
        } else {
          transpose_quarter(from, offset, quarter);
          std::memcpy(out + w * kLanes, quarter, count * kLanes * sizeof(float));
        }
      } else {
        transpose_quarter(from, offset, quarter);
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

  static ELASTIC_INLINE Lanes pack_value(const char* const* rows, int element) {
    if constexpr (kPairs) {
#if ELASTIC_PAIRS
      return join_pairs(reinterpret_cast<const std::uint16_t*>(rows[0]) + element,
                        reinterpret_cast<const std::uint16_t*>(rows[1]) + element);
#endif
    } else if constexpr (sizeof(KV) == 2) {
      return widen(reinterpret_cast<const std::uint16_t*>(rows[0]) + element);
    } else {
      return load(reinterpret_cast<const float*>(rows[0]) + element);
    }
  }

  // One unit of values to [dim], zeros past head_dim.
  static void pack_values(const char* const* rows, int head_dim, int dim, float* out) {
    int e = 0;
    for (; e + kLanes <= head_dim; e += kLanes) store(out + e, pack_value(rows, e));
    if (e == dim) return;
    KV tail[2][kLanes] = {};
    for (int i = 0; i < kUnitKeys; ++i)
      std::memcpy(tail[i], rows[i] + e * sizeof(KV), (head_dim - e) * sizeof(KV));
    const char* tails[2] = {reinterpret_cast<const char*>(tail[0]), reinterpret_cast<const char*>(tail[1])};
    store(out + e, pack_value(tails, 0));
  }

  // Weights of one row from its scores: maximum, exponentials, their sum. The keys it sees are [first, end).
  static void softmax(float* scores, int first, int end, float* maximum, float* sum) {
    Lanes highest = splat(-INFINITY);
    const int begin = first / kLanes * kLanes;
    for (int j = begin; j < end; j += kLanes) {
      Lanes x = load(scores + j);
      if (j < first || j + kLanes > end) {
        x = keep_range(x, first - j, end - j, -INFINITY);
        store(scores + j, x);
      }
      highest = max(highest, x);
    }
    *maximum = max_lanes(highest);
    const Lanes top = splat(*maximum);
    Lanes total = splat(0.0f);
    for (int j = begin; j < end; j += kLanes) {
      const Lanes p = exp_nonpositive(sub(load(scores + j), top));
      total = add(total, p);
#if ELASTIC_PAIRS
      if constexpr (kPairs) {
        store_bfloat16(reinterpret_cast<std::uint16_t*>(scores) + j,
                       p);  // behind the scores still to be read
        continue;
      }
#endif
      store(scores + j, p);
    }
    *sum = sum_lanes(total);
  }

  static void attend_split(const Call& call, const Tile& tile, int split, Work& w, float* partials) {
    const int group = call.group(), base = split * kSplit, stride = partial_stride(call);
    const int last = tile.num_queries - 1;
    for (int i = 0; i <= last; ++i) {
      const int position = tile.first_position + i - base;
      const int first = call.window > 0 ? position - call.window + 1 : 0;
      w.first[i] = first > 0 ? first : 0;
      w.end[i] = position + 1 < kSplit ? position + 1 : kSplit;
      if (w.end[i] <= w.first[i]) w.first[i] = w.end[i] = position < 0 ? 0 : kSplit;
    }
    const int first = w.first[0], end = w.end[last];  // both rise from query to query
    // Queries with a key in [begin, begin + keys): a run, since both bounds rise.
    const auto queries = [&](int begin, int keys, int* from, int* to) {
      for (*from = 0; *from <= last && w.end[*from] <= begin;) ++*from;
      for (*to = last + 1; *to > *from && w.first[*to - 1] >= begin + keys;) --*to;
    };
    const char* rows[kKeyBlock];

    for (int begin = first / kKeyBlock * kKeyBlock; begin < end; begin += kKeyBlock) {
      int from, to;
      queries(begin, kKeyBlock, &from, &to);
      if (from >= to) continue;
      find_rows(call, tile, call.k_cache, w.zeros, base, begin, begin + kKeyBlock, first, end, rows);
      const int blocks = begin + kLanes < end ? 2 : 1;
      for (int b = 0; b < blocks; ++b)
        pack_keys(rows + b * kLanes, call.head_dim, w.keys + b * w.units * kLanes);
      for (int r = from * group; r < to * group; r += kRowsAtOnce) {
        const int count = to * group - r < kRowsAtOnce ? to * group - r : kRowsAtOnce;
        with_rows(count, [&](auto n) {
          const float* q = w.q + r * w.units;
          float* scores = w.scores + r * kSplit + begin;
          if (kBlocksAtOnce == 2 && blocks == 2) {
            score_rows<kPairs, n(), kBlocksAtOnce>(q, w.units, w.keys, w.units, call.scale, scores);
          } else {
            for (int b = 0; b < blocks; ++b) {
              score_rows<kPairs, n(), 1>(q, w.units, w.keys + b * w.units * kLanes, w.units, call.scale,
                                         scores + b * kLanes);
            }
          }
        });
      }
    }

    for (int r = 0; r < w.rows; ++r) {
      float* partial = partials + r * stride;
      std::memset(partial, 0, w.dim * sizeof(float));
      const int i = r / group;
      partial[w.dim] = -INFINITY;
      partial[w.dim + 1] = 0.0f;
      if (w.first[i] < w.end[i]) {
        softmax(w.scores + r * kSplit, w.first[i], w.end[i], partial + w.dim, partial + w.dim + 1);
      }
    }

    for (int begin = first / kKeyBlock * kKeyBlock; begin < end; begin += kKeyBlock) {
      int from, to;
      queries(begin, kKeyBlock, &from, &to);
      if (from >= to) continue;
      find_rows(call, tile, call.v_cache, w.zeros, base, begin, begin + kKeyBlock, first, end, rows);
      for (int j = 0; j < kKeyBlock && begin + j < end; j += kUnitKeys) {
        if (begin + j + kUnitKeys > first)
          pack_values(rows + j, call.head_dim, w.dim, w.values + j / kUnitKeys * w.dim);
      }
      for (int r = from * group; r < to * group; r += kRowsAtOnce) {
        const int count = to * group - r < kRowsAtOnce ? to * group - r : kRowsAtOnce;
        weigh_block(w, r, count, group, begin, first, end, partials, stride);
      }
    }
  }

  // Adds the keys of the packed block to `count` rows: those that all rows see together, what is before and
  // after a row at a time.
  static void weigh_block(const Work& w, int row, int count, int group, int begin, int tile_first,
                          int tile_end, float* partials, int stride) {
    constexpr int kUnits = kKeyBlock / kUnitKeys;
    int from[kRowsAtOnce], to[kRowsAtOnce], common_from = 0, common_to = kUnits;
    bool low_half[kRowsAtOnce], high_half[kRowsAtOnce];
    for (int r = 0; r < count; ++r) {
      const int i = (row + r) / group;
      const int first = w.first[i] - begin, end = w.end[i] - begin;
      // A pair of which a row sees one key is whole for that row where the other key was packed as zeros.
      high_half[r] = kPairs && first > 0 && first < kKeyBlock && first % 2 && w.first[i] != tile_first;
      low_half[r] = kPairs && end > 0 && end < kKeyBlock && end % 2 && w.end[i] != tile_end;
      from[r] = first <= 0 ? 0 : (high_half[r] ? (first + 1) / kUnitKeys : first / kUnitKeys);
      to[r] = end >= kKeyBlock ? kUnits : (low_half[r] ? end / kUnitKeys : (end + kUnitKeys - 1) / kUnitKeys);
      if (to[r] < 0) to[r] = 0;
      common_from = from[r] > common_from ? from[r] : common_from;
      common_to = to[r] < common_to ? to[r] : common_to;
    }
    if (common_to < common_from) common_to = common_from;
    for (int r = 0; r < count; ++r) {
      if (high_half[r]) weigh_half(w, row + r, begin, from[r] - 1, 0xffff0000u, partials, stride);
      const int end = to[r] < common_from ? to[r] : common_from;
      if (from[r] < end) weigh<1>(w, row + r, begin, from[r], end, partials, stride);
    }
    if (common_from < common_to) {
      with_rows(count, [&](auto n) { weigh<n()>(w, row, begin, common_from, common_to, partials, stride); });
    }
    for (int r = 0; r < count; ++r) {
      const int start = from[r] > common_to ? from[r] : common_to;
      if (start < to[r]) weigh<1>(w, row + r, begin, start, to[r], partials, stride);
      if (low_half[r]) weigh_half(w, row + r, begin, to[r], 0x0000ffffu, partials, stride);
    }
  }

  template <int kRows>
  static void weigh(const Work& w, int row, int begin, int from, int to, float* partials, int stride) {
    // The weights of the block's first unit: with pairs, two weights share the place of one score.
    const float* weights = w.scores + row * kSplit + begin / kUnitKeys + from;
    const float* values = w.values + from * w.dim;
    float* out = partials + row * stride;
    int e = 0;
    for (; e + kBlocksAtOnce * kLanes <= w.dim; e += kBlocksAtOnce * kLanes) {
      weigh_rows<kPairs, kRows, kBlocksAtOnce>(weights, values + e, w.dim, to - from, out + e, stride);
    }
    for (; e < w.dim; e += kLanes) {
      weigh_rows<kPairs, kRows, 1>(weights, values + e, w.dim, to - from, out + e, stride);
    }
  }

  // One unit of one row with half of each pair taken as zero: the row may not see that key, not even times a
  // weight of 0.
  static void weigh_half(const Work& w, int row, int begin, int unit, std::uint32_t mask, float* partials,
                         int stride) {
    float half[kLanes];
    for (int e = 0; e < w.dim; e += kLanes) {
      for (int i = 0; i < kLanes; ++i)
        half[i] = bits_to_float(float_to_bits(w.values[unit * w.dim + e + i]) & mask);
      weigh_rows<kPairs, 1, 1>(w.scores + row * kSplit + begin / kUnitKeys + unit, half, kLanes, 1,
                               partials + row * stride + e, stride);
    }
  }

  // state += partial, as log-sum-exp; state starts as (0, -inf, 0).
  static void fold_row(float* state, const float* partial, int dim) {
    if (partial[dim + 1] == 0.0f) return;
    const Lanes old_max = splat(state[dim]), new_max = splat(partial[dim]);
    const Lanes top = max(old_max, new_max);
    const Lanes a = exp_nonpositive(sub(old_max, top)), b = exp_nonpositive(sub(new_max, top));
    for (int e = 0; e < dim; e += kLanes) {
      store(state + e, mul_add(load(partial + e), b, mul(load(state + e), a)));
    }
    const Lanes sum = mul_add(splat(partial[dim + 1]), b, mul(splat(state[dim + 1]), a));
    float lanes[kLanes];
    store(lanes, sum);
    state[dim + 1] = lanes[0];
    store(lanes, top);
    state[dim] = lanes[0];
  }

  static void clear_state(const Call& call, Work& w) {
    const int stride = partial_stride(call);
    for (int r = 0; r < w.rows; ++r) {
      std::memset(w.state + r * stride, 0, stride * sizeof(float));
      w.state[r * stride + w.dim] = -INFINITY;
    }
  }

  static void write(const Call& call, const Tile& tile, const Work& w) {
    const int group = call.group(), dim = call.head_dim, stride = partial_stride(call);
    for (int r = 0; r < w.rows; ++r) {
      const float* state = w.state + r * stride;
      const std::int64_t head = (tile.first_token + r / group) * call.num_heads +
                                static_cast<std::int64_t>(tile.kv_head) * group + r % group;
      const float factor = state[w.dim + 1] == 0.0f ? 0.0f : 1.0f / state[w.dim + 1];
      if (call.q_dtype == DType::Float32) {
        float* out = static_cast<float*>(call.out) + head * dim;
        for (int e = 0; e < dim; ++e) out[e] = state[e] * factor;
      } else {
        BFloat16* out = static_cast<BFloat16*>(call.out) + head * dim;
        for (int e = 0; e < dim; ++e) out[e] = from_float<BFloat16>(state[e] * factor);
      }
    }
  }

  static void split(const Call& call, const Tile& tile, int index, Scratch& scratch, float* partials) {
    Work w = prepare(call, tile, scratch);
    attend_split(call, tile, index, w, partials);
  }

  static void all(const Call& call, const Tile& tile, Scratch& scratch) {
    Work w = prepare(call, tile, scratch);
    clear_state(call, w);
    const int stride = partial_stride(call);
    for (int index = tile.first_split; index < tile.end_split; ++index) {
      attend_split(call, tile, index, w, w.partial);
      for (int r = 0; r < w.rows; ++r) fold_row(w.state + r * stride, w.partial + r * stride, w.dim);
    }
    write(call, tile, w);
  }

  static void fold(const Call& call, const Tile& tile, Scratch& scratch, const float* partials) {
    Work w = prepare(call, tile, scratch);
    clear_state(call, w);
    const int stride = partial_stride(call);
    for (int index = tile.first_split; index < tile.end_split; ++index, partials += w.rows * stride) {
      for (int r = 0; r < w.rows; ++r) fold_row(w.state + r * stride, partials + r * stride, w.dim);
    }
    write(call, tile, w);
  }
};

// Calls f with the Attention of the call's types.
template <class F>
void with_attention(const Call& call, F f) {
  if (call.kv_dtype == DType::Float32) return f(Attention<float, false>());
#if ELASTIC_PAIRS
  if (call.q_dtype == DType::BFloat16) return f(Attention<BFloat16, true>());
#endif
  f(Attention<BFloat16, false>());
}

void attend_split(const Call& call, const Tile& tile, int split, Scratch& scratch, float* partials) {
  with_attention(call, [&](auto attention) { attention.split(call, tile, split, scratch, partials); });
}
void attend(const Call& call, const Tile& tile, Scratch& scratch) {
  with_attention(call, [&](auto attention) { attention.all(call, tile, scratch); });
}
void fold(const Call& call, const Tile& tile, Scratch& scratch, const float* partials) {
  with_attention(call, [&](auto attention) { attention.fold(call, tile, scratch, partials); });
}
