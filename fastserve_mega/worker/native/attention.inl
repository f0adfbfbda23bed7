// Attention over the blocks where they are; included once per instruction set.
//
// A block of a layer holds the keys of each key-value head and then the values of each, as many
// bytes as plain rows of tokens would take. Keys are [units of head_dim][tokens], values [units of
// tokens][head_dim], so that vectors run over the tokens and over the dimensions. Every sum has its order from the row
// alone: over the units of a head, over the lanes of the sequence's tokens, over its tokens.

// Where a layer's part of the blocks is.
struct LayerBlocks {
  char* first;
  size_t block_bytes, head_bytes;
  int kv_heads;

  Unit* keys(int block, int kv_head) const { return at(block, kv_head); }
  Unit* values(int block, int kv_head) const { return at(block, kv_heads + kv_head); }

 private:
  Unit* at(int block, int head) const {
    return reinterpret_cast<Unit*>(first + block * block_bytes + head * head_bytes);
  }
};

template <class T>
static LayerBlocks blocks_of_layer(const Stage& stage, int layer) {
  const StageConfig& c = stage.config;
  const size_t head_bytes = sizeof(T) * c.block_size * c.head_dim;
  const size_t layer_bytes = 2 * head_bytes * c.kv_heads;
  return LayerBlocks{static_cast<char*>(c.pool) + layer * layer_bytes, layer_bytes * c.layers,
                     head_bytes, c.kv_heads};
}

// A row of an item: it may see tokens [from, to) of the sequence.
template <class T>
struct Query {
  const Unit* row;  // [units of head_dim]
  T* out;
  int from, to;
  float factor;  // of its weights
};

static void fetch(const Unit* from, size_t bytes) {
  const char* at = reinterpret_cast<const char*>(from);
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line);
}

// Scores of the blocks [first, end) of a table, unscaled: scores[r][tokens from `first` on].
template <class T, int ROWS>
static void score_rows(const Stage& stage, const LayerBlocks& blocks, int kv_head,
                       const int32_t* table, int first, int end, const Query<T>* queries,
                       float* scores) {
  // Few rows are too few sums at a time to keep the processor busy.
  constexpr int AT_ONCE = ROWS > 6 ? 1 : 2;
  const int size = stage.config.block_size, units = stage.config.head_dim / per_unit<T>();
  const int in_block = (size + LANES - 1) / LANES, total = (end - first) * in_block;
  for (int vector = 0; vector < total; vector += AT_ONCE) {
    const Unit* keys[AT_ONCE];
    int tokens[AT_ONCE];
    for (int i = 0; i < AT_ONCE; i++) {
      const int at = vector + i < total ? vector + i : vector;
      const int block = at / in_block, token = at % in_block * LANES;
      keys[i] = blocks.keys(table[first + block], kv_head) + token;
      tokens[i] = block * size + token;
      if (token == 0) {
        const bool more = first + block + AT_ONCE < end;
        fetch(more ? blocks.keys(table[first + block + AT_ONCE], kv_head)
                   : blocks.values(table[first], kv_head),
              blocks.head_bytes);
      }
    }
    Vec sums[ROWS][AT_ONCE];
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < AT_ONCE; i++) sums[r][i] = Vec{};
    for (int u = 0; u < units; u++) {
      // At the end of a block this reads on into the next ones; `soften_row` drops that.
      Bits key[AT_ONCE];
      for (int i = 0; i < AT_ONCE; i++) key[i] = load_units(keys[i] + u * size);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        const Bits query = broadcast(queries[r].row[u]);
        for (int i = 0; i < AT_ONCE; i++) sums[r][i] = dot<T>(sums[r][i], key[i], query);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < AT_ONCE; i++)
        store(scores + r * stage.score_width + tokens[i], sums[r][i]);
  }
}

