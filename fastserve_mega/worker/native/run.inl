// A whole step of a stage on one of its threads; included once per instruction set.

// Rows that a thread takes through a layer by itself in a long step.
constexpr int ROWS_APART = 3 * MAX_ROWS;

// Sum what is added over the ranks that share the layers, in their order: a row's sum does not
// depend on its step. Afterwards each thread has its share of the rows.
static void sum_over_ranks(Stage& stage, int thread, int rows) {
  const Workspace& work = stage.work;
  const size_t all = static_cast<size_t>(rows) * work.hidden_width;
  wait_for_team(stage);
  if (thread == 0) gather_rows(stage, rows);
  wait_for_team(stage);
  int from, to;
  share(stage, thread, rows, from, to);
  for (size_t i = static_cast<size_t>(from) * work.hidden_width;
       i < static_cast<size_t>(to) * work.hidden_width; i += LANES) {
    Vec sum = load(work.gathered + i);
    for (int rank = 1; rank < stage.config.ranks; rank++) sum += load(work.gathered + rank * all + i);
    store(work.added + i, sum);
  }
}

// A token's row of the embedding table, zeros where another rank has it. Where the table is the
// output matrix, it is only there packed.
template <class T>
static void embed_row(const Stage& stage, int token, float* out) {
  const StageConfig& c = stage.config;
  const int size = c.hidden, row = token - c.first_token;
  if (c.ranks > 1 && (row < 0 || row >= c.vocabulary)) {
    memset(out, 0, sizeof(float) * size);
  } else if (stage.embedding) {
    const T* table = static_cast<const T*>(stage.embedding) + static_cast<size_t>(row) * size;
    for (int k = 0; k < size; k++) out[k] = to_float(table[k]);
  } else {
    const Matrix& matrix = stage.layers[c.layers].matrices[OUTPUT];
    if (matrix.byte_groups) return unpack_bytes(matrix, row, out);
    const Unit* at = matrix.units_at(row / PANEL) + row % PANEL;
    for (int u = 0; u < matrix.units; u++) {
      T values[per_unit<T>()];
      memcpy(values, at + static_cast<size_t>(u) * PANEL, sizeof(Unit));
      for (int i = 0; i < per_unit<T>(); i++) out[u * per_unit<T>() + i] = to_float(values[i]);
    }
  }
}

// The residual of a thread's share of the tokens, from the tables.
template <class T>
static void embed_rows(Stage& stage, int thread, int from, int to) {
  const StageConfig& c = stage.config;
  const int width = stage.work.hidden_width;
  float* found = c.ranks > 1 ? stage.work.added : stage.work.hidden;
  for (int row = from; row < to; row++)
    embed_row<T>(stage, stage.step.token_ids[row], rows_of<float>(found, row, width));
  if (c.ranks > 1) sum_over_ranks(stage, thread, stage.step.tokens);
  for (int row = from; row < to; row++) {
    float* hidden = rows_of<float>(stage.work.hidden, row, width);
    if (c.ranks > 1) memcpy(hidden, rows_of<float>(found, row, width), sizeof(float) * c.hidden);
    if (stage.position_table) {
      const T* table = static_cast<const T*>(stage.position_table) +
                       static_cast<size_t>(stage.step.positions[row]) * c.hidden;
      for (int k = 0; k < c.hidden; k++) hidden[k] += to_float(table[k]);
    }
    if (c.embedding_scale != 1.0f)
      for (int k = 0; k < c.hidden; k++) hidden[k] *= c.embedding_scale;
  }
}

template <class T>
static void enter(Stage& stage, int thread) {
  const StageConfig& c = stage.config;
  const int half = c.head_dim / 2;
  int from, to;
  share(stage, thread, stage.step.tokens, from, to);
  if (c.first) embed_rows<T>(stage, thread, from, to);
  for (int row = from; row < to; row++) {
    if (!c.first)
      memcpy(rows_of<float>(stage.work.hidden, row, stage.work.hidden_width),
             stage.step.hidden_in + static_cast<size_t>(row) * c.hidden, sizeof(float) * c.hidden);
    for (int n = 0; n < c.ropes; n++) {
      const Rope& rope = stage.ropes[n];
      const size_t at = (static_cast<size_t>(n) * stage.work.capacity + row) * half;
      for (int i = 0; i < half; i++) {
        const float angle = static_cast<float>(stage.step.positions[row]) * rope.frequencies[i];
        stage.work.cosines[at + i] = cosf(angle) * rope.factor;
        stage.work.sines[at + i] = sinf(angle) * rope.factor;
      }
    }
  }
  wait_for_team(stage);
}

