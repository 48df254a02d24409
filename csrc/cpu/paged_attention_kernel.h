// The attention kernel, written on Lanes and the products. Included like they are, after them.

// Where the rows of a tile lie, and its scratch.
struct Work {
  int rows, units, dim;      // rows of the products; units of a query; padded head_dim
  std::ptrdiff_t row_bytes;  // of a head of a token
  float* q;                  // [rows, units]
  float* scores;             // [rows, kSplit]; the weights of a row take its scores' place
  float* keys;               // [kKeyBlock / 16, units, 16]
  float* values;             // [kKeyBlock or half as many pairs, dim]
  float* partial;            // [rows, partial_stride]
  float* state;              // [rows, partial_stride]
  char* copies;  // two blocks of sixteen rows, where those of the cache cannot be used as they lie
  int first[kSplit], end[kSplit];  // keys of the split that a query of the tile sees, relative to its start
};

template <class KV, bool kPairs>
struct Attention {
  static constexpr int kUnitKeys = kPairs ? 2 : 1;  // keys in a unit of the values' product

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
    float* p = scratch.take(q + scores + keys + values + 2 * sums + kKeyBlock * w.dim);
    w.q = p, p += q;
    w.scores = p, p += scores;
    w.keys = p, p += keys;
    w.values = p, p += values;
    w.partial = p, p += sums;
    w.state = p, p += sums;
    w.copies = reinterpret_cast<char*>(p);
    w.row_bytes = static_cast<std::ptrdiff_t>(call.head_dim) * sizeof(KV);
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

  // The row of a token of the tile's sequence.
  static const char* find_row(const Call& call, const Tile& tile, const void* cache, int position) {
    const std::int64_t page =
        call.page_table[static_cast<std::int64_t>(tile.row) * call.table_stride + position / call.page_size];
    const std::int64_t token = page * call.page_size + position % call.page_size;
    const std::int64_t head = token * call.num_kv_heads + tile.kv_head;
    return static_cast<const char*>(cache) + head * call.head_dim * static_cast<std::int64_t>(sizeof(KV));
  }

  // Sixteen rows from position `begin`, a multiple of sixteen, where they lie; nothing where they lie in
  // several pages.
  static Rows rows_in_place(const Call& call, const Tile& tile, const void* cache, int begin) {
    if (call.page_size % kLanes != 0) return {nullptr, 0};
    return {find_row(call, tile, cache, begin),
            static_cast<std::ptrdiff_t>(call.num_kv_heads) * call.head_dim * static_cast<int>(sizeof(KV))};
  }

