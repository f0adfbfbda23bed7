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

// The blocks that an item sees, and what this thread reads after them; null if nothing.
struct Reading {
  const LayerBlocks& blocks;
  const int32_t* table;
  int first, end, kv_head;
  const Reading* next;

  // The keys of all blocks are read one after the other, then their values, then the next item's
  // keys. Fetch what stands `position` blocks behind the first keys: the processor cannot guess it,
  // since a head's part of a block is short.
  void fetch(int position) const {
    const int count = end - first;
    const Unit* from = nullptr;
    if (position < count)
      from = blocks.keys(table[first + position], kv_head);
    else if (position < 2 * count)
      from = blocks.values(table[first + position - count], kv_head);
    else if (next && position - 2 * count < next->end - next->first)
      return next->fetch(position - 2 * count);
    const char* at = reinterpret_cast<const char*>(from);
    for (size_t line = 0; from && line < blocks.head_bytes; line += 64)
      __builtin_prefetch(at + line, 0, 2);
  }

  // So many blocks are on their way at a time.
  int ahead() const {
    const int count = static_cast<int>(BYTES_AHEAD / blocks.head_bytes);
    return count < 2 ? 2 : count;
  }

 private:
  static constexpr size_t BYTES_AHEAD = 16384;
};

// Scores of the blocks of an item, unscaled: scores[r][tokens from its first block on].
template <class T, int ROWS>
static void score_rows(const Stage& stage, const Reading& reading, const Query<T>* queries,
                       float* scores) {
  // Few rows are too few sums at a time to keep the processor busy.
  constexpr int AT_ONCE = ROWS > 6 ? 1 : 2;
  const int size = stage.config.block_size, units = stage.config.head_dim / per_unit<T>();
  const int in_block = (size + LANES - 1) / LANES, ahead = reading.ahead();
  const int total = (reading.end - reading.first) * in_block;
  for (int vector = 0; vector < total; vector += AT_ONCE) {
    const Unit* keys[AT_ONCE];
    int tokens[AT_ONCE];
    for (int i = 0; i < AT_ONCE; i++) {
      const int at = vector + i < total ? vector + i : vector;
      const int block = at / in_block, token = at % in_block * LANES;
      keys[i] = reading.blocks.keys(reading.table[reading.first + block], reading.kv_head) + token;
      tokens[i] = block * size + token;
      if (token == 0) reading.fetch(block + ahead);
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

// out[r][some vectors of dimensions from `at` on] = weights times the values.
template <class T, int ROWS, int VECTORS>
static void weigh_values(const Stage& stage, const Reading& reading, const float* weights, int at,
                         const Query<T>* queries) {
  const int dims = stage.config.head_dim, units = stage.config.block_size / per_unit<T>();
  const int count = reading.end - reading.first, ahead = reading.ahead();
  Vec sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) sums[r][v] = Vec{};
  for (int b = 0; b < count; b++) {
    const Unit* values =
        reading.blocks.values(reading.table[reading.first + b], reading.kv_head) + at;
    if (at == 0) reading.fetch(count + b + ahead);
    for (int u = 0; u < units; u++) {
      Bits value[VECTORS];
      for (int v = 0; v < VECTORS; v++) value[v] = load_units(values + u * dims + v * LANES);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        Unit weight;
        memcpy(&weight, weights + r * stage.score_width + b * units + u, sizeof weight);
        for (int v = 0; v < VECTORS; v++)
          sums[r][v] = dot<T>(sums[r][v], value[v], broadcast(weight));
      }
    }
  }
  // Adding 0 makes -0 a 0: the blocks that only other rows see must not show.
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++)
      store(queries[r].out + at + v * LANES, fma(sums[r][v], all(queries[r].factor), Vec{}));
}