// Norm rows of the residual, or those in `chosen`. Returns where they are: in a small step each
// thread has its own, so that none has to wait.
template <class T>
static const T* norm_rows(Stage& stage, int thread, const float* const* norm, const Rows& rows,
                          const int32_t* chosen) {
  const int width = stage.work.hidden_width;
  const bool own = rows.shared && rows.count <= OWN_ROWS;
  void* target = own ? stage.own_rows[thread] : stage.work.normed;
  int from = 0, to = rows.count;
  if (rows.shared && !own) share(stage, thread, rows.count, from, to);
  for (int i = rows.first + from; i < rows.first + to; i++) {
    const float* hidden = stage.work.hidden + static_cast<size_t>(chosen ? chosen[i] : i) * width;
    normalize<T>(stage.config, hidden, norm, stage.config.hidden, rows_of<T>(target, i, width));
  }
  if (!own) wait_for_others(stage, rows);
  return rows_of<T>(target, rows.first, width);
}

static void add_rows(float* rows, int width, int panel, int first, int count, const float* added) {
  for (int r = 0; r < count; r++) {
    float* row = rows + static_cast<size_t>(first + r) * width + panel * PANEL;
    for (int c = 0; c < PANEL; c += LANES) store(row + c, load(row + c) + load(added + r * PANEL + c));
  }
}

static void put_rows(float* rows, int width, int panel, int first, int count, const float* values) {
  for (int r = 0; r < count; r++)
    memcpy(rows + static_cast<size_t>(first + r) * width + panel * PANEL, values + r * PANEL,
           sizeof(float) * PANEL);
}

// Add x times a matrix to the residual: at once, or after the sum over the ranks and the norm of
// what is added, where there are such.
template <class T>
static void add_product(Stage& stage, int thread, const Layer& layer, MatrixName name,
                        VectorName post_norm, void* x, int x_width, const Rows& rows) {
  const Workspace& work = stage.work;
  const float* const* norm = layer.vectors + post_norm;
  const float* bias = layer.vectors[BIASES + name];
  const bool divided = stage.config.ranks > 1, at_once = !divided && !norm[0];
  float* target = at_once ? work.hidden : work.added;
  multiply_matrix<T>(stage, thread, layer.matrices[name], divided ? nullptr : bias,
                     rows_of<T>(x, rows.first, x_width), x_width, rows,
                     [&](int panel, int first, int count, const float* out) {
                       (at_once ? add_rows : put_rows)(target, work.hidden_width, panel, first,
                                                       count, out);
                     });
  if (divided)
    sum_over_ranks(stage, thread, rows.count);
  else
    wait_for_others(stage, rows);
  if (at_once) return;
  int from = 0, to = rows.count;
  if (rows.shared) share(stage, thread, rows.count, from, to);
  for (int row = rows.first + from; row < rows.first + to; row++) {
    float* added = rows_of<float>(work.added, row, work.hidden_width);
    float* hidden = rows_of<float>(work.hidden, row, work.hidden_width);
    for (int k = 0; divided && bias && k < stage.config.hidden; k++) added[k] += bias[k];
    if (norm[0]) normalize<float>(stage.config, added, norm, stage.config.hidden, added);
    for (int k = 0; k < stage.config.hidden; k++) hidden[k] += added[k];
  }
  wait_for_others(stage, rows);
}

// Queries, keys and values of a layer, the latter in their blocks.
template <class T>
static void before_attention(Stage& stage, int thread, int number, const Rows& rows) {
  const Layer& layer = stage.layers[number];
  const Workspace& work = stage.work;
  const LayerBlocks blocks = blocks_of_layer<T>(stage, number);
  const T* normed = norm_rows<T>(stage, thread, layer.vectors + INPUT_NORM, rows, nullptr);
  multiply_matrix<T>(stage, thread, layer.matrices[QKV], layer.vectors[BIASES + QKV], normed,
                     work.hidden_width, rows,
                     [&](int panel, int first, int count, const float* out) {
                       put_rows(work.qkv, work.qkv_width, panel, first, count, out);
                     });
  wait_for_others(stage, rows);
  Part part{0, rows.count, true};
  while (!rows.shared || take_part(stage, rows.count, 1, part)) {
    for (int row = rows.first + part.from; row < rows.first + part.to; row++)
      place_token<T>(stage, layer, blocks, row);
    if (!rows.shared) return;
  }
}

template <class T>
static void run_attention(Stage& stage, int thread, int number) {
  const LayerBlocks blocks = blocks_of_layer<T>(stage, number);
  wait_for_team(stage);
  const int window = stage.layers[number].window;
  Part part;
  while (take_part(stage, stage.item_count, 1, part)) {
    const AttentionItem* item = stage.items + part.from;
    const Reading next = reading_of(stage, blocks, item[!part.is_last], window, nullptr);
    const Reading reading = reading_of(stage, blocks, *item, window, part.is_last ? nullptr : &next);
    attend_item<T>(stage, *item, reading, window, reinterpret_cast<float*>(stage.scores[thread]));
  }
  wait_for_team(stage);
}