// e^(score - largest) in place, as T; returns the sum. What a row may not see weighs 0.
template <class T>
static float soften_row(const StageConfig& config, float* scores, int from, int to, int width) {
  const Vec scale = all(config.attention_scale), cap = all(config.attention_softcap);
  for (int i = 0; i < from; i++) scores[i] = -INFINITY;
  for (int i = to; i < width; i++) scores[i] = -INFINITY;
  Vec largest = all(-INFINITY);
  for (int i = 0; i < width; i += LANES) {
    Vec value = load(scores + i) * scale;
    if (config.attention_softcap > 0.0f) {
      const Vec capped = hyperbolic_tangent(value / cap) * cap;
      value = value == all(-INFINITY) ? value : capped;
    }
    store(scores + i, value);
    largest = larger(value, largest);
  }
  const Vec top = all(largest_of(largest));
  Vec sum{};
  T* weights = reinterpret_cast<T*>(scores);
  for (int i = 0; i < width; i += LANES) {
    const Vec weight = exponential(load(scores + i) - top);
    sum += weight;
    store(weights + i, weight);
  }
  return sum_of(sum);
}

// out[r][two vectors of dimensions from `at` on] = weights times the values.
template <class T, int ROWS>
static void weigh_values(const Stage& stage, const LayerBlocks& blocks, int kv_head,
                         const int32_t* table, int first, int end, const float* weights, int at,
                         const Query<T>* queries) {
  const int dims = stage.config.head_dim, units = stage.config.block_size / per_unit<T>();
  Vec sums[ROWS][2];
  for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = Vec{};
  for (int b = first; b < end; b++) {
    const Unit* values = blocks.values(table[b], kv_head) + at;
    if (at == 0 && b + 1 < end) fetch(blocks.values(table[b + 1], kv_head), blocks.head_bytes);
    for (int u = 0; u < units; u++) {
      const Bits v0 = load_units(values + u * dims), v1 = load_units(values + u * dims + LANES);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        Unit weight;
        memcpy(&weight, weights + r * stage.score_width + (b - first) * units + u, sizeof weight);
        sums[r][0] = dot<T>(sums[r][0], v0, broadcast(weight));
        sums[r][1] = dot<T>(sums[r][1], v1, broadcast(weight));
      }
    }
  }
  for (int r = 0; r < ROWS; r++) {
    // Adding 0 makes -0 a 0: the blocks that only other rows see must not show.
    store(queries[r].out + at, fma(sums[r][0], all(queries[r].factor), Vec{}));
    store(queries[r].out + at + LANES, fma(sums[r][1], all(queries[r].factor), Vec{}));
  }
}

// The last dimensions, fewer than two vectors of them, for one row.
template <class T>
static void weigh_last_values(const Stage& stage, const LayerBlocks& blocks, int kv_head,
                              const int32_t* table, int first, int end, const float* weights, int at,
                              float factor, T* out) {
  const int dims = stage.config.head_dim, units = stage.config.block_size / per_unit<T>();
  for (; at < dims; at += LANES) {
    const int count = dims - at < LANES ? dims - at : LANES;
    Vec sum{};
    for (int b = first; b < end; b++) {
      const Unit* values = blocks.values(table[b], kv_head) + at;
      for (int u = 0; u < units; u++) {
        Unit weight;
        memcpy(&weight, weights + (b - first) * units + u, sizeof weight);
        sum = dot<T>(sum, load_some_units(values + u * dims, count), broadcast(weight));
      }
    }
    T results[LANES];
    store(results, fma(sum, all(factor), Vec{}));
    memcpy(out + at, results, sizeof(T) * count);
  }
}

template <class T, int ROWS>
static void attend_rows(const Stage& stage, const LayerBlocks& blocks, const AttentionItem& item,
                        Query<T>* queries, float* scores) {
  const StageConfig& config = stage.config;
  const int32_t* table = stage.step.tables + stage.step.table_at[item.sequence];
  const int first = queries[0].from / config.block_size;
  const int end = (queries[ROWS - 1].to + config.block_size - 1) / config.block_size;
  // A token has its lane by its place in the sequence, wherever the item begins to look.
  const int begin = first * config.block_size, base = begin / LANES * LANES, shift = begin - base;
  const int width = round_up(end * config.block_size - base, LANES);
  score_rows<T, ROWS>(stage, blocks, item.kv_head, table, first, end, queries, scores + shift);
  for (int r = 0; r < ROWS; r++) {
    float* row = scores + r * stage.score_width;
    queries[r].factor = 1.0f / soften_row<T>(config, row, queries[r].from - base,
                                             queries[r].to - base, width);
  }
  const float* weights = scores + shift / per_unit<T>();
  int at = 0;
  for (; at + 2 * LANES <= config.head_dim; at += 2 * LANES)
    weigh_values<T, ROWS>(stage, blocks, item.kv_head, table, first, end, weights, at, queries);
  if (at == config.head_dim) return;
  for (int r = 0; r < ROWS; r++)
    weigh_last_values<T>(stage, blocks, item.kv_head, table, first, end,
                         weights + r * stage.score_width, at, queries[r].factor, queries[r].out);
}