  // The same for use: copied where need be. Rows outside [first, end) are zeros, or whatever their page holds
  // if `loose`.
  static Rows find_rows(const Call& call, const Tile& tile, const Work& w, const void* cache, int begin,
                        int first, int end, bool loose, char* copy) {
    if (loose || (begin >= first && begin + kLanes <= end)) {
      const Rows rows = rows_in_place(call, tile, cache, begin);
      if (rows.base != nullptr) return rows;
    }
    for (int j = begin; j < begin + kLanes; ++j, copy += w.row_bytes) {
      if (j >= first && j < end) {
        std::memcpy(copy, find_row(call, tile, cache, j), w.row_bytes);
      } else {
        std::memset(copy, 0, w.row_bytes);
      }
    }
    return {copy - kLanes * w.row_bytes, w.row_bytes};
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
        // Half as wide, so always behind the scores still to be read.
        store_bfloat16(reinterpret_cast<std::uint16_t*>(scores) + j, p);
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
    const int newest = tile.first_position + last - base;
    // Queries with a key in [begin, begin + keys): a run, since both bounds rise.
    const auto queries = [&](int begin, int keys, int* from, int* to) {
      for (*from = 0; *from <= last && w.end[*from] <= begin;) ++*from;
      for (*to = last + 1; *to > *from && w.first[*to - 1] >= begin + keys;) --*to;
    };
    const bool in_place = tile.num_queries == 1 && w.rows <= kRowsAtOnce && w.dim == call.head_dim;
    const int block0 = first / kKeyBlock * kKeyBlock;
    // What to ask the memory for while the sixteen keys at `begin` are worked on: rows lie too far apart for
    // the processor to guess. After the last keys come the values, after those the next split's keys.
    const auto upcoming = [&](const void* cache, int begin) -> Rows {
      const bool keys = cache == call.k_cache;
      int next = begin + kKeyBlock;
      if (next >= end) {
        next = keys ? block0 + begin % kKeyBlock : kSplit + begin % kKeyBlock;
        cache = keys ? call.v_cache : call.k_cache;
        if (next > (keys ? end - 1 : newest)) return {nullptr, 0};
      }
      return rows_in_place(call, tile, cache, base + next);
    };

    for (int begin = block0; begin < end; begin += kKeyBlock) {
      int from, to;
      queries(begin, kKeyBlock, &from, &to);
      if (from >= to) continue;
      const int blocks = begin + kLanes < end ? 2 : 1;
      for (int b = 0; b < blocks; ++b) {
        const int start = begin + b * kLanes;
        const Rows keys =
            find_rows(call, tile, w, call.k_cache, base + start, base + first, base + end, true, w.copies);
        pack_keys<KV, kPairs>(keys, upcoming(call.k_cache, start), call.head_dim,
                              w.keys + b * w.units * kLanes);
      }
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

    for (int begin = block0; begin < end; begin += kKeyBlock) {
      int from, to;
      queries(begin, kKeyBlock, &from, &to);
      if (from >= to) continue;
      Rows rows[2], next[2];
      const int blocks = begin + kLanes < end ? 2 : 1;
      for (int b = 0; b < blocks; ++b) {
        const int start = begin + b * kLanes;
        rows[b] = find_rows(call, tile, w, call.v_cache, base + start, base + first, base + end, false,
                            w.copies + b * kLanes * w.row_bytes);
        next[b] = upcoming(call.v_cache, start);
      }
      if (in_place) {
        weigh_in_place(w, rows, next, blocks, begin, first, end, partials, stride);
        continue;
      }
      for (int b = 0; b < blocks; ++b) {
        pack_values<KV, kPairs>(rows[b], next[b], call.head_dim, w.dim,
                                w.values + b * (kLanes / kUnitKeys) * w.dim);
      }
      for (int r = from * group; r < to * group; r += kRowsAtOnce) {
        const int count = to * group - r < kRowsAtOnce ? to * group - r : kRowsAtOnce;
        const bool whole = w.end[r / group] >= begin + kKeyBlock && w.first[(r + count - 1) / group] <= begin;
        if (whole) {  // every row sees all of it
          with_rows(count, [&](auto n) {
            weigh_packed<n()>(w, r, begin, 0, kKeyBlock / kUnitKeys, partials, stride);
          });
        } else {
          weigh_block(w, r, count, group, begin, first, end, partials, stride);
        }
      }
    }
  }

  // Adds a block of keys to the rows of one query, which are few: its values are used once, so they are not
  // packed.
  static void weigh_in_place(const Work& w, const Rows* rows, const Rows* next, int blocks, int begin,
                             int first, int end, float* partials, int stride) {
    const int last = blocks - 1;
    CachedValues<KV, kPairs> values;
    values.low = rows[0].base, values.low_stride = rows[0].stride;
    values.high = rows[last].base - last * kLanes * rows[last].stride, values.high_stride = rows[last].stride;
    values.next_stride = next[0].stride;
    values.next_low = next[0].base;
    values.next_high =
        next[last].base == nullptr ? nullptr : next[last].base - last * kLanes * next[0].stride;
    const int from = first > begin ? (first - begin) / kUnitKeys : 0;
    const int to =
        end < begin + kKeyBlock ? (end - begin + kUnitKeys - 1) / kUnitKeys : kKeyBlock / kUnitKeys;
    with_rows(w.rows, [&](auto n) {
      weigh<kPairs, n()>(w.scores + begin / kUnitKeys, values, w.dim, from, to, partials, stride);
    });
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
      if (from[r] < end) weigh_packed<1>(w, row + r, begin, from[r], end, partials, stride);
    }
    if (common_from < common_to) {
      with_rows(count,
                [&](auto n) { weigh_packed<n()>(w, row, begin, common_from, common_to, partials, stride); });
    }
    for (int r = 0; r < count; ++r) {
      const int start = from[r] > common_to ? from[r] : common_to;
      if (start < to[r]) weigh_packed<1>(w, row + r, begin, start, to[r], partials, stride);
      if (low_half[r]) weigh_half(w, row + r, begin, to[r], 0x0000ffffu, partials, stride);
    }
  }

  template <int kRows>
  static void weigh_packed(const Work& w, int row, int begin, int from, int to, float* partials, int stride) {
    // The weights of the block's first unit: with pairs, two weights share the place of one score.
    const float* weights = w.scores + row * kSplit + begin / kUnitKeys;
    weigh<kPairs, kRows>(weights, PackedValues{w.values, w.dim}, w.dim, from, to, partials + row * stride,
                         stride);
  }

  // One unit of one row with half of each pair taken as zero: the row may not see that key, not even times a
  // weight of 0.
  static void weigh_half(const Work& w, int row, int begin, int unit, std::uint32_t mask, float* partials,
                         int stride) {
    alignas(64) float half[kLanes];
    for (int e = 0; e < w.dim; e += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        half[i] = bits_to_float(float_to_bits(w.values[unit * w.dim + e + i]) & mask);
      }
      weigh<kPairs, 1>(w.scores + row * kSplit + begin / kUnitKeys + unit, PackedValues{half, kLanes}, kLanes,
                       0, 1, partials + row * stride + e, stride);
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