// The rest of a layer.
template <class T>
static void after_attention(Stage& stage, int thread, int number, const Rows& rows) {
  const Layer& layer = stage.layers[number];
  const Workspace& work = stage.work;
  add_product<T>(stage, thread, layer, PROJECTION, POST_ATTENTION_NORM, work.attended,
                 work.heads_width, rows);
  const T* normed = norm_rows<T>(stage, thread, layer.vectors + FEED_FORWARD_NORM, rows, nullptr);
  alignas(64) float gates[MAX_ROWS * PANEL];
  multiply_matrix<T>(stage, thread, layer.matrices[FC1], layer.vectors[BIASES + FC1], normed,
                     work.hidden_width, rows,
                     [&](int panel, int first, int count, const float* out) {
                       activate_rows<T>(stage, panel, first, count, out, gates);
                     });
  wait_for_others(stage, rows);
  add_product<T>(stage, thread, layer, FC2, POST_FEED_FORWARD_NORM, work.activated, work.ffn_width,
                 rows);
}

// All layers with the threads at the same rows: each reads its part of the weights once.
template <class T>
static void run_together(Stage& stage, int thread) {
  const Rows rows{0, stage.step.tokens, true};
  for (int layer = 0; layer < stage.config.layers; layer++) {
    // All threads meet within the next line, and again before the next layer asks.
    if (thread == 0 && stage.verdict == UNKNOWN) stage.verdict = stage.step.ask();
    before_attention<T>(stage, thread, layer, rows);
    if (stage.verdict == ABANDON) return;
    run_attention<T>(stage, thread, layer);
    after_attention<T>(stage, thread, layer, rows);
  }
}

// All layers with each thread at rows of its own: they meet only before and after attention, which
// matters when they do not all have a core. The weights are read once for some rows.
template <class T>
static void run_apart(Stage& stage, int thread) {
  const int layers = stage.config.layers, tokens = stage.step.tokens;
  for (int layer = -1; layer < layers; layer++) {
    if (layer >= 0) run_attention<T>(stage, thread, layer);
    Part part;
    while (take_part(stage, tokens, ROWS_APART, part)) {
      const Rows rows{part.from, part.to - part.from, false};
      if (layer >= 0) after_attention<T>(stage, thread, layer, rows);
      if (layer + 1 < layers) before_attention<T>(stage, thread, layer + 1, rows);
    }
  }
  wait_for_team(stage);
}

template <class T>
static void leave(Stage& stage, int thread) {
  const StageConfig& c = stage.config;
  const StepInput& step = stage.step;
  const Layer& end = stage.layers[c.layers];
  if (!c.last) {
    int from, to;
    share(stage, thread, step.tokens, from, to);
    for (int row = from; row < to; row++)
      memcpy(step.hidden_out + static_cast<size_t>(row) * c.hidden,
             stage.work.hidden + static_cast<size_t>(row) * stage.work.hidden_width,
             sizeof(float) * c.hidden);
    return;
  }
  if (!step.samples) return;
  if (step.normed) {
    int from, to;
    share(stage, thread, step.samples, from, to);
    for (int row = from; row < to; row++)
      normalize<float>(c, rows_of<float>(stage.work.hidden, step.sample_rows[row], stage.work.hidden_width),
                       end.vectors + FINAL_NORM, c.hidden, step.normed + static_cast<size_t>(row) * c.hidden);
  }
  const Rows rows{0, step.samples, true};
  const T* normed = norm_rows<T>(stage, thread, end.vectors + FINAL_NORM, rows, step.sample_rows);
  multiply_matrix<T>(stage, thread, end.matrices[OUTPUT], nullptr, normed, stage.work.hidden_width,
                     rows,
                     [&](int panel, int first, int count, const float* out) {
                       const int left = c.vocabulary - panel * PANEL;
                       const int columns = left < PANEL ? left : PANEL;
                       for (int r = 0; r < count; r++)
                         memcpy(step.logits + static_cast<size_t>(first + r) * c.vocabulary +
                                    panel * PANEL,
                                out + r * PANEL, sizeof(float) * columns);
                     });
}

template <class T>
static void run_stage(Stage& stage, int thread) {
  enter<T>(stage, thread);
  const int threads = stage.config.threads;
  const bool apart = threads > 1 && stage.config.ranks == 1 && !stage.step.ask &&
                     stage.step.tokens >= 2 * ROWS_APART * threads;
  (apart ? run_apart<T> : run_together<T>)(stage, thread);
  if (stage.verdict != ABANDON) leave<T>(stage, thread);
}