// The last dimensions, fewer than two vectors of them, for one row.
template <class T>
static void weigh_last_values(const Stage& stage, const Reading& reading, const float* weights,
                              int at, float factor, T* out) {
  const int dims = stage.config.head_dim, units = stage.config.block_size / per_unit<T>();
  for (; at < dims; at += LANES) {
    const int count = dims - at < LANES ? dims - at : LANES;
    Vec sum{};
    for (int b = reading.first; b < reading.end; b++) {
      const Unit* values = reading.blocks.values(reading.table[b], reading.kv_head) + at;
      for (int u = 0; u < units; u++) {
        Unit weight;
        memcpy(&weight, weights + (b - reading.first) * units + u, sizeof weight);
        sum = dot<T>(sum, load_some_units(values + u * dims, count), broadcast(weight));
      }
    }
    T results[LANES];
    store(results, fma(sum, all(factor), Vec{}));
    memcpy(out + at, results, sizeof(T) * count);
  }
}

template <class T, int ROWS>
static void attend_rows(const Stage& stage, Reading reading, Query<T>* queries, float* scores) {
  const StageConfig& config = stage.config;
  reading.first = queries[0].from / config.block_size;
  reading.end = (queries[ROWS - 1].to + config.block_size - 1) / config.block_size;
  // A token has its lane by its place in the sequence, wherever the item begins to look.
  const int begin = reading.first * config.block_size, base = begin / LANES * LANES;
  const int shift = begin - base, width = round_up(reading.end * config.block_size - base, LANES);
  score_rows<T, ROWS>(stage, reading, queries, scores + shift);
  for (int r = 0; r < ROWS; r++) {
    float* row = scores + r * stage.score_width;
    queries[r].factor = 1.0f / soften_row<T>(config, row, queries[r].from - base,
                                             queries[r].to - base, width);
  }
  const float* weights = scores + shift / per_unit<T>();
  constexpr int MANY = ROWS * 4 > 24 ? 2 : 4;
  int at = 0;
  for (; at + MANY * LANES <= config.head_dim; at += MANY * LANES)
    weigh_values<T, ROWS, MANY>(stage, reading, weights, at, queries);
  for (; at + 2 * LANES <= config.head_dim; at += 2 * LANES)
    weigh_values<T, ROWS, 2>(stage, reading, weights, at, queries);
  if (at == config.head_dim) return;
  for (int r = 0; r < ROWS; r++)
    weigh_last_values<T>(stage, reading, weights + r * stage.score_width, at, queries[r].factor,
                         queries[r].out);
}

// Kernels are compiled for 1, 2, 3, 4, 6, 8 and 12 rows at a time; this is the next smaller one.
constexpr int fewer(int rows) { return rows > 8 ? 8 : rows > 6 ? 6 : rows > 4 ? 4 : rows - 1; }

template <class T, int ROWS = MAX_ROWS>
static void attend(int rows, const Stage& stage, const Reading& reading, Query<T>* queries,
                   float* scores) {
  if (rows >= ROWS) {
    attend_rows<T, ROWS>(stage, reading, queries, scores);
    rows -= ROWS;
    queries += ROWS;
  }
  if constexpr (ROWS > 1) {
    if (rows) attend<T, fewer(ROWS)>(rows, stage, reading, queries, scores);
  }
}

// The oldest token that the token before `to` sees.
static int oldest_seen(int to, int window) { return window > 0 && to > window ? to - window : 0; }

static Reading reading_of(const Stage& stage, const LayerBlocks& blocks, const AttentionItem& item,
                          int window, const Reading* next) {
  const StepInput& step = stage.step;
  const int size = stage.config.block_size, last = item.first + item.count - 1;
  const int from = step.start[item.sequence] + item.first / stage.config.group + 1;
  const int to = step.start[item.sequence] + last / stage.config.group + 1;
  return Reading{blocks, step.tables + step.table_at[item.sequence], oldest_seen(from, window) / size,
                 (to + size - 1) / size, item.kv_head, next};
}

template <class T>
static void attend_item(const Stage& stage, const AttentionItem& item, const Reading& reading,
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
    queries[r].from = oldest_seen(queries[r].to, window);
  }
  attend<T>(item.count, stage, reading, queries, scores);
}