template <class T, int ROWS = MAX_ROWS>
static void attend(int rows, const Stage& stage, const LayerBlocks& blocks,
                   const AttentionItem& item, Query<T>* queries, float* scores) {
  if (rows >= ROWS) {
    attend_rows<T, ROWS>(stage, blocks, item, queries, scores);
    rows -= ROWS;
    queries += ROWS;
  }
  if constexpr (ROWS > 1) {
    if (rows) attend<T, fewer(ROWS)>(rows, stage, blocks, item, queries, scores);
  }
}

template <class T>
static void attend_item(const Stage& stage, const LayerBlocks& blocks, const AttentionItem& item,
                        int window, float* scores) {
  const StageConfig& config = stage.config;
  const int width = stage.work.heads_width;
  Query<T> queries[MAX_ROWS];
  for (int r = 0; r < item.count; r++) {
    const int token = (item.first + r) / config.group, head = (item.first + r) % config.group;
    const size_t row = stage.step.first_row[item.sequence] + token;
    const int heads = (item.kv_head * config.group + head) * config.head_dim;
    queries[r].row = units_of<T>(rows_of<T>(stage.work.query, row, width) + heads);
    queries[r].out = rows_of<T>(stage.work.attended, row, width) + heads;
    queries[r].to = stage.step.start[item.sequence] + token + 1;
    const int oldest = queries[r].to - window;
    queries[r].from = window > 0 && oldest > 0 ? oldest : 0;
  }
  attend<T>(item.count, stage, blocks, item, queries, scores);
}

// Rotate pairs (i, i + head_dim / 2) of one head.
static void rotate(float* head, const float* cosines, const float* sines, int half) {
  for (int i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosines[i] - b * sines[i];
    head[i + half] = b * cosines[i] + a * sines[i];
  }
}

template <class T>
static void write_key(Unit* keys, const T* key, int slot, int size, int dims) {
  for (int u = 0; u < dims / per_unit<T>(); u++)
    memcpy(keys + u * size + slot, key + u * per_unit<T>(), sizeof(Unit));
}

template <class T>
static void write_value(Unit* values, const T* value, int slot, int dims) {
  constexpr int N = per_unit<T>();
  T* target = reinterpret_cast<T*>(values) + static_cast<size_t>(slot / N) * dims * N + slot % N;
  for (int e = 0; e < dims; e++) target[e * N] = value[e];
}

// Norm and rotate queries and keys of a token, and put its keys and values into its block.
template <class T>
static void place_token(const Stage& stage, const Layer& layer, const LayerBlocks& blocks, int row) {
  const StageConfig& c = stage.config;
  const int dims = c.head_dim, block = stage.step.slots[row] / c.block_size;
  const int slot = stage.step.slots[row] % c.block_size;
  const size_t rope = layer.rope < 0 ? 0 : layer.rope;
  const size_t angles = (rope * stage.work.capacity + row) * (dims / 2);
  float* heads = rows_of<float>(stage.work.qkv, row, stage.work.qkv_width);
  T* queries = rows_of<T>(stage.work.query, row, stage.work.heads_width);
  T narrow[MAX_HEAD_DIM];
  for (int kv_head = 0; kv_head < c.kv_heads; kv_head++) {
    for (int n = 0; n < c.group + 2; n++) {
      float* head = heads + (kv_head * (c.group + 2) + n) * dims;
      const float* const* norm = layer.vectors + (n < c.group ? QUERY_NORM : KEY_NORM);
      if (n <= c.group && norm[0]) normalize<float>(c, head, norm, dims, head);
      if (n <= c.group && layer.rope >= 0)
        rotate(head, stage.work.cosines + angles, stage.work.sines + angles, dims / 2);
      copy_row(n < c.group ? queries + (kv_head * c.group + n) * dims : narrow, head, dims);
      if (n == c.group) write_key(blocks.keys(block, kv_head), narrow, slot, c.block_size, dims);
      if (n == c.group + 1) write_value(blocks.values(block, kv_head), narrow, slot, dims);
    }
  }
}
